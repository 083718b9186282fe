"""The hours of a GPU, or of a CPU, that the trainings of a study take, estimated only from measurements and from
trainings: committed ones and its own."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

from ..harness.config import Config, micro_batch
from ..harness.disk import read_lines
from ..harness.keys import config_from_dict
from ..harness.record import read_records
from ..harness.run import Run, read_info, read_run
from ..kernels.errors import InputError
from ..models.registry import family_of, from_dict
from .output import number
from .plan import Planned, pieces

# Committed folders that `lamabench bench` wrote. A wheel has none.
RECORDS = Path(__file__).parent.parent / "reports" / "records"
Line = dict[str, Any]
Hours = dict[str, float] | str
BUSY = ", busy host"
PLAIN = ", without dropout"
FEWEST_LINES = 5  # of metrics from which the speed of a training is taken
ENOUGH = 10  # trainings that are alike
FREE = {"input_size", "in_channels", "num_classes", "dropout"}  # fields that change no speed, or that of two layers
LACK = "no training and no bench record"


def committed_speeds(folder: Path = RECORDS, mode: str = "train") -> list[Line]:
    """The `speeds` of the models in FOLDER/models/* and FOLDER/*/models/*.

    Raises InputError for a folder that cannot be read.
    """
    files = sorted({*folder.glob("models/*/config.json"), *folder.glob("*/models/*/config.json")})
    return speeds((read_run(path.parent) for path in files), mode)


def speeds(runs: Iterable[Run], mode: str = "train") -> list[Line]:
    """The measured training steps, or forward passes, of one process in folders of models, each with the configuration
    of its model as `model`."""
    return [
        {**row.flat(), "model": from_dict(run.info["config"]["model"])}
        for run in runs
        for row in run.records
        if row.kind == "speed"
        and row.state == "done"
        and getattr(row, "mode", None) == mode
        and (getattr(row, "processes", None) or 1) == 1
    ]


def committed_roots(folder: Path = RECORDS) -> list[Path]:
    """The committed folders, each of them the root of some runs."""
    return sorted(path for path in folder.glob("*") if path.is_dir())


def on_gpus(rows: Iterable[Line]) -> list[Line]:
    """The rows that a GPU made. What a CPU of somebody else did says little about another one."""
    return [row for row in rows if (row["provenance"] or {}).get("driver")]


def trained(roots: Iterable[Path], wanted: Collection[Config]) -> list[Line]:
    """The speeds of finished trainings below `roots` that say what those of `wanted` take, in the form of `speeds`.

    The speed of a training is the median of its lines of metrics, in which compilation and pauses do not count. Left
    out are trainings with too few lines, with stretches by several processes, on several devices or of several compile
    modes, and those that cannot be read. Of many alike, some have a say.
    """
    kinds = {repr((one.model, one.train.precision, one.train.checkpointing, one.train.compile)): one for one in wanted}
    names, distinct = {family_of(one.model).name for one in wanted}, list(kinds.values())
    records = (path for root in roots for name in names for path in root.glob(f"trainings/{name}-*/record.jsonl"))
    counts, result = Counter[str](), list[Line]()
    for path in sorted(records):
        try:
            rows = [row.flat() for row in read_records(path) if row.kind == "train" and row.state == "done"]
            model = from_dict(read_info(path.parent)["config"]["model"])
            ways = {(one["device"], one.get("compile"), one.get("processes", 1)) for one in rows[-1]["stretches"]}
            ((device, _, processes),) = ways
            size = {"batch_size": rows[-1]["micro_batch"], "input_size": model.input_size, "model": model}
            row = {**rows[-1], **size, "provenance": {**(rows[-1]["provenance"] or {}), "device": device}}
            kind = repr((model, device, *(row[name] for name in ("precision", "compile", "checkpointing"))))
            if processes > 1 or counts[kind] == ENOUGH or not any(_same(row, config) for config in distinct):
                continue
            lines = read_lines(path.with_name("metrics.jsonl"))
            known = [line["images_per_s"] for line in lines if "images_per_s" in line]
            if len(known) >= FEWEST_LINES and (speed := median(known)) > 0:
                result.append({**row, "images_per_s": speed})
                counts[kind] += 1
        except (InputError, OSError, LookupError, TypeError, ValueError):
            continue
    return result


def of_device(rows: Iterable[Line], count: int) -> dict[str, float]:
    """The median of the images per second of sets of samples by name of the device: of sets of `count` images, because
    the start of a set takes as long for a few images as for many, or else of all sets."""
    speeds: dict[str, dict[bool, list[float]]] = {}
    for row in rows:
        device = (row["provenance"] or {}).get("device", "an unknown device")
        speeds.setdefault(device, {}).setdefault(row["count"] == count, []).append(row["images_per_s"])
    return {device: median(each.get(True) or each[False]) for device, each in speeds.items()}


