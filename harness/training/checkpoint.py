"""Checkpoints: tensors and JSON in one safetensors file, never a pickle.

A file appears whole or not at all (write, fsync, rename) and says the sum of its bytes; the last two are kept. Tensors
are named `model/…`, `ema/…`, `exp_avg/…`, `exp_avg_sq/…` and `window` (the metrics not yet logged); the header holds
the step and the configuration.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...kernels.errors import InputError

KEEP = 2
_NAME = re.compile(r"step-\d{8}\.safetensors")


@dataclass
class Checkpoint:
    """What a file holds: `step`, `seconds` of training so far, the model's configuration and the tensors by name."""

    step: int
    seconds: float
    model: dict[str, Any]
    fingerprint: str  # of the training data
    tensors: dict[str, Tensor]

    def group(self, name: str) -> dict[str, Tensor]:
        """The tensors under `name/`, without that prefix."""
        return {key.removeprefix(f"{name}/"): v for key, v in self.tensors.items() if key.startswith(f"{name}/")}


def files(folder: Path) -> list[Path]:
    """The checkpoint files of a folder, newest first."""
    found = [path for path in folder.glob("step-*.safetensors") if _NAME.fullmatch(path.name)]
    return sorted(found, reverse=True)  # steps are written with leading zeros


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint atomically and remove all but it and the `KEEP` - 1 before it.

    One of a later step goes too: training would have gone on from it, were it not damaged.
    """
    folder.mkdir(exist_ok=True)
    for torn in folder.glob(".step-*.tmp"):  # by a kill, perhaps on another machine; a run has one writer
        torn.unlink()
    path = folder / f"step-{checkpoint.step:08d}.safetensors"
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    header = {
        "step": checkpoint.step,
        "seconds": checkpoint.seconds,
        "model": checkpoint.model,
        "fingerprint": checkpoint.fingerprint,
    }
    try:
        tensors = {name: tensor.detach().contiguous() for name, tensor in checkpoint.tensors.items()}
        header["sum"] = _sum(tensors)
        save_file(tensors, temporary, metadata={"lamabench": json.dumps(header)})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    found = files(folder)
    first = found.index(path)
    for other in found[:first] + found[first + KEEP :]:
        other.unlink()
    return path


def _sum(tensors: dict[str, Tensor]) -> int:
    """The sum of all bytes: quick on any device, and another one where a bit flipped or a block was lost."""
    return sum(int(tensor.reshape(-1).view(torch.uint8).sum(dtype=torch.int64)) for tensor in tensors.values())


def load(path: Path) -> Checkpoint:
    """Read a checkpoint to the CPU. Raises InputError where the file is missing, truncated, changed or not ours."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["lamabench"])
            # Cloned: what safetensors returns is a view of the file, which may be replaced or torn while in use.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise InputError(f"no such checkpoint: {path}") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"checkpoint {path} is truncated or damaged: {error}") from None
    except (KeyError, ValueError):
        raise InputError(f"{path} is a safetensors file, but not a lamabench checkpoint") from None
    if header.pop("sum", None) not in (None, _sum(tensors)):  # None: saved before there was a sum
        raise InputError(f"checkpoint {path} is truncated or damaged: its bytes are not those that were saved")
    return Checkpoint(**header, tensors=tensors)


def newest(folder: Path) -> Iterator[Checkpoint | InputError]:
    """The checkpoints of a folder, newest first; a damaged one comes as the error that it gave."""
    for path in files(folder):
        try:
            yield load(path)
        except InputError as error:
            yield error


def check_model(checkpoint: Checkpoint, model: dict[str, Any], where: Path) -> None:
    """Raise InputError, naming the first fields that differ, where a checkpoint is of another model."""
    if checkpoint.model != model:
        keys = sorted(checkpoint.model.keys() | model.keys())
        pairs = [(key, checkpoint.model.get(key), model.get(key)) for key in keys]
        pairs.sort(key=lambda pair: pair[0] != "family")
        differ = [f"{key} {theirs} there, {ours} here" for key, theirs, ours in pairs if theirs != ours]
        raise InputError(f"the checkpoint in {where} is of another model: {'; '.join(differ[:3])}")
