"""Sets of images, by kind: the door to all of them."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ...kernels.errors import InputError, unknown
from ..sections import DataConfig
from . import cifar10, files, huggingface, webdataset
from .arrays import ArrayData, Arrays
from .digits import digits
from .files import Say
from .folder import FolderData, listed
from .image_data import ImageData, check_labels, no_path
from .npz import npz
from .packed import check_labelled, fingerprint_of
from .splits import held_out, splits_of
from .synthetic import synthetic


def _cifar10(config: DataConfig) -> Arrays:
    """CIFAR-10 as torchvision stores it. Its checksums are not asked for, so that a set that was packed again fits."""
    if config.path is None:
        raise no_path(config)
    return Arrays(*cifar10.read(Path(config.path), config.split))


IN_MEMORY: dict[str, Callable[[DataConfig], Arrays]] = {
    "digits": digits,
    "npz": npz,
    "cifar10": _cifar10,
    "synthetic": synthetic,
}
ON_DEMAND: dict[str, Callable[[DataConfig, Say | None], ImageData]] = {
    "folder": FolderData,
    "webdataset": webdataset.WebData,
    "hf": huggingface.HuggingFaceData,
}
KINDS = ("digits", "npz", "folder", "cifar10", "synthetic", "webdataset", "hf")


def check_request(config: DataConfig) -> None:
    """Raise InputError for an invalid kind, split or number of channels."""
    if config.kind not in KINDS:
        raise unknown("data.kind", config.kind, KINDS)
    if config.split not in (splits := splits_of(config.kind)):
        raise unknown(f"data.split of {config.kind!r}", config.split, splits)
    if config.channels not in (1, 3):
        raise InputError(f"data.channels must be 1 or 3 for images, not {config.channels}")


def load(config: DataConfig, say: Say | None = None) -> ImageData:
    """Load the images that `config` describes. `say` gets a line every few seconds while a large set is read.

    Raises InputError, in one line, for an invalid kind, split, path, file, or number of classes or channels.
    """
    check_request(config)
    if config.kind in ON_DEMAND:
        return ON_DEMAND[config.kind](config, say)
    return ArrayData(config, *IN_MEMORY[config.kind](config))


def load_held_out(config: DataConfig, class_names: list[str], say: Say | None = None) -> ImageData:
    """The test split that belongs to the training data of `config`, whose classes are `class_names`.

    Raises InputError if there is none (`splits.held_out`), if it has other classes, and like `load`.
    """
    data = load(held_out(config), say)
    if data.class_names != class_names:
        other = next((name for name in data.class_names if name not in class_names), data.class_names[0])
        raise InputError(f"the test split of data {config.kind!r} has other classes than the training data: {other}")
    return data


class Glance(NamedTuple):
    """What is known of a set of files without reading its images: their number, None if only reading tells it, and the
    fingerprint of the set, None if files are new or changed since they were last read."""

    images: int | None
    fingerprint: str | None


def glance(config: DataConfig) -> Glance:
    """Look at a set of one of the kinds `ON_DEMAND` and read none of its images. Raises InputError like `load`, but not
    for damaged images, nor for what is wrong in shards that nobody has read."""
    check_request(config)
    if config.kind == "folder":
        root, content, labels, names = listed(config)
        check_labels(config, labels, names)
        return Glance(len(labels), files.known_fingerprint(root, content.files))
    known = webdataset.known_contents if config.kind == "webdataset" else huggingface.known_contents
    if (packed := known(config)) is None:
        return Glance(None, None)
    check_labelled(config, packed)
    check_labels(config, packed.labels, packed.class_names)
    return Glance(len(packed.labels), packed.facts and fingerprint_of(packed.facts, packed.labels))
