"""Drawing images from a checkpoint: seeded by image index, so kills, batch size and sharding change nothing."""

import io
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..kernels.errors import InputError
from ..models.registry import build, select_backends, to_dict
from . import signals
from .config import Config
from .data.images import to_uint8
from .device import autocast, compiled, exact_float32, pick_device, round_weights
from .diffusion.gaussian import Diffusion
from .diffusion.samplers import Net, index_noise, sample
from .progress import Progress
from .record import write_atomically
from .training import checkpoint as ckpt


def labels_of(indices: range, num_classes: int) -> np.ndarray:
    """The class of each sampled image: its index modulo the number of classes, so that all classes are alike often."""
    return np.arange(indices.start, indices.stop, dtype=np.int64) % max(num_classes, 1)


def newest_checkpoint(folder: Path, model: dict[str, Any], say: Any) -> ckpt.Checkpoint:
    """The newest whole checkpoint below a run folder. Raises InputError where there is none, or of another model."""
    where = folder / "checkpoints"
    for saved in ckpt.newest(where):
        if isinstance(saved, InputError):
            say(f"{saved}; falling back to the one before")
            continue
        ckpt.check_model(saved, model, where)
        return saved
    raise InputError(f"{where} holds no whole checkpoint: train the run first (lamabench train …)")


def generate(folder: Path, config: Config, progress: Progress, source: Path | None = None) -> dict[str, Any]:
    """Sample `config.sample.count` images from the averaged weights of the newest checkpoint of `source` (default:
    `folder`) into `folder/samples.npz`; returns the fields of the `sample` record.

    Finished batches wait in `folder/samples.parts`, so a killed call continues. Raises InputError where there is no
    checkpoint, or it is of another model, or guidance does not fit; Stopped after a batch in which a signal came.
    """
    exact_float32()
    settings, device = config.sample, pick_device(config.run.device)
    saved = newest_checkpoint(source or folder, to_dict(config.model), progress.say)
    net = build(config.model)
    net.load_state_dict(saved.group("ema"))
    net = net.to(device).eval()
    round_weights(net, settings.precision)
    backend = select_backends(net, vars(config.backend), device.split(":")[0])
    call = compiled(net, settings.compile)
    parts = folder / "samples.parts" / f"step-{saved.step}"
    for made in (parts.parent, parts):  # but not the run's own folder, which may be away
        made.mkdir(exist_ok=True)
    started, drawn = time.perf_counter(), 0
    pieces = []
    for start in range(0, settings.count, settings.batch_size):
        indices = range(start, min(start + settings.batch_size, settings.count))
        part = parts / f"{indices.start}-{indices.stop}.npy"
        if not part.is_file():
            # A compiled network takes whole batches alone: what is too much is not kept.
            batch = indices if settings.compile == "eager" else range(start, start + settings.batch_size)
            with autocast(device, settings.precision):
                images = _batch(call, batch, config, net.null_class, device)[: len(indices)]
            if not torch.isfinite(images).all():
                raise InputError(f"the checkpoint at step {saved.step} gives images that are not finite")
            buffer = io.BytesIO()
            np.save(buffer, to_uint8(images).permute(0, 2, 3, 1).cpu().numpy(), allow_pickle=False)
            write_atomically(part, buffer.getvalue())
            drawn += len(indices)
        pieces.append(np.load(part, allow_pickle=False))
        progress.update("sample", indices.stop, settings.count)
        signals.check()
    seconds = time.perf_counter() - started
    buffer = io.BytesIO()
    labels = labels_of(range(settings.count), config.model.num_classes)
    np.savez_compressed(buffer, images=np.concatenate(pieces), labels=labels)
    write_atomically(folder / "samples.npz", buffer.getvalue())
    shutil.rmtree(folder / "samples.parts")
    return {
        "count": settings.count,
        "method": settings.method,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "guidance_channels": settings.guidance_channels,
        "clip": settings.clip,
        "checkpoint_step": saved.step,
        "seconds": round(seconds, 3),
        # Only what this call drew; a resumed call that found everything drawn has no speed to tell.
        "images_per_s": drawn / seconds if drawn else None,
        "precision": settings.precision,
        "compile": settings.compile,
        "batch_size": settings.batch_size,
        "backend": backend,
    }


def _batch(net: Net, indices: range, config: Config, null_class: int | None, device: str) -> torch.Tensor:
    settings, model = config.sample, config.model
    shape = (model.in_channels, model.input_size, model.input_size)
    draws = settings.steps if settings.method == "ancestral" else 1
    noise = index_noise(config.seed, indices, shape, draws)
    labels = torch.from_numpy(labels_of(indices, model.num_classes)).to(device)
    return sample(
        net,
        next(noise).to(device),
        labels,
        diffusion=Diffusion(),
        method=settings.method,
        steps=settings.steps,
        guidance=settings.guidance,
        guidance_channels=settings.guidance_channels,
        null_class=null_class,
        clip=settings.clip,
        noise=lambda _: next(noise).to(device),
    )
