"""The files of a training: lines of metrics, checkpoints, kept weights, and the fields of its record."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...models import registry
from .. import parallel
from ..config import Config, micro_batch
from ..disk import append
from .checkpoint import Checkpoint, Weights, check_model, keep, kept_origin, moments, save
from .sharding import gathered
from .step import TrainStep


@dataclass
class Position:
    """The position of a training: steps and seconds so far, and the step of the last regular line of metrics. In
    `waited` of the seconds, its device waited for data (None: unknown, from an earlier version)."""

    step: int = 0
    seconds: float = 0.0
    window_start: int = 0
    waited: float | None = 0.0


@dataclass
class TrainingFolder:
    """Writes the files of a training with the state `step`. Each file has the origin that these fields give.

    If that state is in shards, all processes call `save` and `keep` together.
    """

    path: Path
    step: TrainStep
    model: dict[str, Any]
    fingerprint: str
    stretches: list[dict[str, Any]]
    batch_size: int

    def log(self, at: Position, means: dict[str, float | None], more: dict[str, float]) -> dict[str, Any]:
        """Append a line of means and `more` facts to metrics.jsonl, and return it."""
        line = {"step": at.step, "images": at.step * self.batch_size, **means, "lr": self.step.rate(at.step)}
        line |= {"seconds": round(at.seconds, 3), **more}
        line |= {} if at.waited is None else {"waited": round(at.waited, 3)}
        append(self.path / "metrics.jsonl", line)
        return line

    def save(self, at: Position) -> None:
        """Save the complete state. It replaces the checkpoint before the last."""
        origin = (at.step, at.seconds, self.model, self.fingerprint, self.step.tensors())
        saved = Checkpoint(*origin, stretches=self.stretches, waited=at.waited, window_start=at.window_start)
        save(self.path / "checkpoints", saved)

    def keep(self, at: Position, loss: float) -> None:
        """Keep the averaged weights, whole."""
        tensors = gathered(self.step.ema.tensors())
        if parallel.rank() == 0:
            origin = (at.step, at.seconds, self.model, self.fingerprint, tensors)
            keep(self.path, Weights(*origin, stretches=self.stretches, waited=at.waited, loss=loss))


def process_seconds(stretches: Sequence[dict[str, Any]], seconds: float) -> float:
    """The seconds of a training that took `seconds` in all, each second counted once for each of its processes."""
    starts = [one.get("from_seconds", 0.0) for one in stretches]
    counts = [one.get("processes", 1) for one in stretches] or [1]
    ends = [*starts[1:], seconds]
    return sum(count * (end - start) for count, start, end in zip(counts, starts or [0.0], ends, strict=True))


def record(folder: Path, config: Config, flops: int) -> dict[str, Any]:
    """The fields of the `train` record of a folder that keeps the moment `config.train.steps`.

    `flops` are those of a forward pass of one image. `training_flops` counts three forward passes for every image seen,
    two of them for the backward pass. Raises InputError if that moment is damaged or of another model.
    """
    settings = config.train
    end = kept_origin(folder, settings.steps)
    check_model(end, registry.describe(config.model), folder / "weights")
    images = settings.steps * settings.batch_size
    processes = end.stretches[-1].get("processes", 1) if end.stretches else 1
    return {
        "steps": settings.steps,
        "images": images,
        "training_flops": 3 * flops * images,
        "seconds": round(end.seconds, 3),
        "process_seconds": round(process_seconds(end.stretches, end.seconds), 3),
        "images_per_s": images / end.seconds,
        "waiting_share": None if end.waited is None else round(end.waited / end.seconds, 4),
        "final_loss": end.loss,
        "backend": end.stretches[-1]["backend"] if end.stretches else {},
        "stretches": end.stretches,
        "moments": moments(folder),
        "precision": settings.precision,
        "compile": end.stretches[-1].get("compile", settings.compile) if end.stretches else settings.compile,
        "checkpointing": settings.checkpointing,
        "batch_size": settings.batch_size,
        "micro_batch": micro_batch(config, processes),
        "processes": processes,
        "data_fingerprint": end.fingerprint,
    }
