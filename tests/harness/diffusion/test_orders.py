"""Samplers with the optimal network of a Gaussian: order of convergence, limits, and distribution."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from gaussian_target import ALPHA_BAR, GOALS, MEAN, STD, along, estimates, levels, limit, net_of
from lamabench.harness.diffusion.flow import StraightPath
from lamabench.harness.diffusion.gaussian import Chain
from lamabench.harness.diffusion.path import Denoised, Path
from lamabench.harness.diffusion.samplers import SAMPLERS, Denoiser, ratios, sample
from torch import Tensor

Y = torch.zeros(3, dtype=torch.int64)
X = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
ORDERS = {"ddim": 1, "euler": 1, "heun": 2, "dpmpp_2m": 2}
DETERMINISTIC = [(kind, method) for kind in GOALS for method in ORDERS if method != "euler" or kind == "flow"]


def run(kind: str, method: str, steps: int, net=None, **options) -> Tensor:
    return sample(net or net_of(kind), X, Y, objective=GOALS[kind], method=method, steps=steps, **options)


def error(kind: str, method: str, steps: int) -> float:
    return float((run(kind, method, steps).double() - limit(kind, X)).norm())


@pytest.mark.parametrize(("kind", "method"), DETERMINISTIC)
def test_the_order_of_convergence_on_the_paths_of_objectives(kind, method):
    """Three times as many steps divide the error by 3 to the power of the order. 37 and 111 divide 999, so that the
    steps of a chain are exactly even. The log of the signal-to-noise ratio is infinite at both ends of flow's path,
    which costs DPM-Solver++ a logarithm of the steps."""
    few, many = error(kind, method, 38), error(kind, method, 112)
    order = math.log(few / many, 111 / 37)
    if (kind, method) == ("flow", "dpmpp_2m"):
        order += math.log(math.log(111) / math.log(37), 3)
    assert order == pytest.approx(ORDERS[method], abs=0.25)
    assert many < 0.05 * float(limit(kind, X).norm())


@pytest.mark.parametrize(("kind", "method"), DETERMINISTIC)
def test_many_steps_reach_the_closed_form(kind, method):
    """Of flow the image is MEAN + STD · noise."""
    torch.testing.assert_close(
        run(kind, method, 1000).double(), limit(kind, X), rtol=0, atol={1: 5e-3, 2: 2e-4}[ORDERS[method]]
    )
    torch.testing.assert_close(limit("flow", X), MEAN + STD * X.double())


class EvenInLogSnr(Path):
    """Steps of equal length in log(signal / noise), from -4 to 3. The levels, or their squares, sum to 1."""

    def __init__(self, steps: int, straight: bool) -> None:
        snr = np.exp(np.linspace(-4, 3, steps + 1))
        total = 1 + snr if straight else np.sqrt(1 + snr**2)
        self.all = list(zip((snr / total).tolist(), (1 / total).tolist(), strict=True))
        self.times = list(range(steps))

    def levels(self, i: int) -> tuple[float, float]:
        return self.all[i]

    def denoised(self, out: Tensor, x: Tensor, i: int) -> Denoised:
        return Denoised(*estimates(x, *self.all[i]))


@pytest.mark.parametrize("straight", [False, True])
@pytest.mark.parametrize(("method", "order"), [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_the_order_of_convergence_in_log_snr(method, order, straight):
    """In float64, against the exact map between two levels of noise."""
    errors = []
    for steps in (32, 64, 128):
        path = EvenInLogSnr(steps, straight)
        end = SAMPLERS[method].run(
            Denoiser(lambda x, t, y, sigma: x, Y, path), X.double(), None, lambda done, steps: None
        )
        errors.append(float((end - along(X, path.all[0], path.all[-1])).norm()))
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert orders == pytest.approx([order, order], abs=0.12)


@pytest.mark.parametrize("method", ["ddim", "heun", "dpmpp_2m"])
def test_a_sampler_sees_the_estimate_and_not_what_the_network_predicts(method):
    """The noise and v of the same estimate give the same images; clipped ones too."""
    for clip in (False, True):
        torch.testing.assert_close(
            run("ddpm", method, 20, clip=clip), run("v", method, 20, clip=clip), rtol=0, atol=2e-4
        )


@pytest.mark.parametrize("steps", [1, 7])
def test_ddim_on_the_straight_path_is_euler(steps):
    """Against Euler's method in float64, for one step too."""
    exact, net = X.double(), net_of("flow")
    for t in np.linspace(1, 0, steps + 1)[:-1]:
        exact = exact - net(exact, torch.full((3,), t, dtype=torch.float32), Y).double() / steps
    torch.testing.assert_close(run("flow", "euler", steps).double(), exact, rtol=0, atol=2e-6)
    assert torch.equal(run("flow", "euler", steps), run("flow", "ddim", steps))


