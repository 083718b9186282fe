"""Files of data: fingerprints of their bytes, and a check that they can be read.

Every image is decoded once. Its digest, size and mode are cached with the file's size and modification time, so that
the second fingerprint of a large set reads no file. The user's cache folder has one cache file for each data folder.
A cache that cannot be read or written only costs time.
"""

import hashlib
import io
import lzma
import math
import os
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...kernels.errors import InputError
from ...kernels.nvrtc import cache_folder
from ..disk import write_atomically

# What Pillow raises for bad files.
UNREADABLE = (
    *(OSError, SyntaxError, ValueError, EOFError, MemoryError, struct.error, zlib.error),
    Image.DecompressionBombError,
)
BAD_ARCHIVE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # of the suffixes in folder.py; others could start programs, as EPS does
THREADS = 16
PART = 512  # files between two checks of the clock
SAY_S = 5.0  # seconds between two lines about a large set
FEW = 5  # names in a message
# A file that changes twice within one tick of its file system's clock has the same time after both changes. So the
# digest of a file that changed this recently is not cached.
SETTLED_NS = 2 * 10**9
# An array of an .npz that is larger than this, and so many times larger than its file, is no set of images.
BOMB_BYTES = 2**30
BOMB_RATIO = 200
Say = Callable[[str], None]
T = TypeVar("T")


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


def line_of(file: Path) -> str:
    """A path as one line of text that any UTF-8 output takes, whatever bytes it has."""
    return os.fsencode(file).decode("utf-8", "backslashreplace").replace("\n", "\\n")


def few(texts: Sequence[str], count: int | None = None, separator: str = ", ") -> str:
    """The first of `texts`, and how many of all `count` are not named."""
    rest = (len(texts) if count is None else count) - len(texts[:FEW])
    return separator.join(texts[:FEW]) + (f" and {rest:,} more" if rest else "")


def unreadable(file: Path, error: BaseException | str) -> InputError:
    """The error, one line, of an image that cannot be read."""
    return InputError(f"unreadable image {line_of(file)}: {_reason(error)}")


def _reason(error: BaseException | str) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # Pillow adds the object that it read from, which tells the user nothing.
    text = " ".join(str(error).split(" <_io.")[0].split())
    return text or type(error).__name__


def fingerprint(root: Path, files: Sequence[Path], say: Say | None = None) -> str:
    """16 hex digits of SHA-256 over the names below `root` and the bytes of image files, in their order.

    Raises InputError, like `whole`, for files that cannot be read. `say` gets a line every few seconds.
    """
    return fingerprint_of(root, files, whole(entries(root, files, say)))


def entries(root: Path, files: Sequence[Path], say: Say | None = None) -> list[Entry | Damage]:
    """What is rows of each image file below `root`.

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
    damaged = [entry for entry in rows if isinstance(entry, Damage)]
    if len(damaged) == 1:
        raise unreadable(*damaged[0])
    if damaged:
        texts = [f"{line_of(file)}: {reason}" for file, reason in damaged[:FEW]]
        raise InputError(
            f"{len(damaged):,} of {len(rows):,} images are unreadable ({few(texts, len(damaged), '; ')}); "
            "lamabench data check names them all"
        )
    return [entry for entry in rows if isinstance(entry, Entry)]


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
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        image.load()
    return image, status, content


def _read_entry(file: Path) -> Entry | Damage:
    try:
        image, status, content = read_image(file)
    except UNREADABLE as error:
        return Damage(file, _reason(error))
    if image.mode.startswith(("I", "F")):
        return Damage(file, f"mode {image.mode}, expected 8 bits per channel")
    settled = time.time_ns() - status.st_mtime_ns >= SETTLED_NS
    changed = status.st_mtime_ns if settled else -1
    return Entry(status.st_size, changed, hashlib.sha256(content).digest(), *image.size, image.mode)


def _cache_file(root: Path) -> Path:
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return cache_folder() / "data" / f"{name}.npz"


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


# Arrays


def check_memory(needed: int, what: str) -> None:
    """Raise InputError if `needed` bytes are more than the memory of this machine."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > whole:
        gib = 2**30
        raise InputError(
            f"{what} would take {needed / gib:,.1f} GiB of memory, but this machine has {whole / gib:,.1f}"
        )


