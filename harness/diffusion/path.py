"""The way from noise to an image: what a sampler asks of an objective."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Denoised(NamedTuple):
    """What a network's output says at one step, each [B, C, H, W] float32.

    `x0` is the image, `noise` the noise in x_t, `log_variance` that of the step, None where the output says nothing
    of it.
    """

    x0: Tensor
    noise: Tensor
    log_variance: Tensor | None


class Path(Protocol):
    """The steps of a sampler from noise to image. Step i = 0, 1, … starts at `times[i]`, in the unit of the network's
    t, and ends at `times[i + 1]`, the last one at the image."""

    @property
    def times(self) -> Sequence[float]: ...

    def denoised(self, out: Tensor, x: Tensor, i: int) -> Denoised:
        """What the output for x [B, C, H, W] float32 says at step i."""
        ...

    def clipped(self, said: Denoised, x: Tensor, i: int) -> Denoised:
        """The same with the image clamped to [-1, 1], and the noise that then is left in x."""
        ...

    def join(self, said: Denoised, i: int) -> Tensor:
        """The image with that very noise at the end of step i."""
        ...

    def posterior(self, said: Denoised, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the end of step i, given x and the image."""
        ...
