"""Checkpoints and kept weights: tensors and JSON in one safetensors file, never a pickle.

A training folder has `checkpoints/`, the last two whole states, from which training goes on, and `weights/`, the
averaged weights of every moment that was asked for. A file appears whole or not at all (write, fsync, rename) and says
the sum of its bytes. Tensors of a checkpoint are named `model/…`, `ema/…`, `exp_avg/…`, `exp_avg_sq/…` and `window`
(the metrics not yet logged), those of weights as in the network; the header says of which step, model, data and code.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
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
from ..record import read_records

KEEP = 2
_NAME = re.compile(r"step-(\d{8})\.safetensors")


@dataclass
class Origin:
    """What a file of a training says of itself: `step`, `seconds` of training so far, the model (as
    `registry.describe` has it), the fingerprint of the data, and `stretches`, each {from_step, backend, torch, commit,
    dirty, device, host}."""

    step: int
    seconds: float
    model: dict[str, Any]
    fingerprint: str
    stretches: list[dict[str, Any]] = field(default_factory=list, kw_only=True)


@dataclass
class Checkpoint(Origin):
    """A whole state; `window_start` is the step of the last whole line of metrics."""

    tensors: dict[str, Tensor]
    window_start: int = field(default=0, kw_only=True)

    def group(self, name: str) -> dict[str, Tensor]:
        """The tensors under `name/`, without that prefix."""
        return {key.removeprefix(f"{name}/"): v for key, v in self.tensors.items() if key.startswith(f"{name}/")}


@dataclass
class Weights(Origin):
    """The weights of a network by name, and the loss that was logged at that step, or last before it."""

    tensors: dict[str, Tensor]
    loss: float | None = field(default=None, kw_only=True)


def file_name(step: int) -> str:
    """The file of a step, in either folder."""
    return f"step-{step:08d}.safetensors"


def files(folder: Path) -> list[Path]:
    """The files of `checkpoints/` or `weights/`, newest first."""
    found = [path for path in folder.glob("step-*.safetensors") if _NAME.fullmatch(path.name)]
    return sorted(found, reverse=True)  # steps are written with leading zeros


def moments(folder: Path) -> list[int]:
    """The steps of which a training folder keeps the averaged weights, ascending."""
    return sorted(int(path.stem.removeprefix("step-")) for path in files(folder / "weights"))


def nearest(kept: Iterable[int], step: int) -> str:
    """In words: the kept steps on both sides of one that is not."""
    steps = sorted(kept)
    sides = [*[other for other in steps if other < step][-1:], *[other for other in steps if other > step][:1]]
    return f"the nearest kept: {' and '.join(map(str, sides))}" if sides else "none is kept"


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint atomically and remove all but it and the `KEEP` - 1 before it.

    One of a later step goes too: training would have gone on from it, were it not damaged.
    """
    path = _write(folder, checkpoint)
    kept = files(folder)
    first = kept.index(path)
    for other in kept[:first] + kept[first + KEEP :]:
        other.unlink()
    return path


def keep(folder: Path, weights: Weights) -> Path:
    """Write the weights of a moment, atomically, into the `weights/` of a training folder."""
    return _write(folder / "weights", weights)


def _write(folder: Path, saved: Checkpoint | Weights) -> Path:
    folder.mkdir(exist_ok=True)
    for torn in folder.glob(".step-*.tmp"):  # by a kill, perhaps on another machine; a training has one writer
        torn.unlink()
    path = folder / file_name(saved.step)
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    header = {f.name: getattr(saved, f.name) for f in fields(saved) if f.name != "tensors"}
    try:
        tensors = {name: tensor.detach().contiguous() for name, tensor in saved.tensors.items()}
        header["sum"] = _sum(tensors)
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata={"lamabench": json.dumps(header)})
        temporary.chmod(mode)  # safetensors' own is for the owner alone
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _sum(tensors: dict[str, Tensor]) -> int:
    """The sum of all bytes: quick on any device, and another one where a bit flipped or a block was lost."""
    return sum(int(tensor.reshape(-1).view(torch.uint8).sum(dtype=torch.int64)) for tensor in tensors.values())


