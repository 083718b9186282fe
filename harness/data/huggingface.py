"""Data sets of the library `datasets`, on disk: a DatasetDict or a Dataset that `save_to_disk` wrote, or parquet files.

The column of images is the one of type Image, and labels are a column of type ClassLabel. Images must be inside the
data set; a path or an address in place of one is never followed. Parquet files are converted by `datasets`, which keeps
the result in its own cache, because they have no random access. Nothing is downloaded, and no code of a data set runs.
"""

import glob
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ...kernels.errors import InputError
from ..sections import DataConfig
from .files import Damage, Say
from .image_data import Labels, data_path
from .one_line import FEW, few, line_of, reason_of
from .packed import (
    NO_LABEL,
    Facts,
    Packed,
    PackedData,
    cached,
    examine,
    joined,
    keep,
    seldom,
    stamps_of,
)
from .splits import TEST_WORDS, beside, of_split

SAVED = "state.json"  # in the folder of a Dataset
BLOCK = 2**14  # rows whose facts are one file of the cache
HINT = "labels are a column of type ClassLabel: cast one and save the data set again"


class Source(NamedTuple):
    """A split as it lies on disk: its name for messages, the files that it is in, the types of its columns, the number
    of its rows, a column by name, and a function that opens the split as a `datasets.Dataset`."""

    place: Path
    files: list[Path]
    features: dict[str, Any]
    length: int
    column: Callable[[str], Any]
    rows: Callable[[], Any]


def library() -> Any:
    """The library `datasets`. Raises InputError if it is not installed."""
    try:
        import datasets
    except ImportError:
        raise InputError(
            "data 'hf' needs the library datasets, which is not installed: pip install 'lamabench[hf]'"
        ) from None
    return datasets


# Where a split is


def sources(config: DataConfig) -> Iterator[Source]:
    """What `data.split` of `data.path` may be, the best first: of test splits, there may be `test` and `validation`.
    Raises InputError if there is none."""
    if config.path is not None and not os.path.exists(config.path):
        raise InputError(
            f"data.path {config.path} does not exist; data 'hf' reads a folder on disk (save_to_disk writes one) "
            "and downloads nothing"
        )
    root = data_path(replace(config, split="train"))
    if not root.is_dir():
        raise InputError(f"data.path {line_of(root)} is not a folder")
    if (root / "dataset_dict.json").exists():
        yield from (_saved(root / name) for name in _named(root, config.split))
        return
    if groups := of_split(_parquet(root), config.split):
        yield from (_tables(root, group) for group in groups)
        return
    if config.split == "test":
        root = beside(config)
        groups = of_split(_parquet(root), "train")
    if (root / SAVED).exists():
        yield _saved(root)
    elif groups:
        yield _tables(root, groups[0])
    else:
        raise InputError(
            f"{line_of(root)} is no data set of Hugging Face: expected a folder that save_to_disk wrote "
            f"(dataset_dict.json or {SAVED}), or one with .parquet files"
        )


def _named(root: Path, split: str) -> list[str]:
    """The names of a split in a DatasetDict, the best first."""
    names = _guarded(root, lambda: [str(name) for name in json.loads(_text(root / "dataset_dict.json"))["splits"]])
    wanted = [name for name in (("train",) if split == "train" else TEST_WORDS) if name in names]
    if not wanted:
        raise InputError(f"{line_of(root)} has no split {split!r}, only {few(names) or 'none'}")
    return wanted


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def _parquet(root: Path) -> list[str]:
    """The paths below `root` of the parquet files in it, sorted, without hidden ones. None if `root` was saved."""
    paths = [] if (root / SAVED).exists() else sorted(file.relative_to(root) for file in root.rglob("*.parquet"))
    return [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]


