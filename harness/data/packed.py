"""Images inside larger files: in shards of WebDataset, and in rows of Hugging Face datasets.

Every image is decoded once. What is known of it is cached with the sizes and modification times of the files that it
lies in, so that the second fingerprint of a large set reads no image. A cache that cannot be read or written only costs
time.
"""

import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.errors import InputError
from ...kernels.nvrtc import user_cache
from ..disk import write_atomically
from ..sections import DataConfig
from .archive import read_npz
from .files import (
    PART,
    SAY_S,
    SETTLED_NS,
    THREADS,
    UNREADABLE,
    Damage,
    Say,
    changed,
    damage_error,
    decode,
    few,
    line_of,
    reason_of,
    unreadable,
)
from .image_data import ImageData, Labels, fitted

Stamps = NDArray[np.int64]  # size in bytes and modification time in nanoseconds of each file, [F, 2]
NO_LABEL = -1


class Facts(NamedTuple):
    """What is known of images, one row each: SHA-256 of the bytes uint8 [N, 32], width and height in pixels int64
    [N, 2], and Pillow's name of the mode, bytes [N]."""

    digests: NDArray[np.uint8]
    shapes: NDArray[np.int64]
    modes: NDArray[np.bytes_]


class Packed(NamedTuple):
    """A set as it was read; without `facts` if its images are not in the cache and were not to be read.

    `labels` has `NO_LABEL` where an image has none, but is 0 everywhere if no image has one. `unlabelled` counts the
    images without a label, and `examples` names the first of them; `hint` says what a label is. `left_out` lists what
    is no part of the set, by reason.
    """

    facts: Facts | None
    labels: Labels
    class_names: list[str]
    unlabelled: int
    examples: list[str]
    hint: str
    damaged: list[Damage]
    left_out: dict[str, list[str]]


def fingerprint_of(facts: Facts, labels: Labels) -> str:
    """16 hex digits of SHA-256 over SHA-256 and label (int64, little-endian) of each image, in their order. Names and
    the division into files do not count."""
    rows = np.concatenate([facts.digests, labels.astype("<i8")[:, None].view(np.uint8)], axis=1)
    return hashlib.sha256(rows.tobytes()).hexdigest()[:16]


class PackedData(ImageData):
    """Images inside larger files, decoded on demand. Every image is decoded at the start once, so that a damaged one
    is an error before training and not in the middle of it."""

    def __init__(self, config: DataConfig, packed: Packed) -> None:
        check_labelled(config, packed)
        super().__init__(config, packed.labels, packed.class_names)
        if packed.damaged:
            raise damage_error(packed.damaged, len(self))
        assert packed.facts is not None
        self.fingerprint = fingerprint_of(packed.facts, packed.labels)
        self.digests = packed.facts.digests
        if packed.left_out:
            texts = [f"{len(names):,} {reason} ({few(names)})" for reason, names in packed.left_out.items()]
            where = line_of(Path(config.path or ""))
            self.omissions = f"{where}: left out are {'; '.join(texts)}; lamabench data check says more"

    def content(self, i: int) -> tuple[bytes, bool]:
        """The bytes of image i, and whether the file that they are in is as it was when the set was loaded."""
        raise NotImplementedError

    def place(self, i: int) -> Path:
        """A name of image i for messages."""
        raise NotImplementedError

    def image(self, i: int) -> Tensor:
        try:
            content, same = self.content(i)
            image = fitted(decode(content), self.channels, self.size)
        except UNREADABLE as error:
            raise unreadable(self.place(i), error) from None
        if not same and hashlib.sha256(content).digest() != self.digests[i].tobytes():
            raise changed(self.place(i))
        return image


def check_labelled(config: DataConfig, packed: Packed) -> None:
    """Raise InputError if the set has no image, and if `config` asks for classes but images have no label."""
    where, count, missing = f"data {config.kind!r} at {config.path}", len(packed.labels), packed.unlabelled
    if not count:
        raise InputError(f"{where} contains no image")
    if missing and config.num_classes > (missing == count):  # a set without labels has one class
        some = f"{missing:,} of {count:,} images ({few(packed.examples, missing)}) have no label"
        which = "no image has a label" if missing == count else some
        raise InputError(f"{where}: {which}; {packed.hint}; data.num_classes=0 trains without classes")


