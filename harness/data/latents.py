"""A cache of latents: what an autoencoder's encoder gives for each image of a set, encoded once, read by trainings.

    FOLDER/index.json                        the set, the encoder, and the shards in the order of the images
    FOLDER/START-STOP.safetensors            latents of the images START … STOP-1
    FOLDER/test/                             a cache of the test split, if there is one

A shard has `mean` and, unless the encoder is deterministic, `logvar`, both [n, c, s, s] and as the encoder gives them
(neither shifted nor scaled), and `labels` int64 [n]. If the cache is mirrored, `mean_mirrored` and `logvar_mirrored`
are those of the mirrored images, because a mirrored latent is not the latent of the mirrored image. Files are mapped
into memory, so that processes on one machine share what they read.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...kernels.errors import InputError, unknown
from ...models.fields import declared, typed
from ..disk import access, write_atomically
from ..random import Generators, Stream

if TYPE_CHECKING:
    from ..sections import DataConfig, EncoderConfig

SCHEMA = 1
INDEX = "index.json"
TEST = "test"  # the folder of the test split's cache in a cache
DTYPES: dict[str, tuple[str, torch.dtype]] = {  # of means and log-variances: their name in safetensors, and torch's
    "float16": ("F16", torch.float16),
    "float32": ("F32", torch.float32),
}
FREE = ("path", "flip")  # fields of the section data that do not change a set
_NUMPY = {"F16": "<f2", "F32": "<f4", "I64": "<i8"}


@dataclass(frozen=True)
class EncoderFacts:
    """An autoencoder as an index names it: `kind` is its class, `identity` 12 hex digits of its function, `channels`
    and `side` the shape of a latent, `source` where it came from. The network sees (latent - shift) · scale."""

    kind: str
    identity: str
    scale: float
    shift: float
    channels: int
    side: int
    source: str


@dataclass(frozen=True)
class Shard:
    """A file of a cache: its name, the number of its images, and SHA-256 of its bytes."""

    file: str
    images: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """The content of index.json. `data` is the section `data` as declared, without `path` and `flip`; `path` is where
    the images lay when they were encoded. `fingerprint` and `images` are those of the set of images. `logvar` and
    `mirrored` say which tensors the shards have."""

    data: dict[str, Any]
    path: str | None
    fingerprint: str
    images: int
    class_names: list[str]
    encoder: EncoderFacts
    logvar: bool
    mirrored: bool
    dtype: str
    shards: list[Shard]


def tensor_names(logvar: bool, mirrored: bool) -> list[str]:
    """The names of the tensors of a shard, without `labels`."""
    names = ["mean", *(["logvar"] if logvar else [])]
    return names + [f"{name}_mirrored" for name in names if mirrored]


def write_shard(folder: Path, start: int, tensors: Mapping[str, Tensor], labels: NDArray[np.int64]) -> Shard:
    """Write a shard atomically. Its first image is image `start` of the set; `tensors` have the names of
    `tensor_names`, [n, c, s, s] of the type that the index names. Returns its line of the index."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save({**content, "labels": torch.from_numpy(labels.astype(np.int64))})
    name = f"{start:08d}-{start + len(labels):08d}.safetensors"
    write_atomically(folder / name, data)
    return Shard(name, len(labels), hashlib.sha256(data).hexdigest())


def write_index(folder: Path, index: Index) -> None:
    """Write index.json atomically. A folder without it is no cache, so it is written last."""
    content = json.dumps({"schema": SCHEMA, **asdict(index)}, indent=1, sort_keys=True)
    write_atomically(folder / INDEX, content.encode())


def read_index(folder: Path) -> Index:
    """The index of a cache. Raises InputError for a folder without one, or with another one than this version reads."""
    path = folder / INDEX
    if not folder.exists():
        raise InputError(f"{folder} does not exist; encoder.path=FOLDER says where the cache of latents lies")
    if not path.is_file():
        raise InputError(
            f"{folder} is no complete cache of latents: it has no {INDEX} (lamabench encode … --to FOLDER)"
        )
    with access("read", path):
        text = path.read_bytes()
    try:
        content = json.loads(text)
        schema = content.pop("schema")
        if schema != SCHEMA:
            raise InputError(f"{path} has schema {schema!r}, but this version reads {SCHEMA}: encode the data again")
        content["encoder"] = EncoderFacts(**typed("encoder", EncoderFacts, content["encoder"]))
        content["shards"] = [Shard(**typed("shards", Shard, shard)) for shard in content["shards"]]
        index = Index(**content)
    except InputError as error:
        raise InputError(f"{path}: {error}") if str(path) not in str(error) else error from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is no index of latents: {type(error).__name__}: {error}") from None
    if index.dtype not in DTYPES:
        raise unknown(f"dtype of {path}", index.dtype, DTYPES)
    if (images := sum(shard.images for shard in index.shards)) != index.images:
        raise InputError(f"{path} names shards of {images:,} images, but the set has {index.images:,}")
    return index


Arrays = dict[str, NDArray[Any]]


