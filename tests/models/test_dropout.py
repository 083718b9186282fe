"""Dropout in every family: what it drops, where it is off, and that a training repeats it."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from lamabench.harness.measure.check import check, reference
from lamabench.harness.measure.cost import cost
from lamabench.models import registry
from lamabench.models.layers import dropout
from lamabench.models.registry import Backbone, build, describe, preset
from torch import Tensor, nn

PRESETS = {
    "lamamba": "lamamba_nano", "dit": "dit_nano", "modern": "dit_modern_nano", "adm": "unet_nano", "uvit": "uvit_nano",
}  # fmt: skip


def config(family: str, probability: float) -> Any:
    return replace(preset(PRESETS[family]).config, dropout=probability)


def net_of(family: str, probability: float) -> Backbone:
    """A net whose gates and last layers are not zero."""
    torch.manual_seed(0)
    net = build(config(family, probability))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def batch(net: Backbone, size: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    side = net.config.input_size
    x = torch.randn(size, net.config.in_channels, side, side, generator=draw)
    return x, torch.full((size,), 300.0), torch.zeros(size, dtype=torch.int64)


@pytest.mark.parametrize("family", PRESETS)
def test_it_changes_no_weight_no_cost_and_no_evaluation(family):
    plain, other = net_of(family, 0.0), net_of(family, 0.3)
    states = plain.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert cost(plain.config) == cost(other.config)
    x, t, y = batch(plain)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x, t, y), other.eval()(x, t, y))
        assert not torch.equal(plain.train()(x, t, y), other.train()(x, t, y))


@pytest.mark.parametrize("family", PRESETS)
def test_without_it_nothing_is_drawn_and_no_key_changes(family):
    net = net_of(family, 0.0).train()
    assert not any(isinstance(module, nn.Dropout) for module in net.modules())
    state = torch.get_rng_state()
    net(*batch(net))
    assert torch.equal(state, torch.get_rng_state()) and not net.draws
    assert "dropout" not in describe(net.config) and describe(config(family, 0.1))["dropout"] == 0.1
    old = {name: value for name, value in registry.to_dict(net.config).items() if name != "dropout"}
    assert registry.from_dict(old) == net.config


@pytest.mark.parametrize(
    ("family", "count"),
    [
        ("dit", 4 * 3),  # in each of four blocks after attention and after both layers of the MLP
        ("modern", 4 * 3),
        ("uvit", 5 * 3),
        ("lamamba", 10 * 4),  # in each of ten blocks after the scan, attention and both layers of the MLP
        ("adm", 2 + 2 + 4),  # the ResBlocks of the encoder, the middle and the decoder
    ],
)
def test_its_places(family, count):
    """ADM: each ResBlock, between the activation and the last convolution (guided-diffusion, `ResBlock.out_layers`)."""
    net = net_of(family, 0.25).train()
    calls = []
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            assert module.p == 0.25
            module.register_forward_hook(lambda *args: calls.append(args))
    net(*batch(net))
    assert len(calls) == count
    for _, (before,), after in calls:
        kept = after != 0
        share = float((before[kept] != 0).sum() / (before != 0).sum())
        # Four standard deviations of a binomial share.
        assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / before.numel())
        torch.testing.assert_close(after[kept], before[kept] / 0.75)
    if family == "adm":
        for module in net.modules():
            if hasattr(module, "out_layers"):
                names = [type(layer).__name__ for layer in module.out_layers]  # type: ignore[union-attr]
                assert names == ["GroupNorm", "SiLU", "Dropout", "Conv2d"]


@pytest.mark.parametrize("family", PRESETS)
def test_checkpointed_blocks_repeat_it(family):
    gradients = []
    for checkpointing in (False, True):
        net = net_of(family, 0.2).train()
        net.checkpointing = checkpointing
        torch.manual_seed(5)
        net(*batch(net)).square().sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_probability_of_zero_is_no_layer():
    assert isinstance(dropout(0.0), nn.Identity) and isinstance(dropout(0.5), nn.Dropout)


def test_a_measurement_is_checked_without_it_and_timed_with_it():
    net = net_of("dit", 0.3).train()
    expected = reference(net, "float32", "cpu")
    assert max(check(net, net, expected, 2, "train", "float32", "cpu").values()) < 1e-4
    assert all(module.training for module in net.modules())
