"""Moments: the steps of a training whose weights are asked for, and those that it has reached and kept."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..kernels.errors import InputError
from .config import Config
from .record import Row, read_records
from .training.checkpoint import files, moments, nearest
from .training.resume import asked_moments as snapshots


def asked_moments(config: Config) -> list[int]:
    """The steps of a training whose weights are asked for: `train.snapshots`, explicit `sample.at`, and the end."""
    listed = config.sample.at if isinstance(config.sample.at, list) else []
    return sorted({*snapshots(config), *(step for step in listed if step <= config.train.steps)})


def sampled_moments(config: Config) -> list[int]:
    """The steps whose weights are sampled: `sample.at`. Raises InputError for one beyond `train.steps`."""
    at, steps = config.sample.at, config.train.steps
    if at == "last":
        return [steps]
    if at == "all":
        return asked_moments(config)
    if late := [step for step in at if step > steps]:
        raise InputError(f"sample.at {late[0]} is beyond the end of the training, train.steps {steps}")
    return list(at)


def sample_sets(config: Config, moments: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """The sets of samples that are asked for, each a step and a number of images: `sample.count` at `sample.at`, and
    `sample.curve_count` at every one of `moments` (None: those that are asked of the training). Raises InputError as
    `sampled_moments` does."""
    sets = [(step, config.sample.count) for step in sampled_moments(config)]
    if (count := config.sample.curve_count) is not None:
        sets += [(step, count) for step in (asked_moments(config) if moments is None else moments)]
    return sorted({*sets})


def step_of(training: Path, at: int | str = "last") -> int:
    """A moment of a training folder: `at` itself, or the furthest that is kept. Raises InputError if none is kept."""
    kept = moments(training)
    if type(at) is int:
        return at
    if at != "last":
        raise InputError(f"at must be a step or 'last', not {at!r}")
    if not kept:
        raise InputError(f"{training} has no weights yet: train it first (lamabench train …)")
    return kept[-1]


def kept_steps(training: Path, weights: str = "ema") -> list[int]:
    """The steps for which a training folder has averaged (`ema`) or plain (`live`) weights, ascending. Full checkpoints
    hold both."""
    full = {int(path.stem.removeprefix("step-")) for path in files(training / "checkpoints")}
    return sorted(full if weights == "live" else {*full, *moments(training)})


def not_kept(step: int, kept: Sequence[int]) -> str:
    """The message that a step was not kept, with the nearest kept steps on both sides."""
    return f"step {step} was not kept; {nearest(kept, step)}"


def reached_step(training: Path) -> int | None:
    """The furthest step at which a request to this training ended, or None if none has ended."""
    return reached(read_records(training / "record.jsonl"))


def reached(records: Iterable[Row]) -> int | None:
    """`reached_step` from the records of a training."""
    rows = [one for one in records if one.kind == "train" and one.state == "done"]
    return max((one.steps for one in rows), default=None)  # type: ignore[attr-defined]
