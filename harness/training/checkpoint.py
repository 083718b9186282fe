"""Checkpoints and kept weights: tensors and JSON in one safetensors file, never a pickle.

A training folder has two folders of such files. `checkpoints/` has the last two complete states, from which training
continues. `weights/` has the averaged weights of every requested moment. A file appears complete or not at all (write,
fsync, rename), and its header has the sum of its bytes and names its step, model, data and code. The tensors of a
checkpoint are `model/…`, `ema/…`, `exp_avg/…`, `exp_avg_sq/…` and `window` (metrics that are not yet logged). Those of
weights have their names in the network. The averages of other decays are `ema@DECAY/…` in both.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...kernels.errors import InputError
from ...models import registry
from ...models.registry import Backbone
from ..checks import check_weights
from ..record import access, read_records

KEEP = 2
OTHERS = "ema@"  # how the names of further averages begin
_NAME = re.compile(r"step-(\d{8})\.safetensors")


@dataclass
class Origin:
    """The header of a file of a training: `step`, `seconds` of training so far, the model (as in `registry.describe`),
    the fingerprint of the data, and `stretches`, each {from_step, backend, torch, commit, dirty, device, host}. In
    `waited` of the seconds, it waited for data (None: unknown, from an earlier version)."""

    step: int
    seconds: float
    model: dict[str, Any]
    fingerprint: str
    stretches: list[dict[str, Any]] = field(default_factory=list, kw_only=True)
    waited: float | None = field(default=None, kw_only=True)


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
    """The weights of a network by name, and the loss that was logged last, up to that step. In a file, averages of
    other decays lie beside them."""

    tensors: dict[str, Tensor]
    loss: float | None = field(default=None, kw_only=True)


def file_name(step: int) -> str:
    """The name of the file of a step, in both folders."""
    return f"step-{step:08d}.safetensors"


def files(folder: Path) -> list[Path]:
    """The files of `checkpoints/` or `weights/`, newest first. Raises InputError for a folder that cannot be read."""
    with access("read", folder):
        try:
            names = os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
    return [folder / name for name in sorted(names, reverse=True) if _NAME.fullmatch(name)]  # steps have leading zeros


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
        try:
            save_file(tensors, temporary, metadata={"lamabench": json.dumps(header)})
        except SafetensorError as error:  # of a full disk too, which commands and jobs tell by its number
            if (number := re.search(r"os error (\d+)", str(error))) is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
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


def _group(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The averaged weights `kind` of those in a file of weights."""
    if kind == "ema":
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(OTHERS)}
    return {name.removeprefix(f"{kind}/"): v for name, v in tensors.items() if name.startswith(f"{kind}/")}


