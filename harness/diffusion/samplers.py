"""Samplers, one function each: ancestral (DDPM, 2006.11239), DDIM (2010.02502), Euler, Heun and DPM-Solver++ (2M,
2211.01095); and noise by image index.

A sampler is a function and a line in `SAMPLERS`. `denoiser(x, i)` is the estimate of x_0 and of the noise at step
i, and `denoiser.path` has the levels of both. It serves every objective: along a path, x is signal · x_0 + level ·
noise, and x changes by dx = x_0 d(signal) + noise d(level) (the probability flow).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...kernels.errors import InputError, unknown
from ..random import Stream, generator
from .guidance import Guided, Interval, Net, guided
from .objective import Objective
from .path import Denoised, Path

AUTO = "auto"  # the sampler of the objective
TIMESTEPS = ("even", "ddim")  # how steps are spaced
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
    """A guided network on a path: `denoiser(x, i)` is its estimate for the images x [B, C, H, W] at step i.

    `clip` clamps every estimated image to [-1, 1], as ADM does for pixels. Latents have no such bounds.
    """

    def __init__(self, net: Guided, y: Tensor, path: Path, clip: bool = False) -> None:
        self.net, self.y, self.path, self.clip = net, y, path, clip

    def __call__(self, x: Tensor, i: int) -> Denoised:
        t = torch.full((len(x),), self.path.times[i], dtype=torch.float32, device=x.device)
        signal, noise = self.path.levels(i)
        sigma = noise / signal if signal else math.inf
        estimate = self.path.denoised(self.net(x, t, self.y, sigma).float(), x, i)
        return self.path.clipped(estimate, x, i) if self.clip else estimate


@dataclass(frozen=True)
class Sampler:
    """A sampler: `run(denoiser, x, noise, on_step)` takes the first noise x [B, C, H, W] to x_0.

    It calls `on_step(done, steps)` after each step. With `draws`, it calls `noise(i)` for every step but the last, in
    order. With `posterior`, it needs a path that has one; with `straight`, a straight one.
    """

    run: Callable[[Denoiser, Tensor, Noise, OnStep], Tensor]
    draws: bool = False
    posterior: bool = False
    straight: bool = False


def ancestral(denoiser: Denoiser, x: Tensor, noise: Noise, on_step: OnStep) -> Tensor:
    """Every step draws from the posterior, and the last one takes its mean."""
    path, steps = denoiser.path, len(denoiser.path.times)
    for i in range(steps):
        x, log_variance = path.posterior(denoiser(x, i), x, i)
        if i + 1 < steps:
            x = x + torch.exp(0.5 * log_variance) * noise(i).to(x)
        on_step(i + 1, steps)
    return x


def ddim(denoiser: Denoiser, x: Tensor, noise: Noise, on_step: OnStep) -> Tensor:
    """Every step keeps the noise that the network predicts and draws none."""
    path, steps = denoiser.path, len(denoiser.path.times)
    for i in range(steps):
        x = path.join(denoiser(x, i), i)
        on_step(i + 1, steps)
    return x


def heun(denoiser: Denoiser, x: Tensor, noise: Noise, on_step: OnStep) -> Tensor:
    """The trapezoidal rule: every step takes the mean of the estimates at its two ends (2206.00364, algorithm 1, in the
    levels of the path). The last step is Euler's, because x has no noise to estimate at its end."""
    path, steps = denoiser.path, len(denoiser.path.times)
    for i in range(steps):
        start = denoiser(x, i)
        end = path.join(start, i)
        if i + 1 < steps:
            after = denoiser(end, i + 1)
            (signal, level), (next_signal, next_level) = path.levels(i), path.levels(i + 1)
            end = x + (next_signal - signal) * (start.x0 + after.x0) / 2
            end = end + (next_level - level) * (start.noise + after.noise) / 2
        x = end
        on_step(i + 1, steps)
    return x


def dpmpp_2m(denoiser: Denoiser, x: Tensor, noise: Noise, on_step: OnStep) -> Tensor:
    """DPM-Solver++ (2M) (2211.01095, algorithm 2): DDIM with an image that is extrapolated from this step's estimate
    and that of the step before, linearly in half the log of the signal-to-noise ratio, to the middle of the step.

    The first and the last step are DDIM's. In the second step of a path that starts without signal, the distance to the
    step before is infinite, so that nothing is extrapolated.
    """
    path, steps = denoiser.path, len(denoiser.path.times)
    before: Tensor | None = None
    for i in range(steps):
        estimate = denoiser(x, i)
        x0 = estimate.x0
        if before is not None and i + 1 < steps:
            signal, level = path.levels(i)
            ratio = (_half_log_snr(path, i + 1) - _half_log_snr(path, i)) / (
                _half_log_snr(path, i) - _half_log_snr(path, i - 1)
            )
            middle = x0 + ratio / 2 * (x0 - before)
            estimate = estimate._replace(x0=middle, noise=(x - signal * middle) / level)
        x, before = path.join(estimate, i), x0
        on_step(i + 1, steps)
    return x


