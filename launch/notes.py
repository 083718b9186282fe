"""Notes below the table of `sweep plan`: disk space, data, trainings that are nearly the same, and problems."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..ablations.study import Study
from ..harness.config import Config, DataConfig
from ..harness.data import images
from ..harness.keys import training_folder
from ..harness.record import read_records
from ..harness.stages import Task, reached
from ..harness.training import checkpoint
from ..harness.training.checkpoint import KEEP, moments
from ..kernels.errors import InputError
from ..models import registry
from .plan import Planned, pieces

GROUPS = 4  # tensors per parameter in a full checkpoint: the weight, its average, two moments of AdamW
GIB = 2**30


def parameters(task: Task) -> int:
    """The parameters of a task's model."""
    return _parameters(json.dumps(task.config["model"]))


@cache
def _parameters(model: str) -> int:
    with torch.device("meta"):
        net = registry.build(registry.from_dict(json.loads(model)))
    return sum(value.numel() for value in net.parameters())


def gib(task: Task) -> float:
    """The disk space of a training in GiB: its newest checkpoints, and the weights of every moment."""
    steps = {*task.moments, *moments(task.path)}
    return 4 * parameters(task) * (GROUPS * KEEP + len(steps)) / GIB


def room(runs: Sequence[Planned]) -> dict[str, float]:
    """The disk space of each training in GiB, by the name of the first run that asks for it."""
    return {piece.run: gib(piece.task) for piece in pieces(runs) if piece.task.kind == "training"}


def hints(study: Study, runs: Sequence[Planned]) -> Iterator[str]:
    """Axes over a setting that is a list: `model.mixers: [ssm, window]` gives two runs with one mixer each."""
    for key, values in study.axes.items():
        if len(values) > 1 and not any(isinstance(value, list) for value in values):
            node: Any = runs[0].config
            for word in key.split("."):
                node = getattr(node, word, None)
            if isinstance(node, list):
                inner = ", ".join(map(str, values))
                yield f"axis {key} takes its {len(values)} values one at a time; write [[{inner}]] to combine them"


def problems(runs: Sequence[Planned]) -> Iterator[str]:
    """What prevents runs from doing what is missing."""
    for run in runs:
        yield from (f"{run.name}: {text}" for text in run.problems())


def data(runs: Sequence[Planned]) -> Iterator[str]:
    """Data that cannot be read here, and trainings of other data."""
    others, unread = _compared(runs)
    yield from dict(reversed([*others.values()])).values()  # one line for each training
    yield from (f"data not checked: {reason}" for reason in unread)


def check_data(runs: Sequence[Planned]) -> None:
    """Raise InputError if something is to do for a training whose data differ from those that can be read here."""
    others = _compared(runs)[0]
    for piece in pieces(runs):
        if piece.id in others and piece.missing():
            raise InputError(others[piece.id][1])


def _compared(runs: Sequence[Planned]) -> tuple[dict[tuple[str, str], tuple[Path, str]], list[str]]:
    """For each task of other data, its training and a line about it; and the reasons why data cannot be compared."""
    others: dict[tuple[str, str], tuple[Path, str]] = {}
    prints: dict[str, str | None] = {}
    reasons: list[str] = []
    for piece in pieces(runs):
        if not {"train", "evaluate"} & {*piece.task.stages}:
            continue
        config = DataConfig(**piece.task.config["data"])
        label = str(config)
        if label not in prints:
            prints[label], reason = _fingerprint(config)
            if prints[label] is None:
                reasons.append(reason)
        folder = piece.folder if piece.task.kind == "training" else Path(piece.task.training)
        if (ours := prints[label]) is not None:
            try:
                checkpoint.check_data(folder, ours)
            except InputError as error:
                others[piece.id] = folder, f"{piece.run}: {error}"
    return others, list(dict.fromkeys(reasons))


def _fingerprint(config: DataConfig) -> tuple[str | None, str]:
    """The fingerprint of the data, or None if it is unknown, and why it would be unknown."""
    try:
        value = images.fingerprint(config)
    except InputError as error:
        return None, str(error)
    if config.path is None:
        return value, f"{config.kind} needs data.path=FOLDER"
    exists = Path(config.path).exists()
    return value, f"{config.path} {'was not read yet, or changed since' if exists else 'does not exist'}"


def earlier(runs: Sequence[Planned]) -> Iterator[str]:
    """Finished trainings that differ from a training of the study only in a field that was added later and whose
    default is not the value that means "as before" (`since`)."""
    trainings = {run.training.key: run for run in reversed(runs) if run.training is not None}
    for run in reversed(list(trainings.values())):
        if reached(read_records(run.folder / "record.jsonl")):
            continue
        for name, config in _earlier_configs(run.config):
            folder = training_folder(run.root, config)
            if steps := reached(read_records(folder / "record.jsonl")):
                value = _get(config, name)
                yield f"{run.name}: {folder}, finished to step {steps}, differs only in {name} ({value!r} there)"


def _earlier_configs(config: Config) -> Iterator[tuple[str, Config]]:
    """The configuration with each of the `_changed_defaults` set to its `since` value, and the name of that field."""
    for part in fields(config):
        section = getattr(config, part.name)
        for name, since in _changed_defaults(type(section)) if is_dataclass(section) else ():
            if getattr(section, name) != since:
                yield f"{part.name}.{name}", replace(config, **{part.name: replace(section, **{name: since})})  # type: ignore[type-var]


@cache
def _changed_defaults(section: type) -> list[tuple[str, Any]]:
    """The fields of a section whose default is not their `since` value, each with that value."""
    changed = []
    for one in fields(section):
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if "since" in one.metadata and default != one.metadata["since"]:
            changed.append((one.name, one.metadata["since"]))
    return changed


def _get(config: Config, name: str) -> Any:
    section, field = name.split(".")
    return getattr(getattr(config, section), field)
