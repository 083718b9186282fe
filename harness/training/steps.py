"""The steps of a training, one after the other: one protocol for every backbone (SPEC.md, section 4)."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar, cast

from torch import Tensor

from ...kernels.errors import InputError
from .. import parallel, signals
from ..measure.timing import synchronize
from ..progress import Progress
from ..sections import RunConfig
from .folder import Position
from .start import Start
from .step import TrainStep
from .waiting import Waiting
from .window import window_means

Result = TypeVar("Result")


class Diverged(RuntimeError):
    """The loss or the gradient is no longer finite."""


_unfreed: list[TrainStep] = []  # until the process ends


@contextmanager
def freeing(step: TrainStep) -> Iterator[None]:
    """Free the CUDA graph of a step at the end of the block. It stays, and the step with it, after an error that may
    come from the loss of a process, because a call of NCCL in it then never returns (`parallel.leave`)."""
    try:
        yield
    except (Diverged, InputError, signals.Stopped):
        step.close()
        raise
    except BaseException:
        _unfreed.append(step)
        raise
    step.close()


def loop(
    step: TrainStep,
    batches: Iterable[dict[str, Tensor]],
    at: Position,
    *,
    until: int,
    asked: Collection[int],
    run: RunConfig,
    log: Callable[[Position, dict[str, float | None]], None],
    save: Callable[[Position], None],
    keep: Callable[[Position, float], None],
    preview: Callable[[Position], None],
    heldout: Callable[[], dict[str, float | None]],
    start: Start,
    progress: Progress,
) -> None:
    """Train to the step `until`. `log` gets the means of the metrics every `run.log_every` steps and at the end, `keep`
    the loss at the steps in `asked`, and `save` is called every `run.checkpoint_every` steps and at the end. `preview`
    is called every `run.preview_every` steps. The line of every `run.heldout_every` steps has what `heldout` returns,
    too. The time of both does not count. A signal ends `heldout` early (Stopped). The training that continues measures
    again and writes that line; at the end of a training, the line lacks the held-out loss.

    `start` is told of its last parts, and its line follows the first step.

    A line at the end that is not due leaves the window as it is, so that a longer training continues the window. Raises
    Diverged if the loss is not finite, Stopped after the step in which a signal came (signals.py), and InputError of
    a batch that cannot be read, after saving the step before it. Several processes (parallel.py) have the same metrics,
    and raise these errors after the same step.
    """
    started, before, first, facts = time.perf_counter(), at.seconds, at.step, {}
    waiting, waited = Waiting(step.device), at.waited

    def look_at_the_clock() -> None:
        at.seconds = before + time.perf_counter() - started
        at.waited = None if waited is None else waited + waiting.seconds()

    def aside(work: Callable[..., Result], *inputs: Position) -> Result:
        """Do what is no step of the training, and take its time for none."""
        nonlocal started
        synchronize(step.device)
        begun = time.perf_counter()
        try:
            return work(*inputs)
        finally:
            started += time.perf_counter() - begun

    def measured(stopping: bool) -> dict[str, float | None] | None:
        """The held-out loss where it is due; None if a signal came before it was there."""
        if not run.heldout_every or at.step % run.heldout_every:
            return {}
        values: dict[str, float | None] = {}
        if not stopping:
            with suppress(signals.Stopped):
                values = aside(heldout)
        return None if parallel.stopping() else values

    def end_window() -> None:
        at.window_start = at.step
        step.window.zero_()

    def save_before_damage() -> None:
        if at.step > first:
            look_at_the_clock()
            if at.step > at.window_start:
                mean_metrics(step, at, until)
            save(at)
            progress.say(f"saved at step {at.step} of {until}")

    start.part("network")
    progress.update("train", at.step, until)
    if run.heldout_every and at.step % run.heldout_every == 0 and at.step > at.window_start:
        means = mean_metrics(step, at, until)  # of a line that a signal left for now
        if (values := measured(False)) is None:
            signals.check()
        log(at, means | (values or {}))
        end_window()
        start.part("heldout")
    for batch in waiting.around(_until_damage(batches, save_before_damage)):
        step(batch)
        parallel.mean_(step.window)
        at.step += 1
        if at.step == first + 1:
            synchronize(step.device)
            start.part("step")
            progress.say(start.text())
        last, stopping = at.step == until, parallel.stopping()
        logging, keeping = at.step % run.log_every == 0, at.step in asked
        saving = last or stopping or at.step % run.checkpoint_every == 0
        loss = math.nan
        if logging or saving or keeping:
            means = mean_metrics(step, at, until)
            look_at_the_clock()
            loss = cast(float, means["loss"])
            if (values := measured(stopping)) is None:
                saving, stopping, logging = True, True, logging and last
            if logging or last:
                log(at, means | (values or {}))
                facts = {"loss": f"{loss:.4f}"}
            if logging:
                end_window()
        progress.update("train", at.step, until, **facts)
        if saving:
            save(at)
        if keeping:
            keep(at, loss)
        if stopping and not last:
            progress.say(f"saved at step {at.step} of {until}")
            signals.check()
        if run.preview_every and at.step % run.preview_every == 0:
            aside(preview, at)


def _until_damage(batches: Iterable[dict[str, Tensor]], save: Callable[[], None]) -> Iterator[dict[str, Tensor]]:
    try:
        yield from batches if parallel.size() == 1 else _together(batches)
    except InputError:
        save()
        raise


def _together(batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """The batches, until one of the processes cannot read its part of one."""
    source = iter(batches)
    while True:
        batch, error = None, None
        try:
            batch = next(source, None)
        except Exception as caught:
            error = caught
        parallel.check(error)
        if batch is None:
            return
        yield batch


def mean_metrics(step: TrainStep, at: Position, until: int) -> dict[str, float | None]:
    """The means since the last regular line (`window_means`). Raises Diverged if one is not finite."""
    means = window_means(step.window, step.objective.metrics, at.step - at.window_start)
    if all(value is None or math.isfinite(value) for value in means.values()):
        return means
    text = ", ".join(f"{name} {means[name]}" for name in (*step.objective.metrics, "grad_norm"))
    what = "gradient" if math.isfinite(cast(float, means["loss"])) else "loss"
    raise Diverged(f"the {what} is not finite by step {at.step} of {until}: {text}")
