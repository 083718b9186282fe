"""The training loop: one protocol for every backbone (SPEC.md, section 4)."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels.errors import InputError
from ...models import registry
from ...models.registry import Backbone, build, select_backends
from .. import signals
from ..config import Config, RunConfig, check_fit, micro_batch
from ..data.images import load
from ..data.items import batches
from ..device import compiled, device_type, exact_float32, pick_device
from ..diffusion.objective import objective
from ..measure.cost import cost
from ..progress import Progress
from ..record import read_lines, write_lines
from .folder import Position, TrainingFolder, record
from .resume import all_asked, backends_to_ask, continue_from, missing, with_stretch
from .step import TrainStep


class Diverged(RuntimeError):
    """The loss is no longer finite."""


def loop(
    step: TrainStep,
    batches: Iterable[dict[str, Tensor]],
    at: Position,
    *,
    until: int,
    asked: Collection[int],
    run: RunConfig,
    log: Callable[[Position, dict[str, float]], None],
    save: Callable[[Position], None],
    keep: Callable[[Position, float], None],
    progress: Progress,
) -> None:
    """Train to the step `until`. `log` gets the means of the metrics every `run.log_every` steps and at the end, `keep`
    the loss at the steps in `asked`, and `save` is called every `run.checkpoint_every` steps and at the end.

    A line at the end that is not due leaves the window as it is, so that a longer training continues the window. Raises
    Diverged if the loss is not finite, Stopped after the step in which a signal came (signals.py), and InputError of
    a batch that cannot be read, after saving the step before it.
    """
    started, before, first, facts = time.perf_counter(), at.seconds, at.step, {}

    def save_before_damage() -> None:
        if at.step > first:
            at.seconds = before + time.perf_counter() - started
            if at.step > at.window_start:
                mean_metrics(step, at, until)
            save(at)
            progress.say(f"saved at step {at.step} of {until}")

    progress.update("train", at.step, until)
    for batch in _until_damage(batches, save_before_damage):
        step(batch)
        at.step += 1
        last, stopping = at.step == until, signals.asked() is not None
        logging, keeping = at.step % run.log_every == 0, at.step in asked
        saving = last or stopping or at.step % run.checkpoint_every == 0
        loss = math.nan
        if logging or saving or keeping:
            at.seconds = before + time.perf_counter() - started
            means = mean_metrics(step, at, until)
            loss = means["loss"]
            if logging or last:
                log(at, means)
                facts = {"loss": f"{loss:.4f}"}
            if logging:
                at.window_start = at.step
                step.window.zero_()
        progress.update("train", at.step, until, **facts)
        if saving:
            save(at)
        if keeping:
            keep(at, loss)
        if stopping and not last:
            progress.say(f"saved at step {at.step} of {until}")
            signals.check()


def _until_damage(batches: Iterable[dict[str, Tensor]], save: Callable[[], None]) -> Iterator[dict[str, Tensor]]:
    try:
        yield from batches
    except InputError:
        save()
        raise


def mean_metrics(step: TrainStep, at: Position, until: int) -> dict[str, float]:
    """The means of the metrics since the last regular line. Raises Diverged if one is not finite."""
    values = (step.window / (at.step - at.window_start)).tolist()
    means = dict(zip(step.objective.metrics, values, strict=True))
    if not all(math.isfinite(value) for value in values):
        text = ", ".join(f"{name} {value}" for name, value in means.items())
        raise Diverged(f"the loss is not finite by step {at.step} of {until}: {text}")
    return means


def train(folder: Path, config: Config, progress: Progress, moments: Sequence[int] = ()) -> dict[str, Any]:
    """Train to `config.train.steps`, from the newest complete checkpoint of the folder if there is one.

    Keeps the averaged weights of the steps `moments`, of `config.train.snapshots` and of the end. Appends to
    metrics.jsonl, saves checkpoints, and returns the fields of the `train` record. Does nothing if every moment is kept
    already. Raises Diverged if the loss is not finite; the last checkpoint before it stays. Raises InputError for data,
    a model, a checkpoint or backends that do not fit, if there is no checkpoint to continue from, and if only moments
    that were not kept are missing (see `continue_from`). Raises Stopped after the step in which a signal came, with a
    checkpoint of that step.
    """
    check_fit(config)
    exact_float32()
    asked, device = all_asked(config, moments), pick_device(config.run.device)
    flops = cost(config.model).flops
    if not missing(folder, asked):
        return record(folder, config, flops)
    data = load(config.data, progress.say)
    saved = continue_from(folder, config, asked, data.fingerprint, progress.say)
    if not missing(folder, asked):
        return record(folder, config, flops)
    settings, net, goal = config.train, initial_model(config).to(device), objective(config.objective)
    before = saved.stretches if saved else []
    backend = select_backends(net, backends_to_ask(config, before, device, progress.say), device_type(device))
    net.train()
    net.checkpointing = settings.checkpointing
    step = TrainStep(
        net,
        goal,
        settings,
        call=compiled(net, settings.compile),
        device=device,
        micro_batch=micro_batch(config),
        seed=config.seed,
    )
    at = Position()
    if saved is not None:
        step.restore(saved)
        at = Position(saved.step, saved.seconds, saved.window_start)
        progress.say(f"continuing at step {at.step} of {settings.steps}")
    if data.omissions:
        progress.say(data.omissions)
    metrics = folder / "metrics.jsonl"
    write_lines(metrics, [line for line in read_lines(metrics) if line["step"] <= at.window_start])
    stretches = with_stretch(before, at.step, backend, device, progress.say)
    files = TrainingFolder(
        folder, step, registry.describe(config.model), data.fingerprint, stretches, settings.batch_size
    )
    loop(
        step,
        batches(data, goal, config, net.null_class, at.step, device),
        at,
        until=settings.steps,
        asked=asked,
        run=config.run,
        log=files.log,
        save=files.save,
        keep=files.keep,
        progress=progress,
    )
    return record(folder, config, flops)


def initial_model(config: Config) -> Backbone:
    """The backbone with initial weights from the run's seed. They are drawn on the CPU, the same for every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build(config.model)
