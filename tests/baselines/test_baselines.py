"""DiT and the ADM U-Net: reference implementations, figures of their papers, and options."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lamabench.baselines import adm, dit
from lamabench.baselines.adm import ADM, ADMConfig
from lamabench.baselines.dit import DiT, DiTConfig
from lamabench.kernels.errors import InputError
from lamabench.models import registry
from lamabench.reports import published
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

GOLDEN = Path(__file__).parents[1] / "golden"
DIT_TINY = DiTConfig(8, 4, 10, patch_size=2, hidden_size=48, depth=2, num_heads=3)
ADM_TINY = ADMConfig(16, 4, 10, 32, 1, [1, 2, 2], [2, 4], num_heads=1, num_head_channels=16)
TITLES = {preset.title: preset for preset in [*dit.PRESETS, *adm.PRESETS]}


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference's state dict, and everything else in the file."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    model = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    return model, {key: value for key, value in tensors.items() if not key.startswith("model.")}


def call(net: nn.Module, rest: dict[str, Tensor]) -> Tensor:
    return net(rest["input.x"], rest["input.t"], rest["input.y"])


def error(output: Tensor, exact: Tensor) -> float:
    return ((output - exact).square().mean() / exact.square().mean()).sqrt().item()


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return registry.build(config)


def parameters(config: Any) -> int:
    return sum(parameter.numel() for parameter in on_meta(config).parameters())


@pytest.mark.parametrize(
    ("name", "module", "config", "rounding"), [("dit_tiny", dit, DIT_TINY, 0), ("adm_tiny", adm, ADM_TINY, 6)]
)
def test_golden_output_and_gradients(name, module, config, rounding):
    state, rest = golden(name)
    net = module.from_reference(state, config)
    out = call(net, rest)
    assert error(out, rest["output"]) <= 3e-6

    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    norms = {f"gradnorm.{key}": p.grad.norm().item() for key, p in net.named_parameters() if p.requires_grad}
    expected = {key: value.item() for key, value in rest.items() if key.startswith("gradnorm.")}
    assert norms.keys() == expected.keys()
    # A normalisation with one channel a group cancels the bias before it, whose gradient is then only rounding.
    floor = 1e-7 * max(expected.values())
    assert sum(value < floor for value in expected.values()) == rounding
    for key, value in expected.items():
        assert (norms[key] < floor) if value < floor else (abs(norms[key] / value - 1) <= 1e-5), key


PUBLISHED = published.read()
COUNTED = [row for row in PUBLISHED.counted_from_released_code if row.model in TITLES]
DIT = [row for row in PUBLISHED.steps_400k if row.model.startswith("DiT-")]


@pytest.mark.parametrize("row", COUNTED, ids=lambda row: f"{row.model}-{row.size}")
def test_parameters_counted_from_released_code(row):
    config = replace(TITLES[row.model].config, input_size=row.size)
    assert round(parameters(config) / 1e6, 3) == row.params_m


@pytest.mark.parametrize("row", DIT, ids=lambda row: row.model)
def test_parameters_of_the_dit_table(row):
    # Within the last printed digit, because the paper rounds B/2's 130.51 down and others up.
    assert abs(parameters(TITLES[row.model].config) / 1e6 - row.params_m) < 0.6


def test_every_row_of_the_reference_is_covered():
    assert len(COUNTED) == 8
    assert len(DIT) == 12


def test_parameters_of_the_adm_paper():
    """Its appendix prints 296, 422, 554 and 559 million for 64, 128, 256 and 512 pixels."""
    millions = [parameters(registry.preset(f"adm_{size}").config) / 1e6 for size in (64, 128, 256, 512)]
    assert millions == pytest.approx([296, 422, 554, 559], abs=1)


@pytest.mark.parametrize(("size", "millions"), [("s", 32.96), ("b", 130.5), ("l", 458.1), ("xl", 675.1)])
def test_latent_unets_have_dits_parameters(size, millions):
    config = registry.preset(f"unet_{size}").config
    assert (config.input_size, config.in_channels, config.num_classes, config.null_class) == (32, 4, 1000, True)
    assert parameters(config) / 1e6 == pytest.approx(millions, rel=0.05)


@pytest.mark.parametrize("name", ["dit_nano", "unet_nano"])
def test_nano_presets_have_the_same_size(name):
    config = registry.preset(name).config
    assert parameters(config) == pytest.approx(0.70e6, rel=0.1)
    net = registry.build(config)
    assert net.null_class == 10
    out = net(torch.randn(2, 1, 16, 16), torch.tensor([0, 999]), torch.tensor([3, 10]))
    assert out.shape == (2, 2, 16, 16)


@pytest.mark.parametrize("name", ["dit_nano", "unet_nano", "adm_64"])
def test_costs_on_the_meta_device(name):
    """An attention module declares what torch counts inside it, without the modules that it calls."""
    net = on_meta(registry.preset(name).config)
    size = net.config.input_size
    declared = {}
    for name, module in net.named_modules():
        if hasattr(module, "own_macs"):
            assert module.part == "attention"
            assert module.operators == {"attention": "auto"}
            module.operators["attention"] = "reference"
            module.register_forward_hook(
                lambda module, inputs, out, name=name: declared.update({name: module.own_macs(*inputs)})
            )
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        labels = torch.zeros(3, dtype=torch.long)
        out = net(torch.empty(3, net.config.in_channels, size, size), labels, labels)
    assert out.shape == (3, 2 * net.config.in_channels, size, size)
    counts = {name: sum(operators.values()) for name, operators in counter.get_flop_counts().items()}
    assert declared
    for name, macs in declared.items():
        whole = f"{type(net).__name__}.{name}"
        called = [f"{whole}.{child}" for child, _ in net.get_submodule(name).named_children()]
        assert 2 * macs == counts[whole] - sum(counts.get(child, 0) for child in called)


@pytest.mark.parametrize(("config", "parts"), [(DIT_TINY, {"attention", "mlp", "conditioning"}),
                                               (ADM_TINY, {"attention", "conditioning"})])  # fmt: skip
def test_parts(config, parts):
    net = on_meta(config)
    named = {name: module.part for name, module in net.named_modules() if hasattr(module, "part")}
    assert set(named.values()) == parts
    # Every Linear belongs to a part, except the one of DiT's head.
    loose = [
        name
        for name, module in net.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d)) and not any(name.startswith(part) for part in named)
    ]
    assert loose == (["final_layer.linear"] if isinstance(config, DiTConfig) else [])


@pytest.mark.parametrize("config", [DIT_TINY, ADM_TINY], ids=["dit", "adm"])
def test_autocast_stays_close(config):
    name, module = ("dit_tiny", dit) if isinstance(config, DiTConfig) else ("adm_tiny", adm)
    state, rest = golden(name)
    net = module.from_reference(state, config)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(net, rest)
    assert 1e-5 < error(out.float(), rest["output"]) < 0.03


def test_dit_starts_as_the_paper_says():
    torch.manual_seed(0)
    net: Any = DiT(DIT_TINY)
    state, rest = golden("dit_tiny")
    assert torch.equal(net.pos_embed, state["pos_embed"])
    assert not net.pos_embed.requires_grad
    assert call(net, rest).count_nonzero() == 0
    with torch.no_grad():
        tokens = torch.randn(2, 16, 48)
        assert torch.equal(net.blocks[0](tokens, torch.randn(2, 48)), tokens)
    xavier = {"blocks.0.attn.qkv": (48, 144), "blocks.1.mlp.fc2": (192, 48), "x_embedder.proj": (16, 48)}
    for name, (inputs, outputs) in xavier.items():
        layer = net.get_submodule(name)
        bound = (6 / (inputs + outputs)) ** 0.5
        assert 0.98 * bound < layer.weight.abs().max() <= bound, name
        assert layer.bias.count_nonzero() == 0, name
    for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table"):
        assert net.get_submodule(name).weight.std().item() == pytest.approx(0.02, rel=0.1), name


def test_adm_residual_paths_start_closed():
    net = ADM(ADM_TINY)
    closed = [name for name, value in net.named_parameters() if name.endswith(".weight") and value.count_nonzero() == 0]
    expected = [name for name, module in net.named_modules() if isinstance(module, adm.ResBlock)]
    expected = [f"{name}.out_layers.3.weight" for name in expected]
    expected += [f"{name}.proj_out.weight" for name, m in net.named_modules() if isinstance(m, adm.AttentionBlock)]
    assert sorted(closed) == sorted([*expected, "out.2.weight"])
    assert call(net, golden("adm_tiny")[1]).count_nonzero() == 0


def test_adm_layouts_differ_by_a_permutation_of_qkv():
    state, rest = golden("adm_tiny")
    order = torch.arange(192).view(4, 3, 16).transpose(0, 1).flatten()  # (head, qkv, channel) -> (qkv, head, channel)
    new = {name: value[order] if ".qkv." in name else value for name, value in state.items()}
    config = replace(ADM_TINY, new_attention_order=True)
    assert error(call(adm.from_reference(new, config), rest), rest["output"]) <= 3e-6
    assert error(call(adm.from_reference(state, config), rest), rest["output"]) > 1e-3


def test_adm_head_width_wins_over_head_count():
    state, rest = golden("adm_tiny")
    outputs = [
        call(adm.from_reference(state, replace(ADM_TINY, num_heads=heads, num_head_channels=width)), rest)
        for heads, width in ((2, 16), (4, -1), (2, -1))
    ]
    assert error(outputs[0], rest["output"]) <= 3e-6
    assert error(outputs[1], rest["output"]) <= 3e-6
    assert error(outputs[2], rest["output"]) > 1e-3


def test_adm_without_updown_blocks():
    net = ADM(replace(ADM_TINY, resblock_updown=False))
    names = net.state_dict()
    assert names["input_blocks.2.0.op.weight"].shape == (32, 32, 3, 3)
    assert names["input_blocks.4.0.op.weight"].shape == (64, 64, 3, 3)
    assert names["output_blocks.1.2.conv.weight"].shape == (64, 64, 3, 3)
    assert names["output_blocks.3.2.conv.weight"].shape == (64, 64, 3, 3)
    # A resampling ResBlock has more than a convolution: two norms, a second convolution, the conditioning.
    extra = sum(4 * c + (9 * c * c + c) + (128 + 1) * 2 * c for c in (32, 64, 64, 64))
    assert sum(value.numel() for value in names.values()) == parameters(ADM_TINY) - extra

    x = torch.randn(2, 32, 6, 6)
    down, up = adm.Downsample(32), adm.Upsample(32)
    torch.testing.assert_close(down(x), nn.functional.conv2d(x, down.op.weight, down.op.bias, padding=1)[..., ::2, ::2])
    nearest = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(up(x), nn.functional.conv2d(nearest, up.conv.weight, up.conv.bias, padding=1))


def test_adm_half_multiplier_scales_the_stem():
    net: Any = ADM(ADMConfig(8, 3, 5, 64, 1, [0.5, 1], [2], num_head_channels=32))
    assert net.input_blocks[0][0].weight.shape == (32, 3, 3, 3)
    assert net.time_embed[0].weight.shape == (256, 64)
    assert net.out[2].weight.shape == (6, 32, 3, 3)


def test_adm_labels():
    state, rest = golden("adm_tiny")
    assert ADM(ADM_TINY).null_class is None

    config = replace(ADM_TINY, null_class=True)
    state["label_emb.weight"] = torch.cat([state["label_emb.weight"], torch.zeros(1, 128)])
    net = adm.from_reference(state, config)
    assert net.null_class == 10
    assert error(call(net, rest), rest["output"]) <= 3e-6
    dropped = call(net, {**rest, "input.y": torch.tensor([10, 10])})
    assert error(dropped, rest["output"]) > 1e-3

    # The null row is zero here, so that it must agree with a net without a table.
    del state["label_emb.weight"]
    unconditional = adm.from_reference(state, replace(ADM_TINY, num_classes=0))
    assert unconditional.null_class is None
    assert error(call(unconditional, rest), dropped) <= 1e-6
    only_null: Any = ADM(replace(ADM_TINY, num_classes=0, null_class=True))
    assert (only_null.label_emb.num_embeddings, only_null.null_class) == (1, 0)


def test_unconditional_dit_has_only_the_null_row():
    net = DiT(replace(DIT_TINY, num_classes=0))
    assert (net.y_embedder.embedding_table.num_embeddings, net.null_class) == (1, 0)


@pytest.mark.parametrize("config_type", [DiTConfig, ADMConfig])
def test_defaults_survive_omegaconf(config_type):
    assert OmegaConf.to_object(OmegaConf.structured(config_type)) == config_type()


def test_overrides_survive_omegaconf():
    merged = OmegaConf.merge(OmegaConf.structured(registry.preset("adm_512").config), {"channel_mult": [1, 2]})
    with pytest.raises(InputError, match="attention_ds 16 is not the factor of a level; choices: 1, 2"):
        OmegaConf.to_object(merged)
    config = OmegaConf.to_object(OmegaConf.merge(merged, {"attention_ds": [2]}))
    assert isinstance(config, ADMConfig)
    assert (config.channel_mult, config.widths, config.new_attention_order) == ([1.0, 2.0], [256, 512], False)


@pytest.mark.parametrize("preset", TITLES.values(), ids=lambda preset: preset.name)
def test_presets_are_registered_and_survive_json(preset):
    copy = registry.preset(preset.name)
    assert (copy.title, copy.config) == (preset.title, preset.config)
    assert registry.from_dict(json.loads(json.dumps(registry.to_dict(copy.config)))) == preset.config


BAD = [
    (DIT_TINY, {"num_heads": 5}, "num_heads 5 does not divide model.hidden_size 48"),
    (DIT_TINY, {"patch_size": 3}, "patch_size 3 does not divide model.input_size 8"),
    (DIT_TINY, {"hidden_size": 6}, "hidden_size must be a multiple of 4 .* not 6"),
    (DIT_TINY, {"depth": 0}, "depth must be 1 or more, not 0"),
    (DIT_TINY, {"num_classes": -1}, "num_classes must be 0 .* not -1"),
    (ADM_TINY, {"num_head_channels": 24}, "num_head_channels 24 does not divide the 64 channels"),
    (ADM_TINY, {"num_heads": 3, "num_head_channels": 0}, "num_heads 3 does not divide the 64 channels"),
    (ADM_TINY, {"attention_ds": [2, 8]}, "attention_ds 8 is not the factor of a level; choices: 1, 2, 4"),
    (ADM_TINY, {"input_size": 18}, "input_size 18 is not a multiple of 4"),
    (ADM_TINY, {"channel_mult": [0.5, 1]}, "channel_mult 0.5 times model.model_channels 32 gives 16"),
    (ADM_TINY, {"channel_mult": []}, "channel_mult is empty"),
    (ADM_TINY, {"num_res_blocks": 0}, "num_res_blocks must be 1 or more, not 0"),
    (ADM_TINY, {"num_classes": -1}, "num_classes must be 0 .* not -1"),
]


@pytest.mark.parametrize(("config", "change", "message"), BAD, ids=[str(case[1]) for case in BAD])
def test_bad_sizes_are_refused(config, change, message):
    with pytest.raises(InputError, match=f"model.{message}"):
        replace(config, **change)


@pytest.mark.parametrize(
    ("name", "module", "config", "first"),
    [("dit_tiny", dit, DIT_TINY, "pos_embed"), ("adm_tiny", adm, ADM_TINY, "label_emb.weight")],
)
def test_foreign_weights_are_refused(name, module, config, first):
    state, _ = golden(name)
    missing = {key: value for key, value in state.items() if key != first}
    with pytest.raises(InputError, match=f"1 missing: {first}$"):
        module.from_reference(missing, config)
    with pytest.raises(InputError, match=r"5 unexpected: extra\.0, extra\.1, extra\.2, …$"):
        module.from_reference({**state, **{f"extra.{i}": torch.zeros(1) for i in range(5)}}, config)
    shape = list(state[first].shape)
    with pytest.raises(InputError, match=rf"1 misshaped: {first} \[7\] for \{shape}$"):
        module.from_reference({**state, first: torch.zeros(7)}, config)
