"""Stages: which parts of a task are missing, and how to do them. Running the same task again does what is missing."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..kernels.errors import InputError
from ..models import plugins, registry
from . import signals
from .config import Config, check_fit, micro_batch
from .disk import append
from .keys import (
    config_from_dict,
    digest,
    score_key,
)
from .measure.speed import measure, next_measurement, stored
from .moments import kept_steps, not_kept, reached, reached_step
from .parallel import Lost
from .progress import Progress
from .record import Row, newest, read_records, row
from .run import GLANCE_S, create, is_locked, locked, read_info
from .sections import HELDOUT
from .shards import serves
from .tasks import STAGES, Task
from .training.checkpoint import moments

ERRORS = "error.log"  # the traceback of a stage that failed, until the task is done
FINISH_S = 60.0  # how long a process that drew waits for another one that records the set


def missing(task: Task, records: Sequence[Row] | None = None) -> list[str]:
    """The stages of a task that are not done, in the order in which they run; `records` are those of its folder."""
    records = read_records(task.path / "record.jsonl") if records is None else records
    return [stage for stage in STAGES if stage in task.stages and not _done(task, stage, records)]


def _done(task: Task, stage: str, records: Sequence[Row]) -> bool:
    if stage == "train":  # stays done if a longer training failed later
        return (reached(records) or 0) >= task.config["train"]["steps"] and not held(task)
    rows = newest(records)
    if stage == "evaluate":
        return not missing_metrics(task, rows)
    if stage == "bench":
        model = registry.from_dict(task.config["model"])
        return all(next_measurement(model, plan, rows.values()) is None for plan in task.plans)
    done = [one for one in rows.values() if one.kind == stage and one.state == "done"]
    if stage == "sample" and done and not serves(done[0], task.config):
        scores = task.metrics and task.config["sample"].get("keep") == "features"  # all that is wanted of the set
        return bool(scores) and not missing_metrics(task, rows)
    if stage == "cost" and (task.config.get("run") or {}).get("fvcore"):
        return any(one.flat().get("fvcore") is not None for one in done)
    return bool(done)


def held(task: Task) -> list[int]:
    """The moments of a training task that only a full checkpoint holds. Further training deletes that checkpoint."""
    return sorted({*task.moments} & {*kept_steps(task.path)} - {*moments(task.path)})


def lost(task: Task) -> list[int]:
    """The moments of a training task that its training has passed without keeping their weights."""
    past = reached_step(task.path) or 0
    return sorted({step for step in task.moments if step <= past} - {*kept_steps(task.path)})


def missing_metrics(task: Task, rows: dict[tuple[str, str], Row] | None = None) -> list[str]:
    """The metrics of a task of samples that have no done score."""
    rows = newest(read_records(task.path / "record.jsonl")) if rows is None else rows
    done = {one.key for one in rows.values() if one.kind == "score" and one.state == "done"}
    if not done:
        return list(task.metrics)
    config = config_from_dict(task.config)
    return [metric for metric in task.metrics if score_key(config, task.key, metric) not in done]


def plan_key(task: Task, plan: dict[str, Any]) -> str:
    """The key of a plan of measurements, for the record of its failure."""
    return digest("bench", task.key, plan)


def problem(task: Task) -> str | None:
    """Why a task cannot do what is missing of it, or None if it can. Its training may have passed the moment of the
    samples without keeping the weights, or may have no full checkpoint left to continue from."""
    if task.kind == "training" and "train" in missing(task):
        end, whole = reached_step(task.path), kept_steps(task.path, "live")
        if end is not None and end < task.config["train"]["steps"] and not whole:
            return f"trained to step {end}, and no full checkpoint is left to go on from"
    if task.kind != "samples" or "sample" not in missing(task):
        return None
    kept, end = kept_steps(Path(task.training), task.config["sample"]["weights"]), reached_step(Path(task.training))
    if end is None or end < task.step or task.step in kept:
        return None
    return not_kept(task.step, kept)


def start_problem(task: Task) -> str | None:
    """What a task lacks that another job makes: the weights, or the samples that it scores. None if nothing."""
    if not ready(task):
        return f"{task.training} has no weights of step {task.step}"
    needed = task.stages == ("evaluate",) and needs_samples(task)
    rows = read_records(task.path / "record.jsonl") if needed else None
    if rows is not None and not any(one.kind == "sample" and one.state == "done" for one in rows):
        return f"{task.path} has no samples"
    return None


def needs_samples(task: Task) -> bool:
    """Whether a task asks for samples or for a score of them."""
    return "sample" in task.stages or any(metric != HELDOUT for metric in task.metrics)


def ready(task: Task) -> bool:
    """Whether what a task reads from another folder exists: the weights, for samples that are still to be drawn and for
    the held-out loss."""
    if task.kind != "samples" or ("sample" not in missing(task) and HELDOUT not in missing_metrics(task)):
        return True
    return task.step in kept_steps(Path(task.training), task.config["sample"]["weights"])


def prepare(task: Task) -> Path:
    """The folder of a task, created with its config.json if needed. A folder in use by a process is left unchanged."""
    return task.path if is_locked(task.path) else _prepare(task)


def _prepare(task: Task) -> Path:
    info = {"kind": task.kind, "key": task.key, **task.about, "config": task.config}
    if sources := plugins.loaded():
        info["plugins"] = sources
    if task.kind == "training" and (task.path / "config.json").is_file():
        there = read_info(task.path)["config"]
        if there["train"]["steps"] >= task.config["train"]["steps"]:
            return task.path  # config.json keeps the configuration with the most steps
    if task.kind == "samples":
        info |= {"training": task.training, "step": task.step}
    if task.kind == "model":
        info["config"] = {"model": task.config["model"]}
    return create(task.path, info)


def execute(task: Task, progress: Progress) -> None:
    """Do what is missing of a task, one stage after the other, and record each.

    Any number of processes draw a set of samples together, and one records it. A stage that fails leaves a record with
    its error, which is raised. Raises Busy if another process works in the folder, and Stopped, without a record, if a
    signal asked for it (signals.py); the same call continues.
    """
    from .caches import keep_compiled
    from .device import pick_device
    from .provenance import provenance

    folder = prepare(task)
    plugins.load_recorded(read_info(folder).get("plugins", ()), progress.say)
    sources = {one["name"]: one["sha256"] for one in plugins.loaded()}
    config = config_from_dict(task.config)
    keep_compiled(config.run.root, device := pick_device(config.run.device))
    stages = _DO | ({"sample": _draw(task, config, progress)} if "sample" in missing(task) else {})
    with locked(folder, FINISH_S if "sample" in stages else GLANCE_S):
        _prepare(task)
        if task.kind != "model":
            check_fit(config)
        for stage in missing(task):
            signals.check()
            origin = provenance(device) | ({"plugins": sources} if sources else {})
            try:
                for line in stages[stage](task, config, progress):
                    write(folder, {"provenance": origin, **line})
                    signals.check()
            except signals.Stopped:
                raise
            except Exception as error:
                if signals.asked() and not isinstance(error, Lost):  # damage of a signal is no failure of the run
                    raise signals.Stopped(f"{signals.asked()} during {stage}: {one_line(error)}") from error
                for line in _failure(task, config, stage, error):
                    write(folder, {"provenance": origin, **line})
                if not isinstance(error, InputError) and state_of(error) != "diverged":
                    (folder / ERRORS).write_text(traceback.format_exc(), encoding="utf-8")
                raise
        (folder / ERRORS).unlink(missing_ok=True)


def write(folder: Path, line: dict[str, Any]) -> dict[str, Any]:
    """Check a line and append it to a folder's record. Returns the line as written, with every field of its kind."""
    entry = row(**line)
    append(folder / "record.jsonl", entry.as_dict())
    return entry.flat()


