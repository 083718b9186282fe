"""The protocol of an objective: the registered one, and two short ones whose samples have closed forms."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from lamabench.harness import config
from lamabench.harness.config import ObjectiveConfig
from lamabench.harness.diffusion.gaussian import DDPM, Chain, ChainPath
from lamabench.harness.diffusion.objective import OBJECTIVES, objective
from lamabench.harness.diffusion.path import Denoised
from lamabench.harness.diffusion.samplers import METHODS, sample
from lamabench.kernels.errors import InputError
from torch import Tensor

CENTRE = 0.3  # the grey of every image of the data below


def test_every_name_is_an_objective():
    for kind in OBJECTIVES:
        assert isinstance(objective(ObjectiveConfig(kind)), OBJECTIVES[kind])
    assert isinstance(objective(ObjectiveConfig()), DDPM)
    with pytest.raises(InputError, match=r"unknown objective\.kind 'flwo'; choices: ddpm"):
        objective(ObjectiveConfig("flwo"))
    for method in METHODS:
        config.SampleConfig(method=method)


def test_ddpm_draws_timesteps_uniformly():
    rng, ddpm = np.random.default_rng(0), DDPM()
    drawn = [ddpm.draw_t(rng) for _ in range(20_000)]
    assert all(isinstance(t, float) and t.is_integer() for t in drawn)
    assert min(drawn) == 0 and max(drawn) == 999 and abs(np.mean(drawn) - 499.5) < 4 * 289 / math.sqrt(20_000)
    assert ddpm.draw_t(np.random.default_rng(7)) == float(np.random.default_rng(7).integers(1000))


def test_metrics_are_those_of_the_loss():
    ddpm, x = DDPM(), torch.randn(2, 1, 4, 4)
    assert tuple(ddpm.loss(torch.zeros(2, 2, 4, 4), x, x, torch.tensor([0.0, 999.0]), x)) == ddpm.metrics
    assert ddpm.metrics[0] == "loss" and ddpm.out_channels(4) == 8


class VPrediction(DDPM):
    """v = alpha · noise - sigma · x_0 (2202.00512), with the variance of the posterior."""

    metrics = ("loss",)

    def out_channels(self, in_channels: int) -> int:
        return in_channels

    def path(self, steps: int) -> ChainPath:
        class VPath(ChainPath):
            def denoised(self, out: Tensor, x: Tensor, i: int) -> Denoised:
                signal, noise = self._at("signal", i, x), self._at("noise", i, x)
                return Denoised(signal * x - noise * out, noise * x + signal * out, self._at("log_variance_low", i, x))

        return VPath(Chain.respaced(steps))


class Straight:
    """The path of flow matching: x_t = (1 - t) x_0 + t · noise. The output is its velocity, noise - x_0 (SiT)."""

    def __init__(self, steps: int) -> None:
        self.times = torch.linspace(1, 0, steps + 1).tolist()[:-1]

    def denoised(self, out: Tensor, x: Tensor, i: int) -> Denoised:
        t = self.times[i]
        return Denoised(x - t * out, x + (1 - t) * out, None)

    def join(self, estimate: Denoised, i: int) -> Tensor:
        after = self.times[i + 1] if i + 1 < len(self.times) else 0.0
        return (1 - after) * estimate.x0 + after * estimate.noise

    def clipped(self, estimate: Denoised, x: Tensor, i: int) -> Denoised:
        raise NotImplementedError

    def posterior(self, estimate: Denoised, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class Flow:
    metrics = ("loss",)

    def out_channels(self, in_channels: int) -> int:
        return in_channels

    def draw_t(self, rng: np.random.Generator) -> float:
        return float(rng.random())

    def corrupt(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        t = t.view(-1, 1, 1, 1)
        return (1 - t) * x0 + t * noise

    def loss(self, out: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        return {"loss": (out - (noise - x0)).square().mean(dim=(1, 2, 3))}

    def path(self, steps: int) -> Straight:
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


@pytest.mark.parametrize("method", METHODS)
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
