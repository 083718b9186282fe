"""Samplers, one function each: ancestral (DDPM, 2006.11239) and DDIM (2010.02502); and noise by image index."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ...kernels.errors import InputError, unknown
from ..random import Stream, generator
from .guidance import Net, guided
from .objective import Objective
from .path import Denoised, Path

Noise = Callable[[int], Tensor]
OnStep = Callable[[int, int], object]


def index_noise(seed: int, indices: Sequence[int], shape: Sequence[int], draws: int) -> Iterator[Tensor]:
    """`draws` batches of standard normal noise, [len(indices), *shape] float32 on the CPU, one at a time.

    The first batch is the start of sampling, the others are the noise of its steps. Each image has its own generator,
    seeded by `seed` and its index, so the composition of a batch changes nothing. Memory: one batch.
    """
    generators = [generator(seed, Stream.SAMPLE, index) for index in indices]
    for _ in range(draws):
        yield torch.from_numpy(np.stack([g.standard_normal(tuple(shape), dtype=np.float32) for g in generators]))


class Denoiser:
    """A network on a path: `denoiser(x, i)` is its estimate for the images x [B, C, H, W] at step i.

    `clip` clamps every estimated image to [-1, 1], as ADM does for pixels. Latents have no such bounds.
    """

    def __init__(self, net: Net, y: Tensor, path: Path, clip: bool = False) -> None:
        self.net, self.y, self.path, self.clip = net, y, path, clip

    def __call__(self, x: Tensor, i: int) -> Denoised:
        t = torch.full((len(x),), self.path.times[i], dtype=torch.float32, device=x.device)
        estimate = self.path.denoised(self.net(x, t, self.y).float(), x, i)
        return self.path.clipped(estimate, x, i) if self.clip else estimate


def ancestral(denoiser: Denoiser, x: Tensor, noise: Noise | None, on_step: OnStep) -> Tensor:
    """Every step draws from the posterior, and the last one takes its mean. Raises InputError without noise."""
    if noise is None:
        raise InputError("ancestral sampling needs noise for its steps")
    path, steps = denoiser.path, len(denoiser.path.times)
    for i in range(steps):
        x, log_variance = path.posterior(denoiser(x, i), x, i)
        if i + 1 < steps:
            x = x + torch.exp(0.5 * log_variance) * noise(i).to(x)
        on_step(i + 1, steps)
    return x


def ddim(denoiser: Denoiser, x: Tensor, noise: Noise | None, on_step: OnStep) -> Tensor:
    """Every step keeps the noise that the network predicts and draws none."""
    path, steps = denoiser.path, len(denoiser.path.times)
    for i in range(steps):
        x = path.join(denoiser(x, i), i)
        on_step(i + 1, steps)
    return x


SAMPLERS: dict[str, Callable[[Denoiser, Tensor, Noise | None, OnStep], Tensor]] = {"ancestral": ancestral, "ddim": ddim}
METHODS = tuple(SAMPLERS)


@torch.no_grad()
def sample(
    net: Net,
    x_T: Tensor,
    y: Tensor,
    *,
    objective: Objective,
    method: str,
    steps: int,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    null_class: int | None = None,
    clip: bool = False,
    noise: Noise | None = None,
    progress: OnStep | None = None,
) -> Tensor:
    """Images x_0 [B, C, H, W] float32 from noise x_T [B, C, H, W] and labels y [B].

    Sampling takes `steps` steps on the path of `objective` (DDPM: 2 to 1000 of its timesteps, evenly spaced; the
    network gets the original timesteps). `guided` explains `guidance`, `guidance_channels` and `null_class`, `Denoiser`
    explains `clip`. `noise(i)` gives the noise [B, C, H, W] of step i = 0, 1, … in order (ancestral only; the last step
    has none). `progress(done, steps)` is called after each step. The caller chooses device, autocast and eval mode.
    Raises InputError, before the network runs, for an unknown method, steps out of range, guidance without a null
    class, or more guidance channels than the image has.
    """
    if method not in SAMPLERS:
        raise unknown("sample.method", method, SAMPLERS)
    image_channels = x_T.shape[1]
    net = guided(net, guidance, image_channels=image_channels, channels=guidance_channels, null_class=null_class)
    denoiser = Denoiser(net, y, objective.path(steps), clip)
    return SAMPLERS[method](denoiser, x_T.float(), noise, progress or (lambda done, steps: None))
