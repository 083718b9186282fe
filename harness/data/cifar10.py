"""CIFAR-10 in torchvision's layout, from its files or from a copy that was packed again.

The files are pickles. They are read without pickle's power to run code: only plain types and numeric arrays are
allowed, and arrays are made from their bytes here.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...kernels.errors import InputError
from .archive import check_memory
from .files import line_of

FOLDER = "cifar-10-batches-py"
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
IMAGES = 10_000  # in each batch
CLASSES = 10
_INTEGERS = "u1 u2 u4 u8 i1 i2 i4 i8".split()


class _Type:
    """The type of an array in a pickle, by its code, such as `u1`."""

    def __init__(self, code: str = "", *_: Any) -> None:
        self.code, self.order = code, "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class _Array:
    """An array in a pickle: its shape, its type and its bytes."""

    def __init__(self, content: Any = b"", kind: Any = None, shape: Any = (), order: str = "C") -> None:
        self.content, self.kind, self.shape, self.order = content, kind, shape, order

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.kind, columns_first, self.content = state
        self.order = "F" if columns_first else "C"

    def integers(self) -> NDArray:
        """The array. Raises ValueError for types other than integers, and where bytes and shape do not match."""
        code = getattr(self.kind, "code", None)
        if code not in _INTEGERS or self.kind.order == ">":
            raise ValueError(f"an array of {code}, not of integers")
        # Pickles of Python 2 have bytes as text.
        content = self.content.encode("latin1") if isinstance(self.content, str) else bytes(self.content)
        return np.frombuffer(content, dtype=code).reshape(self.shape, order="F" if self.order == "F" else "C")


def _empty(*_: Any) -> _Array:
    return _Array()


def _scalar(kind: _Type, content: bytes) -> int:
    return int(_Array(content, kind, (1,)).integers()[0])


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


_NUMPY = {"_reconstruct": _empty, "scalar": _scalar, "_frombuffer": _Array}
_ALLOWED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for module in ("multiarray", "numeric")
        for name, function in _NUMPY.items()
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it contains {module}.{name}, not only numbers and text")
        return _ALLOWED[module, name]


def _read(file: Path) -> dict[str, Any]:
    """The entries of a file. Names that are bytes become text."""
    try:
        check_memory(file.stat().st_size, line_of(file))
        with open(file, "rb") as opened:
            content = _Unpickler(opened, encoding="latin1").load()
    except FileNotFoundError:
        raise InputError(
            f"data.path {line_of(file.parent.parent)} does not contain all of CIFAR-10 ({file.name} is missing); "
            f"expected torchvision's layout: a folder {FOLDER} with data_batch_1 … data_batch_5, test_batch and "
            "batches.meta. To get it, unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz in FOLDER, or run "
            "python -c \"from torchvision.datasets import CIFAR10; CIFAR10('FOLDER', download=True)\"; then "
            "data.path=FOLDER"
        ) from None
    except InputError:
        raise
    except Exception as error:  # whatever the bytes of a damaged file make of the allowed types
        raise InputError(f"{line_of(file)} is not a readable file of CIFAR-10: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{line_of(file)} is not a file of CIFAR-10: a {type(content).__name__}, not a dict")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}


def _integers(file: Path, name: str, value: Any) -> NDArray:
    try:
        return value.integers() if isinstance(value, _Array) else np.asarray(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{line_of(file)}: {name} cannot be read: {error}") from None


def _batch(file: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The images uint8 [N, 32, 32, 3] and labels of a batch."""
    content = _read(file)
    if absent := [name for name in ("data", "labels") if name not in content]:
        raise InputError(f"{line_of(file)} has no {absent[0]!r}, as a file of CIFAR-10 has")
    data, labels = (_integers(file, name, content[name]) for name in ("data", "labels"))
    if data.dtype != np.uint8 or data.shape != (IMAGES, 3072):
        raise InputError(f"{line_of(file)}: data is {data.dtype} {list(data.shape)}, not uint8 [{IMAGES}, 3072]")
    if labels.dtype.kind not in "iu" or labels.shape != (IMAGES,) or not 0 <= labels.min() <= labels.max() < CLASSES:
        raise InputError(
            f"{line_of(file)}: labels is {labels.dtype} {list(labels.shape)}, not [{IMAGES}] integers from 0 to 9"
        )
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels.astype(np.int64)


def read(path: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[str]]:
    """The images uint8 [N, 32, 32, 3], the labels and the names of the classes.

    Raises InputError for files that are missing, that cannot be read, or that have other arrays.
    """
    folder = path / FOLDER
    meta = _read(folder / "batches.meta").get("label_names")
    if not isinstance(meta, list) or len(meta) != CLASSES:
        raise InputError(f"{line_of(folder / 'batches.meta')} has no label_names, a list of {CLASSES} names")
    batches = [_batch(folder / name) for name in BATCHES[split]]
    names = [name.decode("latin1") if isinstance(name, bytes) else str(name) for name in meta]
    return np.concatenate([images for images, _ in batches]), np.concatenate([labels for _, labels in batches]), names
