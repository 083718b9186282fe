"""Grids of the images that runs drew: those of one run, one row per class, and those of all runs from equal noise."""

import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.lib import format as npy
from numpy.typing import NDArray

from ..harness.grid import CLASSES, GAP, REAL, paste
from ..harness.shards import Samples, Shards, images_of, labels_at
from ..kernels.errors import InputError
from .runs import Run
from .style import ENTRIES, PAGE, blank, caption, wrapped
from .table import Table

PER_CLASS = 8  # columns of the grid of a run
Images = NDArray[np.uint8]  # [N, H, W, 1 or 3]
Rows = list[NDArray[np.int64]]  # indices of images


@dataclass(frozen=True)
class Mosaic:
    """The images of a run in rows.

    picture   uint8 [height, width, 3]
    names     of its rows; none without classes
    strip     the first image of each row or, without classes, the first images: uint8 [N, H, W, 1 or 3]
    noise     what images of two runs have in common if they are drawn from equal noise: the seed, and the indices and
              labels of the strip
    """

    picture: Images
    names: list[str]
    strip: Images
    noise: tuple[object, ...]


def mosaic(run: Run) -> Mosaic | str:
    """The first images of each of the first classes of a run, or why there are none.

    Reads only the images that it shows and, in the `samples.npz` of an earlier version, those before. Raises
    InputError, one line, for a file that does not hold images uint8 [N, H, W, 1 or 3] and labels [N].
    """
    path = run.samples and images_of(run.samples)
    if path is None or not path.exists():
        return "the run has no samples"
    images, rows, indices, labels = _of_shards(path) if path.is_dir() else _of_file(path)
    if not len(indices):
        return "the run has no samples"
    named = len(np.unique(labels)) > 1
    first = np.array([row[0] for row in rows]) if named else np.concatenate(rows)[:CLASSES]
    names = [str(labels[indices[row[0]]]) for row in rows] if named else []
    seed = run.way.get("sample.seed")
    chosen = indices[first]
    noise = (run.info.get("seed") if seed is None else seed, tuple(chosen.tolist()), tuple(labels[chosen].tolist()))
    return Mosaic(paste(images, rows), names, images[first], noise)


def paste_of(images: Samples, rows: Rows) -> Images:
    """`paste` of images of which only those in `rows` are read."""
    few, places, _ = _few(images, rows)
    return paste(few, places)


def _few(images: Samples, rows: Rows) -> tuple[Images, Rows, NDArray[np.int64]]:
    """The images in some rows, the rows as places in them, and the indices of these images."""
    indices = np.unique(np.concatenate(rows)) if rows else np.empty(0, np.int64)
    few = [images[index : index + 1] for index in indices.tolist()]
    empty = np.empty((0, *images.shape[1:]), np.uint8)
    return np.concatenate(few) if few else empty, [np.searchsorted(indices, row) for row in rows], indices


def _of_shards(path: Path) -> tuple[Images, Rows, NDArray[np.int64], NDArray[np.int64]]:
    """The images of a grid, its rows as places in them, the indices of these images, and all labels."""
    shards, labels = Shards(path), labels_at(path)
    if shards.shape[-1] not in (1, 3) or labels.shape != shards.shape[:1]:
        raise InputError(f"{path} has images {list(shards.shape)} and labels {list(labels.shape)}")
    rows = choose(labels)
    return *_few(shards, rows), labels


