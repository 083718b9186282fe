"""Flow matching on the straight path of SiT (2401.08740) and rectified flow (2209.03003) (SPEC.md, section 4)."""

import math

import numpy as np
from torch import Tensor

from ...kernels.errors import InputError, unknown
from .path import Denoised, Path

TIMES = ("uniform", "logit_normal")  # how t is distributed in training


class Flow:
    """x_t = (1 − t) x_0 + t · noise for t in [0, 1], and the network predicts the velocity noise − x_0, C channels.

    This is the linear interpolant of SiT (2401.08740, section 2) with t as in the paper: 0 is the image, while in its
    released code 1 is. The network gets t itself, not scaled to 1000, as in that code. `distribution`, one of `TIMES`,
    is that of t in training: uniform, or the sigmoid of a standard normal number, the logit-normal(0, 1) of SD3
    (2403.03206, section 3.1). The loss is not reweighted.
    """

    metrics = ("loss",)
    error = "loss"
    span = 1.0
    sampler = "euler"

    def __init__(self, distribution: str = "uniform") -> None:
        if distribution not in TIMES:
            raise unknown("objective.times", distribution, TIMES)
        self.distribution = distribution

    def out_channels(self, in_channels: int) -> int:
        """The channels of the image."""
        return in_channels

    def draw_t(self, rng: np.random.Generator) -> float:
        """One t of the distribution."""
        if self.distribution == "uniform":
            return float(rng.random())
        return 1 / (1 + math.exp(-rng.standard_normal()))

    def times(self, count: int) -> list[float]:
        """The middles of so many equal parts of [0, 1]."""
        return [(2 * i + 1) / (2 * count) for i in range(count)]

    def corrupt(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t from x_0: x0 and noise [B, C, H, W], t [B] -> [B, C, H, W] float32."""
        t = t.float().view(-1, 1, 1, 1)
        return (1 - t) * x0.float() + t * noise.float()

    def loss(self, out: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The mean square error of the velocity of each sample, float32 [B]. All [B, C, H, W], t [B]."""
        return {"loss": ((out.float() - (noise.float() - x0.float())) ** 2).mean(dim=(1, 2, 3))}

    def path(self, steps: int, timesteps: str = "even") -> Path:
        """`steps` equal steps of t from 1 to 0. Raises InputError for timesteps other than `even`."""
        if timesteps != "even":
            raise InputError(
                f"sample.timesteps={timesteps} chooses among the 1000 timesteps of a chain, and objective.kind=flow "
                "has none; choices: even"
            )
        return StraightPath([1 - i / steps for i in range(steps)])


class StraightPath(Path):
    """Steps of falling t on the straight path, from 1 to 0."""

    straight = True

    def __init__(self, times: list[float]) -> None:
        self.times = times

    def levels(self, i: int) -> tuple[float, float]:
        """1 − t and t."""
        t = self.times[i] if i < len(self.times) else 0.0
        return 1 - t, t

    def denoised(self, out: Tensor, x: Tensor, i: int) -> Denoised:
        """The estimate from the velocity [B, C, H, W] for x [B, C, H, W] at step i."""
        t = self.times[i]
        return Denoised(x - t * out, x + (1 - t) * out)
