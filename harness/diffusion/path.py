"""The way from noise to an image: what a sampler asks of an objective."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Denoised(NamedTuple):
    """What a network's output says at one step, each [B, C, H, W] float32.

    `x0` is the image, `noise` the noise in x_t, `log_variance` that of the step, None where the output says nothing
    of it.
    """

    x0: Tensor
    noise: Tensor
    log_variance: Tensor | None = None


class Path(ABC):
    """The steps of a sampler from noise to image. Step i = 0, 1, … starts at `times[i]`, in the unit of the network's
    t, and ends at `times[i + 1]`, the last one at the image.

    An objective says `times`, `levels` and `denoised`; `posterior` where it has one.
    """

    times: Sequence[float]
    has_posterior = False  # whether there is a distribution of the end of a step to draw from

    @abstractmethod
    def levels(self, i: int) -> tuple[float, float]:
        """(signal, noise) at `times[i]`: x is signal · x_0 + noise · noise there. After the last step: (1, 0)."""

    @abstractmethod
    def denoised(self, out: Tensor, x: Tensor, i: int) -> Denoised:
        """What the output for x [B, C, H, W] float32 says at step i."""

    def clipped(self, said: Denoised, x: Tensor, i: int) -> Denoised:
        """The same with the image clamped to [-1, 1], and the noise that then is left in x."""
        signal, noise = self.levels(i)
        x0 = said.x0.clamp(-1, 1)
        return said._replace(x0=x0, noise=(x - signal * x0) / noise)

    def join(self, said: Denoised, i: int) -> Tensor:
        """The image with that very noise at the end of step i (DDIM, eq. 12 without noise of its own)."""
        signal, noise = self.levels(i + 1)
        return signal * said.x0 + noise * said.noise

    def posterior(self, said: Denoised, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the end of step i, given x and the image, where `has_posterior`."""
        raise NotImplementedError
