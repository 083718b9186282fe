"""A set of images of any kind, as an `ImageData`: uint8 images [C, S, S] and labels. What all kinds have in common.

Data are identified by their contents: two sets with the same fingerprint are the same set.
"""

from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ...kernels.errors import InputError
from ..sections import DataConfig
from .files import FEW, few, line_of
from .splits import beside

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


def fitted(image: Image.Image, channels: int, size: int) -> Tensor:
    """A decoded image as it is in a set: grey or RGB, its centre square, uint8 [channels, size, size]."""
    image = fit(image.convert("L" if channels == 1 else "RGB"), size)
    return torch.from_numpy(channels_last(image)).permute(2, 0, 1).contiguous()


class ImageData(Dataset[tuple[Tensor, int]]):
    """A set of images: item i is (uint8 [C, S, S], label).

    `size` S, `channels` C, `num_classes` (0: unconditional, every label 0), `class_names`, `labels` int64 [N],
    `fingerprint` 16 hex digits of SHA-256 over every byte (sets in memory: images [N, C, S, S], then labels; folders:
    names and contents of the files; WebDataset and Hugging Face: contents and label of each image).
    """

    fingerprint: str
    omissions: str = ""  # text about the files of a folder that are no part of the set, other than hidden ones

    def __init__(self, config: DataConfig, labels: Labels, class_names: list[str]) -> None:
        check_labels(config, labels, class_names)
        self.size, self.channels, self.num_classes = config.size, config.channels, config.num_classes
        self.class_names = class_names if config.num_classes else []
        self.labels = labels.astype(np.int64) if config.num_classes else np.zeros(len(labels), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> Tensor:
        """Image i, uint8 [C, S, S]."""
        raise NotImplementedError

    def images_at(self, indices: NDArray[np.int64]) -> Tensor:
        """Several images, uint8 [N, C, S, S], which the caller may change."""
        return torch.stack([self.image(int(i)) for i in indices])

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.image(i), int(self.labels[i])


def check_labels(config: DataConfig, labels: Labels, class_names: list[str]) -> None:
    """Raise InputError for fewer than two images, a class without an image, and another number of classes than
    `data.num_classes`, unless that is 0."""
    where = f"data {config.kind!r}" + (f" at {config.path}" if config.path else "")
    if len(labels) < 2:
        raise InputError(f"{where} has too few images: {len(labels)}, at least 2 are needed")
    count, empty = empty_classes(labels, len(class_names))
    if config.num_classes and count:
        names = few([class_names[i] if i < len(class_names) else str(i) for i in empty], count)
        raise InputError(
            f"{where} has classes without an image: {names}; number the labels from 0 without gaps, or set "
            "data.num_classes to 0 for unconditional training"
        )
    if config.num_classes not in (0, len(class_names)):
        raise InputError(
            f"data.num_classes is {config.num_classes}, but {where} has {len(class_names)} classes; "
            f"set it to {len(class_names)}, or to 0 for unconditional training"
        )


def empty_classes(labels: Labels, classes: int) -> tuple[int, list[int]]:
    """The number of classes without an image, of at least `classes`, and the first of them."""
    present = set(np.unique(labels).tolist())
    total = max(classes, max(present, default=-1) + 1)
    return total - len(present), list(islice((i for i in range(total) if i not in present), FEW))


def channels_last(image: Image.Image) -> NDArray[np.uint8]:
    array = np.array(image, dtype=np.uint8)
    return array[..., None] if array.ndim == 2 else array


def no_path(config: DataConfig) -> InputError:
    return InputError(f"data.path is not set; data {config.kind!r} needs it")


def data_path(config: DataConfig) -> Path:
    """`data.path`, or what lies beside it for the test split. Raises InputError if it is not set, does not exist, or
    cannot be read."""
    if config.path is None:
        raise no_path(config)
    path = beside(config) if config.split == "test" else Path(config.path)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"data.path {line_of(path)} does not exist") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read data.path {line_of(path)}: {getattr(error, 'strerror', error)}") from None
    return path
