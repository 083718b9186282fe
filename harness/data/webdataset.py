"""WebDataset: images in tar files (shards), each beside its label.

A sample is all members of a shard whose names are the same up to the first dot of the last part: `0001.jpg` and
`0001.cls`. Its image is the member `.jpg`, `.jpeg`, `.png`, `.webp` or `.bmp`. Its label is the text of `.cls`, or else
`label`, `cls` or `class` of `.json`: whole numbers from 0, or names, which are numbered in sorted order. The shards are
in the order of their names, numbers in them by value; the images of a shard are in its order.
"""

import glob
import json
import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...kernels.errors import InputError
from ..sections import DataConfig
from .files import Damage, Say
from .folder import HIDDEN, OTHER, SUFFIXES
from .image_data import Labels, no_path
from .one_line import FEW, few, line_of, reason_of
from .packed import (
    NO_LABEL,
    Facts,
    Packed,
    PackedData,
    Stamps,
    cached,
    examine,
    joined,
    keep,
    seldom,
    stamps_of,
)
from .splits import TEST_WORDS, beside, of_split

LABEL_KEYS = ("label", "cls", "class")
HINT = f"a label is KEY.cls or one of {', '.join(LABEL_KEYS)} in KEY.json, a whole number from 0 or a name"
NO_IMAGE = "samples without an image"
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
MOST_SHARDS = 10**6


# The shards


def shards_of(config: DataConfig) -> list[Path]:
    """The tar files of a set: those in the folder `data.path`, or those that it names with `{0000..0099}`, `{a,b}`, `*`
    or `?`. Of files with `train`, `test` or `val` in their names, those of `data.split`.

    Raises InputError if there are none, and for a file of a `{…}` that does not exist.
    """
    if config.path is None:
        raise no_path(config)
    path = Path(config.path)
    folder = _is_folder(path)
    if folder and config.split == "test" and not (shards := _of_split(_tars(path), "test")):
        path = beside(config)
        if not _is_folder(path):
            raise InputError(f"{line_of(path)} is not a folder of shards")
        shards = _tars(path)
    elif folder:
        shards = _of_split(_tars(path), config.split)
    else:
        shards = _expanded(config.path)
        if config.split == "test":
            shards = _siblings(config, shards)
    if not shards:
        hint = f": data.path={line_of(path / 'train')}" if (path / "train").is_dir() else ""
        raise InputError(f"data.path {line_of(path)} contains no shard of WebDataset (.tar){hint}")
    return sorted(shards, key=_natural)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read data.path {line_of(path)}: {reason_of(error)}") from None


def _tars(folder: Path) -> list[Path]:
    try:
        return [file for file in folder.iterdir() if file.suffix == ".tar" and not file.name.startswith(".")]
    except OSError as error:
        raise InputError(f"cannot read {line_of(folder)}: {error.strerror}") from None


def _of_split(shards: Sequence[Path], split: str) -> list[Path]:
    groups = of_split([shard.name for shard in shards], split)
    return [shard for shard in shards if groups and shard.name in groups[0]]


def _siblings(config: DataConfig, shards: Sequence[Path]) -> list[Path]:
    """The shards of the test split beside those of the training, which have `train` in their names."""
    first = min(shards, key=_natural)
    stem, word, _ = first.name.lower().partition("train")
    beside_it = [shard for shard in _tars(first.parent) if shard.name.lower().startswith(stem)]
    if not word or not (test := _of_split(beside_it, "test")):
        raise InputError(
            f"the test split of data {config.kind!r} is shards with {', '.join(TEST_WORDS)} in place of train in their "
            f"names, and {config.path} has none beside it"
        )
    return test


def _expanded(text: str) -> list[Path]:
    """The files that a path names. Raises InputError for one that does not exist."""
    if os.path.exists(text):
        return [Path(text)]
    names = _braces(text)
    files = [Path(file) for name in names for file in (glob.glob(name) if glob.has_magic(name) else [name])]
    if missing := [file for file in files if not file.exists()]:
        verb = "does" if len(missing) == 1 else "do"
        raise InputError(f"data.path: {few([*map(line_of, missing)])} {verb} not exist")
    if not files:
        raise InputError(f"data.path {text}: no file has such a name")
    return [*dict.fromkeys(files)]


