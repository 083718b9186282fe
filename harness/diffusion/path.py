"""The path from noise to an image: the part of an objective that samplers use."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Denoised(NamedTuple):
    """The estimate from a network's output at one step, each [B, C, H, W] float32.

    `x0` is the image, `noise` the noise in x_t, and `log_variance` the log-variance of the step, None if the network
    does not predict it.
    """

    x0: Tensor
    noise: Tensor
    log_variance: Tensor | None = None


class Path(ABC):
    """The steps of a sampler from noise to image. Step i = 0, 1, … starts at `times[i]`, in the unit of the network's
    t, and ends at `times[i + 1]`. The last step ends at the image.

    An objective defines `times`, `levels` and `denoised`, and `posterior` where it has one.
    """

    times: Sequence[float]
    has_posterior = False  # whether the result of a step has a distribution, from which `ancestral` draws
    straight = False  # whether the levels are linear in t, so that a step of Euler's method in t is `join`

    @abstractmethod
    def levels(self, i: int) -> tuple[float, float]:
        """(signal, noise) at `times[i]`: x is signal · x_0 + noise · noise there. After the last step: (1, 0)."""

    @abstractmethod
    def denoised(self, out: Tensor, x: Tensor, i: int) -> Denoised:
        """The estimate from the output for x [B, C, H, W] float32 at step i."""

    def clipped(self, estimate: Denoised, x: Tensor, i: int) -> Denoised:
        """The estimate with its image clamped to [-1, 1], and the noise that remains in x for that image."""
        signal, noise = self.levels(i)
        x0 = estimate.x0.clamp(-1, 1)
        return estimate._replace(x0=x0, noise=(x - signal * x0) / noise)

    def join(self, estimate: Denoised, i: int) -> Tensor:
        """The image with the same noise at the end of step i (DDIM, eq. 12 without random noise).

        That is a step of Euler's method along dx = x_0 d(signal) + noise d(noise).
        """
        signal, noise = self.levels(i + 1)
        return signal * estimate.x0 + noise * estimate.noise

    def posterior(self, estimate: Denoised, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the result of step i, given x and the estimate, where `has_posterior`."""
        raise NotImplementedError
