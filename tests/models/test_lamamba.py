"""LaMamba-Diff against the golden files and its published sizes, and the effect of each ablation."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lamabench.kernels import OPERATORS
from lamabench.kernels.errors import InputError
from lamabench.models.lamamba import Conditioning, LaMamba, LaMambaConfig, from_reference, reference_name
from lamabench.models.layers import sincos_positions
from lamabench.models.mixers import SS2D, WindowAttention
from lamabench.models.registry import presets, select_backends
from omegaconf import OmegaConf
from safetensors import safe_open
from torch import nn

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = LaMambaConfig(
    input_size=8, in_channels=2, num_classes=3, dim=8, depths=[1, 1, 1], bottleneck_depth=1, num_heads=2,
    window_size=2, d_state=2,
)  # fmt: skip


def golden(name):
    with safe_open(GOLDEN / f"lamamba_tiny_{name}.safetensors", "pt") as file:
        meta, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    config = LaMambaConfig(
        input_size=int(meta["resolution"]),
        in_channels=4,
        num_classes=int(meta["num_classes"]),
        dim=int(meta["dim"]),
        depths=json.loads(meta["depths"]),
        bottleneck_depth=int(meta["bottleneck_depth"]),
        num_heads=int(meta["num_heads"]),
        window_size=int(meta["window_size"]),
        d_state=int(meta["d_state"]),
        scan=meta["scan"],
    )
    state = {key.removeprefix("model."): v for key, v in tensors.items() if key.startswith("model.")}
    return config, state, tensors, int(meta["params"])


@pytest.mark.parametrize("name", ["continuous", "cross"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_golden_output_and_every_gradient(name, backend):
    config, state, tensors, params = golden(name)
    net = from_reference(state, config).eval()
    assert sum(p.numel() for p in net.parameters()) == params
    select_backends(net, dict.fromkeys(OPERATORS, backend), "cpu")
    out = net(tensors["input.x"], tensors["input.t"], tensors["input.y"])
    expected = tensors["output"]
    assert (out - expected).square().mean().sqrt() <= 3e-6 * expected.square().mean().sqrt()
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    norms = {reference_name(key): p.grad.norm() for key, p in net.named_parameters()}
    assert {f"gradnorm.{key}" for key in norms} == {key for key in tensors if key.startswith("gradnorm.")}
    for key, norm in norms.items():
        assert abs(norm - tensors[f"gradnorm.{key}"]) <= 1e-5 * tensors[f"gradnorm.{key}"], key


def test_errors_for_a_foreign_state_dict():
    config, state, *_ = golden("cross")
    state.pop("final_linear.bias")
    state["extra"] = torch.zeros(1)
    with pytest.raises(InputError, match=r"missing.*final_linear\.bias.*extra"):
        from_reference(state, config)
    with pytest.raises(InputError, match="mixers"):
        from_reference(state, replace(config, mixers=["window"]))


def inputs(config, batch=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, generator=generator)
    return x, torch.tensor([3, 900][:batch]), torch.arange(batch) % max(config.num_classes, 1)


def perturbed(config):
    """A network without zeros, so that every branch reaches the output."""
    torch.manual_seed(0)
    net = LaMamba(config)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else parameter.data.add_(0.1)
    return net


ABLATIONS = {
    "ssm only": {"mixers": ["ssm"]},
    "window only": {"mixers": ["window"]},
    "order swapped": {"mixers": ["window", "ssm"]},
    "global": {"mixers": ["ssm", "global"]},
    "conv": {"mixers": ["conv"]},
    "large conv": {"mixers": [{"kind": "conv", "kernel": 13}]},
    "ssd": {"mixers": [{"kind": "ssd", "d_state": 5, "head_dim": 3}]},
    "no mixer": {"mixers": []},
    "none is no mixer": {"mixers": ["none", "window"]},
    "parallel": {"parallel": True},
    "no shift": {"shift": False, "depths": [2, 2, 2]},
    "no relative bias": {"relative_bias": False},
    "cross": {"scan": "cross"},
    "bidirectional": {"scan": "bidirectional"},
    "unidirectional": {"scan": "unidirectional"},
    "bidirectional with four sets": {"scan": "bidirectional_4"},
    "unidirectional with four sets": {"scan": "unidirectional_4"},
    "d_state 5": {"d_state": 5},
    "concat": {"skip": "concat"},
    "no skip": {"skip": "none"},
    "isotropic": {"layout": "isotropic"},
    "two stages": {"depths": [2, 1]},
    "one stage": {"depths": [2]},
    "patch 2": {"patch_size": 2},
    "no bottleneck": {"bottleneck_depth": 0},
    "conv bias": {"conv_bias": True},
    "unconditional": {"num_classes": 0},
    "one window": {"window_size": 16},
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_runs_and_uses_every_parameter(name):
    config = replace(TINY, **ABLATIONS[name])
    net = perturbed(config)
    x, t, y = inputs(config)
    out = net(x, t, y)
    assert out.shape == (2, 2 * config.in_channels, config.input_size, config.input_size)
    out.square().sum().backward()
    dead = [key for key, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead


@pytest.mark.parametrize("name", [n for n in ABLATIONS if n not in ("one window", "no shift", "none is no mixer")])
def test_every_ablation_changes_the_parameters_or_the_output(name):
    config = replace(TINY, **ABLATIONS[name])
    plain, other = perturbed(TINY), perturbed(config)
    if [p.shape for p in plain.parameters()] == [p.shape for p in other.parameters()]:
        assert not torch.allclose(plain(*inputs(TINY)), other(*inputs(config)))


def test_a_bottleneck_without_blocks_doubles():
    """x + M(x) with no block in M is 2 x: what one block gives whose gates are zero, as at initialisation."""
    one = perturbed(TINY)
    for layer in one.middle.modules():
        if isinstance(layer, Conditioning):
            layer.zero_init()
    none = LaMamba(replace(TINY, bottleneck_depth=0))
    none.load_state_dict({key: value for key, value in one.state_dict().items() if not key.startswith("middle.")})
    torch.testing.assert_close(none(*inputs(TINY)), one(*inputs(TINY)))


def test_shift_happens_in_odd_blocks_only():
    net = LaMamba(replace(TINY, depths=[3, 1, 1]))
    stage = [block.mixers[1].shift for block in net.encoder[0].blocks]
    assert stage == [0, 1, 0]
    assert not any(m.shift for m in LaMamba(replace(TINY, depths=[3, 1, 1], shift=False)).modules()
                   if isinstance(m, WindowAttention))  # fmt: skip


def test_parallel_mixers_read_the_same_input():
    """The second mixer's norm gets the input of the block, not the output of the first mixer."""
    torch.manual_seed(0)
    block = perturbed(replace(TINY, parallel=True, mixers=["conv", "window"])).encoder[0].blocks[0]
    sources = []
    block.norms[1].register_forward_hook(lambda module, args, out: sources.append(args[0].clone()))
    x, c = torch.randn(1, 8, 8, 8), torch.randn(1, 16)
    block(x, c)
    assert torch.equal(sources[0], x)


