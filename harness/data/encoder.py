"""Encoders: what the network sees of an image. The data stay images, because reports and scores need images."""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ...kernels.errors import unknown

if TYPE_CHECKING:
    from ..sections import EncoderConfig


class Shape(Protocol):
    """The shape of images: `channels`, and the side `size` in pixels. A data section or a set of images has it."""

    @property
    def channels(self) -> int: ...
    @property
    def size(self) -> int: ...


class Encoder(Protocol):
    """Converts images to what the network sees, and back. Leading dimensions of a tensor stay as they are."""

    def shape(self, data: Shape) -> tuple[int, int]:
        """(channels, side) of what the network sees of such images. Raises InputError where they do not fit."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Images uint8 [..., C, S, S] -> what the network sees, float32 [..., *shape]."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """What the network sees, [..., *shape] -> images uint8 [..., C, S, S].

        Raises FloatingPointError for NaN or infinity.
        """
        ...


class Pixels:
    """The image itself, in [-1, 1]."""

    def shape(self, data: Shape) -> tuple[int, int]:
        return data.channels, data.size

    def encode(self, images: Tensor) -> Tensor:
        return to_model_range(images)

    def decode(self, x: Tensor) -> Tensor:
        return to_uint8(x)


def to_model_range(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], any shape."""
    return images.to(torch.float32, copy=True).div_(127.5).sub_(1)  # in place, because new memory costs more


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8, clamped and rounded, any shape. Raises FloatingPointError for NaN or infinity."""
    if not images.isfinite().all():
        raise FloatingPointError("images have values that are not finite")
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


KINDS: dict[str, type[Encoder]] = {"pixels": Pixels}


def encoder(settings: "EncoderConfig") -> Encoder:
    """The encoder that a configuration names. Raises InputError for an unknown kind."""
    if settings.kind not in KINDS:
        raise unknown("encoder.kind", settings.kind, KINDS)
    return KINDS[settings.kind]()
