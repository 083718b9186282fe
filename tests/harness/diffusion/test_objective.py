"""The protocol of an objective: the registered one, and two short ones whose samples have closed forms."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from lamabench.baselines.dit import DiTConfig
from lamabench.harness import config
from lamabench.harness.diffusion import samplers
from lamabench.harness.diffusion.gaussian import DDPM, Chain, ChainPath
from lamabench.harness.diffusion.objective import OBJECTIVES, objective
from lamabench.harness.diffusion.path import Denoised, Path
from lamabench.harness.diffusion.samplers import SAMPLERS, Denoiser, Noise, OnStep, Sampler, index_noise, sample
from lamabench.harness.sections import ObjectiveConfig
from lamabench.kernels.errors import InputError
from torch import Tensor

CENTRE = 0.3  # the grey of every image of the data below


def test_every_name_is_an_objective():
    assert list(OBJECTIVES) == ["ddpm"] and isinstance(objective(ObjectiveConfig()), DDPM)
    with pytest.raises(InputError, match=r"unknown objective\.kind 'flwo'; choices: ddpm"):
        objective(ObjectiveConfig("flwo"))
    with pytest.raises(InputError, match=r"unknown objective\.schedule 'sine' .*choices: linear, cosine"):
        objective(ObjectiveConfig(schedule="sine"))
    for method in SAMPLERS:
        config.SampleConfig(method=method)


def test_ddpm_draws_timesteps_uniformly():
    rng, ddpm = np.random.default_rng(0), DDPM()
    drawn = [ddpm.draw_t(rng) for _ in range(20_000)]
    assert all(isinstance(t, float) and t.is_integer() for t in drawn)
    assert min(drawn) == 0 and max(drawn) == 999 and abs(np.mean(drawn) - 499.5) < 4 * 289 / math.sqrt(20_000)
    assert ddpm.draw_t(np.random.default_rng(7)) == float(np.random.default_rng(7).integers(1000))


def test_ddpm_has_times_in_the_middle_of_equal_parts():
    assert DDPM().times(8) == [62, 187, 312, 437, 562, 687, 812, 937] and DDPM().times(1) == [500]


def test_metrics_are_those_of_the_loss():
    ddpm, x = DDPM(), torch.randn(2, 1, 4, 4)
    assert tuple(ddpm.loss(torch.zeros(2, 2, 4, 4), x, x, torch.tensor([0.0, 999.0]), x)) == ddpm.metrics
    assert ddpm.metrics[0] == "loss" and ddpm.out_channels(4) == 8


class VPrediction(DDPM):
    """v = alpha · noise - sigma · x_0 (2202.00512), with the variance of the posterior."""

    metrics = ("loss",)
    error = "loss"

    def out_channels(self, in_channels: int) -> int:
        return in_channels

    def path(self, steps: int, timesteps: str = "even") -> ChainPath:
        class VPath(ChainPath):
            def denoised(self, out: Tensor, x: Tensor, i: int) -> Denoised:
                signal, noise = self._at("signal", i, x), self._at("noise", i, x)
                return Denoised(signal * x - noise * out, noise * x + signal * out, self._at("log_variance_low", i, x))

        return VPath(Chain.respaced(steps))


class Straight(Path):
    """The path of flow matching: x_t = (1 - t) x_0 + t · noise. The output is its velocity, noise - x_0 (SiT)."""

    def __init__(self, steps: int) -> None:
        self.times = [1 - i / steps for i in range(steps)]

    def levels(self, i: int) -> tuple[float, float]:
        t = self.times[i] if i < len(self.times) else 0.0
        return 1 - t, t

    def denoised(self, out: Tensor, x: Tensor, i: int) -> Denoised:
        t = self.times[i]
        return Denoised(x - t * out, x + (1 - t) * out)


class Flow:
    metrics = ("loss",)
    error = "loss"
    span = 1.0

    def out_channels(self, in_channels: int) -> int:
        return in_channels

    def draw_t(self, rng: np.random.Generator) -> float:
        return float(rng.random())

    def times(self, count: int) -> list[float]:
        return [(i + 0.5) / count for i in range(count)]

    def corrupt(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        t = t.view(-1, 1, 1, 1)
        return (1 - t) * x0 + t * noise

    def loss(self, out: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        return {"loss": (out - (noise - x0)).square().mean(dim=(1, 2, 3))}

    def path(self, steps: int, timesteps: str = "even") -> Straight:
        return Straight(steps)


def test_flow_matching_fits_and_ddim_is_euler():
    """The exact network for N(0, 1) images: its velocity is (2t - 1) x / (t² + (1 - t)²)."""

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        t = t.view(-1, 1, 1, 1)
        return (2 * t - 1) / (t**2 + (1 - t) ** 2) * x

    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    actual = sample(velocity, x, torch.zeros(2, dtype=torch.int64), objective=Flow(), method="ddim", steps=7)
    exact, times = x.double(), np.linspace(1, 0, 8)
    for t, after in pairwise(times):
        exact = exact + (after - t) * velocity(exact, torch.tensor([t, t]), torch.zeros(2))
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-6)
    flow, t = Flow(), torch.tensor([0.25, 0.75])
    noise = torch.randn_like(x)
    assert not flow.loss(noise - x, x, flow.corrupt(x, t, noise), t, noise)["loss"].any()


@pytest.mark.parametrize("method", SAMPLERS)
def test_v_prediction_fits(method):
    """The exact network for images of one grey: every sampler ends at that grey."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))

    def v(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert t.dtype == torch.float32
        signal = torch.tensor(alpha_bar[t.long()]).sqrt().view(-1, 1, 1, 1)
        noise = (1 - signal**2).sqrt()
        return (signal * (x - signal * CENTRE) / noise - noise * CENTRE).float()

    x, y = torch.randn(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
    images = sample(v, x, y, objective=VPrediction(), method=method, steps=20, noise=lambda i: torch.randn_like(x))
    torch.testing.assert_close(images, torch.full_like(x, CENTRE), rtol=0, atol=1e-4)


def heun(denoiser: Denoiser, x: Tensor, noise: Noise, on_step: OnStep) -> Tensor:
    """The trapezoidal rule along any path: dx = x_0 d(signal) + noise d(noise) (cf. 2206.00364, algorithm 1)."""
    path, steps = denoiser.path, len(denoiser.path.times)
    for i in range(steps):
        (signal, level), (signal_after, level_after) = path.levels(i), path.levels(i + 1)
        before, estimate = x, denoiser(x, i)
        x = path.join(estimate, i)
        if i + 1 < steps:
            ends = estimate, denoiser(x, i + 1)
            x0, e = (sum(values) / 2 for values in zip(*(end[:2] for end in ends), strict=True))
            x = before + (signal_after - signal) * x0 + (level_after - level) * e
        on_step(i + 1, steps)
    return x


def linear(signal: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of x in x_0 and in the noise, by the exact network of images N(0, 1/4) each pixel."""
    variance = signal**2 / 4 + level**2
    return signal / 4 / variance, level / variance


def chain_net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    alpha_bar = torch.tensor(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[t.long()].view(-1, 1, 1, 1)
    return torch.cat([linear(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())[1] * x, 0 * x], dim=1).float()


def flow_net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    t = t.view(-1, 1, 1, 1)
    image, noise = linear(1 - t, t)
    return (noise - image) * x


@pytest.mark.parametrize(("goal", "net"), [(DDPM(), chain_net), (Flow(), flow_net)])
def test_a_second_order_sampler_is_a_function_and_a_line(monkeypatch, goal, net):
    """Heun's error on a linear model falls with the square of the step, DDIM's with the step."""
    monkeypatch.setitem(SAMPLERS, "heun", Sampler(heun))
    assert config.SampleConfig(method="heun", steps=8).method == "heun"
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    ends = {
        (method, steps): sample(net, x, torch.zeros(2), objective=goal, method=method, steps=steps)
        for method in ("heun", "ddim")
        for steps in (40, 80, 999)
    }
    exact = ends["heun", 999]
    errors = {key: float((end - exact).norm() / exact.norm()) for key, end in ends.items()}
    assert errors["heun", 80] < errors["heun", 40] / 2.5 and errors["heun", 40] < errors["ddim", 80] / 3
    assert errors["ddim", 80] > errors["ddim", 40] / 2.5


def test_noise_is_drawn_for_a_sampler_that_says_so(monkeypatch):
    """One that draws, without a posterior: every batch of noise that it asks for is there, and no more."""

    def noisy(denoiser: Denoiser, x: Tensor, noise: Noise, on_step: OnStep) -> Tensor:
        return x + sum(noise(i) for i in range(len(denoiser.path.times) - 1))

    monkeypatch.setitem(SAMPLERS, "noisy", Sampler(noisy, draws=True))
    parts = list(index_noise(3, [0, 1], (1, 2, 2), samplers.draws("noisy", 4)))
    assert len(parts) == 4 and samplers.draws("ddim", 4) == 1
    rest = iter(parts[1:])
    options = {"objective": Flow(), "method": "noisy", "steps": 4, "noise": lambda i: next(rest)}
    out = sample(lambda x, t, y: x, parts[0], torch.zeros(2), **options)
    torch.testing.assert_close(out, sum(parts), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match=r"sample\.method noisy needs noise"):
        sample(lambda x, t, y: x, parts[0], torch.zeros(2), objective=Flow(), method="noisy", steps=4)


def test_what_does_not_fit_is_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "flow", lambda config: Flow())
    flow, model = ObjectiveConfig("flow"), DiTConfig(16, 1, 10, depth=1, out_channels=1)
    asked = {"model": model, "data": config.DataConfig(), "objective": flow}
    config.check_fit(config.Config(**asked, sample=config.SampleConfig(method="ddim", steps=1)))
    with pytest.raises(InputError, match=r"ancestral draws from a posterior, .* choices: ddim"):
        config.check_fit(config.Config(**asked, sample=config.SampleConfig(method="ancestral")))
    model = DiTConfig(16, 1, 10, depth=1)
    with pytest.raises(InputError, match=r"sample\.steps must be 2 to 1000, not 1001"):
        config.check_fit(config.Config(model, config.DataConfig(), sample=config.SampleConfig(steps=1001)))


def test_an_image_clipped_along_the_levels_is_the_chains():
    """What a path says of clipping by default, against the chain's own tables."""
    chain, x = ChainPath(Chain.respaced(7)), torch.randn(3, 1, 2, 2)
    estimate = Denoised(3 * torch.randn_like(x), torch.randn_like(x), None)
    for i in range(7):
        ours, theirs = Path.clipped(chain, estimate, x, i), chain.clipped(estimate, x, i)
        assert torch.equal(ours.x0, theirs.x0) and ours.x0.abs().max() <= 1
        torch.testing.assert_close(ours.noise, theirs.noise, rtol=1e-4, atol=1e-5)
    assert chain.levels(7) == (1, 0)
