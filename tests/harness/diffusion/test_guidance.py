"""Guidance against closed forms of Gaussians: of the null class, of another network, and at some noise levels only."""

import math

import numpy as np
import pytest
import torch
from lamabench.harness.diffusion.gaussian import DDPM
from lamabench.harness.diffusion.guidance import applies, guided
from lamabench.harness.diffusion.objective import objective
from lamabench.harness.diffusion.samplers import ratios, sample
from lamabench.harness.sections import ObjectiveConfig
from lamabench.kernels.errors import InputError
from torch import Tensor

ALPHA_BAR = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
SIGMAS = ((1 - ALPHA_BAR) / ALPHA_BAR).sqrt()  # noise over signal
MEANS, SPREADS = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 0.8, 1.5])  # of two classes and of no class (2)
NULL = 2
STEPS = 10
TIMESTEPS = [round(i * 999 / (STEPS - 1)) for i in reversed(range(STEPS))]


def eps_of(x: Tensor, t: int, mean: float, spread: float) -> Tensor:
    """The noise that the best network predicts if every pixel is N(mean, spread²): minus the score, times the noise."""
    signal, noise = ALPHA_BAR[t].sqrt(), (1 - ALPHA_BAR[t]).sqrt()
    return noise * (x.double() - signal * mean) / (signal**2 * spread**2 + noise**2)


class Best:
    """The best network for Gaussians of some means and spreads; v is the label over 10. It counts its images."""

    def __init__(self, means: Tensor = MEANS, spreads: Tensor = SPREADS) -> None:
        self.means, self.spreads, self.batches = means, spreads, []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.batches.append(y.tolist())
        rows = [
            eps_of(one, int(time), float(self.means[label]), float(self.spreads[label]))
            for one, time, label in zip(x, t, y.tolist(), strict=True)
        ]
        eps = torch.stack(rows)
        return torch.cat([eps, (y / 10).view(-1, 1, 1, 1).expand_as(eps)], dim=1).float()


def start(count: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, 4, 4, generator=torch.Generator().manual_seed(0))


Y = torch.tensor([0, 1])


def draw(net=None, **options) -> Tensor:
    options = {"null_class": NULL, "guidance": 2.0, "method": "ddim", "steps": STEPS, **options}
    return sample(net or Best(), start(), Y, objective=DDPM(), **options)


def by_hand(scale: float, inside, others=None) -> Tensor:
    """DDIM (2010.02502, eq. 12) in float64 with the guided noise of closed form at the timesteps of `inside`. `others`
    are the means and spreads of a guide by class; None: those of no class."""
    rows = []
    for label, x in zip(Y.tolist(), start().double(), strict=True):
        other = (MEANS[NULL], SPREADS[NULL]) if others is None else (others[0][label], others[1][label])
        for place, t in enumerate(TIMESTEPS):
            eps = eps_of(x, t, float(MEANS[label]), float(SPREADS[label]))
            if t in inside:
                free = eps_of(x, t, float(other[0]), float(other[1]))
                eps = free + scale * (eps - free)
            before = ALPHA_BAR[TIMESTEPS[place + 1]] if place + 1 < STEPS else torch.tensor(1.0).double()
            x0 = (x - (1 - ALPHA_BAR[t]).sqrt() * eps) / ALPHA_BAR[t].sqrt()
            x = before.sqrt() * x0 + (1 - before).sqrt() * eps
        rows.append(x)
    return torch.stack(rows)


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual.double() - expected).abs().max() < 2e-4 * expected.abs().max())


@pytest.mark.parametrize("scale", [2.0, 0.5])
def test_the_null_class_of_gaussians(scale):
    assert close(draw(guidance=scale), by_hand(scale, TIMESTEPS))


def test_a_guide_of_gaussians_gets_the_same_labels_and_no_null_class():
    others = (torch.tensor([0.5, -1.0]), torch.tensor([1.0, 1.6]))
    net, guide = Best(), Best(*others)
    actual = draw(net, guide=guide, null_class=None)
    assert close(actual, by_hand(2.0, TIMESTEPS, others))
    assert net.batches == guide.batches == [[0, 1]] * STEPS


@pytest.mark.parametrize("low, high", [(0.5, 6.0), (0.0, 1.0), (3.0, None)])
@pytest.mark.parametrize("auto", [False, True])
def test_an_interval_of_gaussians_computes_guidance_inside_only(low, high, auto):
    inside = [t for t in TIMESTEPS if low < SIGMAS[t] <= (high or math.inf)]
    assert 0 < len(inside) < STEPS
    others = (torch.tensor([0.5, -1.0]), torch.tensor([1.0, 1.6])) if auto else None
    net, guide = Best(), Best(*others) if others else None
    actual = draw(net, guidance_interval=[low, high], guide=guide)
    assert close(actual, by_hand(2.0, inside, others))
    double = [0, 1, NULL, NULL]
    assert net.batches == [double if t in inside and not auto else [0, 1] for t in TIMESTEPS]
    assert guide is None or guide.batches == [[0, 1]] * len(inside)