def _of_file(path: Path) -> tuple[Images, Rows, NDArray[np.int64], NDArray[np.int64]]:
    """The same of a samples.npz."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("labels.npy") as file:
            labels = npy.read_array(file, allow_pickle=False)
        with zipfile.ZipFile(path) as archive, archive.open("images.npy") as file:
            read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
            shape, columns_first, dtype = read(file)
            fits = len(shape) == 4 and shape[-1] in (1, 3) and labels.shape == shape[:1]
            if not fits or dtype != np.uint8 or columns_first:
                raise ValueError(f"images must be uint8 [N, H, W, 1 or 3] with N labels, not {dtype} {list(shape)}")
            rows = choose(labels)
            needed = 1 + max((int(row[-1]) for row in rows), default=-1)
            images = np.frombuffer(file.read(needed * prod(shape[1:])), np.uint8).reshape(needed, *shape[1:])
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read as samples: {' '.join(str(error).split())}") from None
    return images, rows, np.arange(needed), labels


def real_images(runs: Iterable[Run]) -> tuple[Images, NDArray[np.int64]] | None:
    """The images that the first of these trainings has kept of its data, and their labels; None if none has."""
    for run in runs:
        path = run.samples.parent.parent / REAL if run.samples else None
        if path and path.is_file():
            try:
                with np.load(path) as file:
                    return file["images"], file["labels"]
            except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile):
                continue  # a damaged picture is no reason against the others
    return None


def choose(labels: NDArray[np.int64]) -> Rows:
    """The indices of each row of a grid: the first images of each class. With a single class: the first images, in
    rows."""
    classes = np.unique(labels)[:CLASSES]
    if len(classes) == 1:
        first = np.arange(min(len(labels), CLASSES * PER_CLASS))
        return [first[at : at + PER_CLASS] for at in range(0, len(first), PER_CLASS)]
    return [np.flatnonzero(labels == label)[:PER_CLASS] for label in classes]


def _show(axes: Axes, picture: Images, names: list[str]) -> None:
    axes.imshow(picture, interpolation="nearest")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks([])
    axes.set_anchor("N")
    pitch = (picture.shape[0] + GAP) / max(1, len(names))
    axes.set_yticks([(row + 0.5) * pitch - GAP / 2 for row in range(len(names))], names, fontsize=7)
    axes.tick_params(length=0, pad=2)


def samples(grid: Mosaic | str) -> Figure | str:
    """The samples of one run in a grid."""
    if isinstance(grid, str):
        return grid
    height, width, _ = grid.picture.shape
    figure = blank(width / 100 + 0.5, height / 100 + 0.3)
    axes = figure.add_subplot()
    _show(axes, grid.picture, grid.names)
    axes.set_ylabel("Class" if grid.names else "")
    return figure


def all_samples(
    overview: Table, pictures: dict[Run, Mosaic | str], faint: Callable[[str], bool] = lambda group: False
) -> Figure | str:
    """Images of all models from equal noise, one row per model and one column per image, above them real images of the
    same classes: the first seed of each model, at most `ENTRIES` models, the `faint` ones left out."""
    rows: dict[str, tuple[str, Run, Mosaic]] = {}
    for row in sorted(overview.rows, key=lambda row: row["seed"] or 0):
        picture = pictures[row["run"]]
        if not isinstance(picture, str):
            rows.setdefault(row["group"], (row["model_label"], row["run"], picture))
    order = [group for group in dict.fromkeys(row["group"] for row in overview.rows) if group in rows]
    shown = [rows[group] for group in order if not faint(group)][:ENTRIES]
    shapes = Counter(picture.strip.shape[1:] for *_, picture in shown)
    if not shapes:
        return "no run has samples"
    shape = shapes.most_common(1)[0][0]
    left_out = len(order) - shapes[shape]
    shown = [entry for entry in shown if entry[2].strip.shape[1:] == shape]
    noise = Counter(picture.noise for *_, picture in shown).most_common(1)[0][0]
    lead = next(picture for *_, picture in shown if picture.noise == noise)
    labels = [label + " ‡" * (picture.noise != noise) for label, _, picture in shown]
    strips = [picture.strip for *_, picture in shown]
    notes = [f"Seed {noise[0]}. Images in a column begin with the same noise" + (" and class." if lead.names else ".")]
    if real := _real_strip(lead, [run for _, run, _ in shown]):
        labels, strips = ["Real images", *labels], [*real, *strips]
    else:
        notes.append("No real images are on record; new trainings keep some.")
    if len(labels) < 2:
        return "one model has samples, and no real images are on record; its own figure shows them"
    if any(picture.noise != noise for *_, picture in shown):
        notes.append("‡: other noise, classes or images.")
    notes += [f"{left_out} more with samples {'is' if left_out == 1 else 'are'} not shown."] if left_out else []
    starts = np.cumsum([0, *map(len, strips)])
    grid = paste(np.concatenate(strips), [np.arange(*ends) for ends in pairwise(starts)])
    columns = max(map(len, strips))
    cell = 0.75 * PAGE / max(columns, 10)  # inches
    figure = blank(PAGE, 0.55 + cell * columns * grid.shape[0] / grid.shape[1])
    axes = figure.add_subplot()
    _show(axes, grid, [wrapped(label, 26) for label in labels])
    if lead.names:
        pitch = (grid.shape[1] + GAP) / columns
        axes.set_xticks([(at + 0.5) * pitch - GAP / 2 for at in range(len(lead.names))], lead.names)
        axes.xaxis.tick_top()
        axes.set_xlabel("Class")
        axes.xaxis.set_label_position("top")
    caption(figure, [" ".join(notes)])
    return figure


def _real_strip(lead: Mosaic, runs: list[Run]) -> list[Images]:
    """A row of real images of the classes of a row of samples, or nothing."""
    images, labels = real_images(runs) or (None, None)
    if images is None or labels is None or images.shape[1:] != lead.strip.shape[1:]:
        return []
    if not lead.names:
        return [images[: len(lead.strip)]]
    places = [np.flatnonzero(labels == int(name)) for name in lead.names]
    return [np.concatenate([images[place[:1]] for place in places])] if all(map(len, places)) else []