def npz_headers(path: Path, names: Sequence[str]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The shape and the type of the arrays of an .npz file that are among `names`. Reads no array.

    Raises InputError for a file that is not an .npz, is damaged, contains Python objects, or declares an array that
    does not match its file, is larger than the memory of this machine, or is compressed as no images are.
    """
    return _with_archive(path, lambda archive: _headers(archive, path, names))


def read_npz(path: Path, names: Sequence[str]) -> dict[str, NDArray]:
    """The arrays of an .npz file that are among `names`. No code from the file runs. Raises InputError like
    `npz_headers`, before it reads an array."""

    def read(archive: zipfile.ZipFile) -> dict[str, NDArray]:
        arrays = {}
        for name in _headers(archive, path, names):
            with archive.open(f"{name}.npy") as file:
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
        return arrays

    return _with_archive(path, read)


class Rows:
    """An array of an .npz file, of which one slice is in memory. Slices are read in their order, as a stream; an
    earlier one begins again. Raises InputError if the file is damaged."""

    def __init__(self, path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.path, self.name, self.shape, self.dtype = path, name, shape, dtype
        self.row_bytes = math.prod(shape[1:]) * dtype.itemsize
        self._file: IO[bytes] | None = None
        self._next = 0  # the row at which the stream stands

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> NDArray:
        start, stop, _ = part.indices(len(self))
        return _guarded(self.path, lambda: self._read(start, max(start, stop)))

    def _read(self, start: int, stop: int) -> NDArray:
        if self._file is None or start < self._next:
            self.close()
            self._file, self._next = zipfile.ZipFile(self.path).open(f"{self.name}.npy"), 0  # noqa: SIM115
            _array_header(self._file)
        for _ in range(start - self._next):
            self._file.read(self.row_bytes)
        content = self._file.read((stop - start) * self.row_bytes)
        self._next = stop
        return np.frombuffer(content, self.dtype).reshape(stop - start, *self.shape[1:])

    def close(self) -> None:
        """Close the file. The next slice opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def npz_rows(path: Path, name: str) -> Rows | NDArray | None:
    """An array of an .npz file as rows to be read one slice at a time; None if the file has no such array. An array
    that is stored column by column is read whole. Raises InputError like `npz_headers`, except for a lack of memory."""

    def read(archive: zipfile.ZipFile) -> Rows | NDArray | None:
        headers = _headers(archive, path, (name,), whole=False)
        if name not in headers:
            return None
        with archive.open(f"{name}.npy") as file:
            columns_first = _array_header(file)[1]
        return read_npz(path, (name,))[name] if columns_first else Rows(path, name, *headers[name])

    return _with_archive(path, read)


def _with_archive(path: Path, read: Callable[[zipfile.ZipFile], T]) -> T:
    def opened() -> T:
        if path.exists() and not path.is_file():  # the end of a pipe may never come
            what = "it is a folder" if path.is_dir() else "it is neither a file nor a folder"
            raise InputError(f"{line_of(path)} is not a readable .npz file: {what}")
        with zipfile.ZipFile(path) as archive:
            return read(archive)

    return _guarded(path, opened)


def _guarded(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except InputError:
        raise
    except (*BAD_ARCHIVE, MemoryError) as error:
        raise InputError(f"{line_of(path)} is not a readable .npz file: {_hint(path) or _reason(error)}") from None


def _hint(path: Path) -> str:
    """What a file is instead, if it is a single array. Empty for other files."""
    with suppress(OSError), open(path, "rb") as file:
        if file.read(6) == np.lib.format.MAGIC_PREFIX:
            return "it is a single array (.npy); write it with numpy.savez(path, images=array)"
    return ""


def _headers(
    archive: zipfile.ZipFile, path: Path, names: Sequence[str], whole: bool = True
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    headers = {}
    for name in names:
        if f"{name}.npy" in archive.namelist():
            member, what = archive.getinfo(f"{name}.npy"), f"array {name} of {line_of(path)}"
            with archive.open(member) as file:
                headers[name] = _header(file, member.file_size, what)
            if whole:
                check_memory(member.file_size, f"the {what}")
            if member.file_size > max(BOMB_BYTES, BOMB_RATIO * min(member.compress_size, path.stat().st_size)):
                raise InputError(
                    f"the {what} would have {member.file_size / 2**30:.1f} GiB, but its file has only "
                    f"{member.compress_size / 2**20:.1f} MiB: images do not compress like this"
                )
    return headers


def _header(file: IO[bytes], held: int, what: str) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and the type of an array. Raises an error if they do not match the size of its file, or if it holds
    Python objects."""
    shape, _, dtype = _array_header(file)
    header = file.tell()
    if dtype.hasobject:
        raise ValueError(f"the {what} contains Python objects (allow_pickle), which are not read")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != held - header:
        raise ValueError(f"the {what} should be {dtype} {list(shape)}, but has {held - header:,} bytes")
    return shape, dtype


def _array_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the array is stored column by column, and type, from the beginning of an .npy file."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read_header(file)
