"""Features that are kept in place of the images of a set of samples (`sample.keep=features`), without torch.

Such a set is a folder of shards (shards.py) whose rows, float32 [D], are the pooled features of an image and then its
logits: all that a metric reads. `features.json` has `network`, its name in `evaluate.features`, and `identity`, that of
the extractor (features.py).
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...kernels.errors import InputError
from ..disk import write_atomically
from ..run import read_json
from ..shards import FEATURES, Samples, Shards, open_samples

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .features import Features
    from .networks import Network


class FeatureSet:
    """A complete set of features in a folder. `shape` [N, H, W, C] and `dtype` are those of the images, `network` is
    the name of the network. Raises InputError if it is damaged."""

    dtype = np.dtype(np.uint8)

    def __init__(self, folder: Path) -> None:
        self.folder, about = folder, read_json(folder / FEATURES)
        if not isinstance(about, dict) or not isinstance(about.get("network"), str):
            raise InputError(f"{folder / FEATURES} was not written by lamabench: it names no network")
        self.network, self._identity = about["network"], about.get("identity")
        self._shards = Shards(folder, "features")
        self.shape = (len(self._shards), *Shards(folder / "first").shape[1:])

    def __len__(self) -> int:
        return len(self._shards)

    def check(self, identity: dict[str, Any]) -> None:
        """Raise InputError if the features are of another network than that of an extractor's `identity`."""
        if identity != self._identity:
            raise InputError(
                f"{self.folder} has features of {self.network}, of another network, other weights or another version "
                "than asked for, and its images were not kept: draw them again (lamabench sample … sample.keep=images)"
            )

    def batches(self, network: "Network", size: int) -> "Iterator[dict[str, Features]]":
        """The features [B, D] of each layer that is kept, `size` images at a time."""
        for start in range(0, len(self), size):
            part = self._shards[start : start + size]
            layers = {network.pooled: part[:, : network.width]}
            yield layers | ({network.logits: part[:, network.width :]} if network.logits else {})


def describe(folder: Path, network: str, identity: dict[str, Any]) -> None:
    """Write `features.json`."""
    write_atomically(folder / FEATURES, json.dumps({"network": network, "identity": identity}).encode())


def open_set(path: Path) -> Samples | FeatureSet:
    """A set of features, or images as `open_samples` opens them. Raises InputError as they do."""
    return FeatureSet(path) if (path / FEATURES).exists() else open_samples(path)
