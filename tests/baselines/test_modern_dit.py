"""DiT's four modern options: timm's layers, closed forms, LightningDiT's numbers and names."""

import copy
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from lamabench.baselines import dit
from lamabench.baselines.dit import DiT, DiTConfig, RMSNorm, rotate, rotation
from lamabench.harness.measure.calls import calls_of
from lamabench.harness.measure.cost import cost
from lamabench.kernels.errors import InputError
from lamabench.models.registry import build, describe, preset
from lamabench.reports import published
from timm.layers.mlp import Mlp, SwiGLU
from timm.layers.norm import RmsNorm
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from timm.models.eva import EvaAttention
from torch import Tensor, nn

OPTIONS = ("qk_norm", "rope", "swiglu", "rms_norm")
ALL: dict[str, Any] = dict.fromkeys(OPTIONS, True)
# Heads of 8 channels have two frequencies for the row and two for the column.
TINY = DiTConfig(8, 4, 10, patch_size=2, hidden_size=24, depth=2, num_heads=3)
SIZES = ("s_2", "l_2")


class TimmBlock(nn.Module):
    """A block of DiT made of timm's layers, with weights of ours."""

    def __init__(self, config: DiTConfig, block: Any) -> None:
        super().__init__()
        width, side = config.hidden_size, config.input_size // config.patch_size
        norm = RmsNorm if config.rms_norm else nn.LayerNorm
        plain = {} if config.rms_norm else {"elementwise_affine": False, "eps": 1e-6}
        self.norm1, self.norm2 = norm(width, **plain), norm(width, **plain)
        self.attn = EvaAttention(
            width, config.num_heads, num_prefix_tokens=0, qk_norm=config.qk_norm, scale_norm=False, norm_layer=norm
        )
        self.attn.k_bias = nn.Parameter(torch.zeros(width))  # timm has no bias of keys: a norm or a rotation needs it
        if config.rope:
            self.rope = RotaryEmbeddingCat(config.head_width, in_pixels=False, feat_shape=[side, side])
        else:
            self.rope = None
        hidden = block.mlp.w3.in_features if config.swiglu else 4 * width
        gelu = nn.GELU(approximate="tanh")
        self.mlp = SwiGLU(width, hidden) if config.swiglu else Mlp(width, hidden, act_layer=lambda: gelu)
        self.adaLN_modulation = copy.deepcopy(block.adaLN_modulation)
        self.double().load_state_dict(from_ours(block.state_dict()), strict=False)

    def forward(self, x: Tensor, c: Tensor, *_: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        rope = None if self.rope is None else self.rope.get_embed()
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rope=rope)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


def from_ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a block, or their gradients, by timm's names."""
    named = dict(tensors)
    if "mlp.w12.weight" in named:
        for kind in ("weight", "bias"):
            named[f"mlp.fc1_g.{kind}"], named[f"mlp.fc1_x.{kind}"] = named.pop(f"mlp.w12.{kind}").chunk(2)
            named[f"mlp.fc2.{kind}"] = named.pop(f"mlp.w3.{kind}")
    for name, part in zip("qkv", named.pop("attn.qkv.bias").chunk(3), strict=True):
        named[f"attn.{name}_bias"] = part
    return named


def drawn(config: DiTConfig, seed: int = 0) -> DiT:
    """A net in float64 without zeros, so that every branch reaches the output."""
    torch.manual_seed(seed)
    net = DiT(config)
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return net.double()


def batch(config: DiTConfig) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, config.in_channels, config.input_size, config.input_size, dtype=torch.float64)
    return x, torch.tensor([3.0, 700.0]), torch.tensor([1, 10])


