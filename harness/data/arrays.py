"""Sets of images that are in memory as a whole."""

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..sections import DataConfig
from .archive import check_memory
from .image_data import ImageData, Labels, channels_last, fit


class Arrays(NamedTuple):
    """A set in memory, as it is stored: `images` uint8 [N, H, W, C], `labels` int64 [N], and the names of classes."""

    images: NDArray[np.uint8]
    labels: Labels
    class_names: list[str]


class ArrayData(ImageData):
    """Images in memory, from uint8 [N, H, W, C] with C 1 or 3. `fit` resizes those that are not [size, size]."""

    def __init__(self, config: DataConfig, images: NDArray[np.uint8], labels: Labels, class_names: list[str]) -> None:
        check_size(config, len(images))
        if len(images) and images.shape[1:3] != (config.size, config.size):
            images = np.stack([channels_last(fit(_to_pil(image), config.size)) for image in images])
        if images.shape[3] == 1:
            images = images.repeat(config.channels, axis=3)
        elif config.channels == 1:
            images = np.stack([channels_last(_to_pil(image).convert("L")) for image in images])
        images = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        super().__init__(config, labels, class_names)
        self.images = torch.from_numpy(images)
        digest = hashlib.sha256(images.data)
        digest.update(labels.astype("<i8").data)
        self.fingerprint = digest.hexdigest()[:16]

    def image(self, i: int) -> Tensor:
        return self.images[i]

    def images_at(self, indices: NDArray[np.int64]) -> Tensor:
        return self.images[torch.from_numpy(indices)]


def _to_pil(image: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def check_size(config: DataConfig, count: int) -> None:
    needed = count * config.channels * config.size**2
    check_memory(needed, f"data {config.kind!r}: {count:,} images of data.size {config.size}")
