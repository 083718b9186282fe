"""Files of data: fingerprints of their bytes, and a check that they can be read.

Every image is decoded once. Its digest, size and mode are cached with the file's size and modification time, so that
the second fingerprint of a large set reads no file. The user's cache folder has one cache file for each data folder.
A cache that cannot be read or written only costs time.
"""

import hashlib
import io
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ...kernels.errors import InputError
from ...kernels.nvrtc import user_cache
from ..disk import write_atomically
from .archive import read_npz
from .one_line import FEW, few, line_of, reason_of

# What Pillow raises for bad files.
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, MemoryError, struct.error, zlib.error),
    Image.DecompressionBombError,
)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # of the suffixes in folder.py; others could start programs, as EPS does
THREADS = 16
PART = 512  # files between two checks of the clock
SAY_S = 5.0  # seconds between two lines about a large set
# A file that changes twice within one tick of its file system's clock has the same time after both changes. So the
# digest of a file that changed this recently is not cached.
SETTLED_NS = 2 * 10**9
Say = Callable[[str], None]


class Entry(NamedTuple):
    """An image as it was read: the size of its file in bytes, its modification time in nanoseconds (-1 if the file had
    just changed), SHA-256 of its bytes, its width and height in pixels, and Pillow's name of its mode."""

    size: int
    time: int
    digest: bytes
    width: int
    height: int
    mode: str


class Damage(NamedTuple):
    """A file that cannot be read, and why not."""

    file: Path
    reason: str


def unreadable(file: Path, error: BaseException | str) -> InputError:
    """The error, one line, of an image that cannot be read."""
    return InputError(f"unreadable image {line_of(file)}: {reason_of(error)}")


def changed(file: Path) -> InputError:
    """The error of an image whose bytes are others than when the set was loaded."""
    return InputError(f"{line_of(file)} was changed while it was in use")


def fingerprint(root: Path, files: Sequence[Path], say: Say | None = None) -> str:
    """16 hex digits of SHA-256 over the names below `root` and the bytes of image files, in their order.

    Raises InputError, like `whole`, for files that cannot be read. `say` gets a line every few seconds.
    """
    return fingerprint_of(root, files, whole(entries(root, files, say)))


def entries(root: Path, files: Sequence[Path], say: Say | None = None) -> list[Entry | Damage]:
    """What is known of each image file below `root`.

    Every file that is not in the cache is read and decoded once, in parallel. A file that is not an image, is
    incomplete, or has more than 8 bits per channel is damaged. `say` gets a line every few seconds.
    """
    names = _names(root, files)
    with ThreadPoolExecutor(THREADS) as pool:
        rows: list[Entry | Damage | None] = list(pool.map(_unchanged, files, _cached(root, names)))
        missing = [i for i, entry in enumerate(rows) if entry is None]
        last_line = time.monotonic()
        try:
            for start in range(0, len(missing), PART):
                if say is not None and time.monotonic() - last_line >= SAY_S:
                    say(f"reading {start:,} of {len(missing):,} files of {line_of(root)}")
                    last_line = time.monotonic()
                part = missing[start : start + PART]
                for i, entry in zip(part, pool.map(_read_entry, [files[i] for i in part]), strict=True):
                    rows[i] = entry
        finally:  # files that were read before a kill are not read again
            if missing:
                _write_cache(root, zip(names, rows, strict=True))
    return [entry for entry in rows if entry is not None]


def whole(rows: Sequence[Entry | Damage]) -> list[Entry]:
    """The entries of a set without damage. Raises InputError that names the first damaged files and counts all."""
    if damaged := [entry for entry in rows if isinstance(entry, Damage)]:
        raise damage_error(damaged, len(rows))
    return [entry for entry in rows if isinstance(entry, Entry)]


def damage_error(damaged: Sequence[Damage], images: int) -> InputError:
    """The error, one line, of a set with damaged images."""
    if len(damaged) == 1:
        return unreadable(*damaged[0])
    texts = [f"{line_of(file)}: {reason}" for file, reason in damaged[:FEW]]
    return InputError(
        f"{len(damaged):,} of {images:,} images are unreadable ({few(texts, len(damaged), '; ')}); "
        "lamabench data check names them all"
    )


