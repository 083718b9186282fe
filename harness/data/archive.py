"""Arrays in .npz files: read without running code, and never larger than the memory."""

import lzma
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from numpy.typing import NDArray

from ...kernels.errors import InputError
from .one_line import line_of, reason_of

BAD_ARCHIVE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
# An array of an .npz that is larger than this, and so many times larger than its file, is no set of images.
BOMB_BYTES = 2**30
BOMB_RATIO = 200
T = TypeVar("T")


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
        raise InputError(f"{line_of(path)} is not a readable .npz file: {_hint(path) or reason_of(error)}") from None


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