def examine(
    contents: Callable[[int], bytes], count: int, place: Callable[[int], Path], say: Callable[[int], None]
) -> tuple[Facts, list[Damage]]:
    """Read and decode images 0 … count-1 once, in parallel. `contents` gives the bytes of one and may raise one of
    `UNREADABLE`, `place` its name. `say` gets the number of images that were read, now and then."""

    def facts(i: int) -> tuple[bytes, int, int, str] | Damage:
        try:
            content = contents(i)
            image = decode(content)
        except UNREADABLE as error:
            return Damage(place(i), reason_of(error))
        return hashlib.sha256(content).digest(), *image.size, image.mode

    rows: list[tuple[bytes, int, int, str] | Damage] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, count, PART):
            rows += pool.map(facts, range(start, min(count, start + PART)))
            say(len(rows))
    damaged = [row for row in rows if isinstance(row, Damage)]
    sound = [(bytes(32), 0, 0, "") if isinstance(row, Damage) else row for row in rows]
    return Facts(
        np.frombuffer(b"".join(row[0] for row in sound), dtype=np.uint8).reshape(-1, 32),
        np.array([row[1:3] for row in sound], dtype=np.int64).reshape(-1, 2),
        np.array([row[3] for row in sound], dtype="S8"),
    ), damaged


def seldom(say: Say | None) -> Say:
    """A `say` that passes a line on only every few seconds, the first one not at once."""
    last_line = time.monotonic()

    def tell(line: str) -> None:
        nonlocal last_line
        if say is not None and time.monotonic() - last_line >= SAY_S:
            say(line)
            last_line = time.monotonic()

    return tell


def joined(parts: Sequence[Facts]) -> Facts:
    """The facts of several files, one after the other."""
    empty = Facts(np.zeros((0, 32), np.uint8), np.zeros((0, 2), np.int64), np.zeros(0, "S8"))
    return Facts(*(np.concatenate(arrays) for arrays in zip(empty, *parts, strict=True)))


# The cache


def stamps_of(files: Sequence[Path]) -> Stamps:
    """The stamps of files. Raises OSError for one that cannot be read."""
    statuses = [file.stat() for file in files]
    return np.array([(status.st_size, status.st_mtime_ns) for status in statuses], dtype=np.int64).reshape(-1, 2)


def cached(place: str, stamps: Stamps, arrays: Sequence[str] = ()) -> dict[str, Any] | None:
    """What `keep` wrote about a place, `facts` and more, if its files still have these stamps, else None. `arrays` are
    the names of what is an array."""
    try:
        content = read_npz(_cache_file(place), ("stamps", "texts", *Facts._fields, *arrays))
        if not np.array_equal(content["stamps"], stamps):
            return None
        facts = Facts(*(content[name] for name in Facts._fields))
        return {**{name: content[name] for name in arrays}, **json.loads(content["texts"].tobytes()), "facts": facts}
    except (InputError, KeyError, ValueError):
        return None


def keep(place: str, stamps: Stamps, facts: Facts, **more: Any) -> None:
    """Write what is known of images, arrays or plain data, to the cache, unless one of their files has just changed: a
    file that changes twice within one tick of a clock has the same time after both changes."""
    if len(stamps) and time.time_ns() - stamps[:, 1].max() < SETTLED_NS:
        return
    buffer = io.BytesIO()
    arrays = {name: value for name, value in more.items() if isinstance(value, np.ndarray)}
    texts = json.dumps({name: value for name, value in more.items() if name not in arrays}).encode()
    content = np.frombuffer(texts, dtype=np.uint8)
    arrays |= {"stamps": stamps, "texts": content, **facts._asdict()}
    np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    file = _cache_file(place)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, buffer.getvalue())


def _cache_file(place: str) -> Path:
    return user_cache() / "data" / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}.npz"
