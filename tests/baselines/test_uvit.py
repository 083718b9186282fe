"""U-ViT: a plain implementation around timm's transformer block, closed forms and the paper's table."""

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from lamabench.baselines import uvit
from lamabench.baselines.uvit import UViT, UViTConfig
from lamabench.harness.measure.cost import Cost, cost
from lamabench.kernels.errors import InputError
from lamabench.models import registry
from lamabench.models.registry import preset
from lamabench.reports import published
from omegaconf import OmegaConf
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn
from torch.nn import functional as F

TINY = UViTConfig(8, 3, 10, patch_size=2, hidden_size=24, depth=5, num_heads=3)
# Layers, width, heads and parameters in 1e6 (the paper's table of configurations).
PAPER = {
    "uvit_s_2": (13, 512, 8, 44), "uvit_s_2_deep": (17, 512, 8, 58), "uvit_m_2": (17, 768, 12, 131),
    "uvit_l_2": (21, 1024, 16, 287), "uvit_h_2": (29, 1152, 16, 501),
}  # fmt: skip


def drawn(config: UViTConfig, seed: int = 0) -> UViT:
    """A net in float64 without zeros, so that every parameter matters."""
    torch.manual_seed(seed)
    net = UViT(config)
    for name, parameter in net.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    return net.double()


def batch(config: UViTConfig) -> tuple[Tensor, Tensor, Tensor]:
    side = config.input_size
    x = torch.randn(2, config.in_channels, side, side, dtype=torch.float64)
    return x, torch.tensor([3.0, 0.25]), torch.tensor([1, config.num_classes])  # small times have exact angles


