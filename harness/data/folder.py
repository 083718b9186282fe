"""Images in a folder: what it contains, by class, what in it is left out, and the set that it is."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from ...kernels.errors import InputError
from ..sections import DataConfig
from . import files
from .files import UNREADABLE, Say, changed, few, line_of, unreadable
from .image_data import ImageData, Labels, data_path, fitted
from .splits import TEST_WORDS

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Why a path is left out.
HIDDEN = "hidden"
SUFFIX = "with another suffix"
DANGLING = "dangling links"
LOOP = "links to a folder above"
OTHER = "neither files nor folders"


class Listing(NamedTuple):
    """The images of each class folder, sorted; the paths that are left out, by reason; and the number of links that
    were followed. The only class of a folder without folders is the folder itself."""

    classes: dict[Path, list[Path]]
    left_out: dict[str, list[Path]]
    links: int

    @property
    def files(self) -> list[Path]:
        """All images, class after class."""
        return [file for group in self.classes.values() for file in group]

    def without_images(self) -> list[Path]:
        """The class folders that contain no image."""
        return [folder for folder, group in self.classes.items() if not group]

    def omissions(self, root: Path) -> str:
        """Text about what is left out, such as `2 with another suffix (a/x.tif, b/y.gif)`. Empty if nothing is."""
        texts = []
        for reason, paths in self.left_out.items():
            names = sorted(line_of(path.relative_to(root)) for path in paths)
            texts.append(f"{len(paths):,} {reason} ({few(names)})")
        return "; ".join(texts)


class _Walk:
    """Collects what is left out while folders are walked."""

    def __init__(self) -> None:
        self.left_out: dict[str, list[Path]] = {reason: [] for reason in (HIDDEN, SUFFIX, DANGLING, LOOP, OTHER)}
        self.links = 0

    def entries(self, folder: Path, above: frozenset[tuple[int, int]]) -> tuple[list[Path], list[Path]]:
        """The images and the folders in a folder. `above` identifies the folders that may not come again."""
        images, folders = [], []
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            for entry in entries:
                path = folder / entry.name
                reason = self._reason(entry, path, above)
                if reason is None:
                    self.links += entry.is_symlink()
                    (folders if entry.is_dir() else images).append(path)
                else:
                    self.left_out[reason].append(path)
        except OSError as error:
            raise InputError(f"cannot read {line_of(folder)}: {error.strerror}") from None
        return images, folders

    def _reason(self, entry: os.DirEntry[str], path: Path, above: frozenset[tuple[int, int]]) -> str | None:
        """Why an entry is left out, None if it is an image or a folder to walk."""
        if entry.name.startswith("."):
            return HIDDEN
        if entry.is_symlink() and not os.path.exists(path):  # or a link to itself
            return DANGLING
        if entry.is_dir():
            return LOOP if entry.is_symlink() and identity(path) in above else None
        if path.suffix.lower() not in SUFFIXES:
            return SUFFIX
        return None if entry.is_file() else OTHER

    def images_below(self, folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
        stack = [(folder, above)]
        while stack:
            inner, before = stack.pop()
            before = before | {identity(inner)}
            images, folders = self.entries(inner, before)
            yield from images
            stack += [(path, before) for path in folders]


def identity(folder: Path) -> tuple[int, int]:
    """Two numbers that are equal if and only if two paths are the same folder."""
    try:
        status = folder.stat()
    except OSError as error:
        raise InputError(f"cannot read {line_of(folder)}: {error.strerror}") from None
    return status.st_dev, status.st_ino


def listing(root: Path) -> Listing:
    """The images below `root`: a folder of class folders (of any depth), or a folder of images, which is one class.

    Links are followed, except links to a folder above. Hidden files and folders, other suffixes and dangling links are
    left out. Raises InputError for a folder that cannot be read, for one that has both images and folders, and for one
    whose folders are splits.
    """
    if not root.is_dir():
        raise InputError(f"data.path {line_of(root)} is not a folder")
    walk = _Walk()
    real = root.resolve()
    above = frozenset(identity(folder) for folder in (real, *real.parents))
    flat, folders = walk.entries(root, above)
    if flat and folders:
        raise InputError(
            f"{line_of(root)} contains images ({flat[0].name}) and folders ({folders[0].name}); "
            "expected only one of the two"
        )
    if {"train"} < (names := {folder.name for folder in folders}) <= {"train", *TEST_WORDS}:
        train = line_of(root / "train")
        raise InputError(f"{line_of(root)} contains splits ({few(sorted(names))}) and no classes: data.path={train}")
    classes = {folder: sorted(walk.images_below(folder, above)) for folder in sorted(folders)} or {root: flat}
    return Listing(classes, {reason: paths for reason, paths in walk.left_out.items() if paths}, walk.links)


def everything(root: Path) -> Listing:
    """The images in a folder and at any depth below it, sorted by path, as those of one class. What is left out is as
    in `listing`. Raises InputError for a folder that cannot be read."""
    walk = _Walk()
    above = frozenset(identity(folder) for folder in root.resolve().parents)
    files = sorted(walk.images_below(root, above), key=lambda file: file.relative_to(root).parts)
    return Listing({root: files}, {reason: paths for reason, paths in walk.left_out.items() if paths}, walk.links)


def check_classes(content: Listing) -> None:
    """Raise InputError if a class folder contains no image."""
    if empty := content.without_images():
        verb = "contains" if len(empty) == 1 else "contain"
        raise InputError(f"{few([*map(line_of, empty)])} {verb} no image; supported are {', '.join(SUFFIXES)}")


class FolderData(ImageData):
    """Images in files, decoded on demand. Every new or changed file is decoded at the start too, so that a damaged file
    is an error before training and not in the middle of it."""

    def __init__(self, config: DataConfig, say: Say | None = None) -> None:
        root, content, labels, names = listed(config)
        super().__init__(config, labels, names)
        self.files = content.files
        entries = files.whole(files.entries(root, self.files, say))
        self.fingerprint = files.fingerprint_of(root, self.files, entries)
        # Arrays, because the processes that load data share their memory.
        self.stamps = np.array([(entry.size, entry.time) for entry in entries], dtype=np.int64)
        self.digests = np.frombuffer(b"".join(entry.digest for entry in entries), dtype=np.uint8).reshape(-1, 32)
        content.left_out.pop(HIDDEN, None)
        if text := content.omissions(root):
            self.omissions = f"{line_of(root)}: left out are {text}; lamabench data check says more"

    def image(self, i: int) -> Tensor:
        file = self.files[i]
        try:
            image, status, content = files.read_image(file)
            image = fitted(image, self.channels, self.size)
        except UNREADABLE as error:
            raise unreadable(file, error) from None
        same = (status.st_size, status.st_mtime_ns) == tuple(self.stamps[i])
        if not same and hashlib.sha256(content).digest() != self.digests[i].tobytes():
            raise changed(file)
        return image


def listed(config: DataConfig) -> tuple[Path, Listing, Labels, list[str]]:
    """The folder of a set, what it contains, the label of each image and the names of the classes. Reads no image."""
    root = data_path(config)
    content = listing(root)
    check_classes(content)
    labels = np.repeat(np.arange(len(content.classes)), [len(group) for group in content.classes.values()])
    names = ["0"] if list(content.classes) == [root] else [folder.name for folder in content.classes]
    return root, content, labels, names
