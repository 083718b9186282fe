"""Encoding of a set of images into a cache of latents (data/latents.py), by any number of processes.

    FOLDER/.encoding/request.json   what the cache will have, as its index; until the cache is complete
    FOLDER/.encoding/claims.jsonl   the shards that processes claimed and wrote (shards.py)

A shard is written whole or not at all, and always of the same images in the same parts, so that kills and the number of
processes change no byte. index.json is written last.
"""

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.errors import InputError, unknown
from ..models.fields import declared
from . import parallel, signals
from .config import Config
from .data import autoencoder, images
from .data.autoencoder import Autoencoder
from .data.files import few, sha256
from .data.images import ImageData
from .data.latents import (
    DTYPES,
    INDEX,
    TEST,
    EncoderFacts,
    Index,
    Shard,
    map_shard,
    read_index,
    tensor_names,
    write_index,
    write_shard,
)
from .data.workers import cores
from .device import device_type, pick_device
from .disk import access, write_atomically, write_lines
from .progress import Progress, Quiet
from .run import locked, read_json
from .sections import DataConfig
from .shards import CLAIMS_S, Claims, joined

SHARD = 512  # images of a shard: 64 MiB of latents 4 × 32 × 32 in float32
WORK, REQUEST = ".encoding", "request.json"
WAIT_S = 0.5  # between two looks at what other processes encode
READERS = 8  # threads that decode images, at most
DTYPE = "float32"


class ShardClaims(Claims):
    """The shards of a cache that processes claimed. `folder` is the cache's folder WORK."""

    @cached_property
    def index(self) -> Index:
        """What the cache will have; it has no shards yet."""
        return _index(read_json(self.folder / REQUEST))

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


def encode(
    config: Config, source: str, target: Path, progress: Progress, dtype: str = DTYPE, download: bool = False
) -> Index:
    """Encode the images of `config.data` by the autoencoder `source` into the cache `target`, and return its index.

    The cache has latents of mirrored images if `config.data.flip` is set. Continues an encoding that was stopped or
    killed, and writes shards again that are missing or incomplete. Other processes of the run encode too (`join`), as
    does the same command on another machine. Raises InputError, before anything is written, for data and an autoencoder
    that do not fit, for a folder with a cache of something else, and for too little room on the disk; Stopped after the
    batch in which a signal came.
    """
    if dtype not in DTYPES:
        raise unknown("--dtype", dtype, DTYPES)
    check_target(target)
    device = parallel.own_device(pick_device(config.run.device))
    network = autoencoder.load(source, device, download)
    network.check(config.data.channels, config.data.size)
    data = images.load(config.data, progress.say)
    wanted = index_of(config.data, data, network, source, dtype)
    request = {**asdict(wanted), "device": device_type(device)}
    index = read_index(target) if (target / INDEX).is_file() else None
    if index is not None:
        _compare(target, asdict(index), request)
        lost = [shard.file for shard in index.shards if not is_whole(target / shard.file, index, shard.images)]
        if not lost:
            _clean(target)
            return index
        progress.say(f"encode: missing or incomplete, and written again: {few(lost)}")
    elif (target / WORK / REQUEST).is_file():
        _compare(target, read_json(target / WORK / REQUEST), request)
    _check_room(target, wanted)
    _begin(target, request, index.shards if index else None)
    parallel.call(
        "encode",
        target=str(target.absolute()),
        data=asdict(config.data),
        source=str(source),
        device=config.run.device,
    )
    with parallel.attending():
        _work(target, data, network, device, progress)
    return _finish(target, wanted)


def join(target: str, data: dict[str, Any], source: str, device: str) -> None:
    """What the other processes of a run do in `encode` of the first one: they claim shards too, without messages."""
    with suppress(signals.Stopped), parallel.attending():
        try:
            own = parallel.own_device(pick_device(device))
            network = autoencoder.load(source, own)
            pictures = images.load(DataConfig(**data), Quiet().say)
        except Exception as error:
            parallel.check(error)
            raise
        _work(Path(target), pictures, network, own, Quiet())


def check_target(target: Path) -> None:
    """Raise InputError if `target` is no folder for a cache: a file, a folder with other things, or one that cannot be
    written."""
    with access("write", target):
        if target.exists() and not target.is_dir():
            raise InputError(f"--to {target} is a file; give a folder")
        names = {path.name for path in target.iterdir()} if target.exists() else set()
    if names - {TEST} and not names & {INDEX, WORK}:
        raise InputError(f"--to {target} has other files ({min(names)}) and no cache of latents: give an empty folder")


def index_of(settings: DataConfig, data: ImageData, network: Autoencoder, source: str, dtype: str) -> Index:
    """The index of a set of images that an autoencoder encodes, without its shards."""
    path = Path(source).expanduser()
    facts = EncoderFacts(
        kind=network.kind,
        identity=network.identity,
        scale=network.scale,
        shift=network.shift,
        channels=network.channels,
        side=data.size // network.factor,
        source=str(path.resolve()) if path.exists() else source,
    )
    return Index(
        data={name: value for name, value in declared(settings).items() if name not in ("path", "flip")},
        path=None if settings.path is None else str(Path(settings.path).absolute()),
        fingerprint=data.fingerprint,
        images=len(data),
        class_names=data.class_names,
        encoder=facts,
        logvar=network.kind == "AutoencoderKL",
        mirrored=settings.flip,
        dtype=dtype,
        shards=[],
    )


def _index(request: dict[str, Any]) -> Index:
    content = {name: value for name, value in request.items() if name != "device"}
    return Index(**{**content, "encoder": EncoderFacts(**content["encoder"])})


