"""Encoders: what the network sees of the images of a set, and how images come of what it draws.

`Pixels` reads images. `Latents` reads a cache (latents.py), so that a training needs neither images nor autoencoder,
and decodes with the autoencoder of the cache. Samples are stored as images, because reports and scores need images.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.errors import InputError, unknown
from .latents import TEST, LatentData, posterior_noise, read_index
from .splits import held_out

if TYPE_CHECKING:
    from ..config import Config
    from ..sections import DataConfig, EncoderConfig
    from .files import Say
    from .images import ImageData

Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]


class Shape(Protocol):
    """The shape of images: `channels`, and the side `size` in pixels. A data section or a set of images has it."""

    @property
    def channels(self) -> int: ...
    @property
    def size(self) -> int: ...


class DataSet(Protocol):
    """What is learned from: labels and names of classes, and the `fingerprint` of its images. `ImageData` says more."""

    labels: NDArray[np.int64]
    num_classes: int
    class_names: list[str]
    size: int
    channels: int
    fingerprint: str
    omissions: str

    def __len__(self) -> int: ...


class Encoder(Protocol):
    """Gives what the network sees of images, float32 [B, *shape], and makes images of it."""

    def shape(self, data: Shape) -> tuple[int, int]:
        """(channels, side) of what the network sees of such images. Raises InputError where they do not fit."""
        ...

    def load(self, data: "DataConfig", say: "Say | None" = None) -> DataSet:
        """The set that a training reads. Raises InputError for one that is missing, damaged, or another one."""
        ...

    def load_held_out(self, data: "DataConfig", class_names: list[str], say: "Say | None" = None) -> DataSet:
        """The test split that belongs to the training data of `data`, whose classes are `class_names`. Raises
        InputError if there is none, and like `load`."""
        ...

    def inputs(
        self, data: Any, indices: Indices, items: Sequence[int], seed: int, mirrored: Flags | None = None
    ) -> Tensor:
        """What the network sees of some images of a set that `load` returned, of their mirror image where `mirrored`.
        What is random about it follows from `seed` and the numbers `items`, one for each image."""
        ...

    def pictures(self, data: Any, indices: Indices, device: str) -> Tensor:
        """Some images of a set as a figure shows them, uint8 [B, C, S, S] on any device."""
        ...

    def find_decoder(self) -> None:
        """Raise InputError if what decodes images is not on this machine. Reads no weights."""
        ...

    def check_decoder(self, device: str) -> None:
        """Raise InputError if images cannot be decoded on this machine, on the device."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """What the network sees, [B, *shape] -> images uint8 [B, C, S, S] on the same device.

        Raises FloatingPointError for NaN or infinity.
        """
        ...


class Pixels:
    """The image itself, in [-1, 1]."""

    def shape(self, data: Shape) -> tuple[int, int]:
        return data.channels, data.size

    def load(self, data: "DataConfig", say: "Say | None" = None) -> DataSet:
        from .images import load

        return load(data, say)

    def load_held_out(self, data: "DataConfig", class_names: list[str], say: "Say | None" = None) -> DataSet:
        from .images import load_held_out

        return load_held_out(data, class_names, say)

    def inputs(
        self, data: Any, indices: Indices, items: Sequence[int], seed: int, mirrored: Flags | None = None
    ) -> Tensor:
        images = data.images_at(indices)
        if mirrored is not None:
            flipped = torch.from_numpy(mirrored)
            images[flipped] = images[flipped].flip(-1)
        return to_model_range(images)

    def pictures(self, data: Any, indices: Indices, device: str) -> Tensor:
        return data.images_at(indices)

    def find_decoder(self) -> None:
        pass

    def check_decoder(self, device: str) -> None:
        pass

    def decode(self, x: Tensor) -> Tensor:
        return to_uint8(x)


class Latents:
    """Latents of an autoencoder: samples of the posterior N(mean, exp(logvar)) of each image, shifted and scaled
    (Rombach et al., arXiv 2112.10752, section 3.3 and appendix G)."""

    def __init__(self, settings: "EncoderConfig") -> None:
        self.settings = settings

    def shape(self, data: Shape) -> tuple[int, int]:
        assert self.settings.channels is not None and self.settings.side is not None
        return self.settings.channels, self.settings.side

    def load(self, data: "DataConfig", say: "Say | None" = None) -> LatentData:
        return LatentData(self._folder(), self.settings, data)

    def load_held_out(self, data: "DataConfig", class_names: list[str], say: "Say | None" = None) -> LatentData:
        folder = self._folder() / TEST
        if not folder.exists():
            raise InputError(
                f"there are no latents of the test split: {folder} does not exist (lamabench encode … data.split=test "
                f"--to {folder})"
            )
        cache = LatentData(folder, self.settings, replace(held_out(data), flip=False))
        if cache.class_names != class_names:
            raise InputError(f"the test split in {folder} has other classes than the training data")
        return cache

    def inputs(
        self, data: Any, indices: Indices, items: Sequence[int], seed: int, mirrored: Flags | None = None
    ) -> Tensor:
        x = data.rows("mean", indices, mirrored)
        if data.index.logvar:
            deviation = data.rows("logvar", indices, mirrored).mul_(0.5).exp_()
            x.addcmul_(deviation, posterior_noise(seed, items, x[0].numel()).reshape(x.shape))
        return self._scaled(x)

    def pictures(self, data: Any, indices: Indices, device: str) -> Tensor:
        """The means, decoded: what the autoencoder keeps of the images, and the best that a network can draw."""
        return self.decode(self._scaled(data.rows("mean", indices)).to(device))

    def find_decoder(self) -> None:
        from .autoencoder import find

        with self._hinted():
            find(self._source())

    def check_decoder(self, device: str) -> None:
        self._decoder(str(torch.empty(0, device=device).device))  # cuda:0 for cuda, as `decode` calls it

    def decode(self, x: Tensor) -> Tensor:
        return self._decoder(str(x.device)).decode(x)

    def _scaled(self, x: Tensor) -> Tensor:
        shift, scale = self.settings.shift, self.settings.scale
        assert shift is not None and scale is not None
        return x.sub_(shift).mul_(scale)

    def _folder(self) -> Path:
        if self.settings.path is None:
            raise InputError("encoder.path is not set; encoder=FOLDER names the cache of lamabench encode")
        return Path(self.settings.path)

    def _source(self) -> str:
        return self.settings.decoder or read_index(self._folder()).encoder.source

    @contextmanager
    def _hinted(self) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            raise InputError(
                f"images cannot be decoded: {error}; encoder.decoder=SOURCE says where the autoencoder lies"
            ) from None

    def _decoder(self, device: str) -> Any:
        settings, source = self.settings, self._source()
        with self._hinted():
            decoder = _autoencoder(source, device)
        actual = {name: getattr(decoder, name) for name in ("identity", "scale", "shift")}
        expected = {name: getattr(settings, name) for name in actual}
        for name, value in expected.items():
            if actual[name] != value:
                raise InputError(
                    f"{source} is not the autoencoder of the latents: its {name} is {actual[name]}, not {value}; "
                    "encoder.decoder=SOURCE names another one"
                )
        return decoder


@lru_cache(maxsize=2)
def _autoencoder(source: str, device: str) -> Any:
    from .autoencoder import load

    return load(source, device)


def to_model_range(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], any shape."""
    return images.to(torch.float32, copy=True).div_(127.5).sub_(1)  # in place, because new memory costs more


