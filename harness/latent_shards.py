"""The folder of a cache of latents while it is written: its claims, what it must have, and what is whole in it.

FOLDER/.encoding/request.json   what the cache will have, as its index; until the cache is complete
FOLDER/.encoding/claims.jsonl   the shards that processes claimed and wrote (shards.py)
"""

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ..kernels.errors import InputError
from . import signals
from .data.files import sha256
from .data.latents import (
    DTYPES,
    INDEX,
    TEST,
    EncoderFacts,
    Index,
    Shard,
    map_shard,
    tensor_names,
    write_shard,
)
from .data.workers import cores
from .disk import access, write_atomically, write_lines
from .progress import Progress
from .run import locked, read_json
from .shards import CLAIMS_S, Claims

SHARD = 512  # images of a shard, at most
SHARD_BYTES = 2**26  # of a shard, at most: its process holds a few of that size in memory
WORK, REQUEST = ".encoding", "request.json"
READERS = 8  # threads that read and decode files, at most


class ShardClaims(Claims):
    """The shards of a cache that processes claimed. `folder` is the cache's folder WORK."""

    @cached_property
    def index(self) -> Index:
        """What the cache will have; it has no shards yet."""
        return index_in(read_json(self.folder / REQUEST))

    def save(self, part: range, tensors: dict[str, Tensor], labels: Any, begin: float) -> None:
        """Write the shard of a claimed range, of which the encoding began at the time `begin`, and note its SHA-256."""
        shard = write_shard(self.folder.parent, part.start, tensors, labels)
        with locked(self.folder, CLAIMS_S):
            seconds = round(time.time() - begin, 3)
            self._note(part.start, part.stop, self.process, begin, seconds=seconds, sha256=shard.sha256)

    def shards(self) -> list[Shard]:
        """The shards of a complete cache, for its index. A shard whose process was killed before it could note the
        SHA-256 is read."""
        lines = sorted(self._taken().values(), key=lambda line: line["start"])
        parts = [(line, self._file(line["start"], line["stop"])) for line in lines]
        return [
            Shard(file.name, line["stop"] - line["start"], line.get("sha256") or sha256(file)) for line, file in parts
        ]

    def _file(self, start: int, stop: int) -> Path:
        return self.folder.parent / f"{start:08d}-{stop:08d}.safetensors"

    def _whole(self, start: int, stop: int) -> bool:
        return is_whole(self._file(start, stop), self.index, stop - start)


def is_whole(file: Path, index: Index, count: int) -> bool:
    """Whether a shard has the tensors and the size that it should have. Reads its header only."""
    try:
        map_shard(file, index, count)
    except InputError:
        return False
    return True


def damaged(target: Path, index: Index, progress: Progress, verify: bool) -> list[str]:
    """The shards of a complete cache that are missing or incomplete. With `verify` every shard is read, and those whose
    checksum is another one are deleted and listed too."""
    lost = [shard.file for shard in index.shards if not is_whole(target / shard.file, index, shard.images)]
    whole = [shard for shard in index.shards if shard.file not in lost] if verify else []
    with ThreadPoolExecutor(min(cores(), READERS)) as pool:
        digests = pool.map(sha256, [target / shard.file for shard in whole])
        for number, (shard, digest) in enumerate(zip(whole, digests, strict=True), start=1):
            signals.check()
            progress.update("verify", number, len(whole))
            if digest != shard.sha256:
                (target / shard.file).unlink()
                lost.append(shard.file)
    return lost


def check_target(target: Path) -> None:
    """Raise InputError if `target` is no folder for a cache: a file, a folder with other things, or one that cannot be
    written."""
    with access("write", target):
        if target.exists() and not target.is_dir():
            raise InputError(f"--to {target} is a file; give a folder")
        names = {path.name for path in target.iterdir()} if target.exists() else set()
        place = _place(target)
    if names - {TEST} and not names & {INDEX, WORK}:
        raise InputError(f"--to {target} has other files ({min(names)}) and no cache of latents: give an empty folder")
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(f"cannot write --to {target}: {place} is not a folder that can be written")


def _place(target: Path) -> Path:
    """The nearest path above or at `target` that exists."""
    return next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())


def index_in(request: dict[str, Any]) -> Index:
    content = {name: value for name, value in request.items() if name != "device"}
    return Index(**{**content, "encoder": EncoderFacts(**content["encoder"])})


def check_same(target: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError that names the first setting in which a cache differs from what is asked for. Neither paths nor
    names of files count."""
    for section in ("data", "encoder", ""):  # another size has another side too
        old, new = (content.get(section) or {} if section else content for content in (before, now))
        for name in new:
            if name in ("source", "path", "shards", "encoder", "data") or (name == "device" and name not in old):
                continue
            if old.get(name) != new[name]:
                key = {"mirrored": "data.flip", "fingerprint": "the fingerprint of the data"}.get(name, name)
                key = f"{section}.{name}" if section else key
                raise InputError(
                    f"{target} has latents with {key} {_short(old.get(name))}, not {_short(new[name])}: "
                    "encode into another folder, or delete this one"
                )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:79] + "…"


def image_bytes(index: Index) -> int:
    """The bytes of one image in the shards of a cache."""
    facts = index.encoder
    values = facts.channels * facts.side**2 * len(tensor_names(index.logvar, index.mirrored))
    return values * DTYPES[index.dtype][1].itemsize + 8  # and its label


def shard_images(index: Index) -> int:
    """The number of images of each shard but the last. It depends on nothing else, so that shards are the same."""
    return min(SHARD, max(1, SHARD_BYTES // image_bytes(index)))


def check_room(target: Path, index: Index) -> None:
    """Raise InputError if the disk has no room for the shards that are missing, and one more."""
    shards = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    needed = (index.images + shard_images(index)) * image_bytes(index) - shards
    if needed > (free := shutil.disk_usage(_place(target)).free):
        half = "; --dtype float16 takes half" if index.dtype == "float32" else ""
        raise InputError(
            f"{target} needs {needed / 2**30:,.3g} GiB more, but its disk has {free / 2**30:,.3g} GiB free{half}"
        )


def prepare(target: Path, request: dict[str, Any], shards: list[Shard] | None) -> None:
    """Make the folder ready for claims. The index of a cache with damaged `shards` makes place for claims of them all,
    of which those that are damaged are freed at the end."""
    work = target / WORK
    with access("write", work, missing=True):
        work.mkdir(parents=True, exist_ok=True)
        if not (work / REQUEST).is_file() or shards is not None:
            write_atomically(work / REQUEST, json.dumps(request, indent=1).encode())
    if shards is not None:
        starts = [int(shard.file.partition("-")[0]) for shard in shards]
        lines = [
            {"start": start, "stop": start + shard.images, "by": "index", "at": 0.0, "seconds": 0.0}
            | {"sha256": shard.sha256}
            for start, shard in zip(starts, shards, strict=True)
        ]
        write_lines(work / "claims.jsonl", lines)
        (target / INDEX).unlink()


def clean(target: Path) -> None:
    """Delete what a complete cache does not need."""
    for file in target.glob(".*.tmp"):
        file.unlink(missing_ok=True)
    shutil.rmtree(target / WORK, ignore_errors=True)
