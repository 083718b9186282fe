"""What samples are compared with: images, moments of features, or both; and a cache of what is computed of images."""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Subset

from ...kernels.errors import InputError
from ..config import Config
from ..data.encoder import load_images
from ..data.files import Say, npz_headers
from ..data.images import load
from ..data.items import epoch_order
from ..data.splits import held_out
from ..disk import access, write_atomically
from ..record import Row
from ..sections import DataConfig
from .counts import OF_MOMENTS, WITHOUT_REFERENCE
from .features import Extractor, Features, alone, prepare_cache, read_cache, write_cache
from .networks import network_of
from .statistics import Moments, RunningMoments
from .statistics_file import Statistics, has_moments, read_statistics

KEPT_BYTES = 2**30  # features of a layer that take more are not kept, only their moments
PART = 4096  # images between two looks at the clock
SAVE_S = 60.0  # between two savings of what a long pass has so far


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
    """What samples are compared with, its `name` in tables, and the fingerprint of its contents.

    `images` is None if only `statistics` are known. With both, as in ADM's files, moments are the `statistics` and
    features are those of the images. What is computed is kept in the folder `cache` (None: nowhere); `counted` counts
    the images that are read for it.
    """

    images: ReferenceImages | None
    name: str
    fingerprint: str
    statistics: Statistics | None = None
    cache: Path | None = None
    counted: Count | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """Plain data that identify these images, or these moments."""
        return {"fingerprint": self.fingerprint, "count": self.count()}

    def count(self, metric: str = "fd") -> int | None:
        """The number of images that a metric compares with, None if it is unknown."""
        if self.statistics is not None and (self.images is None or metric in OF_MOMENTS):
            return self.statistics.count
        return len(self._images())

    @cached_property
    def shape(self) -> list[int] | None:
        """[H, W, C] of an image, None if it is unknown. Raises InputError if the images are not uint8 [C, S, S]."""
        if self.images is None:
            return None if self.statistics is None else self.statistics.shape
        first = self.images[0][0]
        if first.dtype != torch.uint8 or first.ndim != 3:
            raise InputError(f"reference images must be uint8 [C, S, S], not {first.dtype} {list(first.shape)}")
        return [*first.shape[1:], first.shape[0]]

    def batch(self, start: int, stop: int) -> Tensor:
        """Images start … stop-1, uint8 [B, C, S, S]."""
        images = self._images()
        return torch.stack([images[i][0] for i in range(start, stop)])

    def lack(self, metric: str) -> str | None:
        """Why a metric of `sections.METRICS` cannot be computed against this reference, None if it can."""
        if self.images is not None or metric in (*OF_MOMENTS, *WITHOUT_REFERENCE):
            return None
        return f"{metric} needs features of the reference, and {self._moments_only()}"

    def moments(self, extractor: Extractor, layer: str) -> Moments:
        """The moments of a layer's features: those of the statistics, or computed in one pass over the images, in which
        those of the extractor's other layers are computed too.

        If several processes need them, one computes them. A pass over so many images that their features are not kept
        goes on from what it had at most a minute before it was killed; another begins again. Raises InputError for
        statistics of another network.
        """
        if self.statistics is not None:
            return self.statistics.of(extractor, layer)
        file = self._file(extractor, layer, "-moments")
        if file is None:
            return self._moments(extractor, layer, None)
        if (there := _read_moments(file)) is None:
            with alone(file):
                if (there := _read_moments(file)) is None:
                    there = self._moments(extractor, layer, file.with_suffix(".part"))
                    _write_moments(file, there)
        return there

    def features(self, extractor: Extractor, layer: str, count: int | None = None) -> Features:
        """The features [N, D] of a layer, in the order of the images; or of `count` images, the first ones of a fixed
        random order. Computed in one pass, by one of several processes, and those of the pooled layer are kept.

        Raises InputError if the reference has moments only.
        """
        total = len(self._images())
        if count is not None and count < total:
            whole = layer == extractor.network.pooled and self.keeps(extractor)
            return (
                self.features(extractor, layer)[self.order()[:count]]
                if whole
                else self.part(count).features(extractor, layer)
            )
        file, shape = self._file(extractor, layer), (total, extractor.network.width)
        if file is None or layer != extractor.network.pooled:
            return self._compute(extractor)[layer]
        if (there := read_cache(file, shape)) is None:
            with alone(file):
                if (there := read_cache(file, shape)) is None:
                    there = self._compute(extractor)[layer]
        return there

    def part(self, count: int) -> "Reference":
        """`count` of the images, the first ones of a fixed random order, which is the same for every seed."""
        some = Subset(_dataset(self._images()), self.order()[:count].tolist())
        return replace(self, images=some, fingerprint=f"{self.fingerprint}-{count}", statistics=None)

    def halves(self, extractor: Extractor, layer: str, count: int) -> tuple[Moments, Moments]:
        """The moments of `part(count)`, and those of all other images."""
        images = replace(self, statistics=None)
        whole = images.moments(extractor, layer)
        if layer == extractor.network.pooled and images.keeps(extractor):
            return split(whole, Moments.of(images.features(extractor, layer, count)))
        return split(whole, images.part(count).moments(extractor, layer))

    def order(self) -> NDArray[np.int64]:
        """The fixed random order of the images."""
        return epoch_order(0, 0, len(self._images()))

    def _images(self) -> ReferenceImages:
        if self.images is None:
            raise InputError(f"features of the reference are needed, and {self._moments_only()}")
        return self.images

    def _moments_only(self) -> str:
        file = self.name if self.statistics is None else self.statistics.path
        return (
            f"{file} has moments only; choices of evaluate.metrics: {', '.join((*OF_MOMENTS, *WITHOUT_REFERENCE))}; "
            "evaluate.reference=null takes the images of data"
        )

    def keeps(self, extractor: Extractor) -> bool:
        """Whether features of all images are small enough to be kept."""
        return 4 * len(self._images()) * extractor.network.width <= KEPT_BYTES

    def _file(self, extractor: Extractor, layer: str, what: str = "") -> Path | None:
        if self.cache is None:
            return None
        content = {"fingerprint": self.fingerprint, "count": len(self._images()), "images": self.shape}
        name = short_hash({**extractor.identity, **content, "layer": layer}, 16)
        return self.cache / f"{extractor.identity['network']}-{name}{what}.safetensors"

    def _moments(self, extractor: Extractor, layer: str, state: Path | None) -> Moments:
        """The moments of a layer. Those of the others are written to the cache."""
        if self.keeps(extractor):
            pooled = layer == extractor.network.pooled
            return Moments.of(self.features(extractor, layer) if pooled else self._compute(extractor)[layer])
        every = self._pass(extractor, state)
        for other in set(every) - {layer}:
            self._write(extractor, other, every[other])
        return every[layer]

    def _compute(self, extractor: Extractor) -> dict[str, Features]:
        """The features of all images, by layer. Those of the pooled layer, and the moments of the others, are written
        to the cache."""
        images, pooled = len(self._images()), extractor.network.pooled
        counted = self.counted or Count(0, None)
        counted.total += images
        every = extractor.features(self.batch, images, counted.add)
        for layer in _layers(extractor):
            if layer != pooled and images > 1:
                self._write(extractor, layer, Moments.of(every[layer]))
            elif (file := self._file(extractor, layer)) is not None:
                write_cache(file, every[layer])
        return every

    def _write(self, extractor: Extractor, layer: str, moments: Moments) -> None:
        if (file := self._file(extractor, layer, "-moments")) is not None:
            _write_moments(file, moments)

    def _pass(self, extractor: Extractor, state: Path | None) -> dict[str, Moments]:
        """The moments of every layer, in one pass over the images. Every minute it saves what it has to the file
        `state`, and begins with what is there."""
        total, running = len(self._images()), {layer: RunningMoments() for layer in _layers(extractor)}
        if state is not None and (there := _read_parts(state, list(running))) is not None:
            for layer, moments in there.items():
                running[layer].merge(moments)
        begin = next(iter(running.values())).count
        counted = self.counted or Count(0, None)
        counted.total += total - begin
        saved = time.monotonic()
        for start in range(begin, total, PART):
            stop = min(start + PART, total)
            values = extractor.features(
                lambda first, last, start=start: self.batch(start + first, start + last), stop - start, counted.add
            )
            for layer, one in running.items():
                one.add(values[layer])
            if state is not None and time.monotonic() - saved > SAVE_S and stop < total:
                _write_arrays(state, _flat({layer: one.moments() for layer, one in running.items()}))
                saved = time.monotonic()
        if state is not None:
            state.unlink(missing_ok=True)
        return {layer: one.moments() for layer, one in running.items()}