def map_shard(path: Path, index: Index, images: int) -> Arrays:
    """The arrays of a shard, mapped into memory; nobody writes to them. Raises InputError for a file that is missing,
    incomplete, or another one than the index says. Reads its header only."""
    with access("read", path, missing=True):
        size = path.stat().st_size
        whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy() if size else np.empty(0)
    try:
        (length,) = struct.unpack("<Q", whole[:8].tobytes())
        header = json.loads(whole[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        layout = {name: (entry["dtype"], entry["shape"], *entry["data_offsets"]) for name, entry in header.items()}
    except (struct.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is no shard of latents: {type(error).__name__}: {error}") from None
    facts, start = index.encoder, 8 + length
    shape = [images, facts.channels, facts.side, facts.side]
    expected = dict.fromkeys(tensor_names(index.logvar, index.mirrored), (DTYPES[index.dtype][0], shape))
    expected["labels"] = ("I64", [images])
    if {name: (dtype, shape) for name, (dtype, shape, *_) in layout.items()} != expected:
        raise InputError(f"{path} has other tensors than {INDEX} says: {', '.join(expected)} of {images} images")
    if start + max(stop for *_, stop in layout.values()) != size:
        raise InputError(f"{path} is incomplete: the same lamabench encode writes it again")
    return {
        name: whole[start + first : start + stop].view(_NUMPY[dtype]).reshape(shape)
        for name, (dtype, shape, first, stop) in layout.items()
    }


class LatentData:
    """The latents in the folder of a cache as a set that is learned from; `size`, `channels`, `labels`, `class_names`
    and `fingerprint` are those of the images (`ImageData`).

    Shards are mapped when they are first read, in each process by itself, so that objects can be sent to others. Raises
    InputError for a cache that is damaged, of another encoder or scale, or of other data than `data`.
    """

    omissions = ""

    def __init__(self, folder: Path, settings: "EncoderConfig", data: "DataConfig") -> None:
        self.folder, self.index = folder, read_index(folder)
        check_encoder(folder, self.index, settings)
        check_declared(folder, self.index, data)
        if data.flip and not self.index.mirrored:
            raise InputError(
                f"data.flip=true needs latents of mirrored images, which {folder} does not have: data.flip=false"
            )
        counts = [shard.images for shard in self.index.shards]
        self.starts = np.cumsum(counts) - counts
        self._maps: dict[int, Arrays] = {}
        self.size, self.channels, self.num_classes = data.size, data.channels, data.num_classes
        self.class_names = self.index.class_names if data.num_classes else []
        self.fingerprint = self.index.fingerprint
        labels = np.concatenate([self._shard(i)["labels"] for i in range(len(counts))])  # all files must be there
        self.labels: NDArray[np.int64] = labels if data.num_classes else np.zeros_like(labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def __len__(self) -> int:
        return self.index.images

    def _shard(self, number: int) -> Arrays:
        if number not in self._maps:
            shard = self.index.shards[number]
            self._maps[number] = map_shard(self.folder / shard.file, self.index, shard.images)
        return self._maps[number]

    def rows(self, name: str, indices: NDArray[np.int64], mirrored: NDArray[np.bool_] | None = None) -> Tensor:
        """`mean` or `logvar` of some images, float32 [n, c, s, s], those of the mirrored image where `mirrored`."""
        facts = self.index.encoder
        dtype = _NUMPY[DTYPES[self.index.dtype][0]]
        values = np.empty((len(indices), facts.channels, facts.side, facts.side), dtype=dtype)
        names = (name, f"{name}_mirrored")
        shards = np.searchsorted(self.starts, indices, side="right") - 1
        places = indices - self.starts[shards]
        sides = np.zeros(len(indices), dtype=int) if mirrored is None else mirrored.astype(int)
        for row, (number, place, side) in enumerate(zip(*(x.tolist() for x in (shards, places, sides)), strict=True)):
            values[row] = self._shard(number)[names[side]][place]
        return torch.from_numpy(values).to(torch.float32)


def check_encoder(folder: Path, index: Index, settings: "EncoderConfig") -> None:
    """Raise InputError if a cache is of another encoder, scale, shift or shape than a configuration has."""
    for name in ("identity", "scale", "shift", "channels", "side"):
        if (there := getattr(index.encoder, name)) != (wanted := getattr(settings, name)):
            raise InputError(f"encoder.{name} is {wanted}, but the latents in {folder} have {there}: another encoder")


def check_declared(folder: Path, index: Index, data: "DataConfig") -> None:
    """Raise InputError if a cache is of other data than a configuration declares. `data.num_classes=0` fits all."""
    there, wanted = (
        {name: value for name, value in one.items() if name not in FREE} for one in (index.data, declared(data))
    )
    if not data.num_classes:
        there.pop("num_classes", None)
        wanted.pop("num_classes", None)
    for name in {**there, **wanted}:
        if there.get(name) != wanted.get(name):
            raise InputError(
                f"data.{name} is {wanted.get(name)!r}, but the latents in {folder} are of data.{name}="
                f"{there.get(name)}: leave out data.{name}, or give the encoder of other latents"
            )


def posterior_noise(seed: int, items: Sequence[int], size: int) -> Tensor:
    """Normal numbers, float32 [len(items), size], each row from `seed` and its item alone: words of Philox through the
    transform of Box and Muller (1958), in a quarter of the time of numpy's normal numbers."""
    generators, half = Generators(seed, Stream.POSTERIOR), -(-size // 2)
    words = np.empty((len(items), half), dtype=np.uint64)
    for row, item in enumerate(items):
        words[row] = generators.at(item).bit_generator.random_raw(half)  # type: ignore[attr-defined]
    integers = torch.from_numpy(words.view(np.int32))
    # The size of a signed word is uniform below 2^31. As a float it is finest near 0, where the logarithm is steepest.
    radius = integers[:, :half].float().abs_().add_(0.5).mul_(2.0**-31).log_().mul_(-2).sqrt_()
    angle = integers[:, half:].float().mul_(math.pi * 2.0**-31)
    return torch.cat((angle.cos().mul_(radius), angle.sin_().mul_(radius)), 1)[:, :size]
