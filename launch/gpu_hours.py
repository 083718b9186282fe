"""What a study costs: GPU-hours of training, from measurements, committed or its own, and from nothing else."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..harness.config import Config, micro_batch
from ..harness.keys import config_from_dict
from ..harness.run import Run, read_run
from ..models.registry import from_dict
from .plan import Planned, pieces

# Folders that `lamabench bench` wrote. A wheel has none.
RECORDS = Path(__file__).parent.parent / "reports" / "records"
Row = dict[str, Any]
Hours = dict[str, float] | str
BUSY = ", busy host"


def measured(folder: Path = RECORDS) -> list[Row]:
    """The training steps that were measured in FOLDER/models/* and FOLDER/*/models/*, each with the configuration of
    its model as `model`.

    Raises InputError for a folder that cannot be read.
    """
    found = sorted({*folder.glob("models/*/config.json"), *folder.glob("*/models/*/config.json")})
    return steps_of(read_run(path.parent) for path in found)


def steps_of(runs: Iterable[Run]) -> list[Row]:
    """The training steps that folders of models hold, as `measured` has them."""
    return [
        {**row.flat(), "model": from_dict(run.info["config"]["model"])}
        for run in runs
        for row in run.records
        if row.kind == "speed" and row.state == "done" and getattr(row, "mode", None) == "train"
    ]


def of_runs(runs: Sequence[Planned], rows: Sequence[Row]) -> tuple[list[Hours], list[str]]:
    """What each run's training costs, and, where another run has it already, that run's name: a training that several
    share is counted once, to the furthest step that one of them asks for."""
    trainings = {piece.task.key: piece for piece in pieces(runs) if piece.task.kind == "training"}
    hours: list[Hours] = []
    shared: list[str] = []
    for run in runs:
        piece = trainings[run.training.key] if run.training else None
        ours = piece is not None and piece.run == run.name
        shared.append(piece.run if piece is not None and not ours else "")
        words = ", ".join(text for text in run.overrides if text.startswith("model."))
        name = f"{run.about['model']} ({words})" if words else run.about["model"]
        hours.append(gpu_hours(config_from_dict(piece.task.config), rows, name) if piece is not None and ours else {})
    return hours, shared


def gpu_hours(config: Config, rows: Sequence[Row], name: str) -> Hours:
    """Hours of a training by the name of the GPU, or why they are not known; `name` is what to call the model.

    The fastest batch that was measured, up to what a step of the training passes at a time (`run.micro_batch`) where
    such a one was, of this very model at this size, precision, compile mode and checkpointing. Channels and classes may
    differ: they move the first and the last layer alone. Sampling is not counted. A name that ends in ", busy host"
    says that others worked on the measuring host: fewer hours may do. It is there where no better was measured.
    """
    settings = config.train
    speeds: dict[str, float] = {}
    same = [row for row in rows if _same(row, config)]
    fitting = [row for row in same if row["batch_size"] <= micro_batch(config)] or same
    for row in sorted(fitting, key=lambda row: bool(row.get("disturbed"))):
        device = row["provenance"]["device"]
        if row.get("disturbed"):
            if device in speeds:
                continue
            device += BUSY
        speeds[device] = max(speeds.get(device, 0.0), row["images_per_s"])
    if not speeds:
        how = f"{settings.precision}, {settings.compile}" + (", checkpointed" if settings.checkpointing else "")
        return f"unknown (no bench record of {name} at side {config.model.input_size}, {how})"
    return {device: settings.steps * settings.batch_size / speed / 3600 for device, speed in speeds.items()}


def _same(row: Row, config: Config) -> bool:
    ours = (config.model.input_size, config.train.precision, config.train.checkpointing, config.train.compile)
    if ours != tuple(row[name] for name in ("input_size", "precision", "checkpointing", "compile")):
        return False
    shape = {name: getattr(config.model, name) for name in ("input_size", "in_channels", "num_classes")}
    return type(row["model"]) is type(config.model) and replace(row["model"], **shape) == config.model


def words(hours: Hours, shared: str = "") -> str:
    """Hours as a cell of a table; `shared` is the run that has the same training."""
    if isinstance(hours, str):
        return hours
    none = f"with {shared}" if shared else "none: no training"
    return ", ".join(f"{value:.3g} ({device})" for device, value in hours.items()) or none


def total(hours: Sequence[Hours]) -> str:
    """The sum over runs, for each GPU that all of them have, and how many are not known."""
    known = [found for found in hours if isinstance(found, dict)]
    devices = dict.fromkeys(device for found in known for device in found)
    sums = [
        f"{sum(found.get(device, 0.0) for found in known):.4g} on {device} "
        f"({sum(device in found for found in known)} runs)"
        for device in devices
    ]
    if unknown := len(hours) - len(known):
        sums.append(f"unknown for {unknown} runs (no bench record)")
    if any(device.endswith(BUSY) for device in devices):
        sums.append("busy host: measured beside other work, fewer hours may do")
    return "; ".join(sums) or "none"