def _half_log_snr(path: Path, i: int) -> float:
    signal, level = path.levels(i)
    return math.log(signal / level) if signal else -math.inf


# `ddim` is Euler's method in the levels of any path. Only where these are linear in t is it the `euler` of papers.
SAMPLERS = {
    "ancestral": Sampler(ancestral, draws=True, posterior=True),
    "ddim": Sampler(ddim),
    "euler": Sampler(ddim, straight=True),
    "heun": Sampler(heun),
    "dpmpp_2m": Sampler(dpmpp_2m),
}


def _never(i: int) -> Tensor:
    raise AssertionError(f"a sampler whose `draws` is False asked for the noise of step {i}")


def draws(method: str, steps: int) -> int:
    """How many batches of noise sampling needs: the first, and one for every step but the last if the sampler draws."""
    return steps if SAMPLERS[method].draws else 1


def path_of(objective: Objective, method: str, steps: int, timesteps: str = "even") -> Path:
    """The path of `steps` steps for a sampler, spaced as `timesteps` (one of `TIMESTEPS`) says.

    Raises InputError for an unknown method, a number of steps that the objective does not allow, or a method that the
    objective does not have: one that needs a posterior or a straight path where there is none.
    """
    if method not in SAMPLERS:
        raise unknown("sample.method", method, SAMPLERS)
    path = objective.path(steps, timesteps)
    if (reason := _misfit(SAMPLERS[method], path)) is not None:
        fit = [name for name, other in SAMPLERS.items() if _misfit(other, path) is None]
        raise InputError(f"sample.method {method} {reason}; choices: {', '.join(fit)}")
    return path


def _misfit(sampler: Sampler, path: Path) -> str | None:
    if sampler.posterior and not path.has_posterior:
        return "draws from a posterior, which this objective does not have"
    if sampler.straight and not path.straight:
        return "is for straight paths, and this objective has none: ddim is Euler's method there"
    return None


@torch.no_grad()
def ratios(objective: Objective, method: str, steps: int, timesteps: str = "even") -> list[float]:
    """The noise-to-signal ratio at each call of the network that sampling takes, in order: the sampler itself says it,
    on a batch of no images. Raises InputError as `path_of` does."""
    seen: list[float] = []

    def net(x: Tensor, t: Tensor, y: Tensor, sigma: float) -> Tensor:
        seen.append(sigma)
        return torch.zeros(0, objective.out_channels(1), 1, 1)

    none = torch.zeros(0, 1, 1, 1)
    denoiser = Denoiser(net, torch.zeros(0, dtype=torch.int64), path_of(objective, method, steps, timesteps))
    SAMPLERS[method].run(denoiser, none, lambda _: none, lambda done, steps: None)
    return seen


@torch.no_grad()
def sample(
    net: Net,
    x_T: Tensor,
    y: Tensor,
    *,
    objective: Objective,
    method: str,
    steps: int,
    timesteps: str = "even",
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    guidance_interval: Interval | None = None,
    guide: Net | None = None,
    null_class: int | None = None,
    clip: bool = False,
    noise: Noise | None = None,
    progress: OnStep | None = None,
) -> Tensor:
    """Images x_0 [B, C, H, W] float32 from noise x_T [B, C, H, W] and labels y [B].

    Sampling takes `steps` steps on the path of `objective` (of a chain 2 to 1000 of its timesteps, spaced as
    `timesteps` says, and the network gets the original timesteps; of flow any number of equal steps). `guided` explains
    `guidance`, `guidance_channels`, `guidance_interval`, `guide` and `null_class`, `Denoiser` explains `clip`.
    `noise(i)` gives the noise [B, C, H, W] of step i = 0, 1, … in order (ancestral only; the last step has none).
    `progress(done, steps)` is called after each step. The caller chooses device, autocast and eval mode.
    Raises InputError, before the network runs, for an unknown method, steps out of range, guidance with neither a null
    class nor a guide, or more guidance channels than the image has.
    """
    path = path_of(objective, method, steps, timesteps)
    if noise is None and SAMPLERS[method].draws:
        raise InputError(f"sample.method {method} needs noise for its steps")
    settings = {"channels": guidance_channels, "interval": guidance_interval, "null_class": null_class, "guide": guide}
    denoiser = Denoiser(guided(net, guidance, image_channels=x_T.shape[1], **settings), y, path, clip)
    return SAMPLERS[method].run(denoiser, x_T.float(), noise or _never, progress or (lambda done, steps: None))