Saved = TypeVar("Saved", Checkpoint, Weights)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint to the CPU. Raises InputError where the file is missing, truncated, changed or not ours."""
    return _read(path, Checkpoint)


def _read(path: Path, kind: type[Saved], tensors: bool = True) -> Saved:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["lamabench"])
            names = file.keys() if tensors else []
            # Cloned: what safetensors returns is a view of the file, which may be replaced or torn while in use.
            read = {name: file.get_tensor(name).clone() for name in names}
    except FileNotFoundError:
        raise InputError(f"no such checkpoint: {path}") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"checkpoint {path} is truncated or damaged: {error}") from None
    except (KeyError, ValueError):
        raise InputError(f"{path} is a safetensors file, but not a lamabench checkpoint") from None
    if tensors and header.get("sum") not in (None, _sum(read)):  # None: saved before there was a sum
        raise InputError(f"checkpoint {path} is truncated or damaged: its bytes are not those that were saved")
    known = {f.name for f in fields(kind)} & header.keys()
    return kind(**{name: header[name] for name in known}, tensors=read)


def newest(folder: Path) -> Iterator[Checkpoint | InputError]:
    """The checkpoints of a folder, newest first; a damaged one comes as the error that it gave."""
    for path in files(folder):
        try:
            yield load(path)
        except InputError as error:
            yield error


def load_weights(folder: Path, step: int, kind: str = "ema", model: dict[str, Any] | None = None) -> Weights:
    """The weights of a training folder at a step, `ema` (averaged) or `live`, on the CPU.

    Live weights are in a whole checkpoint alone. Raises InputError, with the nearest kept steps, where there are none
    of that step; and where they are damaged or of another model than `model` (as `registry.describe` gives it).
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
            f"{folder} has no live weights of step {step} (they are in its last {KEEP} checkpoints alone); "
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
    """What the file of a kept moment says of itself, without its tensors. Raises InputError as `load`."""
    return _read(folder / "weights" / file_name(step), Weights, tensors=False)


def check_data(folder: Path, fingerprint: str) -> None:
    """Raise InputError where a training folder was trained on other data than those of `fingerprint`."""
    if (other := trained_on(folder)) not in (None, fingerprint):
        raise InputError(
            f"{folder} was trained on other data (fingerprint {other}, now {fingerprint}): "
            "give the new set another data.name"
        )


def trained_on(folder: Path) -> str | None:
    """The fingerprint of the data of a training folder, by its newest file or else by its record; None where neither
    says any."""
    for path in (*files(folder / "checkpoints"), *files(folder / "weights")):
        with suppress(InputError):  # a damaged file says nothing
            return _read(path, Weights, tensors=False).fingerprint
    rows = [row.flat().get("data_fingerprint") for row in read_records(folder / "record.jsonl")]
    return next((value for value in reversed(rows) if value), None)


def check_model(saved: Origin, model: dict[str, Any], where: Path) -> None:
    """Raise InputError, naming the first fields that differ, where a file is of another model.

    A field that has its `since` value on one side may be missing on the other: it joined later.
    """
    there, here = _less_since(saved.model), _less_since(model)
    if there != here:
        pairs = [(key, there.get(key), here.get(key)) for key in sorted(there.keys() | here.keys())]
        pairs.sort(key=lambda pair: pair[0] != "family")
        differ = [f"{key} {theirs} there, {ours} here" for key, theirs, ours in pairs if theirs != ours]
        raise InputError(f"the checkpoint in {where} is of another model: {'; '.join(differ[:3])}")


def _less_since(model: dict[str, Any]) -> dict[str, Any]:
    family = registry.families().get(model.get("family", ""))
    since = {f.name: f.metadata for f in fields(family.config_type)} if family else {}
    return {key: value for key, value in model.items() if value != since.get(key, {}).get("since", _NEVER)}


_NEVER = object()