def _braces(text: str) -> list[str]:
    """A text for each combination of its `{first..last}` and `{a,b}`, as a shell writes them."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if match is None:
        return [text]
    first, last, items = match.groups()
    if first is None:
        choices = items.split(",")
    elif int(last) - int(first) >= MOST_SHARDS:
        raise InputError(f"data.path {text} names more than {MOST_SHARDS:,} shards")
    else:
        width = max(len(one) for one in (first, last) if one.startswith("0") or one is first)
        choices = [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    return [text[: match.start()] + choice + rest for choice in choices for rest in _braces(text[match.end() :])]


def _natural(path: Path) -> list[Any]:
    """The order of names in which `2` is before `10`."""
    parts = re.split(r"(\d+)", path.as_posix())
    return [(int(part), part) if i % 2 else part for i, part in enumerate(parts)]


# The contents of a shard


class Shard(NamedTuple):
    """The images of a tar file: their names, `offsets` and `sizes` in bytes int64 [N], the texts of their labels (empty
    if there is none), what is known of them, and the names of members that are left out, by reason."""

    names: list[str]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: list[str]
    facts: Facts
    left_out: dict[str, list[str]]


def known(shard: Path, stamps: Stamps) -> Shard | None:
    """What the cache has about a shard that did not change since, else None. Reads nothing of the shard."""
    content = cached(_place(shard), stamps, ("offsets", "sizes"))
    return None if content is None else Shard(*(content[name] for name in Shard._fields))


def read(shard: Path, stamps: Stamps, say: Say | None = None) -> tuple[Shard, list[Damage]]:
    """Read and decode the images of a shard. `say` gets a line now and then. Raises InputError for a file that is not a
    whole tar file, and for a sample with two images."""
    try:
        with open(shard, "rb") as file:
            samples, left_out = _samples(shard, file)
            images = [image for image, _ in samples]
            labels = [_label(file.fileno(), others) for _, others in samples]
            facts, damaged = examine(
                lambda i: os.pread(file.fileno(), images[i].size, images[i].offset_data),
                len(images),
                lambda i: shard / images[i].name,
                lambda done: say(f"reading {done:,} of {len(images):,} images of {line_of(shard)}") if say else None,
            )
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {line_of(shard)}: {error.strerror or error}") from None
    except (tarfile.TarError, EOFError, ValueError, IndexError, OverflowError) as error:
        raise InputError(f"{line_of(shard)} is not a whole tar file: {reason_of(error)}") from None
    offsets, sizes = np.array([(one.offset_data, one.size) for one in images], dtype=np.int64).reshape(-1, 2).T
    content = Shard([one.name for one in images], offsets, sizes, labels, facts, left_out)
    if not damaged:
        keep(_place(shard), stamps, **content._asdict())
    return content, damaged


def _place(shard: Path) -> str:
    return f"webdataset {shard.resolve()}"


def _stamps(shard: Path) -> Stamps:
    try:
        return stamps_of([shard])
    except OSError as error:
        raise InputError(f"cannot read {line_of(shard)}: {error.strerror}") from None


Members = dict[str, tarfile.TarInfo]  # of a sample, by what follows the first dot of their names


def _samples(shard: Path, file: IO[bytes]) -> tuple[list[tuple[tarfile.TarInfo, Members]], dict[str, list[str]]]:
    """The image of each sample and its other members, and the names that are left out. Raises InputError for a sample
    with two images, and ValueError or one of tarfile's errors for a file that is not a whole tar file."""
    start = file.read(2)
    if start in COMPRESSED:
        raise ValueError(f"it is compressed ({COMPRESSED[start]}), so that no image can be read without all before it")
    samples: dict[str, Members] = {}
    left_out: dict[str, list[str]] = {}
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            folder, slash, name = member.name.rpartition("/")
            key, _, kind = name.partition(".")
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                left_out.setdefault(OTHER, []).append(member.name)
            elif not key or not kind:
                left_out.setdefault(HIDDEN if not key else NO_IMAGE, []).append(member.name)
            elif kind.lower() in (sample := samples.setdefault(folder + slash + key, {})):
                raise InputError(f"{line_of(shard)} has two members {member.name}")
            else:
                sample[kind.lower()] = member
        _check_end(file, archive.offset)
    pairs = []
    for key, members in samples.items():
        images = [members[suffix[1:]] for suffix in SUFFIXES if suffix[1:] in members]
        if len(images) > 1:
            raise InputError(f"{line_of(shard)}: sample {key} has {len(images)} images ({images[0].name}, …), not one")
        if images:
            pairs.append((images[0], members))
        else:
            left_out.setdefault(NO_IMAGE, []).append(key)
    return pairs, left_out


def _check_end(file: IO[bytes], end: int) -> None:
    """Raise ValueError if there are not zeros alone, and at least a block of them, from `end` on. tarfile takes a torn
    or damaged header for the end."""
    file.seek(end)
    rest = 0
    while block := file.read(2**20):
        rest += len(block)
        if block.count(0) != len(block):
            raise ValueError(f"there is no header of a member at byte {end:,}, and no end")
    if rest < tarfile.BLOCKSIZE:
        raise ValueError(f"it has no end: it was cut at byte {end + rest:,}")