@pytest.mark.parametrize("options", [*({name: True} for name in OPTIONS), ALL], ids=lambda one: "+".join(one))
def test_timms_layers_give_the_same_output_and_gradients(options):
    """In float64, but for both tables of angles, which have the rounding of float32."""
    config = replace(TINY, **options)
    net = drawn(config)
    twin = copy.deepcopy(net)
    for number, block in enumerate(net.blocks):
        twin.blocks[number] = TimmBlock(config, block)
    if config.rms_norm:
        twin.final_layer.norm_final = RmsNorm(24).double()
        twin.final_layer.norm_final.load_state_dict(net.final_layer.norm_final.state_dict())
    inputs = batch(config)
    outputs = [one(*inputs) for one in (net, twin)]
    torch.testing.assert_close(*outputs, rtol=0, atol=2e-6 * float(outputs[1].detach().abs().max()))
    for out in outputs:
        (out * torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)).sum().backward()
    compared = 0
    for mine, timms in zip(net.blocks, twin.blocks, strict=True):
        own = from_ours({name: p.grad for name, p in mine.named_parameters() if p.grad is not None})
        theirs = {name: p.grad for name, p in timms.named_parameters()}
        assert own.keys() == theirs.keys()
        scale = max(float(value.norm()) for value in theirs.values() if value is not None)
        for name, value in theirs.items():
            assert value is not None and (own[name] - value).norm() <= 2e-6 * (value.norm() + 1e-3 * scale), name
            compared += 1
    assert compared >= 20
    outside = [name for name, p in net.named_parameters() if not name.startswith("blocks.") and p.requires_grad]
    for name in outside:
        mine, theirs = (one.get_parameter(name).grad for one in (net, twin))
        assert mine is not None and theirs is not None and (mine - theirs).norm() <= 2e-6 * theirs.norm(), name


def test_products_of_rotated_vectors_depend_on_the_difference_of_places():
    side, width = 5, 12
    turns = rotation(width, side).double()
    q, k = torch.randn(2, 1, 1, 1, width, dtype=torch.float64)
    queries, keys = (rotate(one.expand(1, 1, side**2, width), turns)[0, 0].view(side, side, width) for one in (q, k))
    products = torch.einsum("abc,dec->abde", queries, keys)
    for row, column in ((0, 0), (1, 0), (0, 2), (3, 1)):
        shifted = [products[a, b, a + row, b + column] for a in range(side - row) for b in range(side - column)]
        torch.testing.assert_close(torch.stack(shifted), shifted[0].expand(len(shifted)), rtol=1e-5, atol=1e-5)
    assert abs(products[0, 0, 1, 0] - products[0, 0, 0, 1]) > 1e-2  # rows and columns turn other channels
    torch.testing.assert_close(queries.norm(dim=-1), q.norm().expand(side, side), rtol=1e-6, atol=0)


def test_rms_norm_works_in_float32_at_least():
    norm, x = RMSNorm(16), torch.randn(3, 16)
    nn.init.normal_(norm.weight)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), exact, rtol=1e-6, atol=1e-6)
    half = x.bfloat16()
    assert norm(half).dtype == torch.float32 and torch.equal(norm(half), norm(half.float()))
    assert norm.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("options", [{"qk_norm": True}, {"rope": True}, ALL], ids=lambda one: "+".join(one))
def test_attention_gets_values_of_one_type(options):
    """Kernels of attention take no mixture of types. Norm and rotation are in float32 before."""
    for precision, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        calls = calls_of(build(replace(TINY, **options)), 1, precision, "cpu")
        calls = [call for call in calls if call.operator == "attention"]
        assert len(calls) == 2 and {arg.dtype for call in calls for arg in call.args} == {dtype}


def test_it_starts_as_dit_does():
    torch.manual_seed(0)
    net: Any = DiT(replace(TINY, **ALL)).double()
    assert net(*batch(TINY)).count_nonzero() == 0
    tokens = torch.randn(2, 16, 24, dtype=torch.float64)
    assert torch.equal(net.blocks[0](tokens, torch.randn(2, 24, dtype=torch.float64), net.turns), tokens)
    for name, (inputs, outputs) in {"w12": (24, 128), "w3": (64, 24)}.items():
        layer, bound = net.blocks[1].mlp.get_submodule(name), (6 / (inputs + outputs)) ** 0.5
        assert layer.weight.shape == (outputs, inputs) and 0.95 * bound < layer.weight.abs().max() <= bound
    weights = [parameter for name, parameter in net.named_parameters() if "norm" in name]
    assert len(weights) == 2 * 4 + 1 and all((weight == 1).all() for weight in weights)