def test_zero_initialised_head_starts_at_zero():
    x, t, y = inputs(TINY)
    assert LaMamba(TINY)(x, t, y).abs().sum() > 0
    assert LaMamba(replace(TINY, zero_init_head=True))(x, t, y).abs().sum() == 0


def test_initialisation():
    """SPEC.md: Xavier linears, zero adaLN, S4D-real A, dt bias as inverse softplus of log-uniform [1e-3, 1e-1]."""
    torch.manual_seed(0)
    net = LaMamba(LaMambaConfig(input_size=8, dim=64, depths=[1, 1], num_heads=4, num_classes=7))
    mixer = net.encoder[0].blocks[0].mixers[0]
    assert isinstance(mixer, SS2D)
    assert torch.allclose(mixer.A_logs, torch.arange(1.0, 17).log().expand(4 * 128, -1))
    step = nn.functional.softplus(mixer.dt_projs_bias).log10()
    assert -3.01 < step.min() < -2.95 and -1.05 < step.max() < -0.99 and abs(step.mean() + 2) < 0.06
    for weight, bound in (
        (mixer.x_proj_weight, 128**-0.5),
        (mixer.dt_projs_weight, 4**-0.5),
        (mixer.conv2d.weight, 1 / 3),
        (mixer.in_proj.weight, (6 / (64 + 256)) ** 0.5),
        (net.encoder[0].blocks[0].mlp.fc1.weight, (6 / (64 + 256)) ** 0.5),
        (net.patch_embed.proj.weight, (6 / (64 + 4)) ** 0.5),
        (net.final_linear.weight, (6 / (64 + 8)) ** 0.5),
    ):
        assert 0.97 * bound < weight.abs().max() <= bound
        assert abs(weight.std() / bound - 3**-0.5) < 0.05  # uniform
    assert net.encoder[0].blocks[0].adaLN_modulation[1].weight.abs().max() == 0
    assert net.final_adaLN_modulation[1].weight.abs().max() == 0
    assert abs(net.y_embedder.embedding_table.weight.std() - 0.02) < 2e-3
    assert abs(net.t_embedder.mlp[0].weight.std() - 0.02) < 2e-3
    assert len(net.y_embedder.embedding_table.weight) == 8
    assert torch.equal(net.pos_embed[0], sincos_positions(64, 8))


def test_sincos_positions_by_hand():
    table = sincos_positions(8, 3)  # two frequencies: 1 and 1/100
    column = torch.tensor([1.0, 0.01]) * 2
    row = torch.tensor([1.0, 0.01]) * 1
    assert torch.allclose(table[1, 2], torch.cat([column.sin(), column.cos(), row.sin(), row.cos()]))


def test_config_is_a_structured_config():
    node = OmegaConf.structured(LaMambaConfig)
    assert OmegaConf.to_object(node) == LaMambaConfig()


def test_presets_have_the_published_head_widths():
    for name in ("lamamba_s", "lamamba_b", "lamamba_l"):
        config = presets()[name].config
        assert config.dim // config.num_heads == 16


BAD = [
    ({"window_size": 3}, r"window_size 3 does not divide the 8 × 8 grid.*choices: \[1, 2, 4, 8\]"),
    ({"num_heads": 3}, r"num_heads 3 does not divide dim 8; choices: \[1, 2, 4, 8\]"),
    ({"d_state": 0}, "d_state must be 1 or more"),
    ({"mixers": ["ssm", "mamba"]}, "unknown mixer 'mamba'; choices: window, global, conv, ssm, ssd, none"),
    ({"scan": "snake"}, "unknown scan 'snake'; choices: continuous, cross"),
    ({"skip": "ad"}, "unknown skip 'ad'.*choices: add, concat, none"),
    ({"layout": "vit"}, "unknown layout 'vit'; choices: unet, isotropic"),
    ({"input_size": 7}, "input_size 7 is not a multiple of"),
    ({"dim": 6, "num_heads": 2}, "dim must be a multiple of 4"),
    ({"depths": []}, "depths must be a list"),
    ({"depths": [1, 0]}, "depths must be a list"),
    ({"num_classes": -1}, "num_classes"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_errors_are_one_line(change, message):
    with pytest.raises(InputError, match=message) as caught:
        replace(TINY, **change)
    assert "\n" not in str(caught.value)
