"""Sets of images, by kind. A set of any kind is an `ImageData`: uint8 images [C, S, S] and labels.

Data are identified by their contents: two sets with the same fingerprint are the same set.
"""

import hashlib
from collections.abc import Callable
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ...kernels.errors import InputError, unknown
from ..random import Stream, generator
from ..sections import DataConfig
from . import cifar10, files
from .files import FEW, UNREADABLE, Say, check_memory, few, line_of, npz_headers, read_npz, unreadable
from .folder import HIDDEN, Listing, check_classes, listing
from .splits import EIGHTH, beside, held_out, splits_of

SYNTHETIC_IMAGES = 320
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


class ImageData(Dataset[tuple[Tensor, int]]):
    """A set of images: item i is (uint8 [C, S, S], label).

    `size` S, `channels` C, `num_classes` (0: unconditional, every label 0), `class_names`, `labels` int64 [N],
    `fingerprint` 16 hex digits of SHA-256 over every byte (sets in memory: images [N, C, S, S], then labels; folders:
    names and contents of the files).
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


class ArrayData(ImageData):
    """Images in memory, from uint8 [N, H, W, C] with C 1 or 3. `fit` resizes those that are not [size, size]."""

    def __init__(self, config: DataConfig, images: NDArray[np.uint8], labels: Labels, class_names: list[str]) -> None:
        _check_memory(config, len(images))
        if len(images) and images.shape[1:3] != (config.size, config.size):
            images = np.stack([_channels_last(fit(_to_pil(image), config.size)) for image in images])
        if images.shape[3] == 1:
            images = images.repeat(config.channels, axis=3)
        elif config.channels == 1:
            images = np.stack([_channels_last(_to_pil(image).convert("L")) for image in images])
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


class FolderData(ImageData):
    """Images in files, decoded on demand. Every new or changed file is decoded at the start too, so that a damaged file
    is an error before training and not in the middle of it."""

    def __init__(self, config: DataConfig, say: Say | None) -> None:
        root, content, labels, names = _listed(config)
        super().__init__(config, labels, names)
        self.files = content.files
        entries = files.whole(files.entries(root, self.files, say))
        self.fingerprint = files.fingerprint_of(root, self.files, entries)
        # Arrays, because the processes that load data share their memory.
        self.stamps = np.array([(entry.size, entry.time) for entry in entries], dtype=np.int64)
        self.digests = np.frombuffer(b"".join(entry.digest for entry in entries), dtype=np.uint8).reshape(-1, 32)
        content.left_out.pop(HIDDEN, None)
        if text := content.omissions(root):
            self.omissions = f"{line_of(root)}: left out are {text}; lamabench data check says more"

    def image(self, i: int) -> Tensor:
        file = self.files[i]
        try:
            image, status, content = files.read_image(file)
            image = fit(image.convert("L" if self.channels == 1 else "RGB"), self.size)
        except UNREADABLE as error:
            raise unreadable(file, error) from None
        same = (status.st_size, status.st_mtime_ns) == tuple(self.stamps[i])
        if not same and hashlib.sha256(content).digest() != self.digests[i].tobytes():
            raise InputError(f"{line_of(file)} was changed while it was in use")
        return torch.from_numpy(_channels_last(image)).permute(2, 0, 1).contiguous()


def _listed(config: DataConfig) -> tuple[Path, Listing, Labels, list[str]]:
    """The folder of a set, what it contains, the label of each image and the names of the classes. Reads no image."""
    root = data_path(config)
    content = listing(root)
    check_classes(content)
    labels = np.repeat(np.arange(len(content.classes)), [len(group) for group in content.classes.values()])
    names = ["0"] if list(content.classes) == [root] else [folder.name for folder in content.classes]
    return root, content, labels, names


def _to_pil(image: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def _channels_last(image: Image.Image) -> NDArray[np.uint8]:
    array = np.array(image, dtype=np.uint8)
    return array[..., None] if array.ndim == 2 else array


def _check_memory(config: DataConfig, count: int) -> None:
    needed = count * config.channels * config.size**2
    check_memory(needed, f"data {config.kind!r}: {count:,} images of data.size {config.size}")


def _no_path(config: DataConfig) -> InputError:
    return InputError(f"data.path is not set; data {config.kind!r} needs it")


def data_path(config: DataConfig) -> Path:
    """`data.path`, or what lies beside it for the test split. Raises InputError if it is not set, does not exist, or
    cannot be read."""
    if config.path is None:
        raise _no_path(config)
    path = beside(config) if config.split == "test" else Path(config.path)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"data.path {line_of(path)} does not exist") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read data.path {line_of(path)}: {getattr(error, 'strerror', error)}") from None
    return path


class Arrays(NamedTuple):
    """A set in memory, as it is stored: `images` uint8 [N, H, W, C], `labels` int64 [N], and the names of classes."""

    images: NDArray[np.uint8]
    labels: Labels
    class_names: list[str]


def _digits(config: DataConfig) -> Arrays:
    """scikit-learn's 1,797 handwritten digits, 8 × 8 at 17 grey levels, enlarged; of most and test, a part."""
    if config.size < 8:
        raise InputError(f"data.size must be 8 or more for digits, not {config.size}")
    package = find_spec("sklearn")  # its import takes a second, its file of digits does not
    assert package is not None and package.origin is not None
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    if config.split != "train":
        table = table[(np.arange(len(table)) % EIGHTH == 0) == (config.split == "test")]
    images = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return Arrays(images, table[:, -1].astype(np.int64), [str(i) for i in range(10)])


