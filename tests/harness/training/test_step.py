"""The step of training against closed forms and a loop in float64, and its options after an interruption."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from lamabench.harness.sections import TrainConfig
from lamabench.harness.training.step import TrainStep
from torch import Tensor, nn
from trainings import FAMILIES, assert_same, longer, make, metrics, trained


class Line(nn.Module):
    """out = w · x: a gradient that is known in closed form."""

    draws = False

    def __init__(self, w: list[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x * self.w


class Squares:
    """An objective whose loss is the mean of squares of out - x0, and whose x_t is `noise`."""

    metrics = ("loss",)
    span = 1.0

    def corrupt(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return noise

    def loss(self, out: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        return {"loss": ((out - x0) ** 2).mean(dim=(1, 2, 3))}


START = [0.5, -1.0, 2.0]


def step_of(settings: TrainConfig, **more: Any) -> TrainStep:
    net: Any = Line(START)
    return TrainStep(net, Squares(), settings, call=net, device="cpu", **more)  # pyright: ignore[reportArgumentType]


def batch(seed: int, size: int = 4) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    x0, noise = (torch.tensor(rng.standard_normal((size, 1, 1, 3)), dtype=torch.float32) for _ in range(2))
    return {"x0": x0, "noise": noise, "t": torch.zeros(size), "y": torch.zeros(size, dtype=torch.int64)}


@dataclass
class Loop:
    """The same training in float64 and by hand: AdamW (1711.05101, algorithm 2), clipping, warm-up."""

    settings: TrainConfig

    def run(self, steps: int) -> list[np.ndarray]:
        one, w, m, v = self.settings, np.array(START), np.zeros(3), np.zeros(3)
        weights = [w]
        for k in range(1, steps + 1):
            x0, x = (batch(k)[name].double().numpy().reshape(-1, 3) for name in ("x0", "noise"))
            gradient = 2 * ((w * x - x0) * x).mean(axis=0) / 3
            if one.clip is not None:
                gradient = gradient * min(1, one.clip / (np.sqrt((gradient**2).sum()) + 1e-6))
            rate = one.lr * min(1, k / one.warmup) if one.warmup else one.lr
            m = one.betas[0] * m + (1 - one.betas[0]) * gradient
            v = one.betas[1] * v + (1 - one.betas[1]) * gradient**2
            change = m / (1 - one.betas[0] ** k) / (np.sqrt(v / (1 - one.betas[1] ** k)) + 1e-8)
            w = w - rate * one.weight_decay * w - rate * change
            weights.append(w)
        return weights


def average(weights: list[np.ndarray], decay: float, rampup: bool) -> np.ndarray:
    """The moving average of weights after each step, `weights[0]` those before the first, by its definition."""
    averaged = weights[0]
    for n, w in enumerate(weights[1:]):
        d = min(decay, (1 + n) / (10 + n)) if rampup else decay
        averaged = d * averaged + (1 - d) * w
    return averaged


OPTIONS: dict[str, dict[str, Any]] = {
    "as it was": {},
    "betas": {"betas": [0.5, 0.7]},
    "warm-up": {"warmup": 6},
    "clip": {"clip": 0.05},
    "weight decay": {"weight_decay": 0.5},
    "averages": {"ema_decays": [0.999, 0.5]},
    "no ramp": {"ema_rampup": False},
    "all": {"betas": [0.8, 0.95], "warmup": 3, "clip": 0.3, "weight_decay": 0.1},
}


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("averages", "no ramp")])
def test_weights_are_those_of_a_loop_in_float64(name):
    settings = TrainConfig(lr=0.01, precision="float32", **OPTIONS[name])
    step, expected = step_of(settings), Loop(settings).run(9)
    for k in range(1, 10):
        step(batch(k))
        actual = next(iter(step.net.parameters())).detach().double().numpy()
        assert np.abs(actual - expected[k]).max() < 2e-6, k
    if name != "as it was":  # the option has an effect that is far above the tolerance
        assert np.abs(expected[9] - Loop(TrainConfig(lr=0.01)).run(9)[9]).max() > 1e-4


@pytest.mark.parametrize("rampup", [False, True])
def test_averages_are_those_of_a_loop_in_float64(rampup):
    """With the ramp, 0.5 is reached after 8 steps, and 0.9999 in none of these."""
    settings = TrainConfig(lr=0.01, precision="float32", ema_decay=0.9999, ema_decays=[0.5, 0.0], ema_rampup=rampup)
    step, weights = step_of(settings), Loop(settings).run(30)
    for k in range(1, 31):
        step(batch(k))
    assert list(step.ema.nets) == ["ema", "ema@0.0", "ema@0.5"]
    for (kind, net), decay in zip(step.ema.nets.items(), (0.9999, 0.0, 0.5), strict=True):
        actual = next(iter(net.parameters())).double().numpy()
        assert np.abs(actual - average(weights, decay, rampup)).max() < 3e-6, kind
    assert torch.equal(*(next(iter(net.parameters())) for net in (step.net, step.ema.nets["ema@0.0"])))
    share = average([np.ones(1)] + [np.zeros(1)] * 30, 0.9999, rampup).item()  # of the initial weights
    assert (share < 1e-6) if rampup else (share > 0.99)


def test_the_rate_rises_linearly():
    step = step_of(TrainConfig(lr=0.8, warmup=4, precision="float32"))
    rates = []
    for k in range(6):
        step(batch(k))
        rates.append(step.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8], rel=1e-12)


@pytest.mark.parametrize(("clip", "scale"), [(1.0, 0.2), (5.0, 1.0), (50.0, 1.0)])
def test_a_gradient_is_clipped_to_a_norm(clip, scale):
    """The gradient (3, 0, -4) has the norm 5."""
    step = step_of(TrainConfig(clip=clip, lr=1e-6, precision="float32"))
    x = torch.ones(1, 1, 1, 3)
    target = torch.tensor(START) - 1.5 * torch.tensor([3.0, 0.0, -4.0])  # 2/3 (w - target) is the gradient
    step({"x0": target.view(1, 1, 1, 3), "noise": x, "t": torch.zeros(1), "y": torch.zeros(1, dtype=torch.int64)})
    assert float(step.window[-2]) == pytest.approx(5, rel=1e-6)  # before clipping
    gradient = step.trained[0].grad
    assert gradient is not None
    assert gradient.tolist() == pytest.approx([3 * scale, 0, -4 * scale], rel=1e-5)


def test_parts_of_a_batch_have_the_gradients_of_the_whole():
    whole, parts = (step_of(TrainConfig(precision="float32")) for _ in range(2))
    parts.micro_batch = 2
    for step in (whole, parts):
        step(batch(0, size=6))
    assert torch.allclose(whole.trained[0], parts.trained[0], atol=1e-7)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "as it was"])
def test_a_training_with_an_option_continues_bit_for_bit(name, tmp_path):
    config = make(steps=7, **OPTIONS[name])
    broken = trained(tmp_path / "broken", longer(config, 3))
    assert_same(trained(tmp_path / "whole", config), trained(broken, config))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_with_dropout_continues_bit_for_bit(family, tmp_path):
    """Whatever was drawn before, in the training or by others in the process."""
    config = make(replace(FAMILIES[family], dropout=0.2), steps=7)
    whole = trained(tmp_path / "whole", config)
    broken = trained(tmp_path / "broken", longer(config, 3))
    torch.rand(3)
    assert_same(whole, trained(broken, config))
    plain = trained(tmp_path / "plain", make(FAMILIES[family], steps=7))
    other = trained(tmp_path / "seed", replace(config, seed=1))
    assert len({str(metrics(folder)) for folder in (whole, plain, other)}) == 3


def test_dropout_differs_between_steps_and_between_processes():
    def drawn(seed: int, rank: int, updates: int) -> float:
        step = step_of(TrainConfig(precision="float32"), seed=seed, rank=rank)
        step.net.draws, step.updates = True, updates  # pyright: ignore[reportAttributeAccessIssue]
        step(batch(0))
        return float(torch.rand(()))

    cases = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**64 - 1, 0, 99_999_999)]
    assert len({drawn(*case) for case in cases}) == 5 and drawn(0, 1, 0) == drawn(0, 1, 0)


def test_a_step_without_dropout_seeds_nothing():
    torch.manual_seed(4)
    before = torch.get_rng_state()
    step_of(TrainConfig(precision="float32"))(batch(0))
    assert torch.equal(before, torch.get_rng_state())
