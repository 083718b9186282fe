"""The same images as a folder, as shards of WebDataset, and as data sets of Hugging Face."""

import io
import itertools
import os
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

LONG_AGO = 10**9  # seconds: 2001, so that what was read is cached
ticks = itertools.count(LONG_AGO)  # the times of tar files, of which most have one size


class Picture(NamedTuple):
    """The bytes of a file, its suffix, and its class."""

    content: bytes
    suffix: str
    label: int


# A format, a mode and a size (width, height) for each image of a class.
VARIETY = [
    ("jpg", "JPEG", "RGB", (20, 12)),
    ("jpg", "JPEG", "CMYK", (12, 15)),
    ("png", "PNG", "RGBA", (11, 30)),
    ("png", "PNG", "L", (12, 12)),
    ("png", "PNG", "P", (9, 16)),
    ("webp", "WEBP", "RGB", (16, 10)),
]


def picture(seed: int, label: int = 0, kind: tuple[str, str, str, tuple[int, int]] = VARIETY[3]) -> Picture:
    """An image of noise."""
    suffix, form, mode, (width, height) = kind
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(pixels if mode == "RGBA" else pixels[..., :3]).convert(mode)
    file = io.BytesIO()
    image.save(file, form)
    return Picture(file.getvalue(), suffix, label)


def pictures(classes: int = 2, first: int = 0) -> list[Picture]:
    """Six images of each class, class after class."""
    return [picture(first + 6 * label + i, label, kind) for label in range(classes) for i, kind in enumerate(VARIETY)]


def write_folder(root: Path, images: Iterable[Picture]) -> Path:
    for i, one in enumerate(images):
        file = root / f"class{one.label}" / f"{i:04d}.{one.suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(one.content)
        os.utime(file, (LONG_AGO, LONG_AGO))
    return root


def write_tar(file: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    os.utime(file, times=(LONG_AGO, next(ticks)))
    return file


def members(images: Sequence[Picture], start: int = 0) -> list[tuple[str, bytes]]:
    """The members of a shard: each image, and the number of its class."""
    pairs = [
        ((f"{i:04d}.{one.suffix}", one.content), (f"{i:04d}.cls", b"%d" % one.label))
        for i, one in enumerate(images, start)
    ]
    return [member for pair in pairs for member in pair]


def write_shards(root: Path, images: Sequence[Picture], shards: int = 3, name: str = "train") -> Path:
    for shard in range(shards):
        part = slice(shard * len(images) // shards, (shard + 1) * len(images) // shards)
        write_tar(root / f"{name}-{shard:04d}.tar", members(images[part], part.start))
    return root


def dataset(images: Sequence[Picture], names: Sequence[str] = ("class0", "class1")):
    """The images as a `datasets.Dataset` with the columns `picture` and `kind`."""
    import datasets

    features = datasets.Features({"kind": datasets.ClassLabel(names=list(names)), "picture": datasets.Image()})
    rows = {"picture": [{"bytes": one.content, "path": None} for one in images], "kind": [one.label for one in images]}
    return datasets.Dataset.from_dict(rows, features=features)


def write_saved(root: Path, **splits: Sequence[Picture]) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.DatasetDict({name: dataset(images) for name, images in splits.items()}).save_to_disk(root)
    return long_ago(root)


def write_parquet(root: Path, **splits: Sequence[Picture]) -> Path:
    import datasets

    datasets.disable_progress_bars()
    root.mkdir(parents=True)
    for name, images in splits.items():
        dataset(images).to_parquet(root / f"{name}-00000-of-00001.parquet")
    return long_ago(root)


def long_ago(root: Path) -> Path:
    for file in root.rglob("*"):
        os.utime(file, (LONG_AGO, LONG_AGO))
    return root