def split(whole: Moments, part: Moments) -> tuple[Moments, Moments]:
    """The moments of a part of a set, and of all the rest of it, from those of the set and of the part (Chan, Golub &
    LeVeque, 1979, solved for the rest). Raises InputError if fewer than two images are left."""
    count = whole.count - part.count
    if count < 2:
        raise InputError(f"moments need at least 2 images, {count} are left")
    mean = (whole.count * whole.mean - part.count * part.mean) / count
    distance = part.mean - mean
    scatter = whole.covariance * (whole.count - 1) - part.covariance * (part.count - 1)
    scatter -= np.outer(distance * (part.count * count / whole.count), distance)
    return part, Moments(count, mean, scatter / (count - 1))


def reference_of(config: Config, say: Say | None = None) -> Reference:
    """The reference of a configuration: the file `evaluate.reference`, or the images of `config.data`, or those
    held out from it (`evaluate.split`); of images, a fixed random subset of `evaluate.reference_count`, the same for
    every seed.

    A file has moments (see statistics_file.py), images (`arr_0` or `images`, uint8 [N, S, S, C]) or, as some of ADM's,
    both. Raises InputError for a file that has neither or is of another network, and for more images than there are.
    """
    cache, count = Path(config.run.root) / ".cache", config.evaluate.reference_count
    test = config.evaluate.split == "test"
    data = held_out(config.data) if test else config.data
    name = (config.data.name or config.data.kind) + (" test" if test else "")
    if config.evaluate.reference is not None:
        path = Path(config.evaluate.reference)
        statistics = read_statistics(path) if has_moments(path) else None
        images = _images_in(path)
        if statistics is None and images is None:
            raise InputError(f"evaluate.reference {path} has no moments (mu, sigma) and no images (arr_0)")
        if statistics is not None:
            if count is not None:
                raise InputError(f"evaluate.reference_count {count} has no effect on moments of {path}; set it to null")
            network = network_of(config.evaluate.features)
            statistics.check({"network": network.extractor, "inputs": network.inputs})
            there = None if images is None else load(images, say)
            return Reference(there, statistics.name, statistics.fingerprint, statistics, cache)
        assert images is not None
        data, name = images, path.stem
    there = load_images(config, data, say)
    if count is None or count == len(there):
        return Reference(there, name, there.fingerprint, cache=cache)
    if count > len(there):
        raise InputError(f"evaluate.reference_count {count} is more than the {len(there)} images of the data")
    return Reference(there, name, there.fingerprint, cache=cache).part(count)


