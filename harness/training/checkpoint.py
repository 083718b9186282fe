"""Checkpoints and kept weights.

A training folder has two folders of files (storage.py). `checkpoints/` has the last two complete states, from which
training continues. `weights/` has the averaged weights of every requested moment. A header names step, model, data and
code. The tensors of a checkpoint are `model/…`, `ema/…`, `exp_avg/…`, `exp_avg_sq/…` and `window` (sums that are not
yet logged). Those of weights have their names in the network. Other averages are `ema@DECAY/…` and `power@WIDTH/…`
in both. A checkpoint may be in shards; it has the same names and, when it is read, the same tensors.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ...kernels.errors import InputError
from ...models import registry
from ...models.registry import Backbone
from .. import parallel
from ..checks import check_weights
from ..record import read_records
from .ema import of_width, part
from .sharding import own_part, own_rows
from .storage import file_name, files, of_step, read, read_rows, remove, step_of, write, write_shards
from .window import EARLIER, MORE

KEEP = 2
OTHERS = ("ema@", "power@")  # how the names of further averages begin


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
    """A complete state. `window_start` is the step of the last regular line of metrics. `path` is where it was read,
    which is not in its header."""

    tensors: dict[str, Tensor]
    window_start: int = field(default=0, kw_only=True)
    path: Path | None = field(default=None, kw_only=True)

    def group(self, name: str) -> dict[str, Tensor]:
        """The tensors with the prefix `name/`, without that prefix."""
        return {key.removeprefix(f"{name}/"): v for key, v in self.tensors.items() if key.startswith(f"{name}/")}

    def rows(self, rows: Mapping[str, range]) -> dict[str, Tensor]:
        """The tensors; of those in `rows` only these rows, read from the file if there are any."""
        if rows and self.path is not None:
            return read_rows(self.path, rows)
        return {name: v[rows[name].start : rows[name].stop] if name in rows else v for name, v in self.tensors.items()}


@dataclass
class Weights(Origin):
    """The weights of a network by name, and the loss that was logged last, up to that step. In a file, other averages
    lie beside them. `error` is that of `posthoc.fit`, None for weights that were kept."""

    tensors: dict[str, Tensor]
    loss: float | None = field(default=None, kw_only=True)
    error: float | None = field(default=None, kw_only=True)


def moments(folder: Path) -> list[int]:
    """The steps whose averaged weights a training folder has, ascending."""
    return sorted(map(step_of, files(folder / "weights")))


def nearest(steps: Iterable[int], step: int) -> str:
    """Text that names the kept steps before and after a step that was not kept."""
    steps = sorted(steps)
    sides = [*[other for other in steps if other < step][-1:], *[other for other in steps if other > step][:1]]
    return f"the nearest kept: {' and '.join(map(str, sides))}" if sides else "none is kept"


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint atomically and remove all others except the `KEEP` - 1 before it. If tensors are sharded, all
    processes call this together.

    Checkpoints of later steps are removed too. They are damaged, or training would have continued from them.
    """
    step, header = checkpoint.step, _header(checkpoint)
    if own_rows(checkpoint.tensors):
        path = write_shards(folder, step, own_part(checkpoint.tensors), header)
    else:
        path = write(folder, step, checkpoint.tensors, header)
    if parallel.rank() == 0:
        before = [other for other in files(folder) if step_of(other) < step][: KEEP - 1]
        for other in files(folder):
            if other not in (path, *before):
                remove(other)
    return path


def keep(folder: Path, weights: Weights) -> Path:
    """Write the weights of a moment atomically into `weights/` of a training folder."""
    return write(folder / "weights", weights.step, weights.tensors, _header(weights))


def _header(saved: Checkpoint | Weights) -> dict[str, Any]:
    return {f.name: getattr(saved, f.name) for f in fields(saved) if f.name not in ("tensors", "path", "error")}


def _group(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The averaged weights `kind` of those in a file of weights."""
    if kind == "ema":
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(OTHERS)}
    return part(tensors, kind)


def _tensors(path: Path, tensors: bool) -> dict[str, Tensor]:
    return _read(path, Weights, tensors).tensors


Saved = TypeVar("Saved", Checkpoint, Weights)


def load(path: Path, tensors: bool = True) -> Checkpoint:
    """Read a checkpoint to the CPU. Raises InputError for a file that is missing, truncated, changed or not one."""
    saved = _read(path, Checkpoint, tensors)
    saved.path = path
    return saved


def _read(path: Path, kind: type[Saved], tensors: bool = True) -> Saved:
    """With `tensors` False, they are on the meta device, which has names and shapes only."""
    header, values = read(path, tensors)
    attributes = {f.name for f in fields(kind)} & header.keys()
    return kind(**{name: header[name] for name in attributes}, tensors=values)


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
    window = saved.tensors.get("window")
    sizes = [metrics + more for more in EARLIER if window is not None and window.shape == (metrics + more,)]
    expected["window"] = torch.empty(*sizes or [metrics + MORE], device="meta")
    check_tensors(saved.tensors, expected, where)


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
    """The weights of a training folder at a step, `ema` (averaged), `ema@DECAY`, `power@WIDTH` or `live`, on the CPU.
    With `tensors` False, they are only names and shapes.

    Live weights exist only in complete checkpoints. Weights `power@WIDTH` that were not kept are computed from those of
    other widths that were kept up to that step. Raises InputError, with the nearest kept steps, if there are no weights
    of that step, if they do not include that average, if too few were kept to compute it, and if they are damaged or do
    not fit the configuration `model`.
    """
    kind = check_weights("sample.weights", kind)
    own, whole = folder / "weights" / file_name(step), of_step(folder / "checkpoints", step)
    if kind != "live" and own in files(own.parent):
        path = own
    elif whole is not None:
        path = whole
    elif kind != "live":
        raise InputError(f"{folder} has no averaged weights of step {step}; {nearest(moments(folder), step)}")
    else:
        steps = map(step_of, files(folder / "checkpoints"))
        raise InputError(
            f"{folder} has no live weights of step {step} (only its last {KEEP} checkpoints have them); "
            f"{nearest(steps, step)}"
        )
    if kind.startswith("power@"):
        earlier = [other for other in files(own.parent) if step_of(other) < step]
        weights = _read(path, Weights, tensors=False)
        weights.tensors, weights.error = of_width(kind, [path, *earlier], _tensors, tensors)
    elif path == own:
        weights = _read(own, Weights, tensors)
        weights.tensors = _group(weights.tensors, kind)
    else:
        weights = weights_of(_read(path, Checkpoint, tensors), kind)
    if not weights.tensors:
        option = "ema_powers" if kind.startswith("power@") else "ema_decays"
        raise InputError(f"{path} has no weights {kind}; train.{option} lists the averages that a training keeps")
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
            return _read(path, Weights, tensors=False).fingerprint or None  # released weights do not say it
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
