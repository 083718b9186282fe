"""What samples are compared with: images, and a cache of their features."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Subset

from ...kernels.errors import InputError
from ..config import Config
from ..data.files import Say
from ..data.images import load
from ..data.items import epoch_order
from .features import Extractor, Features, alone, read_cache, write_cache
from .statistics import Moments

SPATIAL_WIDTH = 2023  # of the layer of sFID


class ReferenceImages(Protocol):
    """A map-style dataset: item i is (uint8 [C, S, S], label)."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> tuple[Tensor, Any]: ...


class Count:
    """Counts images that are done, of `total`."""

    def __init__(self, total: int, progress: Callable[[int, int], object] | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def add(self, images: int) -> None:
        self.done += images
        if self.progress is not None:
            self.progress(self.done, self.total)


@dataclass(frozen=True)
class Reference:
    """The images that samples are compared with, their `name` in tables, and the fingerprint of their contents.

    What is computed is kept in the folder `cache` (None: nowhere); `counted` counts the images that are read for it.
    """

    images: ReferenceImages
    name: str
    fingerprint: str
    cache: Path | None = None
    counted: Count | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Plain data that identify these images."""
        return {"fingerprint": self.fingerprint, "count": len(self.images)}

    def count(self, metric: str = "fd") -> int:
        """The number of images."""
        return len(self.images)

    @property
    def shape(self) -> list[int]:
        """[H, W, C] of an image. Raises InputError if the images are not uint8 [C, S, S]."""
        first = self.images[0][0]
        if first.dtype != torch.uint8 or first.ndim != 3:
            raise InputError(f"reference images must be uint8 [C, S, S], not {first.dtype} {list(first.shape)}")
        return [*first.shape[1:], first.shape[0]]

    def batch(self, start: int, stop: int) -> Tensor:
        """Images start … stop-1, uint8 [B, C, S, S]."""
        return torch.stack([self.images[i][0] for i in range(start, stop)])

    def moments(self, extractor: Extractor, layer: str) -> Moments:
        """The moments of a layer's features."""
        return Moments.of(self.features(extractor, layer))

    def features(self, extractor: Extractor, layer: str, count: int | None = None) -> Features:
        """The features [N, D] of a layer, in the order of the images; or of `count` images, the first ones of a fixed
        random order. If several processes need them, one computes them."""
        images, network = len(self.images), extractor.network
        if count is not None and count < images:
            return self.features(extractor, layer)[epoch_order(0, 0, images)[:count]]
        counted = self.counted or Count(0, None)
        if self.cache is None:
            counted.total += images
            return extractor.features(self.batch, images, counted.add)[layer]
        content = {**extractor.identity, "images": self.shape, **self.identity, "layer": layer}
        file = self.cache / f"{network.extractor}-{short_hash(content, 16)}.safetensors"
        expected = (images, network.width if layer == network.pooled else SPATIAL_WIDTH)
        if (there := read_cache(file, expected)) is not None:
            return there
        with alone(file):
            if (there := read_cache(file, expected)) is None:
                counted.total += images
                there = extractor.features(self.batch, images, counted.add)[layer]
                write_cache(file, there)
        return there


def reference_of(config: Config, say: Say | None = None) -> Reference:
    """The images of `config.data`, or a fixed random subset of `evaluate.reference_count`, the same for every seed."""
    data, count = load(config.data, say), config.evaluate.reference_count
    name = config.data.name or config.data.kind
    if count is None or count == len(data):
        return Reference(data, name, data.fingerprint)
    if count > len(data):
        raise InputError(f"evaluate.reference_count {count} is more than the {len(data)} images of the data")
    subset = Subset(data, epoch_order(0, 0, len(data))[:count].tolist())
    return Reference(subset, name, f"{data.fingerprint}-{count}")


def short_hash(definition: dict[str, Any], digits: int) -> str:
    text = json.dumps(definition, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
