"""What a set of images contains: the answer of `lamabench data check`."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..sections import DataConfig
from . import files, huggingface, webdataset
from .arrays import ArrayData
from .files import Damage, Entry, Say, few, line_of
from .folder import listing
from .image_data import Labels, data_path, empty_classes
from .images import IN_MEMORY, check_request
from .packed import NO_LABEL, Packed, fingerprint_of

Size = tuple[int, int]  # width and height in pixels


@dataclass
class Summary:
    """A set of images.

    `images` counts all of them, and `classes` those of each class. `empty` names classes without an image, the first
    few of `empty_count`. `unlabelled` names images without a label, the first few of `unlabelled_count`, unless no
    image has one. `sizes` and `modes` count the images that could be decoded. `left_out` lists the paths that are no
    part of the set, by reason. `links` counts the links that were followed. `unreadable` says what is wrong with each
    damaged file. A set with damaged files has no `fingerprint`. Paths are below the folder of the set.
    """

    images: int
    classes: dict[str, int]
    sizes: dict[Size, int]
    modes: dict[str, int]
    fingerprint: str | None
    empty: list[str] = field(default_factory=list)
    empty_count: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)
    links: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    unlabelled: list[str] = field(default_factory=list)
    unlabelled_count: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON. A size is the text `WIDTHxHEIGHT`."""
        return {**vars(self), "sizes": {f"{width}x{height}": count for (width, height), count in self.sizes.items()}}

    def problem(self) -> str:
        """What is wrong with the set, empty if nothing is. `unreadable` names the files."""
        problems = []
        if self.unreadable:
            problems.append(f"{len(self.unreadable):,} of {self.images:,} images are unreadable")
        if self.empty:
            problems.append(f"classes without an image: {few(self.empty, self.empty_count)}")
        if self.unlabelled:
            texts = few(self.unlabelled, self.unlabelled_count)
            problems.append(f"{self.unlabelled_count:,} of {self.images:,} images have no label ({texts})")
        if self.images < 2:
            problems.append(f"too few images: {self.images}, at least 2 are needed")
        return "; ".join(problems)


def summary(config: DataConfig, say: Say | None = None) -> Summary:
    """Read and decode all images that `config` describes, whatever its `num_classes`. Files that were read before, here
    or by a training, are not read again. `say` gets a line every few seconds.

    Raises InputError like `load`, but not for damaged images and empty classes.
    """
    check_request(config)
    if config.kind == "folder":
        return _of_folder(data_path(config), say)
    if config.kind == "webdataset":
        return _of_packed(config, webdataset.contents(config, say)[2])
    if config.kind == "hf":
        return _of_packed(config, huggingface.contents(config, say))
    return _of_arrays(config)


def _of_folder(root: Path, say: Say | None) -> Summary:
    content = listing(root)
    names = {folder: line_of(folder.relative_to(root)) if folder != root else "0" for folder in content.classes}
    entries = files.entries(root, content.files, say)
    sound = [entry for entry in entries if isinstance(entry, Entry)]
    empty = [names[folder] for folder in content.without_images()]
    return Summary(
        images=len(entries),
        classes={names[folder]: len(group) for folder, group in content.classes.items()},
        sizes=Counter((entry.width, entry.height) for entry in sound),
        modes=Counter(entry.mode for entry in sound),
        fingerprint=files.fingerprint_of(root, content.files, sound) if len(sound) == len(entries) else None,
        empty=empty,
        empty_count=len(empty),
        left_out={reason: _below(root, paths) for reason, paths in content.left_out.items()},
        links=content.links,
        unreadable={
            line_of(entry.file.relative_to(root)): entry.reason for entry in entries if isinstance(entry, Damage)
        },
    )


def _below(root: Path, paths: Sequence[Path]) -> list[str]:
    return sorted(line_of(path.relative_to(root)) for path in paths)


def _of_packed(config: DataConfig, packed: Packed) -> Summary:
    facts, labels, names = packed.facts, packed.labels, packed.class_names
    assert facts is not None
    sound = facts.modes != b""
    with_label = labels[labels != NO_LABEL]
    count, empty = empty_classes(with_label, len(names))
    none_labelled = packed.unlabelled == len(labels)
    root = Path(config.path or "")
    root = root if root.is_dir() else root.parent
    return Summary(
        images=len(labels),
        classes=_counts(with_label, names),
        sizes=Counter(tuple(size) for size in facts.shapes[sound].tolist()),
        modes=Counter(mode.decode() for mode in facts.modes[sound].tolist()),
        fingerprint=None if packed.damaged else fingerprint_of(facts, labels),
        empty=[_name(label, names) for label in empty],
        empty_count=count,
        left_out=packed.left_out,
        unlabelled=[] if none_labelled else packed.examples,
        unlabelled_count=0 if none_labelled else packed.unlabelled,
        unreadable={line_of(Path(os.path.relpath(file, root))): reason for file, reason in packed.damaged},
    )


def _name(label: int, names: Sequence[str]) -> str:
    return names[label] if label < len(names) else str(label)


def _counts(labels: Labels, names: Sequence[str]) -> dict[str, int]:
    """The number of images of each class that has some, by its name."""
    values, counts = np.unique(labels, return_counts=True)
    return {_name(label, names): count for label, count in zip(values.tolist(), counts.tolist(), strict=True)}


def _of_arrays(config: DataConfig) -> Summary:
    images, labels, names = IN_MEMORY[config.kind](config)
    count, empty = empty_classes(labels, len(names))
    height, width, channels = images.shape[1:]
    return Summary(
        images=len(images),
        classes=_counts(labels, names),
        sizes={(width, height): len(images)},
        modes={"L" if channels == 1 else "RGB": len(images)},
        fingerprint=ArrayData(replace(config, num_classes=0), images, labels, names).fingerprint,
        empty=[_name(label, names) for label in empty],
        empty_count=count,
    )
