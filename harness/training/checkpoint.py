"""Checkpoints and kept weights: tensors and JSON in one safetensors file, never a pickle.

A training folder has two folders of such files. `checkpoints/` has the last two complete states, from which training
continues. `weights/` has the averaged weights of every requested moment. A file appears complete or not at all (write,
fsync, rename), and its header has the sum of its bytes and names its step, model, data and code. The tensors of a
checkpoint are `model/…`, `ema/…`, `exp_avg/…`, `exp_avg_sq/…` and `window` (metrics that are not yet logged). Those of
weights have their names in the network.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...kernels.errors import InputError, unknown
from ...models import registry
from ..config import WEIGHTS

KEEP = 2
_NAME = re.compile(r"step-(\d{8})\.safetensors")


@dataclass
class Origin:
    """The header of a file of a training: `step`, `seconds` of training so far, the model (as in `registry.describe`),
    the fingerprint of the data, and `stretches`, each {from_step, backend, torch, commit, dirty, device, host}."""

    step: int
    seconds: float
    model: dict[str, Any]
    fingerprint: str
    stretches: list[dict[str, Any]] = field(default_factory=list, kw_only=True)


@dataclass
class Checkpoint(Origin):
    """A complete state. `window_start` is the step of the last regular line of metrics."""

    tensors: dict[str, Tensor]
    window_start: int = field(default=0, kw_only=True)

    def group(self, name: str) -> dict[str, Tensor]:
        """The tensors with the prefix `name/`, without that prefix."""
        return {key.removeprefix(f"{name}/"): v for key, v in self.tensors.items() if key.startswith(f"{name}/")}


@dataclass
class Weights(Origin):
    """The weights of a network by name, and the loss that was logged last, up to that step."""

    tensors: dict[str, Tensor]
    loss: float | None = field(default=None, kw_only=True)


def file_name(step: int) -> str:
    """The name of the file of a step, in both folders."""
    return f"step-{step:08d}.safetensors"


def files(folder: Path) -> list[Path]:
    """The files of `checkpoints/` or `weights/`, newest first."""
    paths = [path for path in folder.glob("step-*.safetensors") if _NAME.fullmatch(path.name)]
    return sorted(paths, reverse=True)  # steps have leading zeros


def moments(folder: Path) -> list[int]:
    """The steps whose averaged weights a training folder has, ascending."""
    return sorted(int(path.stem.removeprefix("step-")) for path in files(folder / "weights"))


def nearest(steps: Iterable[int], step: int) -> str:
    """Text that names the kept steps before and after a step that was not kept."""
    steps = sorted(steps)
    sides = [*[other for other in steps if other < step][-1:], *[other for other in steps if other > step][:1]]
    return f"the nearest kept: {' and '.join(map(str, sides))}" if sides else "none is kept"


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint atomically and remove all others except the `KEEP` - 1 before it.

    Checkpoints of later steps are removed too. They are damaged, or training would have continued from them.
    """
    path = _write(folder, checkpoint)
    paths = files(folder)
    place = paths.index(path)
    for other in paths[:place] + paths[place + KEEP :]:
        other.unlink()
    return path


def keep(folder: Path, weights: Weights) -> Path:
    """Write the weights of a moment atomically into `weights/` of a training folder."""
    return _write(folder / "weights", weights)


def _write(folder: Path, saved: Checkpoint | Weights) -> Path:
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob(".step-*.tmp"):  # from a kill, perhaps on another machine; a training has one writer
        leftover.unlink()
    path = folder / file_name(saved.step)
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    header = {f.name: getattr(saved, f.name) for f in fields(saved) if f.name != "tensors"}
    try:
        tensors = {name: tensor.detach().contiguous() for name, tensor in saved.tensors.items()}
        header["sum"] = _sum(tensors)
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata={"lamabench": json.dumps(header)})
        temporary.chmod(mode)  # safetensors lets only the owner read its files
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _sum(tensors: dict[str, Tensor]) -> int:
    """The sum of all bytes. It is quick on any device and changes if a bit flips or a block is lost."""
    return sum(int(tensor.reshape(-1).view(torch.uint8).sum(dtype=torch.int64)) for tensor in tensors.values())