def plain(config: UViTConfig, state: dict[str, Tensor], x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """U-ViT from section 3 of the paper, with patches cut by `unfold` and timm's pre-norm block."""

    def block(name: str, tokens: Tensor) -> Tensor:
        layer = TimmBlock(config.hidden_size, config.num_heads, norm_layer=nn.LayerNorm, device="meta")
        own = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
        own = {key: value for key, value in own.items() if not key.startswith("skip_linear.")}
        assert own.keys() == layer.state_dict().keys()
        return torch.func.functional_call(layer, own, (tokens,))

    patch, width = config.patch_size, config.hidden_size
    patches = F.unfold(x, patch, stride=patch).transpose(1, 2)  # channels, then rows, then columns of a patch
    tokens = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    angles = t[:, None] * 10000.0 ** (-torch.arange(width // 2) / (width // 2))
    tokens = torch.cat([torch.cat([angles.cos(), angles.sin()], 1).double()[:, None], tokens], 1)
    if config.num_classes:
        tokens = torch.cat([state["label_emb.weight"][y][:, None], tokens], 1)
    tokens = tokens + state["pos_embed"]
    half, outputs = config.depth // 2, []
    for number in range(half):
        tokens = block(f"in_blocks.{number}", tokens)
        outputs.append(tokens)
    tokens = block("mid_block", tokens)
    for number in range(half):
        name = f"out_blocks.{number}"
        both = torch.cat([tokens, outputs[half - 1 - number]], -1)  # the last block's output goes to the first
        tokens = both @ state[f"{name}.skip_linear.weight"].T + state[f"{name}.skip_linear.bias"]
        tokens = block(name, tokens)
    tokens = F.layer_norm(tokens, (width,), state["norm.weight"], state["norm.bias"])[:, -patches.shape[1] :]
    pixels = tokens @ state["decoder_pred.weight"].T + state["decoder_pred.bias"]
    # Channels of a token are rows, columns and channels of its patch; `fold` wants channels first.
    out = pixels.unflatten(-1, (patch**2, -1)).transpose(-1, -2).flatten(2).transpose(1, 2)
    out = F.fold(out, config.input_size, patch, stride=patch)
    if config.final_conv:
        out = F.conv2d(F.pad(out, (1, 1, 1, 1)), state["final_layer.weight"], state["final_layer.bias"])
    return out


@pytest.mark.parametrize(
    "change",
    [{}, {"final_conv": False, "out_channels": 3}, {"num_classes": 0, "depth": 3}, {"depth": 1, "patch_size": 1}],
    ids=str,
)
def test_a_plain_implementation_gives_the_same_output_and_gradients(change):
    config = replace(TINY, **change)
    net, inputs = drawn(config), batch(config)
    state = {name: value.detach().clone().requires_grad_() for name, value in net.state_dict().items()}
    outputs = [net(*inputs), plain(config, state, *inputs)]
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6)  # features of the time are in float32
    for out in outputs:
        (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)).sum().backward()
    for name, parameter in net.named_parameters():
        expected, got = state[name].grad, parameter.grad
        assert expected is not None and got is not None and expected.norm() > 1e-9, name
        assert (got - expected).norm() <= 2e-6 * expected.norm(), name


@cache
def counted(name: str) -> tuple[UViTConfig, Cost]:
    """A preset as the paper trains it, and its cost: S without classes, and all with a head for noise alone."""
    config = replace(preset(name).config, out_channels=4, num_classes=0 if "_s_" in name else 1000)
    return config, cost(config)


@pytest.mark.parametrize("name", PAPER)
def test_presets_are_the_papers_table(name):
    depth, width, heads, millions = PAPER[name]
    config, its_cost = counted(name)
    assert (config.depth, config.hidden_size, config.num_heads, config.patch_size) == (depth, width, heads, 2)
    assert abs(its_cost.params / 1e6 - millions) < 0.6


@pytest.mark.parametrize("name", PAPER)
def test_cost_by_hand(name):
    config, its_cost = counted(name)
    classes, c, depth, half, out = config.num_classes, config.hidden_size, config.depth, config.depth // 2, 4
    tokens = 256 + (2 if classes else 1)
    block = 12 * c * c + 4 * c + 6 * c  # qkv, proj and the MLP; two norms; biases of proj and of the MLP
    head = 4 * out * (c + 1) + (9 * out * out + out) * config.final_conv
    params = depth * block + half * (2 * c + 1) * c + (16 + 1) * c + tokens * c + 2 * c + head
    params += (classes + 1) * c if classes else 0
    assert its_cost.params == params
    attention = depth * (4 * tokens * c * c + 2 * tokens * tokens * c)
    mlp = depth * 8 * tokens * c * c
    rest = half * 2 * tokens * c * c + 256 * 16 * c + tokens * 4 * out * c + 1024 * 9 * out * out * config.final_conv
    assert {part: value.macs for part, value in its_cost.parts.items() if value.macs} == {
        "attention": attention, "mlp": mlp, "rest": rest,
    }  # fmt: skip
    assert its_cost.flops - 2 * its_cost.macs == 5 * tokens * c * (2 * depth + 1)
    assert its_cost.parts["conditioning"].params == (1001 * c if classes else 0)
    assert its_cost.paper_gflops * 1e9 == pytest.approx(its_cost.macs)


def test_the_published_costs():
    """Within 0.1 % of what the paper prints for H/2; its 77 for L/2 has no digit behind the point."""
    rows = {row.model: row for row in published.read().imagenet_256}
    for name, allowed in (("uvit_h_2", 1e-3), ("uvit_l_2", 1e-2)):
        its_cost, row = counted(name)[1], rows[preset(name).title]
        assert row.macs_g is not None and its_cost.macs / 1e9 == pytest.approx(row.macs_g, rel=allowed)
        assert row.params_m is not None and abs(its_cost.params / 1e6 - row.params_m) < 0.6


def test_it_starts_as_released():
    torch.manual_seed(0)
    net: Any = UViT(replace(TINY, hidden_size=96))
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert layer.bias is None or layer.bias.count_nonzero() == 0, name
        if isinstance(layer, nn.LayerNorm):
            assert (layer.weight == 1).all() and layer.bias.count_nonzero() == 0 and layer.eps == 1e-5
    assert net.pos_embed.std().item() == pytest.approx(0.02, rel=0.1) and net.pos_embed.requires_grad
    assert net.label_emb.weight.std().item() == pytest.approx(1, rel=0.1)
    assert net(batch(TINY)[0].float(), *batch(TINY)[1:]).count_nonzero() > 0


def test_the_time_is_read_in_every_block_and_the_class_where_there_is_one():
    x, t, y = batch(TINY)
    net = drawn(TINY)
    assert net.null_class == 10 and not torch.equal(net(x, t, y), net(x, t, y.flip(0)))
    free = drawn(replace(TINY, num_classes=0))
    assert free.null_class is None and free.label_emb is None and free.pos_embed.shape == (1, 17, 24)
    assert torch.equal(free(x, t, y), free(x, t, y.flip(0))) and not torch.equal(free(x, t, y), free(x, t.flip(0), y))


NAMES = """decoder_pred.bias decoder_pred.weight final_layer.bias final_layer.weight label_emb.weight norm.bias
norm.weight patch_embed.proj.bias patch_embed.proj.weight pos_embed"""
BLOCK = """attn.proj.bias attn.proj.weight attn.qkv.weight mlp.fc1.bias mlp.fc1.weight mlp.fc2.bias mlp.fc2.weight
norm1.bias norm1.weight norm2.bias norm2.weight"""


def test_parameters_have_the_released_names():
    state = drawn(TINY).state_dict()
    blocks = [*(f"in_blocks.{i}" for i in range(2)), "mid_block", *(f"out_blocks.{i}" for i in range(2))]
    expected = NAMES.split() + [f"{block}.{name}" for block in blocks for name in BLOCK.split()]
    expected += [f"out_blocks.{i}.skip_linear.{kind}" for i in range(2) for kind in ("weight", "bias")]
    assert sorted(state) == sorted(expected)
    loaded = uvit.from_reference(state, TINY).state_dict()
    assert all(torch.equal(loaded[name], value.float()) for name, value in state.items())
    with pytest.raises(InputError, match=r"2 unexpected: final_layer\.weight, final_layer\.bias$"):
        uvit.from_reference(state, replace(TINY, final_conv=False))


def test_autocast_stays_close():
    net, (x, t, y) = drawn(TINY).float(), batch(TINY)
    exact = net(x.float(), t, y)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x.float(), t, y)
    assert 1e-5 < (out.float() - exact).norm() / exact.norm() < 0.03


def test_configurations_survive_omegaconf_and_json():
    assert OmegaConf.to_object(OmegaConf.structured(UViTConfig)) == UViTConfig()
    for one in uvit.PRESETS:
        assert registry.from_dict(json.loads(json.dumps(registry.to_dict(one.config)))) == one.config
    nano = cost(preset("uvit_nano").config).params
    assert nano == pytest.approx(cost(preset("dit_nano").config).params, rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 4}, "depth must be odd, because one block is the middle of a U-ViT, not 4"),
        ({"depth": 0}, "depth must be 1 or more, not 0"),
        ({"depth": 1001}, "depth asks for 1,001 blocks"),
        ({"num_heads": 5}, "num_heads 5 does not divide model.hidden_size 24"),
        ({"patch_size": 3}, "patch_size 3 does not divide model.input_size 8"),
        ({"num_classes": -1}, "num_classes must be 0 .* not -1"),
        ({"out_channels": 0}, "out_channels must be 1 or more, or null, not 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
    ],
)
def test_bad_sizes_are_refused(change, message):
    with pytest.raises(InputError, match=f"model.{message}"):
        replace(TINY, **change)
