"""Sets of images, by kind. A set of any kind is an `ImageData`: uint8 images [C, S, S] and labels.

Data are identified by their contents: two sets with the same fingerprint are the same set.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ...kernels.errors import InputError, unknown
from ..config import DataConfig
from ..random import Stream, generator
from .files import UNREADABLE, Say, check_memory, known_fingerprint, read_npz, unreadable
from .files import fingerprint as fingerprint_of_files

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SYNTHETIC_IMAGES = 320
Labels = NDArray[np.int64]


def fit(image: Image.Image, size: int) -> Image.Image:
    """Crop the centre square of an image, with side `size`, as ADM and DiT prepare ImageNet: box halving while the
    short side is at least twice `size`, bicubic resizing of the short side to `size`, then a centre crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class ImageData(Dataset[tuple[Tensor, int]]):
    """A set of images: item i is (uint8 [C, S, S], label).

    `size` S, `channels` C, `num_classes` (0: unconditional, every label 0), `class_names`, `labels` int64 [N],
    `fingerprint` 16 hex digits of SHA-256 over every byte (sets in memory: images [N, C, S, S], then labels; folders:
    names and contents of the files).
    """

    fingerprint: str

    def __init__(self, config: DataConfig, labels: Labels, class_names: list[str]) -> None:
        where = f"data {config.kind!r}" + (f" at {config.path}" if config.path else "")
        needed = max(2, len(class_names) if config.num_classes else 0)
        if len(labels) < needed:
            raise InputError(f"{where} has too few images: {len(labels)}, at least {needed} are needed")
        if config.num_classes not in (0, len(class_names)):
            raise InputError(
                f"data.num_classes is {config.num_classes}, but {where} has {len(class_names)} classes; "
                f"set it to {len(class_names)}, or to 0 for unconditional training"
            )
        self.size, self.channels, self.num_classes = config.size, config.channels, config.num_classes
        self.class_names = class_names if config.num_classes else []
        self.labels = labels.astype(np.int64) if config.num_classes else np.zeros(len(labels), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> Tensor:
        """Image i, uint8 [C, S, S]."""
        raise NotImplementedError

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.image(i), int(self.labels[i])


class ArrayData(ImageData):
    """Images in memory, from uint8 [N, H, W, C] with C 1 or 3. `fit` resizes those that are not [size, size]."""

    def __init__(self, config: DataConfig, images: NDArray[np.uint8], labels: Labels, class_names: list[str]) -> None:
        _check_memory(config, len(images))
        if len(images) and images.shape[1:3] != (config.size, config.size):
            images = np.stack([_channels_last(fit(_to_pil(image), config.size)) for image in images])
        if images.shape[3] == 1:
            images = images.repeat(config.channels, axis=3)
        elif config.channels == 1:
            images = np.stack([_channels_last(_to_pil(image).convert("L")) for image in images])
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        super().__init__(config, labels, class_names)
        self.images = torch.from_numpy(images)
        digest = hashlib.sha256(images.data)
        digest.update(labels.astype("<i8").data)
        self.fingerprint = digest.hexdigest()[:16]

    def image(self, i: int) -> Tensor:
        return self.images[i]


class FolderData(ImageData):
    """Images in files, decoded on demand. Every new or changed file is read at the start, so that a file that is not an
    image is an error before training and not in the middle of it."""

    def __init__(
        self, config: DataConfig, files: list[Path], labels: Labels, class_names: list[str], say: Say | None
    ) -> None:
        super().__init__(config, labels, class_names)
        self.files = files
        self.fingerprint = fingerprint_of_files(_path(config), files, say)

    def image(self, i: int) -> Tensor:
        try:
            with Image.open(self.files[i]) as file:
                image = fit(file.convert("L" if self.channels == 1 else "RGB"), self.size)
        except UNREADABLE as error:
            raise unreadable(self.files[i], error) from None
        return torch.from_numpy(_channels_last(image)).permute(2, 0, 1).contiguous()


def _to_pil(image: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def _channels_last(image: Image.Image) -> NDArray[np.uint8]:
    array = np.array(image, dtype=np.uint8)
    return array[..., None] if array.ndim == 2 else array


def _check_memory(config: DataConfig, count: int) -> None:
    needed = count * config.channels * config.size**2
    check_memory(needed, f"data {config.kind!r}: {count:,} images of data.size {config.size}")


def _no_path(config: DataConfig) -> InputError:
    return InputError(f"data.path is not set; data {config.kind!r} needs it")


def _path(config: DataConfig) -> Path:
    if config.path is None:
        raise _no_path(config)
    path = Path(config.path)
    if not path.exists():
        raise InputError(f"data.path {config.path} does not exist")
    return path


def _digits(config: DataConfig, say: Say | None) -> ImageData:
    """scikit-learn's 1,797 handwritten digits, 8 × 8 at 17 grey levels, enlarged."""
    from sklearn.datasets import load_digits  # takes a second to import

    if config.size < 8:
        raise InputError(f"data.size must be 8 or more for digits, not {config.size}")
    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(np.asarray(pixels) * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return ArrayData(config, images, np.asarray(labels, dtype=np.int64), [str(i) for i in range(10)])


def _npz(config: DataConfig, say: Say | None) -> ImageData:
    """An .npz file with `images` uint8 [N, H, W, C] or [N, H, W] and optional integer `labels` [N], from class 0 to the
    highest label."""
    path = _path(config)
    arrays = read_npz(path, ("images", "labels"))
    if "images" not in arrays:
        raise InputError(f"{path} has no array 'images' (uint8 [N, H, W, C] or [N, H, W])")
    images = arrays["images"]
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape[1:]:
        actual = f"{images.dtype} {list(arrays['images'].shape)}"
        raise InputError(f"{path}: images is {actual}, not uint8 [N, H, W, C] or [N, H, W]")
    if images.shape[3] != config.channels:
        raise InputError(f"data.channels is {config.channels}, but the images of {path} have {images.shape[3]}")
    labels = arrays.get("labels", np.zeros(len(images), dtype=np.int64))
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        actual = f"{labels.dtype} {list(labels.shape)}"
        raise InputError(f"{path}: labels is {actual}, not [{len(images)}] integers of 0 or more")
    return ArrayData(config, images, labels.astype(np.int64), [str(i) for i in range(int(labels.max(initial=0)) + 1)])


def _folder(config: DataConfig, say: Say | None) -> ImageData:
    """A folder of class folders (of any depth), or a folder of images, which is one class. Hidden files are ignored."""
    root = _path(config)
    groups = _files_by_class(root)
    labels = np.repeat(np.arange(len(groups)), [len(group) for group in groups.values()])
    names = ["0"] if list(groups) == [root] else [folder.name for folder in groups]
    return FolderData(config, [file for group in groups.values() for file in group], labels, names, say)


def _files_by_class(root: Path) -> dict[Path, list[Path]]:
    """The images of each class folder, sorted. Where `root` has no folders, its own images are one class."""
    if not root.is_dir():
        raise InputError(f"data.path {root} is not a folder")
    classes = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    flat = [entry for entry in sorted(root.iterdir()) if _is_image(entry)]
    if flat and classes:
        raise InputError(
            f"{root} contains images ({flat[0].name}) and folders ({classes[0].name}); expected only one of the two"
        )
    groups = {folder: sorted(_images_below(folder)) for folder in classes} or {root: flat}
    for folder, group in groups.items():
        if not group:
            raise InputError(f"{folder} contains no image; supported are {', '.join(SUFFIXES)}")
    return groups


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


def _images_below(folder: Path) -> list[Path]:
    paths = (Path(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names)
    return [path for path in paths if _is_image(path)]


def _cifar10(config: DataConfig, say: Say | None) -> ImageData:
    """CIFAR-10 as torchvision stores it, with torchvision's check of its checksums."""
    from torchvision.datasets import CIFAR10  # not needed by the other kinds

    if config.path is None:
        raise _no_path(config)
    try:
        data = CIFAR10(config.path, train=config.split == "train", download=False)
    except RuntimeError:
        raise InputError(
            f"data.path {config.path} does not contain all of CIFAR-10; expected torchvision's layout: "
            "a folder cifar-10-batches-py with data_batch_1 … data_batch_5, test_batch and batches.meta"
        ) from None
    return ArrayData(config, np.asarray(data.data), np.array(data.targets, dtype=np.int64), list(data.classes))


def _synthetic(config: DataConfig, say: Say | None) -> ImageData:
    """320 smooth images, or one per class if that is more. Each class has its own three waves, each image its own
    phases and colours. The images are the same in every call."""
    classes = max(1, config.num_classes)
    labels = np.arange(max(SYNTHETIC_IMAGES, classes)) % classes
    _check_memory(config, len(labels))
    across = np.arange(config.size) / config.size
    waves = [generator(0, Stream.INIT, label).uniform(-2, 2, size=(3, 2)) for label in range(classes)]
    images = np.zeros((len(labels), config.size, config.size, config.channels), dtype=np.uint8)
    for i, label in enumerate(labels):
        rng = generator(0, Stream.INIT, classes + i)
        phase, colour = rng.uniform(0, 1, size=3), rng.uniform(-1, 1, size=(3, config.channels))
        turns = (waves[label] @ np.stack(np.meshgrid(across, across)).reshape(2, -1)) + phase[:, None]
        picture = np.cos(2 * np.pi * turns).T @ colour
        images[i] = np.rint(127.5 + 42.5 * picture).reshape(config.size, config.size, -1)
    return ArrayData(config, images, labels, [str(label) for label in range(classes)])


KINDS: dict[str, Callable[[DataConfig, Say | None], ImageData]] = {
    "digits": _digits,
    "npz": _npz,
    "folder": _folder,
    "cifar10": _cifar10,
    "synthetic": _synthetic,
}
ON_DISK = ("npz", "folder", "cifar10")
SPLITS = {"cifar10": ("train", "test")}  # of the kinds that have more than train


def load(config: DataConfig, say: Say | None = None) -> ImageData:
    """Load the images that `config` describes. `say` gets a line every few seconds while a large set is read.

    Raises InputError, in one line, for an invalid kind, split, path, file, or number of classes or channels.
    """
    if config.kind not in KINDS:
        raise unknown("data.kind", config.kind, KINDS)
    if config.split not in (splits := SPLITS.get(config.kind, ("train",))):
        raise unknown(f"data.split of {config.kind!r}", config.split, splits)
    if config.channels not in (1, 3):
        raise InputError(f"data.channels must be 1 or 3 for images, not {config.channels}")
    return KINDS[config.kind](config, say)


def fingerprint(config: DataConfig) -> str | None:
    """The fingerprint of a set without reading the images of a folder. None where the files are missing, or where files
    of a folder are new or changed since they were last read. Raises InputError like `load` for existing data."""
    if config.kind in ON_DISK and (config.path is None or not Path(config.path).exists()):
        return None
    if config.kind != "folder":
        return load(config).fingerprint
    root = _path(config)
    return known_fingerprint(root, [file for group in _files_by_class(root).values() for file in group])
