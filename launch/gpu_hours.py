"""What a study costs: GPU-hours of training, from measurements, committed or its own, and from nothing else."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..harness.config import Config, micro_batch
from ..harness.record import Run, read_runs
from ..harness.run import config_from_dict
from ..models.registry import from_dict

# Run folders of `lamabench bench`. A wheel has none.
RECORDS = Path(__file__).parent.parent / "reports" / "records"
Row = dict[str, Any]
BUSY = ", busy host"


def measured(folder: Path = RECORDS) -> list[Row]:
    """The training steps that runs below FOLDER measured, each with its run's configuration of the model as `model`.

    Raises RecordError for a run that cannot be read.
    """
    return steps_of(read_runs([folder])) if folder.is_dir() else []


def steps_of(runs: Iterable[Run]) -> list[Row]:
    """The training steps that runs measured, as `measured` has them."""
    return [
        {**row, "model": from_dict(run.info["config"]["model"])}
        for run in runs
        for row in run.records
        if row["kind"] == "bench" and row["state"] == "done" and row.get("mode") == "train"
    ]


def gpu_hours(info: Row, stages: Sequence[str], rows: Sequence[Row]) -> dict[str, float] | str:
    """Hours of training by the name of the GPU, or why they are not known.

    The fastest batch that was measured, up to what a step of the training passes at a time (`run.micro_batch`) where
    such a one was, of this very model at this size, precision, compile mode and checkpointing. Channels and classes may
    differ: they move the first and the last layer alone. Sampling is not counted. A name that ends in ", busy host"
    says that others worked on the measuring host: fewer hours may do. It is there where no better was measured.
    """
    if "train" not in stages:
        return {}
    config = config_from_dict(info["config"])
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
        changed = ", ".join(text for text in info["overrides"] if text.startswith("model."))
        how = f"{settings.precision}, {settings.compile}" + (", checkpointed" if settings.checkpointing else "")
        model = f"{info['model']} ({changed})" if changed else info["model"]
        return f"unknown (no bench record of {model} at side {config.model.input_size}, {how})"
    return {device: settings.steps * settings.batch_size / speed / 3600 for device, speed in speeds.items()}


def _same(row: Row, config: Config) -> bool:
    ours = (config.model.input_size, config.train.precision, config.train.checkpointing, config.train.compile)
    if ours != tuple(row[name] for name in ("input_size", "precision", "checkpointing", "compile")):
        return False
    shape = {name: getattr(config.model, name) for name in ("input_size", "in_channels", "num_classes")}
    return type(row["model"]) is type(config.model) and replace(row["model"], **shape) == config.model


def words(hours: dict[str, float] | str) -> str:
    """Hours as a cell of a table."""
    if isinstance(hours, str):
        return hours
    return ", ".join(f"{value:.3g} ({device})" for device, value in hours.items()) or "none: no training"


def total(hours: Sequence[dict[str, float] | str]) -> str:
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