def _saved(folder: Path) -> Source:
    """A split that `save_to_disk` wrote. Its files are mapped into memory and not read."""
    rows = _guarded(folder, lambda: library().Dataset.load_from_disk(str(folder), keep_in_memory=False))
    files = [Path(file["filename"]) for file in rows.cache_files]
    return Source(folder, files, rows.features, len(rows), rows.data.column, lambda: rows)


def _tables(root: Path, names: Sequence[str]) -> Source:
    """A split in parquet files. They are converted when their rows are needed."""
    datasets = library()
    import pyarrow
    from pyarrow import parquet

    files = [root / name for name in names]
    if len(folders := {*(line_of(file.parent) for file in files)}) > 1:
        raise InputError(
            f"parquet files of one split are in {few(sorted(folders))}: data.path must name one of these sets"
        )

    def column(name: str) -> Any:
        return pyarrow.concat_tables([parquet.read_table(file, columns=[name]) for file in files]).column(name)

    def rows() -> Any:
        shown = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            paths = [glob.escape(str(file.resolve())) for file in files]
            # Not load_dataset, which reports to the network that it was called.
            return datasets.Dataset.from_parquet(paths, keep_in_memory=False)
        finally:
            if shown:
                datasets.enable_progress_bars()

    features = _guarded(files[0], lambda: datasets.Features.from_arrow_schema(parquet.read_schema(files[0])))
    count = sum(_guarded(root, lambda: [parquet.read_metadata(file).num_rows for file in files]))
    place = root / names[0].partition("-")[0]
    return Source(place, files, features, count, column, rows)


T = TypeVar("T")


def _guarded(place: Path, read: Callable[[], T]) -> T:
    """What `read` returns. Any error becomes an InputError, whatever the bytes of a damaged file make of `datasets`."""
    try:
        return read()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{line_of(place)} cannot be read by datasets: {reason_of(error)}") from None


# What is in it


class Columns(NamedTuple):
    """The column of images, that of labels (None if there is none), and the names of its classes."""

    images: str
    labels: str | None
    class_names: list[str]


def columns_of(config: DataConfig, source: Source) -> Columns:
    """The columns of a split, by their types. Of several columns of labels, the one with `data.num_classes` classes.
    Raises InputError if there is no single column of images, or no single one of labels."""
    datasets, where = library(), line_of(source.place)
    there = f"its columns: {', '.join(f'{name} {_type(kind)}' for name, kind in source.features.items())}"
    images = [name for name, kind in source.features.items() if isinstance(kind, datasets.Image)]
    labels = {name: kind.names for name, kind in source.features.items() if isinstance(kind, datasets.ClassLabel)}
    if not images:
        raise InputError(f"{where} has no column of type Image ({there}): cast one and save the data set again")
    if len(images) > 1:
        raise InputError(f"{where} has {len(images)} columns of type Image ({there}): save it with one of them")
    fitting = [name for name, names in labels.items() if len(names) == config.num_classes]
    if len(labels) > 1 and config.num_classes and len(fitting) != 1:
        counts = ", ".join(f"{name} with {len(names)} classes" for name, names in labels.items())
        raise InputError(f"{where} has {len(labels)} columns of labels: {counts}; data.num_classes chooses one of them")
    name = fitting[0] if len(fitting) == 1 else next(iter(labels), None)
    return Columns(images[0], name, ["0"] if name is None else list(labels[name]))


def _type(kind: Any) -> str:
    return str(getattr(kind, "dtype", None) if type(kind).__name__ == "Value" else type(kind).__name__)


def _labels(source: Source, columns: Columns) -> Labels:
    """The labels int64 [N], `NO_LABEL` where a row has none."""
    if (name := columns.labels) is None:
        return np.full(source.length, NO_LABEL)
    column = _guarded(source.place, lambda: source.column(name).fill_null(NO_LABEL).to_numpy())
    if len(column) and column.max() >= len(columns.class_names):
        raise InputError(
            f"{line_of(source.place)}: column {name} has label {column.max()}, but only {len(columns.class_names)} "
            "classes"
        )
    return np.maximum(column.astype(np.int64), NO_LABEL)


