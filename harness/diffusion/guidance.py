"""Guidance as a wrapper of a network, so that samplers see one network: away from the null class (classifier-free,
2207.12598) or from another network (autoguidance, 2406.02507), at all noise levels or at some (2404.07724)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...kernels.errors import InputError

Net = Callable[[Tensor, Tensor, Tensor], Tensor]  # a Backbone, or any function with the same arguments
Guided = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # a Net that is told the noise-to-signal ratio of x too
Interval = Sequence[float | None]  # low and high; a high of None has no end


def applies(scale: float, interval: Interval | None, sigma: float) -> bool:
    """Whether a scale guides at the noise-to-signal ratio `sigma`: in (low, high] of an interval (2404.07724), or
    everywhere if there is none."""
    if scale == 1 or interval is None:
        return scale != 1
    low, high = interval
    return (low or 0.0) < sigma and (high is None or sigma <= high)


def guided(
    net: Net,
    scale: float,
    *,
    image_channels: int,
    channels: int | None,
    null_class: int | None,
    interval: Interval | None = None,
    guide: Net | None = None,
) -> Guided:
    """`net` guided by `scale` away from `guide` or, without one, away from `null_class`.

    The output is float32: g + scale · (net - g), where g is the prediction of the guide for the same labels, or that of
    `net` for the null class, which runs in one batch with the labels. Where guidance does not apply (`applies`), `net`
    alone runs, once. Guidance applies only to the first `channels` (None: all) of the predicted image channels. The
    other channels, and those of a predicted variance, are those of `net` for the labels.
    Raises InputError for guidance with neither a null class nor a guide, or of more channels than the image has.
    """
    if channels is not None and not 1 <= channels <= image_channels:
        raise InputError(
            f"sample.guidance_channels must be 1 to {image_channels} (the image's channels), not {channels}"
        )
    if scale != 1 and null_class is None and guide is None:
        raise InputError(f"sample.guidance is {scale:g}, but the model has no null class to guide away from; use 1")
    split = image_channels if channels is None else channels

    def both(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if guide is not None:
            conditional = net(x, t, y).float().clone()  # the next call of a CUDA graph may overwrite its memory
            return conditional, guide(x, t, y).float()
        assert null_class is not None  # checked above
        null = torch.full_like(y, null_class)
        conditional, free = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).float().chunk(2)
        return conditional, free

    def call(x: Tensor, t: Tensor, y: Tensor, sigma: float) -> Tensor:
        if not applies(scale, interval, sigma):
            return net(x, t, y).float()
        conditional, free = both(x, t, y)
        first = free[:, :split] + scale * (conditional[:, :split] - free[:, :split])
        return torch.cat([first, conditional[:, split:]], dim=1)

    return call