def _compare(target: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
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


def _check_room(target: Path, index: Index) -> None:
    """Raise InputError if the disk has no room for the shards that are missing, and one more."""
    shards = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    needed = (index.images + SHARD) * image_bytes(index) - shards
    place = next(path for path in (target.absolute(), *target.absolute().parents) if path.exists())
    if needed > (free := shutil.disk_usage(place).free):
        half = "; --dtype float16 takes half" if index.dtype == "float32" else ""
        raise InputError(
            f"{target} needs {needed / 2**30:,.3g} GiB more, but its disk has {free / 2**30:,.3g} GiB free{half}"
        )


def _begin(target: Path, request: dict[str, Any], shards: list[Shard] | None) -> None:
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


def _work(target: Path, data: ImageData, network: Autoencoder, device: str, progress: Progress) -> None:
    """The part of `encode` that all processes do: claim shards, and return when all are written."""
    parallel.check(None)  # of those that could not load the data or the autoencoder
    parallel.facts(device, data_fingerprint=data.fingerprint, encoder=network.identity)
    pool = ThreadPoolExecutor(min(cores(), READERS))
    try:
        with joined(target / WORK, len(data), ShardClaims) as claims:
            _work_off(claims, data, network, pool, progress)
    finally:
        pool.shutdown(cancel_futures=True)
    parallel.check(None)  # before the first process ends the claims


def _work_off(
    claims: ShardClaims, data: ImageData, network: Autoencoder, pool: ThreadPoolExecutor, progress: Progress
) -> None:
    waiting, first = False, True
    while True:
        parallel.heed()
        begin = time.time()
        try:
            part = claims.take(SHARD)
            complete = part is None and claims.complete()
        except FileNotFoundError:  # another command has completed the cache
            if not (claims.folder.parent / INDEX).is_file():
                raise
            return
        if part is None:
            if complete:
                if waiting:
                    progress.update("encode", claims.count, claims.count)
                return
            progress.update("encode", claims.drawn, claims.count)
            if not waiting:
                progress.say(f"encode: waiting for {claims.count - claims.drawn} images that other processes encode")
            waiting = True
            time.sleep(WAIT_S)
            continue
        pieces: dict[str, list[Tensor]] = {}
        done = claims.drawn
        for latents in batches(data, part, network, pool, claims.index.mirrored):
            if first:
                first = _say_rounding(latents, claims.index.dtype, progress)
            for name, tensor in latents.items():
                pieces.setdefault(name, []).append(tensor.to(DTYPES[claims.index.dtype][1]))
            done += len(latents["mean"])
            progress.update("encode", done, claims.count)
            parallel.heed()
        tensors = {name: torch.cat(parts) for name, parts in pieces.items()}
        if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise InputError(
                f"{bad[0]} of images {part.start} to {part.stop - 1} is not finite in {claims.index.dtype}"
            )
        claims.save(part, tensors, data.labels[part.start : part.stop], begin)


def batches(
    data: ImageData, part: range, network: Autoencoder, pool: ThreadPoolExecutor, mirrored: bool
) -> Iterator[dict[str, Tensor]]:
    """The latents of the images `part`, a batch at a time, by `latents.tensor_names`, float32 [n, c, s, s] on the CPU.
    Images are decoded by the threads of `pool` while others are encoded."""
    pending = [pool.submit(data.image, i) for i in part]
    count = max(1, autoencoder.PIXELS // data.size**2)
    for start in range(0, len(part), count):
        pixels = torch.stack([future.result() for future in pending[start : start + count]])
        pending[start : start + count] = [None] * len(pixels)  # type: ignore[list-item]  # frees the images
        values: dict[str, Tensor] = {}
        for end, batch in (("", pixels), *((("_mirrored", pixels.flip(-1)),) if mirrored else ())):
            mean, logvar = network.encode(batch)
            values[f"mean{end}"] = mean.cpu()
            if logvar is not None:
                values[f"logvar{end}"] = logvar.cpu()
        yield values


def rounding(mean: Tensor, logvar: Tensor, dtype: str) -> tuple[float, float]:
    """The root mean square of the error that `dtype` makes in the means, and that of the posterior's noise."""
    error = (mean.to(DTYPES[dtype][1]).double() - mean.double()).square().mean().sqrt()
    return float(error), float(logvar.double().exp().mean().sqrt())


def _say_rounding(latents: dict[str, Tensor], dtype: str, progress: Progress) -> bool:
    """Say how float16 rounds the first batch of a process, if it does so by more than the posterior's noise."""
    if dtype == "float16" and "logvar" in latents:
        error, noise = rounding(latents["mean"], latents["logvar"], dtype)
        if error > noise:
            progress.say(
                f"encode: float16 rounds the means by {error:.2g} (root mean square), more than the posterior's noise "
                f"of {noise:.2g}; --dtype float32 does not"
            )
    return False


def _finish(target: Path, wanted: Index) -> Index:
    """Write the index of a cache whose shards are all there, and delete what it does not need."""
    if (target / INDEX).is_file():  # by another command
        return read_index(target)
    claims = ShardClaims(target / WORK, wanted.images, "")
    index = replace(wanted, shards=claims.shards())
    write_index(target, index)
    _clean(target)
    return read_index(target)


def _clean(target: Path) -> None:
    """Delete what a complete cache does not need."""
    for file in target.glob(".*.tmp"):
        file.unlink(missing_ok=True)
    shutil.rmtree(target / WORK, ignore_errors=True)
