"""Sampling of images from the weights of a training.

Each image is seeded by its index, so that kills, batch size and sharding change nothing.
"""

import hashlib
import io
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels.errors import InputError
from ..models.registry import Backbone, build, describe, select_backends
from . import signals
from .config import Config, check_fit
from .data.encoder import encoder
from .device import autocast, compiled, device_type, exact_float32, pick_device, round_weights
from .diffusion.guidance import Net
from .diffusion.objective import objective
from .diffusion.samplers import draws, index_noise, sample
from .measure.cost import cost
from .progress import Progress
from .record import write_atomically
from .training.checkpoint import load_weights


def labels_of(indices: range, num_classes: int) -> NDArray[np.int64]:
    """The class of each sampled image: its index modulo the number of classes, so that classes are balanced."""
    return np.arange(indices.start, indices.stop, dtype=np.int64) % max(num_classes, 1)


def seed_of(config: Config) -> int:
    """The seed of the noise: `sample.seed`, or the training's seed if that is null."""
    return config.seed if config.sample.seed is None else config.sample.seed


def generate(out: Path, training: Path, config: Config, step: int, progress: Progress) -> dict[str, Any]:
    """Sample `config.sample.count` images from the weights of a step in the folder `training`.

    Writes `out/samples.npz` (`images` uint8 [N, H, W, C], `labels` int64 [N]) and returns the fields of the `sample`
    record. Finished batches are kept in `out/samples.parts`, so that a killed call continues. It never uses parts of
    other weights or settings. Raises InputError if the weights are missing or of another model, if guidance does not
    fit, or if images are not finite; Stopped after a batch in which a signal came.
    """
    exact_float32()
    settings, device = config.sample, pick_device(config.run.device)
    weights = load_weights(training, step, settings.weights, config.model)
    sampler = Sampler(config, weights.tensors, device)
    parts = Parts(out, sampler.key(weights.tensors))
    started, drawn = time.perf_counter(), 0
    pieces = []
    for start in range(0, settings.count, settings.batch_size):
        indices = range(start, min(start + settings.batch_size, settings.count))
        if (images := parts.read(indices)) is None:
            # A compiled network takes only whole batches. Images beyond the count are dropped.
            batch = indices if settings.compile == "eager" else range(start, start + settings.batch_size)
            x = sampler.draw(batch)[: len(indices)]
            if not torch.isfinite(x).all():
                raise InputError(f"the {settings.weights} weights of step {step} give images that are not finite")
            images = sampler.images(x)
            parts.write(indices, images)
            drawn += len(indices)
        pieces.append(images)
        progress.update("sample", indices.stop, settings.count)
        signals.check()
    seconds = time.perf_counter() - started
    buffer = io.BytesIO()
    labels = labels_of(range(settings.count), config.model.num_classes)
    np.savez_compressed(buffer, images=np.concatenate(pieces), labels=labels)
    write_atomically(out / "samples.npz", buffer.getvalue())
    parts.remove()
    return {
        "count": settings.count,
        "method": settings.method,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "guidance_channels": settings.guidance_channels,
        "clip": settings.clip,
        "seed": seed_of(config),
        "checkpoint_step": step,
        "weights": settings.weights,
        "images_seen": step * config.train.batch_size,
        "training_flops": 3 * cost(config.model).flops * step * config.train.batch_size,
        "training_seconds": round(weights.seconds, 3),
        "seconds": round(seconds, 3),
        # Only images of this call. A resumed call without any has no speed.
        "images_per_s": drawn / seconds if drawn else None,
        "precision": settings.precision,
        "compile": settings.compile,
        "batch_size": settings.batch_size,
        "backend": sampler.backend,
    }