def _chosen(config: DataConfig) -> tuple[Source, Columns, Labels]:
    """The split, its columns and its labels. Of several that it may be, the first that has labels."""
    candidates = []
    for source in sources(config):
        columns = columns_of(config, source)
        candidates.append((source, columns, _labels(source, columns)))
        if (candidates[-1][2] != NO_LABEL).any():
            return candidates[-1]
    return candidates[0]


class HuggingFaceData(PackedData):
    """The images of a data set of the library `datasets`, read from files that are mapped into memory, which the
    processes that load data share."""

    def __init__(self, config: DataConfig, say: Say | None = None) -> None:
        source, columns, labels = _chosen(config)
        super().__init__(config, _packed(source, columns, labels, say))
        self.rows, self.column, self.root = source.rows(), columns.images, source.place
        self.cells: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"cells": None}  # which would take all images along; of `rows`, only names of files go

    def content(self, i: int) -> tuple[bytes, bool]:
        if self.cells is None:
            self.cells = self.rows.data.column(self.column)  # takes longer than to read an image
        return _content(self.cells, i), True

    def place(self, i: int) -> Path:
        return _row(self.root, i)


def contents(config: DataConfig, say: Say | None = None) -> Packed:
    """A set as it is. Only rows of new and changed files are read. Raises InputError for a set that cannot be read."""
    return _packed(*_chosen(config), say)


def known_contents(config: DataConfig) -> Packed:
    """What is known of a set without reading an image."""
    return _packed(*_chosen(config), None, read=False)


def _packed(source: Source, columns: Columns, labels: Labels, say: Say | None, read: bool = True) -> Packed:
    """All about a split, by blocks of rows; without facts if a block is not in the cache and `read` is not set."""
    try:
        stamps = stamps_of(source.files)
    except OSError as error:
        raise InputError(f"cannot read {line_of(source.place)}: {error.strerror}") from None
    parts, damaged, tell = [], [], seldom(say)
    files = [os.fsencode(file.resolve()).hex() for file in source.files]
    for start in range(0, source.length, BLOCK):
        place = json.dumps(["hf", *files, columns.images, start])
        if (known := cached(place, stamps)) is not None:
            parts.append(known["facts"])
        elif read:
            if say is not None and source.files[0].suffix == ".parquet" and not parts:
                say(f"the library datasets converts {line_of(source.place)} for its cache, which has random access")
            facts, more = _read(source, columns.images, start, min(BLOCK, source.length - start), tell)
            if not more:
                keep(place, stamps, facts)
            parts.append(facts)
            damaged += more
    facts = joined(parts)
    missing = np.flatnonzero(labels == NO_LABEL)
    examples = [line_of(_row(source.place, int(i))) for i in missing[:FEW]]
    if len(missing) == len(labels):
        labels, columns = np.zeros_like(labels), columns._replace(class_names=["0"])
    whole = facts if len(facts.digests) == len(labels) else None
    return Packed(whole, labels, columns.class_names, len(missing), examples, HINT, damaged, {})


def _read(source: Source, column: str, start: int, count: int, say: Say) -> tuple[Facts, list[Damage]]:
    cells = _guarded(source.place, lambda: source.rows().data.column(column))
    return examine(
        lambda i: _content(cells, start + i),
        count,
        lambda i: _row(source.place, start + i),
        lambda done: say(f"reading {start + done:,} of {source.length:,} images of {line_of(source.place)}"),
    )


def _row(place: Path, i: int) -> Path:
    return place / f"row {i}"


def _content(cells: Any, i: int) -> bytes:
    """The bytes of the image in cell i of a column. Raises ValueError if it is not in the data set."""
    content = (cells[i].as_py() or {}).get("bytes")
    if content is None:
        raise ValueError("the data set has no bytes of it, only a path or nothing; save_to_disk embeds images")
    return content