@pytest.mark.parametrize("method", ORDERS)
def test_one_step_of_any_method_is_eulers(method):
    assert torch.equal(run("flow", method, 1), run("flow", "euler", 1))


@pytest.mark.parametrize("kind", GOALS)
@pytest.mark.parametrize("method", SAMPLERS)
def test_the_network_is_called_as_often_as_plans_say(kind, method):
    if (kind, method) not in [*DETERMINISTIC, ("ddpm", "ancestral"), ("v", "ancestral")]:
        return
    seen = []

    def net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return net_of(kind)(x, t, y)

    run(kind, method, 6, net, noise=lambda i: torch.zeros_like(X))
    assert len(seen) == len(ratios(GOALS[kind], method, 6)) == (11 if method == "heun" else 6)
    times = [1 - i / 6 for i in range(6)] if kind == "flow" else [999, 799, 599, 400, 200, 0]
    assert sorted(set(seen), reverse=True) == pytest.approx(times)


def test_ancestral_sampling_of_v_has_the_variance_of_the_posterior():
    """Every step is linear in x and in its noise, so that mean and variance follow from DDPM's equation 7."""
    steps, chain = 20, Chain.respaced_timesteps(20)
    alpha_bar = ALPHA_BAR[chain]
    mean, variance = 0.0, 1.0
    for i in reversed(range(steps)):
        now, before = alpha_bar[i], alpha_bar[i - 1] if i else 1.0
        beta = 1 - now / before
        of_image, of_x = beta * before**0.5 / (1 - now), (1 - before) * (1 - beta) ** 0.5 / (1 - now)
        shrink = now**0.5 * STD**2 / (now * STD**2 + 1 - now)  # of the expected image, per unit of x
        offset = MEAN - shrink * now**0.5 * MEAN
        mean = (of_image * shrink + of_x) * mean + of_image * offset
        variance = (of_image * shrink + of_x) ** 2 * variance + (beta * (1 - before) / (1 - now) if i else 0)
    draw, count = torch.Generator().manual_seed(1), 40_000
    images = sample(
        net_of("v"),
        torch.randn(count, 1, 1, 1, generator=draw),
        torch.zeros(count, dtype=torch.int64),
        objective=GOALS["v"],
        method="ancestral",
        steps=steps,
        noise=lambda i: torch.randn(count, 1, 1, 1, generator=draw),
    )
    assert float(images.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / count))
    assert float(images.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / count))
    assert 0.5 * STD**2 < variance < STD**2  # the posterior's variance is a lower bound


def test_clipping_on_the_straight_path():
    """The velocity of the clipped image is that of x and the clipped image."""
    path, x = StraightPath([1.0, 0.5]), 3 * X
    for i, t in enumerate((1.0, 0.5)):
        estimate = path.denoised(X, x, i)
        clipped = path.clipped(estimate, x, i)
        assert torch.equal(clipped.x0, (x - t * X).clamp(-1, 1)) and clipped.x0.abs().max() == 1
        torch.testing.assert_close(clipped.noise - clipped.x0, (x - clipped.x0) / t)


def test_the_levels_of_the_paths():
    for kind, goal in GOALS.items():
        path = goal.path(20)
        assert path.levels(20) == (1, 0) and len(path.times) == 20
        for i, t in enumerate(path.times):
            signal, noise = levels(kind, torch.tensor([t]))
            assert path.levels(i) == pytest.approx((float(signal), float(noise)), abs=1e-7)