Saved = TypeVar("Saved", Checkpoint, Weights)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint to the CPU. Raises InputError for a file that is missing, truncated, changed or not one."""
    return _read(path, Checkpoint)


def _read(path: Path, kind: type[Saved], tensors: bool = True) -> Saved:
    """With `tensors` False, they are on the meta device, which has names and shapes only."""
    try:
        with access("read", path), open(path, "rb"):  # safetensors says of each error that there is no such file
            str(path).encode()
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["lamabench"])
            names = file.keys()
            # Cloned, because safetensors returns a view of the file, which may be replaced or truncated while in use.
            read = {name: file.get_tensor(name).clone() for name in names} if tensors else {
                name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names
            }  # fmt: skip
    except FileNotFoundError:
        raise InputError(f"no such checkpoint: {path}") from None
    except UnicodeEncodeError:
        raise InputError(f"the path of {str(path)!a} is not UTF-8, which checkpoints need: rename the folder") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"checkpoint {path} is truncated or damaged: {error}") from None
    except InputError:
        raise
    except (KeyError, ValueError, RecursionError):
        raise InputError(f"{path} is a safetensors file, but not a lamabench checkpoint") from None
    _check_header(header, kind, path)
    if tensors and header.get("sum") not in (None, _sum(read)):  # None: an old file without a sum
        raise InputError(f"checkpoint {path} is truncated or damaged: its bytes have changed")
    if file_name(header["step"]) != path.name:
        raise InputError(f"{path} was renamed: it is of step {header['step']}")
    attributes = {f.name for f in fields(kind)} & header.keys()
    return kind(**{name: header[name] for name in attributes}, tensors=read)


_HEADER = {"step": int, "seconds": (int, float), "model": dict, "fingerprint": str}
_MORE = {"stretches": list, "window_start": int, "sum": (int, NoneType)}
_MORE |= dict.fromkeys(("loss", "waited"), (int, float, NoneType))
_STRETCH = {"from_step": int, "backend": dict, "commit": (str, NoneType)}


def _check_header(header: Any, kind: type[Origin], path: Path) -> None:
    """Raise InputError if a header lacks a field or has one of another type."""
    if not isinstance(header, dict):
        raise InputError(f"the header of {path} is damaged: it is no JSON object")
    shapes = [(header, _HEADER | {name: types for name, types in _MORE.items() if name in header})]
    stretches = header.get("stretches", [])
    shapes += [(stretch, _STRETCH) for stretch in (stretches if isinstance(stretches, list) else [])]
    for fields_there, types_by_name in shapes:
        for name, types in types_by_name.items():
            value = fields_there.get(name) if isinstance(fields_there, dict) else None
            if not isinstance(value, types) or isinstance(value, bool):
                raise InputError(f"the header of {path} is damaged: its {name} is {value!r}"[:300])


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: Path) -> None:
    """Raise InputError if tensors do not have the names and shapes of those of a network."""
    faults = [f"{name} is missing" for name in expected if name not in tensors]
    faults += [f"{name} is not of the model" for name in tensors if name not in expected]
    faults += [
        f"{name} is {list(tensors[name].shape)}, not {list(value.shape)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if faults:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise InputError(f"the tensors in {where} do not fit the model: {faults[0]}{more}")


def check_complete(saved: Checkpoint, model: Any, averages: Iterable[str], metrics: int, where: Path) -> None:
    """Raise InputError if a checkpoint lacks a tensor that the configuration of a model needs, or has one of another
    shape. `averages` are the names of the averaged weights, `metrics` is the number of averaged quantities."""
    net = _meta(model)
    weights, parameters = net.state_dict(), dict(net.named_parameters())
    moments = {name for group in ("exp_avg", "exp_avg_sq") for name in saved.group(group)} & parameters.keys()
    expected = {f"{group}/{name}": value for group in ("model", *averages) for name, value in weights.items()}
    expected |= {f"{group}/{name}": parameters[name] for group in ("exp_avg", "exp_avg_sq") for name in moments}
    check_tensors(saved.tensors, expected | {"window": torch.empty(metrics, device="meta")}, where)


def _meta(model: Any) -> Backbone:
    with torch.device("meta"):
        return registry.build(model)


def newest(folder: Path) -> Iterator[Checkpoint | InputError]:
    """The checkpoints of a folder, newest first. For a damaged one, its error takes its place."""
    for path in files(folder):
        try:
            yield load(path)
        except InputError as error:
            yield error


def load_weights(folder: Path, step: int, kind: str = "ema", model: Any = None, tensors: bool = True) -> Weights:
    """The weights of a training folder at a step, `ema` (averaged), `ema@DECAY` or `live`, on the CPU. With `tensors`
    False, they are only names and shapes.

    Live weights exist only in complete checkpoints. Raises InputError, with the nearest kept steps, if there are no
    weights of that step, if they do not include that average, and if they are damaged or do not fit the configuration
    `model`.
    """
    kind = check_weights("sample.weights", kind)
    own, whole = folder / "weights" / file_name(step), folder / "checkpoints" / file_name(step)
    if kind != "live" and own in files(own.parent):
        weights, path = _read(own, Weights, tensors), own
        weights.tensors = _group(weights.tensors, kind)
    elif whole in files(whole.parent):
        weights, path = weights_of(_read(whole, Checkpoint, tensors), kind), whole
    elif kind != "live":
        raise InputError(f"{folder} has no averaged weights of step {step}; {nearest(moments(folder), step)}")
    else:
        steps = [int(path.stem.removeprefix("step-")) for path in files(whole.parent)]
        raise InputError(
            f"{folder} has no live weights of step {step} (only its last {KEEP} checkpoints have them); "
            f"{nearest(steps, step)}"
        )
    if not weights.tensors:
        raise InputError(f"{path} has no weights {kind}; train.ema_decays lists the averages that a training keeps")
    if model is not None:
        check_model(weights, registry.describe(model), path)
        check_tensors(weights.tensors, _meta(model).state_dict(), path)
    return weights


def weights_of(saved: Checkpoint, kind: str = "ema") -> Weights:
    """The weights in a checkpoint."""
    tensors = saved.group("model" if kind == "live" else kind)
    origin = (saved.step, saved.seconds, saved.model, saved.fingerprint, tensors)
    return Weights(*origin, stretches=saved.stretches, waited=saved.waited)


def averages_of(saved: Checkpoint, loss: float | None) -> Weights:
    """The averaged weights in a checkpoint, as a file of weights has them."""
    weights = weights_of(saved)
    weights.tensors |= {name: tensor for name, tensor in saved.tensors.items() if name.startswith(OTHERS)}
    weights.loss = loss
    return weights


def kept_origin(folder: Path, step: int) -> Weights:
    """The header of the file of a kept moment, without its tensors. Raises InputError like `load`."""
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