def to_uint8(images: Tensor) -> Tensor:
    """[-1, 1] -> uint8, clamped and rounded, any shape. Raises FloatingPointError for NaN or infinity."""
    if not images.isfinite().all():
        raise FloatingPointError("images have values that are not finite")
    return ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


KINDS: dict[str, Any] = {"pixels": lambda _: Pixels(), "latents": Latents}


def encoder(settings: "EncoderConfig") -> Encoder:
    """The encoder that a configuration names. Raises InputError for an unknown kind."""
    if settings.kind not in KINDS:
        raise unknown("encoder.kind", settings.kind, KINDS)
    return KINDS[settings.kind](settings)


def load(config: "Config", say: "Say | None" = None) -> DataSet:
    """The set that a training of a configuration reads, by its encoder (`Encoder.load`)."""
    return encoder(config.encoder).load(config.data, say)


def load_images(config: "Config", data: "DataConfig", say: "Say | None" = None) -> "ImageData":
    """The images with which samples of a configuration are compared, of `data`. Raises InputError like `load`."""
    from .images import load

    try:
        return load(data, say)
    except InputError as error:
        if config.encoder.kind == "pixels":
            raise
        raise InputError(
            f"{error}. Latents do not replace the images with which samples are compared: give data.path, or "
            "evaluate.reference=FILE"
        ) from None


def load_held_out(config: "Config", class_names: list[str], say: "Say | None" = None) -> DataSet:
    """The test split that belongs to it (`Encoder.load_held_out`)."""
    return encoder(config.encoder).load_held_out(config.data, class_names, say)