Saved = TypeVar("Saved", Checkpoint, Weights)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint to the CPU. Raises InputError for a file that is missing, truncated, changed or not one."""
    return _read(path, Checkpoint)


def _read(path: Path, kind: type[Saved], tensors: bool = True) -> Saved:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["lamabench"])
            names = file.keys() if tensors else []
            # Cloned, because safetensors returns a view of the file, which may be replaced or truncated while in use.
            read = {name: file.get_tensor(name).clone() for name in names}
    except FileNotFoundError:
        raise InputError(f"no such checkpoint: {path}") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"checkpoint {path} is truncated or damaged: {error}") from None
    except (KeyError, ValueError):
        raise InputError(f"{path} is a safetensors file, but not a lamabench checkpoint") from None
    if tensors and header.get("sum") not in (None, _sum(read)):  # None: an old file without a sum
        raise InputError(f"checkpoint {path} is truncated or damaged: its bytes have changed")
    attributes = {f.name for f in fields(kind)} & header.keys()
    return kind(**{name: header[name] for name in attributes}, tensors=read)


def newest(folder: Path) -> Iterator[Checkpoint | InputError]:
    """The checkpoints of a folder, newest first. For a damaged one, its error takes its place."""
    for path in files(folder):
        try:
            yield load(path)
        except InputError as error:
            yield error


def load_weights(folder: Path, step: int, kind: str = "ema", model: dict[str, Any] | None = None) -> Weights:
    """The weights of a training folder at a step, `ema` (averaged) or `live`, on the CPU.

    Live weights exist only in complete checkpoints. Raises InputError, with the nearest kept steps, if there are no
    weights of that step, and if they are damaged or of another model than `model` (as in `registry.describe`).
    """
    if kind not in WEIGHTS:
        raise unknown("sample.weights", kind, WEIGHTS)
    own, whole = folder / "weights" / file_name(step), folder / "checkpoints" / file_name(step)
    if kind == "ema" and own.is_file():
        weights = _read(own, Weights)
    elif whole.is_file():
        weights = weights_of(load(whole), kind)
    elif kind == "ema":
        raise InputError(f"{folder} has no averaged weights of step {step}; {nearest(moments(folder), step)}")
    else:
        steps = [int(path.stem.removeprefix("step-")) for path in files(whole.parent)]
        raise InputError(
            f"{folder} has no live weights of step {step} (only its last {KEEP} checkpoints have them); "
            f"{nearest(steps, step)}"
        )
    if model is not None:
        check_model(weights, model, own if own.is_file() else whole)
    return weights


def weights_of(saved: Checkpoint, kind: str = "ema", loss: float | None = None) -> Weights:
    """The weights in a checkpoint."""
    tensors = saved.group("model" if kind == "live" else "ema")
    return Weights(saved.step, saved.seconds, saved.model, saved.fingerprint, tensors, stretches=saved.stretches,
                   loss=loss)  # fmt: skip


def kept_origin(folder: Path, step: int) -> Weights:
    """The header of the file of a kept moment, without its tensors. Raises InputError like `load`."""
    return _read(folder / "weights" / file_name(step), Weights, tensors=False)


def check_data(folder: Path, fingerprint: str) -> None:
    """Raise InputError if a training folder was trained on other data than those of `fingerprint`."""
    for path in (*files(folder / "checkpoints"), *files(folder / "weights")):
        try:
            saved = _read(path, Weights, tensors=False)
        except InputError:
            continue  # a damaged file has no fingerprint
        if saved.fingerprint != fingerprint:
            raise InputError(
                f"{folder} was trained on other data (fingerprint {saved.fingerprint}, now {fingerprint}): "
                "give the new set another data.name"
            )
        return


def check_model(saved: Origin, model: dict[str, Any], where: Path) -> None:
    """Raise InputError, with the first fields that differ, if a file is of another model.

    A field that has its `since` value on one side may be missing on the other, because it was added later.
    """
    there, here = _less_since(saved.model), _less_since(model)
    if there != here:
        pairs = [(key, there.get(key), here.get(key)) for key in sorted(there.keys() | here.keys())]
        pairs.sort(key=lambda pair: pair[0] != "family")
        differ = [f"{key} {old} there, {new} here" for key, old, new in pairs if old != new]
        raise InputError(f"the checkpoint in {where} is of another model: {'; '.join(differ[:3])}")


def _less_since(model: dict[str, Any]) -> dict[str, Any]:
    family = registry.families().get(model.get("family", ""))
    since = {f.name: f.metadata for f in fields(family.config_type)} if family else {}
    return {key: value for key, value in model.items() if value != since.get(key, {}).get("since", _NEVER)}


_NEVER = object()