class Sampler:
    """A network with weights on a device that draws images by their index.

    `backend` names the implementation of each operator that the network calls.
    """

    def __init__(self, config: Config, tensors: dict[str, Tensor], device: str) -> None:
        self.config, self.device, self.encoder = config, device, encoder(config.encoder)
        net = build(config.model)
        net.load_state_dict(tensors)
        net = net.to(device).eval()
        round_weights(net, config.sample.precision)
        self.backend = select_backends(net, vars(config.backend), device_type(device))
        self.null_class = net.null_class
        self.call: Net = compiled(net, config.sample.compile)

    def key(self, tensors: dict[str, Tensor]) -> str:
        """16 hex digits of everything that determines an image, except its index."""
        config, settings = self.config, vars(self.config.sample)
        facts = {name: value for name, value in settings.items() if name not in ("count", "batch_size", "at", "seed")}
        facts |= {"seed": seed_of(config), "model": describe(config.model), "encoder": vars(config.encoder)}
        facts |= {"objective": vars(config.objective), "backend": self.backend, "device": device_type(self.device)}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for name in sorted(tensors):
            digest.update(name.encode())
            digest.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]

    def draw(self, indices: range) -> Tensor:
        """The network's images for these indices, encoded, float32 [B, C, S, S] on the device."""
        labels = labels_of(indices, self.config.model.num_classes)
        return _sampled(self.call, self.config, indices, torch.from_numpy(labels), self.null_class, self.device)

    def images(self, x: Tensor) -> NDArray[np.uint8]:
        """Images uint8 [B, H, W, C] from the result of `draw`."""
        return self.encoder.decode(x).permute(0, 2, 3, 1).cpu().numpy()


class Parts:
    """Finished batches, one file each, in `out/samples.parts/KEY`."""

    def __init__(self, out: Path, key: str) -> None:
        self.folder = out / "samples.parts" / key
        for folder in (self.folder.parent, self.folder):  # but not `out`, whose disk may be missing
            folder.mkdir(exist_ok=True)

    def _file(self, indices: range) -> Path:
        return self.folder / f"{indices.start}-{indices.stop}.npy"

    def read(self, indices: range) -> NDArray[np.uint8] | None:
        """The images of a batch, None if it is not finished or its file is damaged."""
        try:
            images = np.load(self._file(indices), allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return images if getattr(images, "shape", ())[:1] == (len(indices),) else None  # np.load opens an .npz too

    def write(self, indices: range, images: NDArray[np.uint8]) -> None:
        """Write the file of a batch, atomically."""
        buffer = io.BytesIO()
        np.save(buffer, images, allow_pickle=False)
        write_atomically(self._file(indices), buffer.getvalue())

    def remove(self) -> None:
        """Remove all parts, including those of other weights and settings."""
        shutil.rmtree(self.folder.parent)


def draw(net: Backbone, config: Config, labels: Sequence[int], seed: int) -> NDArray[np.uint8]:
    """Draw images uint8 [N, H, W, C] with a network by `config.sample`: one for each label, image i from (seed, i).

    Runs on the network's device. Raises InputError for labels out of range and settings that do not fit.
    """
    most = max(config.model.num_classes, 1) - 1
    if not labels or not all(0 <= label <= most for label in labels):
        raise InputError(f"labels must be a list of classes from 0 to {most}, not {list(labels)}")
    config = replace(config, sample=replace(config.sample, seed=seed))
    check_fit(config)
    exact_float32()
    device = str(next(net.parameters()).device)
    x = _sampled(net, config, range(len(labels)), torch.tensor(labels), net.null_class, device)
    return encoder(config.encoder).decode(x).permute(0, 2, 3, 1).cpu().numpy()


def _sampled(net: Net, config: Config, indices: range, labels: Tensor, null_class: int | None, device: str) -> Tensor:
    settings, model = config.sample, config.model
    shape = (model.in_channels, model.input_size, model.input_size)
    noise = index_noise(seed_of(config), indices, shape, draws(settings.method, settings.steps))
    with autocast(device, settings.precision):
        return sample(
            net,
            next(noise).to(device),
            labels.to(device),
            objective=objective(config.objective),
            method=settings.method,
            steps=settings.steps,
            guidance=settings.guidance,
            guidance_channels=settings.guidance_channels,
            null_class=null_class,
            clip=settings.clip,
            noise=lambda _: next(noise).to(device),
        )
