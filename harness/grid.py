"""Pictures of several images."""

from collections.abc import Sequence
from math import ceil

import numpy as np
from numpy.typing import NDArray

REAL = "real.npz"  # in the folder of a training: a few of its images
CLASSES = 10  # rows of the grid of a run, and columns of the grid of all runs
CELL, GAP = 48, 3  # pixels: the least side of an enlarged image, and the space between images


def paste(images: NDArray[np.uint8], rows: Sequence[NDArray[np.int64]]) -> NDArray[np.uint8]:
    """Rows of the images uint8 [N, H, W, 1 or 3], given by their indices, side by side on white, every pixel enlarged
    to a square of pixels: uint8 [height, width, 3]."""
    if not rows:
        return np.empty((0, 0, 3), np.uint8)
    scale = max(1, ceil(CELL / max(images.shape[1:3])))
    height, width = (scale * side + GAP for side in images.shape[1:3])
    picture = np.full((len(rows) * height - GAP, max(map(len, rows)) * width - GAP, 3), 255, np.uint8)
    for down, row in enumerate(rows):
        for right, index in enumerate(row):
            large = images[index].repeat(scale, axis=0).repeat(scale, axis=1)
            picture[down * height : (down + 1) * height - GAP, right * width : (right + 1) * width - GAP] = large
    return picture