def _npz(config: DataConfig) -> Arrays:
    """An .npz file with `images` uint8 [N, H, W, C] or [N, H, W] and optional integer `labels` [N], from class 0 to the
    highest label. Where there are no `images`, `arr_0` and `arr_1` are taken, as in the files of ADM's evaluator."""
    path = data_path(config)
    name, of_labels = "images", "labels"
    if name not in (headers := npz_headers(path, (name, of_labels))):
        name, of_labels = "arr_0", "arr_1"
        headers = npz_headers(path, (name, of_labels))
    if name not in headers:
        raise InputError(f"{line_of(path)} has no array 'images' (uint8 [N, H, W, C] or [N, H, W])")
    shape, kind = headers[name]
    if kind != np.uint8 or len(shape) not in (3, 4) or 0 in shape[1:]:
        raise InputError(f"{line_of(path)}: {name} is {kind} {list(shape)}, not uint8 [N, H, W, C] or [N, H, W]")
    if (channels := (*shape, 1)[3]) != config.channels:
        hint = f"; set it to {channels}" if channels in (1, 3) else ""
        raise InputError(f"data.channels is {config.channels}, but the images of {line_of(path)} have {channels}{hint}")
    _check_memory(config, shape[0])
    arrays = read_npz(path, (name, of_labels))
    labels = arrays.get(of_labels, np.zeros(shape[0], dtype=np.int64))
    fits = labels.dtype.kind in "iu" and labels.shape == shape[:1]
    if not fits or labels.astype(np.int64).min(initial=0) < 0:
        actual = f"{labels.dtype} {list(labels.shape)}"
        raise InputError(f"{line_of(path)}: {of_labels} is {actual}, not [{shape[0]}] integers of 0 or more")
    labels = labels.astype(np.int64)
    names = [str(i) for i in range(len(np.unique(labels)))]
    return Arrays(arrays[name].reshape(*shape[:3], channels), labels, names)


def _cifar10(config: DataConfig) -> Arrays:
    """CIFAR-10 as torchvision stores it. Its checksums are not asked for, so that a set that was packed again fits."""
    if config.path is None:
        raise _no_path(config)
    return Arrays(*cifar10.read(Path(config.path), config.split))


def _synthetic(config: DataConfig) -> Arrays:
    """320 smooth images, or one per class if that is more. Each class has its own three waves, each image its own
    phases and colours. The images are the same in every call, and as many others of the same classes are the test
    split."""
    classes = max(1, config.num_classes)
    labels = np.arange(max(SYNTHETIC_IMAGES, classes)) % classes
    _check_memory(config, len(labels))
    across = np.arange(config.size) / config.size
    waves = [generator(0, Stream.INIT, label).uniform(-2, 2, size=(3, 2)) for label in range(classes)]
    images = np.zeros((len(labels), config.size, config.size, config.channels), dtype=np.uint8)
    first = classes + (len(labels) if config.split == "test" else 0)
    for i, label in enumerate(labels):
        rng = generator(0, Stream.INIT, first + i)
        phase, colour = rng.uniform(0, 1, size=3), rng.uniform(-1, 1, size=(3, config.channels))
        turns = (waves[label] @ np.stack(np.meshgrid(across, across)).reshape(2, -1)) + phase[:, None]
        picture = np.cos(2 * np.pi * turns).T @ colour
        images[i] = np.rint(127.5 + 42.5 * picture).reshape(config.size, config.size, -1)
    return Arrays(images, labels, [str(label) for label in range(classes)])


IN_MEMORY: dict[str, Callable[[DataConfig], Arrays]] = {
    "digits": _digits,
    "npz": _npz,
    "cifar10": _cifar10,
    "synthetic": _synthetic,
}
KINDS = ("digits", "npz", "folder", "cifar10", "synthetic")


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
    return FolderData(config, say) if config.kind == "folder" else ArrayData(config, *IN_MEMORY[config.kind](config))


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
    """What is known of a folder without reading its images: their number, and the fingerprint of the set, None if files
    are new or changed since they were last read."""

    images: int
    fingerprint: str | None


def glance(config: DataConfig) -> Glance:
    """Look at a folder of images and read none of them. Raises InputError like `load`, but not for damaged images."""
    check_request(config)
    root, content, labels, names = _listed(config)
    check_labels(config, labels, names)
    return Glance(len(labels), files.known_fingerprint(root, content.files))