def state_of(error: Exception) -> str:
    """The state of the record of a stage that ended in an error."""
    from .measure.timing import out_of_memory
    from .training.steps import Diverged

    return "diverged" if isinstance(error, Diverged) else "oom" if out_of_memory(error) else "failed"


def one_line(error: Exception) -> str:
    """An error as the text of a record."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    plain = isinstance(error, InputError | OSError) or state_of(error) == "diverged"
    return (text if plain else f"{type(error).__name__}: {text}")[:500]


def _failure(task: Task, config: Config, stage: str, error: Exception) -> Iterator[dict[str, Any]]:
    state, text = state_of(error), one_line(error)
    if (state, stage) == ("oom", "train") and (size := micro_batch(config)) > 1:
        text += f"; it passed {size} images at a time, fewer (run.micro_batch=N) take less"
    if stage == "evaluate":
        reasons = getattr(error, "reasons", {})  # of score.Unscored
        for metric in missing_metrics(task):
            line = {"key": score_key(config, task.key, metric), "metric": metric, "samples": task.key}
            yield {"kind": "score", **line, "state": state, "error": reasons.get(metric, text)}
    elif stage == "bench":
        rows = newest(read_records(task.path / "record.jsonl")).values()
        for plan in task.plans:
            if next_measurement(config.model, plan, rows) is not None:
                yield {"kind": "speed", "key": plan_key(task, plan), "state": state, "error": text}
    else:
        yield {"kind": stage, "key": task.key, "state": state, "error": text}


def _cost(task: Task, config: Config, progress: Progress) -> Iterator[dict[str, Any]]:
    from .measure.cost import cost, fvcore_count

    row = {"kind": "cost", "key": task.key, **cost(config.model).as_dict()}
    if config.run.fvcore:
        count = fvcore_count(config.model)
        row |= {"fvcore": count.total, "fvcore_skips": count.skips()}
    yield row


def _train(task: Task, config: Config, progress: Progress) -> Iterator[dict[str, Any]]:
    from .training.folder import record
    from .training.loop import train

    # A moment that was passed and not kept is lost. It is an error only if something needs it (`problem`).
    ahead = sorted({*task.moments} - {*lost(task)})
    past = reached_step(task.path) or 0
    steps = max(config.train.steps, past)  # the record stays that of the furthest step
    config = replace(config, train=replace(config.train, steps=steps, snapshots=[]))
    end = train(task.path, config, progress, ahead)
    flops = end["training_flops"] // (3 * end["images"])
    for step in ahead:  # a row for each moment, because other requests may end there
        if past < step < steps:
            moment = replace(config, train=replace(config.train, steps=step))
            yield {"kind": "train", "key": task.key, **record(task.path, moment, flops)}
    yield {"kind": "train", "key": task.key, **end}


def _draw(task: Task, config: Config, progress: Progress) -> Callable[..., Iterator[dict[str, Any]]]:
    """Draw images, together with other processes. Returns what records them, or raises the error that ended it."""
    from .sampling import drawn, finish

    facts = drawn(task.path, Path(task.training), config, task.step, progress)

    def record(*_: Any) -> Iterator[dict[str, Any]]:
        yield {"kind": "sample", "key": task.key, **finish(task.path, config, facts.result())}

    return record


def _evaluate(task: Task, config: Config, progress: Progress) -> Iterator[dict[str, Any]]:
    from .scoring.score import score_set
    from .scoring.statistics_file import check_same

    check_same(config.evaluate.reference, task.reference)
    where = (task.path, Path(task.training), task.step)
    for line in score_set(*where, config, missing_metrics(task), progress):
        request = line.pop("request")
        of = {} if request == HELDOUT else {"samples": task.key}
        yield {"kind": "score", "key": score_key(config, task.key, request), **of, **line}


def _bench(task: Task, config: Config, progress: Progress) -> Iterator[dict[str, Any]]:
    """Yield rows as they are measured, so that a killed benchmark continues where it stopped."""
    from .device import device_name, pick_device

    device = pick_device(config.run.device)
    for plan in task.plans:
        rows = newest(read_records(task.path / "record.jsonl")).values()
        if next_measurement(config.model, plan, rows) is not None:
            there = stored(config.model, plan, rows, device_name(device))
            yield from measure(config.model, plan, config.objective, device, progress.say, there)


_DO: dict[str, Callable[..., Iterator[dict[str, Any]]]]
_DO = {"cost": _cost, "train": _train, "evaluate": _evaluate, "bench": _bench}
