"""Files of data: fingerprints of their bytes, and a check that they can be read.

The digest of each file is cached with the file's size and modification time, so that the second fingerprint of a large
set reads no file. The user's cache folder has one cache file for each data folder. A cache that cannot be read or
written only costs time.
"""

import hashlib
import io
import lzma
import math
import os
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...kernels.errors import InputError
from ...kernels.nvrtc import cache_folder
from ..record import write_atomically

UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for bad files
BAD_ARCHIVE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
THREADS = 16
PART = 512  # files between two checks of the clock
SAY_S = 5.0  # seconds between two lines about a large set
# A file that changes twice within one tick of its file system's clock has the same time after both changes. So the
# digest of a file that changed this recently is not cached.
SETTLED_NS = 2 * 10**9
Say = Callable[[str], None]


class Entry(NamedTuple):
    """A file as it was read: its size in bytes, its modification time in nanoseconds, and SHA-256 of its bytes."""

    size: int
    time: int
    digest: bytes


def unreadable(file: Path, error: object) -> InputError:
    """The error, one line, of an image that cannot be read."""
    return InputError(f"unreadable image {file}: {' '.join(str(error).split())}")


def fingerprint(root: Path, files: Sequence[Path], say: Say | None = None) -> str:
    """16 hex digits of SHA-256 over the names below `root` and the bytes of image files, in their order.

    Every file that is not in the cache is read once, in parallel, and its header is checked. `say` gets a line every
    few seconds. Raises InputError for a file that is not an image or has more than 8 bits per channel.
    """
    names = _names(root, files)
    with ThreadPoolExecutor(THREADS) as pool:
        entries = list(pool.map(_unchanged, files, _cached(root, names)))
        missing = [i for i, entry in enumerate(entries) if entry is None]
        last_line = time.monotonic()
        try:
            for start in range(0, len(missing), PART):
                if say is not None and time.monotonic() - last_line >= SAY_S:
                    say(f"reading {start:,} of {len(missing):,} files of {root}")
                    last_line = time.monotonic()
                part = missing[start : start + PART]
                for i, entry in zip(part, pool.map(_read_entry, [files[i] for i in part]), strict=True):
                    entries[i] = entry
        finally:  # files that were read before a bad file or a kill are not read again
            if missing:
                _write_cache(root, zip(names, entries, strict=True))
    return _joined(names, entries)


def known_fingerprint(root: Path, files: Sequence[Path]) -> str | None:
    """The `fingerprint` of a set whose files are all in the cache, else None. Reads no file."""
    names = _names(root, files)
    with ThreadPoolExecutor(THREADS) as pool:
        entries = list(pool.map(_unchanged, files, _cached(root, names)))
    return None if None in entries else _joined(names, entries)


def _names(root: Path, files: Sequence[Path]) -> list[bytes]:
    return [os.fsencode(file.relative_to(root).as_posix()) for file in files]


def _joined(names: Sequence[bytes], entries: Sequence[Entry | None]) -> str:
    digest = hashlib.sha256()
    for name, entry in zip(names, entries, strict=True):
        assert entry is not None
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


def _read_entry(file: Path) -> Entry:
    """Read a whole file and check its header."""
    try:
        with open(file, "rb") as opened:
            status = os.fstat(opened.fileno())
            content = opened.read()
        with Image.open(io.BytesIO(content)) as image:
            mode = image.mode
    except UNREADABLE as error:
        # Pillow adds the object that it read from, which tells the user nothing.
        raise unreadable(file, str(error).split(" <_io.")[0]) from None
    if mode.startswith(("I", "F")):
        raise unreadable(file, f"mode {mode}, expected 8 bits per channel")
    settled = time.time_ns() - status.st_mtime_ns >= SETTLED_NS
    return Entry(status.st_size, status.st_mtime_ns if settled else -1, hashlib.sha256(content).digest())


def _cache_file(root: Path) -> Path:
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return cache_folder() / "data" / f"{name}.npz"


def _cached(root: Path, names: Sequence[bytes]) -> list[Entry | None]:
    """The cached entry of each name, None where there is none."""
    try:
        arrays = read_npz(_cache_file(root), ("names", "sizes", "times", "digests"))
        cached_names = arrays["names"].tobytes().split(b"\0")
        sizes, times = arrays["sizes"].tolist(), arrays["times"].tolist()
        digests = [row.tobytes() for row in arrays["digests"].reshape(-1, 32)]
        entries = dict(zip(cached_names, map(Entry, sizes, times, digests), strict=True))
    except (InputError, KeyError, ValueError):
        return [None] * len(names)
    return [entries.get(name) for name in names]


def _write_cache(root: Path, entries: Iterable[tuple[bytes, Entry | None]]) -> None:
    settled = [(name, entry) for name, entry in entries if entry is not None and entry.time >= 0]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        names=np.frombuffer(b"\0".join(name for name, _ in settled), dtype=np.uint8),
        sizes=np.array([entry.size for _, entry in settled], dtype=np.int64),
        times=np.array([entry.time for _, entry in settled], dtype=np.int64),
        digests=np.frombuffer(b"".join(entry.digest for _, entry in settled), dtype=np.uint8),
    )
    file = _cache_file(root)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, buffer.getvalue())


# Arrays


def check_memory(needed: int, what: str) -> None:
    """Raise InputError if `needed` bytes are more than the memory of this machine."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > whole:
        gib = 2**30
        raise InputError(
            f"{what} would take {needed / gib:,.1f} GiB of memory, but this machine has {whole / gib:,.1f}"
        )


def read_npz(path: Path, names: Sequence[str]) -> dict[str, NDArray]:
    """The arrays of an .npz file that are among `names`. No code from the file runs.

    Raises InputError for a file that is not an .npz, is damaged, contains Python objects, or declares an array that is
    larger than the file or than the memory of this machine.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name: f"{name}.npy" for name in names if f"{name}.npy" in archive.namelist()}
            for name, member in members.items():
                with archive.open(member) as file:
                    _check_size(file, archive.getinfo(member).file_size, f"array {name} of {path}")
            for name, member in members.items():
                with archive.open(member) as file:
                    arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    except InputError:
        raise
    except (*BAD_ARCHIVE, MemoryError) as error:
        raise InputError(f"{path} is not a readable .npz file: {' '.join(str(error).split())}") from None
    return arrays


def _check_size(file: IO[bytes], held: int, what: str) -> None:
    """Raise an error if the header of an array does not match the size of its file, or memory does not suffice."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    header = file.tell()
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize != held - header:
        raise ValueError(f"the {what} should be {dtype} {list(shape)}, but has {held - header:,} bytes")
    check_memory(held, f"the {what}")
