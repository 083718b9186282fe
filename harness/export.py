"""Samples for other programs: the .npz of ADM's evaluator, or a folder of PNG files. Memory holds one batch."""

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image

from ..kernels.errors import InputError
from .disk import access
from .progress import Progress
from .shards import Samples

BATCH = 64  # images
FILES = (".npy", ".zip", ".tar", ".gz", ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".safetensors")  # no folders
Labels = NDArray[np.int64]


def names(labels: Labels, num_classes: int) -> list[str]:
    """The names of the PNG files of a set: the index and, unless the model has no classes, the class of each image."""
    classes = [f"-class{label}" for label in labels.tolist()] if num_classes else [""] * len(labels)
    return [f"{index:06d}{text}.png" for index, text in enumerate(classes)]


def check_target(path: Path, files: Iterable[str]) -> None:
    """Raise InputError if samples cannot be written to `path`, an .npz or a folder of the PNG `files`: for another kind
    of file, a folder with anything else in it, or a place that cannot be written."""
    if path.suffix.lower() in FILES:
        raise InputError(f"--to {path} is neither a FILE.npz nor a folder for PNG files")
    with access("write", path):
        if path.suffix == ".npz" and path.is_dir():
            raise InputError(f"--to {path} is a folder: give another name")
        if path.suffix != ".npz" and path.exists():
            if not path.is_dir():
                raise InputError(f"--to {path} is a file, and neither a FILE.npz nor a folder for PNG files")
            if others := {one.name for one in path.iterdir()} - {*files}:
                raise InputError(f"--to {path} holds {min(others)}, which is not of these samples: give a new folder")
        there = next(one for one in (path, *path.absolute().parents) if one.exists())
        if not there.is_dir() and there != path:
            raise InputError(f"cannot write {path}: {there} is a file")
        if not os.access(there, os.W_OK):
            raise InputError(f"cannot write {path}: {there} is not writable")


def export(path: Path, images: Samples, labels: Labels, num_classes: int, progress: Progress) -> None:
    """Write images uint8 [N, H, W, C] and labels [N] to `path`.

    An .npz gets `arr_0`, the images, and `arr_1`, the labels, as the evaluator of ADM (2105.05233) reads them; it
    appears complete or not at all. A folder gets a PNG file for each image (`names`). Raises InputError for damaged
    samples and for a place that cannot be written.
    """
    with access("write", path, missing=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".npz":
            _write_npz(path, images, labels, progress)
        else:
            path.mkdir(exist_ok=True)
            _write_pngs(path, images, names(labels, num_classes), progress)


def _batches(images: Samples, progress: Progress) -> Iterable[NDArray[np.uint8]]:
    for start in range(0, len(images), BATCH):
        yield images[start : start + BATCH]
        progress.update("export", min(start + BATCH, len(images)), len(images))


def _write_npz(path: Path, images: Samples, labels: Labels, progress: Progress) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with zipfile.ZipFile(temporary, "w") as archive:
            _write_member(archive, "arr_0", images.shape, images.dtype, _batches(images, progress))
            _write_member(archive, "arr_1", labels.shape, labels.dtype, [labels])
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_member(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], parts: Iterable[NDArray[Any]]
) -> None:
    """An array that is written one part after the other, uncompressed."""
    header = {"shape": shape, "fortran_order": False, "descr": npy.dtype_to_descr(dtype)}
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
        npy.write_array_header_1_0(file, header)
        for part in parts:
            file.write(part.tobytes())


def _write_pngs(folder: Path, images: Samples, files: list[str], progress: Progress) -> None:
    index = 0
    for batch in _batches(images, progress):
        for image in batch:
            Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(folder / files[index])
            index += 1
