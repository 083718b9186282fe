"""Encoding of a set of images into a cache of latents (data/latents.py), by any number of processes (latent_shards.py).

A shard is written whole or not at all, and always of the same images in the same parts, so that kills and the number of
processes change no byte. index.json is written last.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import islice
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
from .data.files import few
from .data.images import ImageData
from .data.latents import (
    DTYPES,
    FREE,
    INDEX,
    EncoderFacts,
    Index,
    read_index,
    write_index,
)
from .data.workers import cores
from .device import device_type, own_device, pick_device
from .latent_shards import (
    READERS,
    REQUEST,
    WORK,
    ShardClaims,
    check_room,
    check_same,
    check_target,
    clean,
    damaged,
    prepare,
    shard_images,
)
from .progress import Progress, Quiet
from .run import locked, read_json
from .sections import DataConfig
from .shards import CLAIMS_S, joined

WAIT_S = 0.5  # between two looks at what other processes encode
DTYPE = "float32"


def encode(
    config: Config,
    source: str,
    target: Path,
    progress: Progress,
    dtype: str = DTYPE,
    download: bool = False,
    verify: bool = False,
) -> Index:
    """Encode the images of `config.data` by the autoencoder `source` into the cache `target`, and return its index.

    The cache has latents of mirrored images if `config.data.flip` is set. Continues an encoding that was stopped or
    killed, and writes shards again that are missing or incomplete and, with `verify`, those of a complete cache that
    have another checksum. Other processes of the run encode too (`join`), as does the same command on another machine.
    Raises InputError, before anything is written, for data and an autoencoder that do not fit, for a folder with a
    cache of something else, and for too little room on the disk; Stopped after the batch in which a signal came.
    """
    if dtype not in DTYPES:
        raise unknown("--dtype", dtype, DTYPES)
    check_target(target)
    device = own_device(pick_device(config.run.device))
    network = autoencoder.load(source, device, download)
    network.check(config.data.channels, config.data.size)
    data = images.load(config.data, progress.say)
    wanted = index_of(config.data, data, network, source, dtype)
    request = {**asdict(wanted), "device": device_type(device)}
    index = read_index(target) if (target / INDEX).is_file() else None
    if index is not None:
        check_same(target, asdict(index), request)
        lost = damaged(target, index, progress, verify)
        if not lost:
            clean(target)
            return index
        progress.say(f"encode: missing or damaged, and written again: {few(lost)}")
    elif (target / WORK / REQUEST).is_file():
        check_same(target, read_json(target / WORK / REQUEST), request)
    check_room(target, wanted)
    prepare(target, request, index.shards if index else None)
    parallel.call(
        "encode",
        target=str(target.absolute()),
        data=asdict(config.data),
        source=str(source),
        device=config.run.device,
    )
    with parallel.attending("encode"):
        _work(target, data, network, device, progress)
    return _finish(target, wanted)


def join(target: str, data: dict[str, Any], source: str, device: str) -> None:
    """What the other processes of a run do in `encode` of the first one: they claim shards too, without messages."""
    with suppress(signals.Stopped), parallel.attending("encode"):
        try:
            own = own_device(pick_device(device))
            network = autoencoder.load(source, own)
            pictures = images.load(DataConfig(**data), Quiet().say)
        except Exception as error:
            parallel.check(error)
            raise
        _work(Path(target), pictures, network, own, Quiet())


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
        data={name: value for name, value in declared(settings).items() if name not in FREE},
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
    waiting = last = False
    while True:
        parallel.heed()
        begin = time.time()
        try:
            part = claims.take(shard_images(claims.index))
            complete = part is None and claims.complete()
        except FileNotFoundError:  # another command has completed the cache
            if not (claims.folder.parent / INDEX).is_file():
                raise
            return
        if part is None:
            if complete:
                if not last:  # this process said so with its own last shard
                    progress.update("encode", claims.count, claims.count)
                return
            progress.update("encode", claims.drawn, claims.count)
            if not waiting:
                progress.say(f"encode: waiting for {claims.count - claims.drawn} images that other processes encode")
            waiting = True
            time.sleep(WAIT_S)
            continue
        last = claims.drawn + len(part) == claims.count
        tensors = _encoded(claims, part, data, network, pool, progress)
        claims.save(part, tensors, data.labels[part.start : part.stop], begin)


def _encoded(
    claims: ShardClaims,
    part: range,
    data: ImageData,
    network: Autoencoder,
    pool: ThreadPoolExecutor,
    progress: Progress,
) -> dict[str, Tensor]:
    """The tensors of a shard, in the type of the cache."""
    index, done, pieces = claims.index, claims.drawn, dict[str, list[Tensor]]()
    for latents in batches(data, part, network, pool, index.mirrored):
        if not pieces and part.start == 0:
            say_rounding(latents, index.dtype, progress)
        for name, tensor in latents.items():
            pieces.setdefault(name, []).append(tensor.to(DTYPES[index.dtype][1]))
        done += len(latents["mean"])
        progress.update("encode", done, claims.count)
        parallel.heed()
    tensors = {name: torch.cat(parts) for name, parts in pieces.items()}
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise InputError(f"{bad[0]} of images {part.start} to {part.stop - 1} is not finite in {index.dtype}")
    return tensors


def batches(
    data: ImageData, part: range, network: Autoencoder, pool: ThreadPoolExecutor, mirrored: bool
) -> Iterator[dict[str, Tensor]]:
    """The latents of the images `part`, a batch at a time, by `latents.tensor_names`, float32 [n, c, s, s] on the CPU.
    Images are decoded by the threads of `pool` while others are encoded."""
    count, rest = max(1, autoencoder.PIXELS // data.size**2), iter(part)
    pending = deque(pool.submit(data.image, i) for i in islice(rest, 2 * count + READERS))
    while pending:
        pixels = torch.stack([pending.popleft().result() for _ in range(min(count, len(pending)))])
        pending.extend(pool.submit(data.image, i) for i in islice(rest, count))
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


def say_rounding(latents: dict[str, Tensor], dtype: str, progress: Progress) -> None:
    """Say how float16 rounds the means of a batch, if it does so by more than the posterior's noise."""
    if dtype == "float16" and "logvar" in latents:
        error, noise = rounding(latents["mean"], latents["logvar"], dtype)
        if error > noise:
            progress.say(
                f"encode: float16 rounds the means by {error:.2g} (root mean square), more than the posterior's noise "
                f"of {noise:.2g}; --dtype float32 does not"
            )


def _finish(target: Path, wanted: Index) -> Index:
    """Write the index of a cache whose shards are all there, and delete what it does not need."""
    with suppress(FileNotFoundError), locked(target / WORK, CLAIMS_S):  # another command may have done it
        if not (target / INDEX).is_file():
            shards = ShardClaims(target / WORK, wanted.images, "").shards()
            write_index(target, replace(wanted, shards=shards))
            clean(target)
    return read_index(target)
