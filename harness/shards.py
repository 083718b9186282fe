"""The images of a set of samples on disk: shards that any number of processes write, and their reading.

    shards/KEY/START-STOP.npy   images START … STOP-1, uint8 [n, H, W, C]; KEY stands for weights and settings
    shards/KEY/labels.npy       int64 [N], once all images are there
    shards/KEY/claims.jsonl     the range that a process claimed, and again once it is done; written under KEY/.lock
    shards/KEY/PROCESS.lock     held by a process while it draws, so that its claims end with it

With `sample.keep=features`, the shards have features, float32 [n, D], in place of the images, and beside them are
    shards/KEY/features.json    the network and its layers (see scoring/kept.py)
    shards/KEY/first/           the first FIRST images, each in a shard of its own, and their labels.npy

Only the content of claims.jsonl decides what is free, because a listing of a folder may be old on a network file
system.
"""

import os
import platform
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol, TypeVar
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from ..kernels.errors import InputError
from .disk import access, append, read_lines, write_atomically
from .record import read_records
from .run import Busy, is_held, locked, plain_name

CLAIMS_S = 60.0  # how long a process waits for the claims of another, which takes milliseconds
NOBODY = "nobody"
FEATURES = "features.json"
FIRST = 64  # images that are kept beside features
KINDS: dict[str, tuple[Any, int]] = {"images": (np.uint8, 4), "features": (np.float32, 2)}  # type, dimensions
Images = NDArray[np.uint8]
Line = dict[str, Any]