def known_fingerprint(root: Path, files: Sequence[Path]) -> str | None:
    """The `fingerprint` of a set whose files are all in the cache, else None. Reads no file."""
    with ThreadPoolExecutor(THREADS) as pool:
        rows = list(pool.map(_unchanged, files, _cached(root, _names(root, files))))
    sound = [entry for entry in rows if entry is not None]
    return fingerprint_of(root, files, sound) if len(sound) == len(rows) else None


def _names(root: Path, files: Sequence[Path]) -> list[bytes]:
    return [os.fsencode(file.relative_to(root).as_posix()) for file in files]


def sha256(path: Path) -> str:
    """The SHA-256 of a file, 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint_of(root: Path, files: Sequence[Path], sound: Sequence[Entry]) -> str:
    """The `fingerprint` of a set from its entries."""
    digest = hashlib.sha256()
    for name, entry in zip(_names(root, files), sound, strict=True):
        digest.update(name + b"\0" + entry.digest)  # no name contains a zero, every digest has 32 bytes
    return digest.hexdigest()[:16]


def _unchanged(file: Path, entry: Entry | None) -> Entry | None:
    """The entry if the file still has its size and time, else None."""
    if entry is None:
        return None
    try:
        status = file.stat()
    except OSError:
        return None
    return entry if (entry.size, entry.time) == (status.st_size, status.st_mtime_ns) else None


def read_image(file: Path) -> tuple[Image.Image, os.stat_result, bytes]:
    """A decoded image, the status of its file, and the bytes of its file. Raises one of `UNREADABLE`."""
    with open(file, "rb") as opened:
        status = os.fstat(opened.fileno())
        content = opened.read()
    return decode(content), status, content


def decode(content: bytes) -> Image.Image:
    """The image in the bytes of a file. Raises one of `UNREADABLE`, also for more than 8 bits per channel."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        image.load()
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode}, expected 8 bits per channel")
    return image


def _read_entry(file: Path) -> Entry | Damage:
    try:
        image, status, content = read_image(file)
    except UNREADABLE as error:
        return Damage(file, reason_of(error))
    settled = time.time_ns() - status.st_mtime_ns >= SETTLED_NS
    changed = status.st_mtime_ns if settled else -1
    return Entry(status.st_size, changed, hashlib.sha256(content).digest(), *image.size, image.mode)


def _cache_file(root: Path) -> Path:
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return user_cache() / "data" / f"{name}.npz"


def _cached(root: Path, names: Sequence[bytes]) -> list[Entry | None]:
    """The cached entry of each name, None where there is none."""
    try:
        arrays = read_npz(_cache_file(root), ("names", "sizes", "times", "digests", "shapes", "modes"))
        cached_names = arrays["names"].tobytes().split(b"\0")
        sizes, times = arrays["sizes"].tolist(), arrays["times"].tolist()
        digests = [row.tobytes() for row in arrays["digests"].reshape(-1, 32)]
        widths, heights = arrays["shapes"].reshape(-1, 2).T.tolist()
        modes = arrays["modes"].astype("U").tolist()
        cached = dict(zip(cached_names, map(Entry, sizes, times, digests, widths, heights, modes), strict=True))
    except (InputError, KeyError, ValueError):
        return [None] * len(names)
    return [cached.get(name) for name in names]


def _write_cache(root: Path, rows: Iterable[tuple[bytes, Entry | Damage | None]]) -> None:
    settled = [(name, entry) for name, entry in rows if isinstance(entry, Entry) and entry.time >= 0]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        names=np.frombuffer(b"\0".join(name for name, _ in settled), dtype=np.uint8),
        sizes=np.array([entry.size for _, entry in settled], dtype=np.int64),
        times=np.array([entry.time for _, entry in settled], dtype=np.int64),
        digests=np.frombuffer(b"".join(entry.digest for _, entry in settled), dtype=np.uint8),
        shapes=np.array([(entry.width, entry.height) for _, entry in settled], dtype=np.int64),
        modes=np.array([entry.mode for _, entry in settled], dtype="S8"),
    )
    file = _cache_file(root)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, buffer.getvalue())