def of_runs(runs: Sequence[Planned], rows: Sequence[Line]) -> tuple[list[Hours], list[str]]:
    """The hours of each run's training, and the name of the run that has them if that is another one, else "".

    Runs may share a training. It is counted once, for the first of them, up to the furthest step that any of them asks
    for.
    """
    trainings = {piece.task.key: piece for piece in pieces(runs) if piece.task.kind == "training"}
    hours: list[Hours] = []
    shared: list[str] = []
    for run in runs:
        piece = trainings[run.training.key] if run.training else None
        first = piece is not None and piece.run == run.name
        shared.append(piece.run if piece is not None and not first else "")
        fields = ", ".join(text for text in map(str, run.overrides) if text.startswith("model."))
        name = f"{run.about['model']} ({fields})" if fields else run.about["model"]
        hours.append(gpu_hours(config_from_dict(piece.task.config), rows, name) if piece is not None and first else {})
    return hours, shared


def gpu_hours(config: Config, rows: Sequence[Line], name: str) -> Hours:
    """The hours of a training by name of the GPU, or why they are unknown. `name` stands for the model in that text.

    The speed is that of the fastest training or measured batch of the same model, at the same size, precision,
    checkpointing and compile mode (any, for `auto`). Batches larger than what a step passes at a time
    (`run.micro_batch`) count only if there is no other. Channels and classes may differ, because they change only the
    first and the last layer. Without a measurement of the model's dropout, one of another dropout counts, and the name
    of the GPU ends in `PLAIN`. A GPU whose name ends in ", busy host" was measured while other processes kept the host
    busy, so that the training may take fewer hours; it is used only if there is no undisturbed measurement. Sampling is
    not included.
    """
    settings = config.train
    every = [row for row in rows if _same(row, config)]
    exact = [row for row in every if _dropout(row["model"]) == _dropout(config.model)]
    same, about = (exact, "") if exact or not every else (every, PLAIN)
    images_per_s = fastest([row for row in same if row["batch_size"] <= micro_batch(config)] or same)
    if not images_per_s:
        how = f"{settings.precision}, {settings.compile}" + (", checkpointed" if settings.checkpointing else "")
        return f"unknown ({LACK} of {name} at side {config.model.input_size}, {how})"
    images = settings.steps * settings.batch_size
    return {device + about: images / speed / 3600 for device, speed in images_per_s.items()}


def fastest(rows: Sequence[Line]) -> dict[str, float]:
    """The most images per second by name of the device, which ends in `BUSY` if it has no undisturbed measurement."""
    result: dict[str, float] = {}
    for row in sorted(rows, key=lambda row: bool(row.get("disturbed"))):
        device = (row["provenance"] or {}).get("device", "an unknown device")
        if row.get("disturbed"):
            if device in result:
                continue
            device += BUSY
        result[device] = max(result.get(device, 0.0), row["images_per_s"])
    return result


def same_model(one: Any, other: Any) -> bool:
    """Whether two configurations differ at most in side, channels and classes, which change the first and last layer,
    and in dropout, which does nothing in a forward pass."""
    if type(one) is not type(other):
        return False
    names = (field.name for field in fields(one) if field.compare and field.name not in FREE)
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _dropout(model: Any) -> float:
    return getattr(model, "dropout", 0.0)


def _same(row: Line, config: Config) -> bool:
    settings = (config.model.input_size, config.train.precision, config.train.checkpointing)
    if settings != tuple(row[name] for name in ("input_size", "precision", "checkpointing")):
        return False
    if config.train.compile not in ("auto", row["compile"]):
        return False
    return same_model(row["model"], config.model)


def cell(hours: Hours, shared: str = "") -> str:
    """Hours as a cell of a table. `shared` is the other run that has the same training, if there is one."""
    if isinstance(hours, str):
        return hours
    none = f"with {shared}" if shared else "none: no training"
    return ", ".join(f"{value:.3g} ({device})" for device, value in hours.items()) or none


def total(hours: Sequence[Hours], lack: str = LACK) -> str:
    """The sum over runs for each GPU, with the number of runs that have a measurement on it, and how many runs have
    none, because of a `lack`."""
    estimates = [each for each in hours if isinstance(each, dict)]
    devices = dict.fromkeys(device for each in estimates for device in each)
    sums = [
        f"{sum(each.get(device, 0.0) for each in estimates):.4g} on {device} "
        f"({number(sum(device in each for each in estimates), 'run')})"
        for device in devices
    ]
    if missing := len(hours) - len(estimates):
        sums.append(f"unknown for {number(missing, 'run')} ({lack})")
    if any(device.endswith(PLAIN) for device in devices):
        sums.append("without dropout: measured without it, so it may take a little longer")
    if any(BUSY in device for device in devices):
        sums.append("busy host: measured while other processes kept it busy, so it may take fewer hours")
    return "; ".join(sums) or "none"
