"""A picture of some images of a set of samples, for a first look."""

from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..harness.disk import write_atomically
from ..harness.shards import Samples

SIDE = 8  # the most images in a row and in a column


def choose(labels: NDArray[np.int64]) -> tuple[list[NDArray[np.int64]], list[int]]:
    """The indices of the images in each row of a grid, and the class of each row.

    If every class has as many images as another, but for one, and at least two: a row for each class, or for SIDE of
    them, evenly from the first on. Otherwise the rows have no class and images evenly from the first on.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) > 1 and counts.min() > 1 and counts.max() - counts.min() <= 1:
        few = classes[_evenly(len(classes), SIDE)]
        return [np.flatnonzero(labels == label)[:SIDE] for label in few], few.tolist()
    indices = _evenly(len(labels), SIDE**2)
    return [indices[at : at + SIDE] for at in range(0, len(indices), SIDE)], []


def _evenly(count: int, most: int) -> NDArray[np.int64]:
    """At most `most` of the numbers 0 … count-1, from 0 on at even distances."""
    most = min(count, most)
    return np.arange(most) * count // most


def write_grid(path: Path, images: Samples, labels: NDArray[np.int64]) -> list[int]:
    """Write a PNG of up to SIDE × SIDE of the images uint8 [N, H, W, 1 or 3]. Returns the classes of its rows, empty if
    the rows have none."""
    from ..reports.samples import paste_of  # imports matplotlib, which takes a second

    rows, classes = choose(labels)
    buffer = BytesIO()
    Image.fromarray(paste_of(images, rows)).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())
    return classes