def _label(file: int, members: Members) -> str:
    """The text of a sample's label; empty if there is none, or none that is a number from 0 or a name."""
    member = members.get("cls") or members.get("json")
    if member is None:
        return ""
    try:
        text = os.pread(file, member.size, member.offset_data).decode()
        if "cls" not in members:
            content = json.loads(text)
            values = [content[key] for key in LABEL_KEYS if key in content] if isinstance(content, dict) else []
            text = str(values[0]) if values and type(values[0]) in (int, str) else ""
    except (ValueError, RecursionError):
        return ""
    return "" if re.fullmatch(r"-[0-9]+", text := text.strip()) else text


def classes_of(texts: Sequence[str]) -> tuple[Labels, list[str]]:
    """The labels int64 [N] and the names of the classes: numbers if all texts are numbers, else names in sorted order.
    An empty text is `NO_LABEL`. Without any text, all labels are 0."""
    present = {*texts} - {""}
    if not present:
        return np.zeros(len(texts), dtype=np.int64), ["0"][: len(texts)]
    if all(re.fullmatch(r"[0-9]{1,18}", text) for text in present):
        numbers = {text: int(text) for text in present}
        names = [str(i) for i in range(len({*numbers.values()}))]
    else:
        names = sorted(present)
        numbers = {name: i for i, name in enumerate(names)}
    return np.array([numbers.get(text, NO_LABEL) for text in texts], dtype=np.int64), names


# The set


class WebData(PackedData):
    """The images of WebDataset shards, read from their places in the tar files."""

    def __init__(self, config: DataConfig, say: Say | None = None) -> None:
        shards, parts, packed = contents(config, say)
        super().__init__(config, packed)
        # Arrays and bytes, because the processes that load data share their memory. A shard is opened for each image,
        # so that no process has a file of another.
        self.shards = [shard for shard, _ in shards]
        self.stamps = [(int(stamps[0, 0]), int(stamps[0, 1])) for _, stamps in shards]
        self.starts = np.cumsum([0, *(len(part.names) for part in parts)])
        self.offsets = np.concatenate([part.offsets for part in parts])
        self.sizes = np.concatenate([part.sizes for part in parts])
        self.names = [json.dumps(part.names).encode() for part in parts]

    def content(self, i: int) -> tuple[bytes, bool]:
        shard = self._shard(i)
        with open(self.shards[shard], "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            content = os.pread(file.fileno(), int(self.sizes[i]), int(self.offsets[i]))
        return content, (status.st_size, status.st_mtime_ns) == self.stamps[shard]

    def place(self, i: int) -> Path:
        shard = self._shard(i)
        return self.shards[shard] / json.loads(self.names[shard])[i - self.starts[shard]]

    def _shard(self, i: int) -> int:
        return int(np.searchsorted(self.starts, i, side="right")) - 1


def contents(config: DataConfig, say: Say | None = None) -> tuple[list[tuple[Path, Stamps]], list[Shard], Packed]:
    """The shards of a set with their stamps, what each contains, and all together. Only new and changed shards are
    read.

    Raises InputError for shards that are missing or not whole.
    """
    shards = [(shard, _stamps(shard)) for shard in shards_of(config)]
    parts, damaged, errors, say = [], [], [], seldom(say)
    for number, (shard, stamps) in enumerate(shards):
        if (part := known(shard, stamps)) is None:
            say(f"reading shard {number + 1:,} of {len(shards):,} of {config.path}")
            try:
                part, more = read(shard, stamps, say)
            except InputError as error:
                errors.append(str(error))
                continue
            damaged += more
        parts.append(part)
    if errors:
        raise InputError(few(errors, separator="; "))
    return shards, parts, _together([shard for shard, _ in shards], parts, damaged)


def _together(shards: Sequence[Path], parts: Sequence[Shard], damaged: list[Damage]) -> Packed:
    labels, names = classes_of([text for part in parts for text in part.labels])
    left_out: dict[str, list[str]] = {}
    unlabelled = []
    for shard, part in zip(shards, parts, strict=True):
        for reason, members in part.left_out.items():
            left_out.setdefault(reason, []).extend(line_of(Path(shard.name, member)) for member in members)
        unlabelled += [(shard, name) for name, text in zip(part.names, part.labels, strict=True) if not text]
    examples = [line_of(shard / name) for shard, name in unlabelled[:FEW]]
    facts = joined([part.facts for part in parts])
    return Packed(facts, labels, names, len(unlabelled), examples, HINT, damaged, left_out)


def known_contents(config: DataConfig) -> Packed | None:
    """A set whose shards are all in the cache, else None. Reads no shard. Raises InputError for missing shards."""
    shards = shards_of(config)
    parts = [part for shard in shards if (part := known(shard, _stamps(shard))) is not None]
    return _together(shards, parts, []) if len(parts) == len(shards) else None
