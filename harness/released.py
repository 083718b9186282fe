"""Runs with released weights in place of a training: ROOT/weights/NAME-KEY, with the files that a training has.

config.json says `origin`: what was converted. The weights lie in `weights/`, as those of step 0: how long they were
trained is unknown.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models import registry
from .config import Config
from .data.files import sha256
from .measure.cost import cost
from .training.checkpoint import Weights, keep

STEP = 0


def file_digest(path: Path) -> str:
    """The SHA-256 of a file; of a folder, of the names and contents of its files (hidden ones left out)."""
    if path.is_file():
        return sha256(path)
    files = sorted(one for one in path.rglob("*") if one.is_file() and not one.name.startswith("."))
    lines = [f"{one.relative_to(path)}\0{sha256(one)}\n" for one in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of the names, shapes, types and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}\0{list(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def keep_weights(folder: Path, config: Config, tensors: dict[str, Tensor]) -> Path:
    """Write weights into a run's folder, atomically."""
    return keep(folder, Weights(STEP, 0.0, registry.describe(config.model), "", tensors))


def training_facts(config: Config, step: int, seconds: float) -> dict[str, Any]:
    """The fields of a record that say how long weights were trained; null for released ones, of which it is unknown."""
    if config.released.tensors:
        return {"images_seen": None, "training_flops": None, "training_seconds": None}
    images = step * config.train.batch_size
    return {
        "images_seen": images,
        "training_flops": 3 * cost(config.model).flops * images,
        "training_seconds": round(seconds, 3),
    }
