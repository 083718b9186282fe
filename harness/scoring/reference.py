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
from ..data.splits import held_out
from .features import Extractor, Features, alone, read_cache, write_cache


class ReferenceImages(Protocol):
    """A map-style dataset: item i is (uint8 [C, S, S], label)."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> tuple[Tensor, Any]: ...


@dataclass(frozen=True)
class Reference:
    """The images that samples are compared with, their `name` in tables, and the fingerprint of their contents."""

    images: ReferenceImages
    name: str
    fingerprint: str

    @property
    def identity(self) -> dict[str, Any]:
        """Plain data that identify these images."""
        return {"fingerprint": self.fingerprint, "count": len(self.images)}

    def batch(self, start: int, stop: int) -> Tensor:
        """Images start … stop-1, uint8 [B, C, S, S]."""
        return torch.stack([self.images[i][0] for i in range(start, stop)])


class Count:
    """Counts images that are done, of `total`."""

    def __init__(self, total: int, progress: Callable[[int, int], object] | None) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def add(self, images: int) -> None:
        self.done += images
        if self.progress is not None:
            self.progress(self.done, self.total)


def reference_of(config: Config, say: Say | None = None) -> Reference:
    """The images of `config.data`, or those held out from it (`evaluate.split`), or a fixed random subset of
    `evaluate.reference_count`, the same for every seed."""
    test, count = config.evaluate.split == "test", config.evaluate.reference_count
    data = load(held_out(config.data) if test else config.data, say)
    name = (config.data.name or config.data.kind) + (" test" if test else "")
    if count is None or count == len(data):
        return Reference(data, name, data.fingerprint)
    if count > len(data):
        raise InputError(f"evaluate.reference_count {count} is more than the {len(data)} images of the data")
    subset = Subset(data, epoch_order(0, 0, len(data))[:count].tolist())
    return Reference(subset, name, f"{data.fingerprint}-{count}")


def features_of(reference: Reference, extractor: Extractor, file: Path, count: Count) -> Features:
    """The pooled features [N, D] of a reference, from its file in the cache or computed and written to it. If several
    processes need them, one computes them."""
    images, network = len(reference.images), extractor.network
    if (there := read_cache(file, (images, network.width))) is not None:
        return there
    with alone(file):
        if (there := read_cache(file, (images, network.width))) is None:
            count.total += images
            there = extractor.features(reference.batch, images, count.add)[network.pooled]
            write_cache(file, there)
    return there


def short_hash(definition: dict[str, Any], digits: int) -> str:
    text = json.dumps(definition, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
