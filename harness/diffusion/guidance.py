"""Classifier-free guidance (2207.12598) as a wrapper of a network, so that samplers see one network."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.errors import InputError

Net = Callable[[Tensor, Tensor, Tensor], Tensor]  # a Backbone, or any function with the same arguments


def guided(net: Net, scale: float, *, image_channels: int, channels: int | None, null_class: int | None) -> Net:
    """`net` guided away from `null_class` by `scale`, or `net` itself if `scale` is 1.

    Both halves run as one batch. Guidance applies only to the first `channels` (None: all) of the predicted image
    channels. The other channels, and those of a predicted variance, are the conditional ones. The output is float32.
    Raises InputError for guidance without a null class, or for more channels than the image has.
    """
    if channels is not None and not 1 <= channels <= image_channels:
        raise InputError(
            f"sample.guidance_channels must be 1 to {image_channels} (the image's channels), not {channels}"
        )
    if scale == 1:
        return net
    if null_class is None:
        raise InputError(f"sample.guidance is {scale:g}, but the model has no null class to guide away from; use 1")
    split = image_channels if channels is None else channels

    def call(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        null = torch.full_like(y, null_class)
        conditional, free = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).float().chunk(2)
        first = free[:, :split] + scale * (conditional[:, :split] - free[:, :split])
        return torch.cat([first, conditional[:, split:]], dim=1)

    return call
