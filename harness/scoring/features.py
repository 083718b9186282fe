"""Features of images: their extraction batch by batch, and a cache of them on disk."""

import errno
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np
import safetensors.numpy
import torch
import torch_fidelity
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from .. import signals
from ..disk import access, write_atomically
from ..run import Busy, locked
from ..sections import EvaluateConfig
from ..shards import Samples
from .networks import build, find_weights, network_of, sha256
from .statistics import Moments, RunningMoments

Features = NDArray[np.float32]
SPOOL_BYTES = 2**28  # features of a layer, for a second pass over them, that stay in memory; more go to disk
BLOCK = 1024  # features that are read back at once
LOOK_S = 2.0  # between two looks at whether a signal came


class Extractor:
    """A network with weights on a device. It computes the features of images for each of `layers`.

    `title` is its name in metrics. `identity` is plain data that identify its features. Raises InputError like
    `find_weights` and `build`.
    """

    def __init__(self, settings: EvaluateConfig, layers: list[str], device: str) -> None:
        weights = find_weights(settings.features, settings.features_path, settings.download)
        digest = sha256(weights)
        self.network, self.device, self.batch_size = network_of(settings.features), device, settings.batch_size
        self.module, self.layers = build(settings.features, weights, layers, device), layers
        self.title = self.network.title
        if self.network.sha256 is not None and digest != self.network.sha256:
            self.title += f"-{digest[:8]}"  # other weights than the published ones give no FID
        self.identity = {
            "torch_fidelity": torch_fidelity.__version__,
            "network": self.network.extractor,
            "weights": digest,
            "inputs": self.network.inputs,
        }

    def batches(
        self, images: Callable[[int, int], Tensor], count: int, on_batch: Callable[[int], object]
    ) -> Iterator[dict[str, Features]]:
        """The features [B, D] of each layer, batch by batch. `images(start, stop)` returns a batch uint8 [B, 1 or 3, H,
        W], and `on_batch` is called with the number of images of each batch."""

        def read() -> Iterator[Tensor]:
            for start in range(0, count, self.batch_size):
                stop = min(start + self.batch_size, count)
                yield images(start, stop).to(self.device)
                on_batch(stop - start)

        return extract(self.module, read())

    def features(
        self, images: Callable[[int, int], Tensor], count: int, on_batch: Callable[[int], object]
    ) -> dict[str, Features]:
        """The features [count, D] of each layer: `batches`, joined."""
        return collect(self.batches(images, count, on_batch), self.layers, ())[0]

    def of_samples(self, samples: Samples, on_batch: Callable[[int], object]) -> Iterator[dict[str, Features]]:
        """`batches` of samples uint8 [N, H, W, 1 or 3], read one batch at a time."""
        return self.batches(
            lambda start, stop: torch.tensor(samples[start:stop]).permute(0, 3, 1, 2), len(samples), on_batch
        )


class FeatureNetwork:
    """The network `evaluate.features` on a device, for samples of which features are kept (kept.py). `identity` is that
    of `Extractor`, and `key` stands for it in the name of a folder. Raises InputError like `Extractor`."""

    def __init__(self, settings: EvaluateConfig, device: str) -> None:
        self.name, network = settings.features, network_of(settings.features)
        self._extractor = Extractor(settings, [one for one in (network.pooled, network.logits) if one], device)
        self.identity = self._extractor.identity
        self.key = f"{self.name}-{hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:8]}"

    def __call__(self, images: Samples) -> Features:
        """The features [N, D] of images uint8 [N, H, W, 1 or 3], `evaluate.batch_size` of them at a time."""
        layers = self._extractor.layers
        features, _ = collect(self._extractor.of_samples(images, lambda _: None), layers, ())
        return np.concatenate([features[layer] for layer in layers], 1)


def extract(extractor: torch_fidelity.FeatureExtractorBase, batches: Iterable[Tensor]) -> Iterator[dict[str, Features]]:
    """The features [B, D] of each layer for each batch uint8 [B, 1 or 3, H, W]. TF32 is off because it changes them."""
    for batch in batches:
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            features = extractor(batch.expand(-1, 3, -1, -1).contiguous())
        layers = extractor.convert_features_tuple_to_dict(features)
        yield {layer: values.float().cpu().numpy() for layer, values in layers.items()}


def collect(
    batches: Iterable[dict[str, Features]], whole: Collection[str], moments: Collection[str]
) -> tuple[dict[str, Features], dict[str, Moments]]:
    """The features [N, D] of the layers `whole`, and the moments of the layers `moments`, of batches of features.
    Features of other layers are not held. Raises InputError for moments of fewer than two images."""
    parts: dict[str, list[Features]] = {layer: [] for layer in whole}
    running = {layer: RunningMoments() for layer in moments}
    for batch in batches:
        for layer, features in batch.items():
            if layer in parts:
                parts[layer].append(features)
            if layer in running:
                running[layer].add(features)
    features = {layer: np.concatenate(values) for layer, values in parts.items()}
    return features, {layer: one.moments() for layer, one in running.items()}


def spooled(batches: Iterable[dict[str, Features]], files: Mapping[str, IO[bytes]]) -> Iterator[dict[str, Features]]:
    """The batches as they are, while the features of the layers `files` are written to these files."""
    for batch in batches:
        for layer, file in files.items():
            file.write(np.ascontiguousarray(batch[layer], np.float32).tobytes())
        yield batch


def spooled_again(file: IO[bytes], width: int) -> Iterator[Features]:
    """The features [B, D] that `spooled` wrote to a file, D = `width`, `BLOCK` of them at a time."""
    file.seek(0)
    while content := file.read(4 * width * BLOCK):
        yield np.frombuffer(content, np.float32).reshape(-1, width)


def prepare_cache(folder: Path) -> None:
    """Create the folder of a cache. Raises InputError if nothing can be written there."""
    with access("write below", folder, "; run.root=FOLDER takes another place", missing=True):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process computes the features of a file of the cache, and hold its lock. Raises Stopped if a
    signal comes meanwhile."""
    lock = path.with_suffix(".lock")
    with ExitStack() as stack:
        while True:
            signals.check()
            with suppress(Busy):
                stack.enter_context(locked(path.parent, LOOK_S, lock.name))
                break
        yield
        lock.unlink(missing_ok=True)  # who waits for it sees the file of the cache next


def write_cache(path: Path, features: Features) -> None:
    """Write features [N, D] and their checksum to a file."""
    prepare_cache(path.parent)
    write_atomically(path, safetensors.numpy.save({"features": features, "sha256": _checksum(features)}))


def read_cache(path: Path, shape: tuple[int, int]) -> Features | None:
    """The features of `write_cache`, None without such a file. An incomplete or different file is a warning."""
    with access("read", path):
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
    try:
        arrays = safetensors.numpy.load(content)
        features, checksum = arrays["features"], arrays["sha256"]
    except (SafetensorError, KeyError):
        reason = "is not a complete file of features"
    else:
        if features.shape != shape or features.dtype != np.float32:
            reason = f"has {features.dtype} {list(features.shape)}, not float32 {list(shape)}"
        elif not np.array_equal(checksum, _checksum(features)):
            reason = "does not match its checksum"
        else:
            return features
    warnings.warn(f"cache {path} {reason}: features are computed again", stacklevel=2)
    return None


def _checksum(features: Features) -> NDArray[np.uint8]:
    return np.frombuffer(hashlib.sha256(features.tobytes()).digest(), dtype=np.uint8)