def test_an_end_is_inside_above_and_outside_below():
    sigma = ratios(DDPM(), "ddim", STEPS)[4]
    net = Best()
    draw(net, guidance_interval=[0, sigma])
    assert [len(batch) for batch in net.batches] == [2] * 4 + [4] * 6
    net = Best()
    draw(net, guidance_interval=[sigma, None])
    assert [len(batch) for batch in net.batches] == [4] * 4 + [2] * 6


@pytest.mark.parametrize("method", ["ddim", "ancestral"])
@pytest.mark.parametrize("auto", [False, True])
def test_to_the_bit(method, auto):
    """Scale 1 and an empty interval are no guidance, an interval of everything is plain guidance, bit for bit."""
    noise = torch.randn(STEPS, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    guide = Best(MEANS / 2, SPREADS * 2) if auto else None
    options = {"method": method, "noise": lambda i: noise[i], "guide": guide}
    plain, net = draw(guidance=1.0, method=method, noise=lambda i: noise[i], null_class=None), Best()
    assert torch.equal(draw(net, guidance=1.0, **options), plain)
    assert torch.equal(draw(net, guidance=1.0, guidance_interval=[0.1, 5.0], **options), plain)
    assert torch.equal(draw(net, guidance_interval=[2.0, 2.0], **options), plain)
    assert torch.equal(draw(net, guidance_interval=[1e6, None], **options), plain)
    assert {len(batch) for batch in net.batches} == {2} and (guide is None or not guide.batches)
    everywhere = draw(**options)
    assert not torch.equal(everywhere, plain)
    assert torch.equal(draw(guidance_interval=[0, None], **options), everywhere)


def test_a_guide_that_is_the_network_changes_rounding_only():
    assert close(draw(guide=Best()), draw(guidance=1.0).double())


@pytest.mark.parametrize("auto", [False, True])
def test_chosen_channels(auto):
    """Three of four latent channels, as DiT guides; the fourth and the variance are those without guidance."""
    guide = Best(MEANS / 2, SPREADS * 2) if auto else None
    x, t = start(channels=4), torch.full((2,), 500.0)
    options = {"image_channels": 4, "null_class": NULL, "guide": guide}
    three = guided(Best(), 2.0, channels=3, **options)(x, t, Y, 1.0)
    four = guided(Best(), 2.0, channels=4, **options)(x, t, Y, 1.0)
    none = Best()(x, t, Y)
    assert torch.equal(three[:, :3], four[:, :3]) and torch.equal(three[:, 3:], none[:, 3:])
    assert not torch.equal(four[:, 3], none[:, 3]) and torch.equal(four[:, 4:], none[:, 4:])
    assert torch.equal(four, guided(Best(), 2.0, channels=None, **options)(x, t, Y, 1.0))


@pytest.mark.parametrize("timesteps", ["even", "ddim"])
@pytest.mark.parametrize("method", ["ddim", "ancestral"])
def test_ratios_are_those_of_the_chain(method, timesteps):
    steps = TIMESTEPS if timesteps == "even" else list(range(900, -1, -100))
    expected = [float(SIGMAS[t]) for t in steps]
    assert ratios(DDPM(), method, STEPS, timesteps) == pytest.approx(expected, rel=1e-6)


def test_ratios_and_guidance_of_a_straight_path():
    """Flow matching has noise alone at t = 1, and t over 1 - t later; Heun calls twice but in the last step."""
    flow = objective(ObjectiveConfig(kind="flow"))
    expected = [math.inf, 3.0, 3.0, 1.0, 1.0, 1 / 3, 1 / 3]
    assert ratios(flow, "heun", 4) == pytest.approx(expected)
    assert ratios(flow, "euler", 4) == pytest.approx([math.inf, 3.0, 1.0, 1 / 3])
    batches = []

    def net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        batches.append(len(y))
        return x

    options = {"objective": flow, "method": "heun", "steps": 4, "guidance": 2.0, "null_class": NULL}
    for interval, guided_calls in (([1.0, None], 3), ([0.5, 3.0], 4), ([0.0, 0.5], 2), (None, 7)):
        batches.clear()
        sample(net, start(), Y, guidance_interval=interval, **options)
        inside = [applies(2.0, interval, sigma) for sigma in expected]
        assert batches == [4 if one else 2 for one in inside] and sum(inside) == guided_calls


def test_guidance_without_anything_to_guide_away_from():
    with pytest.raises(InputError, match="no null class to guide away from"):
        draw(null_class=None)