def check_contents(config: Config, rows: Iterable[Row]) -> None:
    """Raise InputError if scores, whose key has only the name of the file `evaluate.reference`, are of other contents
    than the file has now."""
    reference = reference_of(config)
    if not all(was_against(row, reference) for row in rows):
        raise InputError(
            f"evaluate.reference {config.evaluate.reference} has other contents than the file of this name with which "
            "these samples were scored; give it another name"
        )


def was_against(row: Row, reference: Reference) -> bool:
    """Whether a score was computed against the contents of a reference, as far as its record says."""
    line = row.flat()
    if (against := (line.get("evaluation") or {}).get("reference")) is not None:
        return against["fingerprint"] == reference.fingerprint  # of some of the data, with the number of images
    return line.get("data_fingerprint") in (None, reference.fingerprint.split("-")[0])


def _images_in(path: Path) -> DataConfig | None:
    """The images of a file as data, None if it has none."""
    headers = npz_headers(path, ("images", "arr_0"))
    for name in ("images", "arr_0"):
        if name in headers and headers[name][1] == np.uint8:
            shape = headers[name][0]
            if len(shape) == 4 and shape[1] == shape[2]:
                return DataConfig(kind="npz", path=str(path), size=shape[1], channels=shape[3], num_classes=0)
            raise InputError(f"evaluate.reference {path}: {name} is {list(shape)}, not images [N, S, S, C]")
    return None


def short_hash(definition: dict[str, Any], digits: int) -> str:
    text = json.dumps(definition, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def _layers(extractor: Extractor) -> list[str]:
    """The layers of an extractor that a reference has features of: all but the logits."""
    return [layer for layer in extractor.layers if layer != extractor.network.logits]


def _dataset(images: ReferenceImages) -> Any:
    return images


def _flat(moments: dict[str, Moments]) -> dict[str, NDArray[Any]]:
    """Moments by layer as arrays by name."""
    arrays: dict[str, NDArray[Any]] = {}
    for layer, one in moments.items():
        arrays |= {f"{layer}.count": np.array([one.count]), f"{layer}.mean": one.mean}
        arrays[f"{layer}.covariance"] = one.covariance
    return arrays


def _read_parts(file: Path, layers: Sequence[str]) -> dict[str, Moments] | None:
    """The moments of layers that `_flat` made arrays of, None if the file has not all of them, or is missing."""
    if (arrays := _read_arrays(file)) is None:
        return None
    try:
        return {
            layer: Moments(int(arrays[f"{layer}.count"][0]), arrays[f"{layer}.mean"], arrays[f"{layer}.covariance"])
            for layer in layers
        }
    except KeyError:
        return None


def _write_moments(file: Path, moments: Moments) -> None:
    _write_arrays(file, _flat({"": moments}))


def _read_moments(file: Path) -> Moments | None:
    there = _read_parts(file, [""])
    return None if there is None else there[""]


def _write_arrays(file: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write arrays and their checksum to a file of the cache."""
    prepare_cache(file.parent)
    write_atomically(file, safetensors.numpy.save(arrays | {"sha256": _checksum(arrays)}))


def _read_arrays(file: Path) -> dict[str, NDArray[Any]] | None:
    """The arrays of `_write_arrays`, None without such a file. A damaged file is a warning."""
    with access("read", file):
        try:
            content = file.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
    try:
        arrays = safetensors.numpy.load(content)
        if np.array_equal(arrays.pop("sha256"), _checksum(arrays)):
            return arrays
        reason = "does not match its checksum"
    except (SafetensorError, KeyError):
        reason = "is not a complete file of moments"
    warnings.warn(f"cache {file} {reason}: moments are computed again", stacklevel=2)
    return None


def _checksum(arrays: dict[str, NDArray[Any]]) -> NDArray[np.uint8]:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + arrays[name].tobytes())
    return np.frombuffer(digest.digest(), dtype=np.uint8)
