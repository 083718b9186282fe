"""Grids of the images that runs drew: one row per class, enlarged by a whole factor."""

import itertools
import zipfile
import zlib
from dataclasses import dataclass
from math import ceil, prod

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.lib import format as npy
from numpy.typing import NDArray

from ..harness.grid import GAP, paste
from ..harness.shards import Samples, Shards, images_of, labels_at
from ..kernels.errors import InputError
from .runs import Run
from .style import blank, wrapped

CLASSES, PER_CLASS = 10, 8  # rows and columns


@dataclass(frozen=True)
class Mosaic:
    """One picture, uint8 [height, width, 3], and the names of its rows; without classes there are no names."""

    picture: NDArray[np.uint8]
    names: list[str]


def mosaic(run: Run) -> Mosaic | str:
    """The first images of each of the first classes of a run, or why there are none.

    Reads only the images that it shows and, in the `samples.npz` of an earlier version, those before. Raises
    InputError, one line, for a file that does not hold images uint8 [N, H, W, 1 or 3] and labels [N].
    """
    path = run.samples and images_of(run.samples)
    if path is None or not path.exists():
        return "the run has no samples"
    if path.is_dir():
        shards, labels = Shards(path), labels_at(path)
        if shards.shape[-1] not in (1, 3) or labels.shape != shards.shape[:1]:
            raise InputError(f"{path} has images {list(shards.shape)} and labels {list(labels.shape)}")
        rows, names = choose(labels)
        return Mosaic(paste_of(shards, rows), names)
    try:
        with zipfile.ZipFile(path) as archive, archive.open("labels.npy") as file:
            labels = npy.read_array(file, allow_pickle=False)
        with zipfile.ZipFile(path) as archive, archive.open("images.npy") as file:
            read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
            shape, columns_first, dtype = read(file)
            fits = len(shape) == 4 and shape[-1] in (1, 3) and labels.shape == shape[:1]
            if not fits or dtype != np.uint8 or columns_first:
                raise ValueError(f"images must be uint8 [N, H, W, 1 or 3] with N labels, not {dtype} {list(shape)}")
            rows, names = choose(labels)
            needed = 1 + max((int(row[-1]) for row in rows), default=-1)
            images = np.frombuffer(file.read(needed * prod(shape[1:])), np.uint8).reshape(needed, *shape[1:])
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read as samples: {' '.join(str(error).split())}") from None
    return Mosaic(paste(images, rows), names) if needed else "the run has no samples"


def paste_of(images: Samples, rows: list[NDArray[np.int64]]) -> NDArray[np.uint8]:
    """`paste` of images of which only those in `rows` are read."""
    wanted = np.unique(np.concatenate(rows))
    few = np.concatenate([images[index : index + 1] for index in wanted.tolist()])
    return paste(few, [np.searchsorted(wanted, row) for row in rows])


def choose(labels: NDArray[np.int64]) -> tuple[list[NDArray[np.int64]], list[str]]:
    """The indices of each row of a grid, and the names of the rows. With a single class: the first images, in rows."""
    classes = np.unique(labels)[:CLASSES]
    if len(classes) == 1:
        first = np.arange(min(len(labels), CLASSES * PER_CLASS))
        return [first[at : at + PER_CLASS] for at in range(0, len(first), PER_CLASS)], []
    return [np.flatnonzero(labels == label)[:PER_CLASS] for label in classes], [str(label) for label in classes]


def _show(axes: Axes, grid: Mosaic) -> None:
    axes.imshow(grid.picture, interpolation="nearest")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_anchor("N")
    pitch = (grid.picture.shape[0] + GAP) / max(1, len(grid.names))
    axes.set_yticks([(row + 0.5) * pitch - GAP / 2 for row in range(len(grid.names))], grid.names, fontsize=7)
    axes.tick_params(length=0, pad=2)


def samples(grid: Mosaic | str) -> Figure | str:
    """The samples of one run in a grid."""
    if isinstance(grid, str):
        return grid
    height, width, _ = grid.picture.shape
    figure = blank(width / 100 + 0.5, height / 100 + 0.3)
    axes = figure.add_subplot()
    _show(axes, grid)
    axes.set_ylabel("Class" if grid.names else "")
    return figure


def all_samples(grids: list[tuple[str, Mosaic | str]]) -> Figure | str:
    """The grids of two to six runs, each below its label."""
    panels = [(label, grid) for label, grid in grids if not isinstance(grid, str)]
    if not 2 <= len(panels) <= 6:
        return f"{len(panels)} run(s) with samples; the joint figure is for 2 to 6"
    across = 2 if len(panels) in (2, 4) else 3
    down = ceil(len(panels) / across)
    tallest = max(grid.picture.shape[0] / grid.picture.shape[1] for _, grid in panels)
    figure = blank(3.4 * across, down * (3.2 * tallest + 0.4))
    for axes, panel in itertools.zip_longest(figure.subplots(down, across, squeeze=False).flat, panels):
        if panel is None:
            axes.set_visible(False)
            continue
        _show(axes, panel[1])
        axes.set_title(wrapped(panel[0], 36), fontsize=9)
    return figure
