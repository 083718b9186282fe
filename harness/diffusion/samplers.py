"""Respaced ancestral (DDPM, 2006.11239) and DDIM (2010.02502) sampling with guidance, and noise by image index."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ...kernels.errors import InputError, unknown
from ..random import Stream, generator
from .gaussian import Diffusion

METHODS = ("ancestral", "ddim")
Net = Callable[[Tensor, Tensor, Tensor], Tensor]  # a Backbone, or anything called like one


def index_noise(seed: int, indices: Sequence[int], shape: Sequence[int], draws: int) -> Iterator[Tensor]:
    """`draws` batches of standard normal noise, [len(indices), *shape] float32 on the CPU, one at a time.

    The first is where sampling starts, the following are the noise of its steps. Each image draws from a generator of
    its own, seeded by `seed` and its index, so a batch's composition changes nothing. Memory: one batch.
    """
    generators = [generator(seed, Stream.SAMPLE, index) for index in indices]
    for _ in range(draws):
        yield torch.from_numpy(np.stack([g.standard_normal(tuple(shape), dtype=np.float32) for g in generators]))


def _check(
    channels: int, method: str, noise: object, guidance: float, guided: int | None, null_class: int | None
) -> None:
    if method not in METHODS:
        raise unknown("sample.method", method, METHODS)
    if method == "ancestral" and noise is None:
        raise InputError("ancestral sampling needs noise for its steps")
    if guidance != 1 and null_class is None:
        raise InputError(f"sample.guidance is {guidance:g}, but the model has no null class to guide away from; use 1")
    if guided is not None and not 1 <= guided <= channels:
        raise InputError(f"sample.guidance_channels must be 1 to {channels} (the image's channels), not {guided}")


def _guided(
    net: Net, x: Tensor, t: Tensor, y: Tensor, scale: float, channels: int | None, null_class: int | None
) -> Tensor:
    """The network's output under classifier-free guidance (2207.12598), [B, 2C, H, W] float32.

    Both halves run as one batch. Only the first `channels` of the noise are guided; the rest of the noise and the
    variance are the conditional ones.
    """
    if scale == 1 or null_class is None:
        return net(x, t, y).float()
    both = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, torch.full_like(y, null_class)])).float()
    conditional, unconditional = both.chunk(2)
    split = x.shape[1] if channels is None else channels
    guided = unconditional[:, :split] + scale * (conditional[:, :split] - unconditional[:, :split])
    return torch.cat([guided, conditional[:, split:]], dim=1)


@torch.no_grad()
def sample(
    net: Net,
    x_T: Tensor,
    y: Tensor,
    *,
    diffusion: Diffusion,
    method: str,
    steps: int,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    null_class: int | None = None,
    clip: bool = False,
    noise: Callable[[int], Tensor] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Tensor:
    """Images x_0 [B, C, H, W] float32 from noise x_T [B, C, H, W] and labels y [B].

    `steps` of the `diffusion`'s 1000 are taken (2 to 1000), evenly spaced; the network sees the original timesteps.
    `clip` clamps every predicted x_0 to [-1, 1] (ADM's rule in pixels; latents have no such bounds). `noise(i)` gives
    [B, C, H, W] for step i = 0, 1, … in order (ancestral only; the last step has none), and `progress(i, steps)` is
    called after each step with the number done. The caller chooses device, autocast and eval mode. Raises InputError
    for an unknown method, steps out of range, guidance without a null class, or more guidance channels than the image
    has.
    """
    _check(x_T.shape[1], method, noise, guidance, guidance_channels, null_class)
    chain = diffusion.respaced(steps)
    x = x_T.float()
    for i, step in enumerate(reversed(range(steps))):
        t = torch.full((len(x),), step, dtype=torch.int64, device=x.device)
        original = torch.full_like(t, int(chain.timesteps[step]))
        output = _guided(net, x, original, y, guidance, guidance_channels, null_class)
        p = chain.p_mean_variance(output, x, t)
        x0, predicted, mean = p.pred_x0, output[:, : x.shape[1]], p.mean
        if clip:
            x0 = x0.clamp(-1, 1)
            predicted = (chain.at("x0_from_x", t) * x - x0) / chain.at("x0_from_noise", t)
            mean = chain.q_mean(x0, x, t)
        if method == "ddim":
            x = chain.at("signal_before", t) * x0 + chain.at("noise_before", t) * predicted
        elif step > 0 and noise is not None:
            x = mean + torch.exp(0.5 * p.log_variance) * noise(i).to(x)
        else:
            x = mean
        if progress is not None:
            progress(i + 1, steps)
    return x