class Samples(Protocol):
    """Images uint8 [N, H, W, C], of which a slice is read at a time: an array, shards, or the rows of an .npz."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> Images: ...


def first_gap(count: int, taken: Iterable[tuple[int, int]], most: int) -> range | None:
    """The first `most` or fewer of the indices 0 … count-1 that are in no (start, stop) of `taken`; None if all are."""
    start = 0
    for first, stop in sorted(taken):
        if start < first:
            return range(start, min(start + most, first))
        start = max(start, stop)
    return range(start, min(start + most, count)) if start < count else None


def busy_seconds(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (begin, end)."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


@dataclass
class Claims:
    """The ranges of a set of `count` images that processes claimed in `folder`; `process` is the name of this one, and
    `drawn` counts the images that all of them had drawn at the last look."""

    folder: Path
    count: int
    process: str
    drawn: int = 0

    def take(self, most: int) -> range | None:
        """Claim the next `most` or fewer images. None if all are drawn or claimed by living processes."""
        with locked(self.folder, CLAIMS_S):
            indices = first_gap(self.count, self._taken(), most)
            if indices is not None:
                self._note(indices.start, indices.stop, self.process, time.time())
        return indices

    def write(self, indices: range, values: NDArray[Any], begin: float) -> None:
        """Write the images of a claimed range, or their features, of which drawing began at the time `begin`, and note
        that it is done."""
        write_array(self._file(indices.start, indices.stop), values)
        with locked(self.folder, CLAIMS_S):
            self._note(indices.start, indices.stop, self.process, begin, seconds=round(time.time() - begin, 3))

    def complete(self) -> bool:
        """Whether all images are drawn. A range is free again if its file was deleted or damaged."""
        with locked(self.folder, CLAIMS_S):
            taken = self._taken()
            if self.drawn < self.count:
                return False
            lost = [(start, stop) for start, stop in taken if not self._whole(start, stop)]
            for start, stop in lost:
                self._note(start, stop, NOBODY, time.time())
        return not lost

    def times(self) -> tuple[float, int, float]:
        """Of all ranges that are done: the seconds in which at least one process drew, the number of processes, and the
        sum of their seconds."""
        done = [line for line in self._taken().values() if "seconds" in line]
        wall = busy_seconds((line["at"], line["at"] + line["seconds"]) for line in done)
        return wall, len({line["by"] for line in done}), sum(line["seconds"] for line in done)

    def _whole(self, start: int, stop: int) -> bool:
        try:
            return len(_read(self._file(start, stop))) == stop - start
        except InputError:
            return False

    def _file(self, start: int, stop: int) -> Path:
        return self.folder / f"{start:08d}-{stop:08d}.npy"

    def _note(self, start: int, stop: int, by: str, at: float, **more: Any) -> None:
        append(self.folder / "claims.jsonl", {"start": start, "stop": stop, "by": by, "at": at, **more})

    def _taken(self) -> dict[tuple[int, int], Line]:
        """The newest line of each range that is done or claimed by a living process, by (start, stop)."""
        lines = read_lines(self.folder / "claims.jsonl", damaged=True)  # ranges of damaged lines are drawn again
        newest = {(line["start"], line["stop"]): line for line in lines}
        taken, lives = {}, {self.process: True}
        for (start, stop), line in newest.items():
            by = line["by"]
            if "seconds" not in line:
                if by not in lives:
                    lives[by] = is_held(self.folder / f"{by}.lock")
                if not lives[by] and by != NOBODY and self._file(start, stop).is_file():
                    # It was killed after it wrote the file and before it noted that.
                    line["seconds"] = max(0.0, self._file(start, stop).stat().st_mtime - line["at"])
            if "seconds" in line or lives[by]:
                taken[start, stop] = line
        self.drawn = sum(stop - start for (start, stop), line in taken.items() if "seconds" in line)
        return taken


AnyClaims = TypeVar("AnyClaims", bound=Claims)


@contextmanager
def joined(folder: Path, count: int, kind: type[AnyClaims] = Claims) -> Iterator[AnyClaims]:
    """Take part in the drawing of a set of `count` images into `folder`, shards/KEY. The folder above must exist.
    Yields claims of the class `kind`.

    Raises Busy if a process draws the same set with other weights or settings, such as on another kind of device.
    """
    for path in (folder.parent, folder):
        path.mkdir(exist_ok=True)
    process = plain_name(f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    lock = folder / f"{process}.lock"
    with locked(folder, name=lock.name):
        try:
            for other in folder.parent.glob("*/*.lock"):
                if other.parent.name != folder.name and is_held(other):
                    raise Busy(
                        f"{folder.parent.parent} is being worked on by {other.stem}, on another kind of device or with "
                        "other backends or another sample.keep, and one set does not mix them"
                    )
            yield kind(folder, count, process)
        finally:
            lock.unlink(missing_ok=True)


def write_array(path: Path, array: NDArray[Any]) -> None:
    """Write an .npy file atomically."""
    buffer = BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomically(path, buffer.getvalue())


def write_first(folder: Path, indices: range, images: Images) -> None:
    """Write those of the images that are among the first FIRST of a set of features in `folder`."""
    (folder / "first").mkdir(exist_ok=True)
    for index, image in zip(indices[: max(0, FIRST - indices.start)], images, strict=False):
        write_array(folder / "first" / f"{index:08d}-{index + 1:08d}.npy", image[None])


class Shards:
    """The images or the features of a complete set in a folder shards/KEY. A slice reads only the files that it needs.

    Raises InputError for a folder without any, or with a gap, and for a file that cannot be read.
    """

    def __init__(self, folder: Path, kind: str = "images") -> None:
        self.folder, self.kind = folder, kind
        with access("read", folder, missing=True):
            names = sorted(name for name in os.listdir(folder) if name[0].isdigit() and name.endswith(".npy"))
        self.ranges: list[tuple[int, int]] = []
        stop = 0
        for name in names:
            start, end = _numbers(folder, name)
            if start != stop:
                break
            self.ranges.append((start, end))
            stop = end
        if not names or len(self.ranges) < len(names):
            raise InputError(f"{folder} has no image {stop}: draw the samples again")
        first = self._load(*self.ranges[0])
        self.shape, self.dtype = (stop, *first.shape[1:]), first.dtype
        for start, end in self.ranges[1:]:  # their headers
            self._load(start, end)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> NDArray[Any]:
        start, stop, _ = part.indices(len(self))
        pieces = [
            self._load(first, last)[max(start - first, 0) : stop - first]
            for first, last in self.ranges
            if first < stop and start < last
        ]
        return np.concatenate(pieces) if pieces else np.empty((0, *self.shape[1:]), self.dtype)

    def _load(self, start: int, stop: int) -> NDArray[Any]:
        path = self.folder / f"{start:08d}-{stop:08d}.npy"
        array = _read(path)
        expected = (stop - start, *(self.shape[1:] if hasattr(self, "shape") else array.shape[1:]))
        dtype, dimensions = KINDS[self.kind]
        if array.dtype != dtype or array.ndim != dimensions or array.shape != expected:
            wanted = f"{self.kind} {np.dtype(dtype)} {list(expected)}"
            raise InputError(f"{path} should have {wanted}, not {array.dtype} {list(array.shape)}")
        return array


def _numbers(folder: Path, name: str) -> tuple[int, int]:
    try:
        start, stop = map(int, name.removesuffix(".npy").split("-"))
    except ValueError:
        raise InputError(f"{folder / name} is no shard of a set of samples") from None
    return start, stop


def _read(path: Path) -> NDArray[Any]:
    """A file as an array whose content is read when it is used."""
    with access("read", path, missing=True):
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, BadZipFile) as error:
            raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(array, np.ndarray) or not array.ndim:  # np.load also opens an .npz
        raise InputError(f"{path} cannot be read: it has no images")
    return array


def set_of(folder: Path) -> Path:
    """Where the set of a folder of samples lies: its shards or, of an earlier version, `samples.npz`."""
    rows = [row.flat() for row in read_records(folder / "record.jsonl") if row.kind == "sample" and row.state == "done"]
    key = rows[-1]["shards"] if rows else None
    return folder / "shards" / key if key else folder / "samples.npz"


def images_of(folder: Path) -> Path:
    """Where the images of a folder of samples lie. Beside features, they are only the first ones."""
    path = set_of(folder)
    return path / "first" if (path / FEATURES).exists() else path


def features_of(folder: Path) -> str | None:
    """The network whose features a folder of samples has in place of images; None if it has none."""
    rows = [row for row in read_records(folder / "record.jsonl") if row.kind == "sample" and row.state == "done"]
    return rows[-1].flat()["features"] if rows else None


def serves(row: Any, config: dict[str, Any]) -> bool:
    """Whether a set whose record is `row` has what a configuration (plain data) keeps of it. Images serve for
    everything, features for `sample.keep=features` with their network."""
    wanted = config["evaluate"]["features"] if config["sample"].get("keep") == "features" else None
    return row.features in (None, wanted)


def open_samples(path: Path) -> Samples:
    """The images of a folder of shards, or of an .npz file with `images` or, as the evaluator of ADM takes it, `arr_0`.

    Raises InputError if there are no images uint8 [N, H, W, C].
    """
    if path.is_dir():
        return Shards(path)
    from .data.files import npz_rows

    if not path.exists():
        raise InputError(f"no samples: {path} does not exist; draw them first (lamabench sample …)")
    for name in ("images", "arr_0"):
        if (rows := npz_rows(path, name)) is not None:
            if rows.dtype != np.uint8 or len(rows.shape) != 4:
                raise InputError(f"`{name}` in {path} must be uint8 [N, H, W, C], not {rows.dtype} {list(rows.shape)}")
            return rows
    raise InputError(f"{path} has no array `images` or `arr_0` (uint8 [N, H, W, C])")


def labels_at(path: Path) -> NDArray[np.int64]:
    """The labels of the images at `path`, as `images_of` gives it. Raises InputError if there are none."""
    if path.is_dir():
        return _read(path / "labels.npy")
    from .data.files import read_npz

    labels = read_npz(path, ("labels",)).get("labels")
    if labels is None:
        raise InputError(f"{path} has no array `labels`")
    return labels