def test_options_that_are_off_change_nothing():
    assert not {*OPTIONS} & describe(TINY).keys()
    assert {*OPTIONS} <= describe(replace(TINY, **ALL)).keys()
    assert {f.name: f.metadata["since"] for f in fields(DiTConfig) if f.name in OPTIONS} == dict.fromkeys(
        OPTIONS, False
    )
    assert list(DiT(TINY).state_dict()) == list(DiT(replace(TINY, rope=True)).state_dict())


@pytest.mark.parametrize("size", SIZES)
def test_cost_by_hand(size):
    """SwiGLU has the parameters of the MLP; what is new are weights of norms, and for L the rounding of 2,730 2/3."""
    plain, modern = preset(f"dit_{size}").config, preset(f"dit_modern_{size}").config
    assert describe(plain).items() <= describe(modern).items()
    before, after = cost(plain), cost(modern)
    width, depth, tokens = plain.hidden_size, plain.depth, 256
    hidden = {384: 1024, 1024: 2736}[width]
    more = 3 * width * hidden - 2 * width * 4 * width  # products of the MLP
    biases = 2 * hidden + width - 5 * width
    norms = (2 * depth + 1) * width + depth * 2 * width // plain.num_heads
    assert after.params - before.params == depth * (more + biases) + norms
    assert after.macs - before.macs == depth * tokens * more
    # Four operations an element: two norms a block and the last, and queries and keys, which are as wide together.
    assert after.flops - 2 * after.macs == 4 * tokens * width * (2 * depth + 1 + 2 * depth)
    assert before.flops - 2 * before.macs == 4 * tokens * width * (2 * depth + 1)
    assert after.params == pytest.approx(before.params, rel=2e-3)


def test_the_published_size_of_lightning_dit():
    rows = [row for row in published.read().imagenet_256 if row.model == "LightningDiT-XL/1"]
    with torch.device("meta"):
        net = build(replace(preset("lightning_dit_xl_1").config, out_channels=32))  # of a velocity
    millions = sum(parameter.numel() for parameter in net.parameters()) / 1e6
    assert len(rows) == 2 and preset("lightning_dit_xl_1").title == rows[0].model
    assert all(row.checked and row.params_m and abs(millions - row.params_m) < 0.6 for row in rows)


NAMES = """adaLN_modulation.1.bias adaLN_modulation.1.weight attn.k_norm.weight attn.proj.bias attn.proj.weight
attn.q_norm.weight attn.qkv.bias attn.qkv.weight mlp.w12.bias mlp.w12.weight mlp.w3.bias mlp.w3.weight norm1.weight
norm2.weight"""


def test_parameters_have_lightning_dits_names():
    config = replace(TINY, **ALL)
    state = drawn(config).state_dict()
    assert sorted(name[9:] for name in state if name.startswith("blocks.0.")) == NAMES.split()
    tables = {f"feat_rope.freqs_{name}": torch.zeros(16, 8) for name in ("cos", "sin")}
    loaded = dit.from_reference({**state, **tables}, config).state_dict()
    assert all(torch.equal(loaded[name], value.float()) for name, value in state.items())
    with pytest.raises(InputError, match=r"unexpected: feat_rope\.freqs_cos, feat_rope\.freqs_sin$"):
        dit.from_reference({**state, **tables}, replace(config, rope=False))


def test_heads_that_cannot_be_rotated_are_refused():
    with pytest.raises(InputError, match=r"^model.rope needs heads of a multiple of 4 channels, not 6: change model.n"):
        replace(TINY, num_heads=4, rope=True)
