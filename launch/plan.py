"""Plans: the runs of a study, the tasks that they ask for, and the state of each task as its folder records it.

A run is a variant with a seed. It asks for up to three kinds of folders: one for its model, one for its training, and
one for each set of samples. Runs that ask for the same folder share it.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..ablations.study import Study
from ..harness.config import Config, check_fit
from ..harness.guide import open_guide
from ..harness.keys import asked, config_from_dict, model_folder, score_key, training_folder
from ..harness.measure.speed import next_measurement
from ..harness.moments import kept_steps, not_kept
from ..harness.progress import describe
from ..harness.progress import read as read_progress
from ..harness.record import STAGE_OF, Row, newest, read_records
from ..harness.run import check_study, is_locked, read_info, write_study
from ..harness.sections import RunConfig
from ..harness.stages import lost, missing, missing_metrics, needs_samples, plan_key, problem, ready
from ..harness.tasks import Task, merged, only, tasks
from ..harness.training.loggers import check_loggers
from ..kernels.errors import InputError, unknown
from ..models import plugins, registry
from .compose import Override, compose, plugin_names, text_of
from .slurm.cluster import flat, of_cluster
from .slurm.cluster import load as load_cluster

# A run has the first of these states that one of its tasks has. "" stands for every state of failure.
ORDER = ("unreadable", "running", "preempted", "queued", "", "stopped", "planned", "done")


TAKEN = ("report", "records.jsonl")  # beside the links in the folder of a study


@dataclass(frozen=True)
class Look:
    """The state of a task according to its folder, its error, and the stages that are to do. The state is planned,
    running, stopped (begun, but no process works on it), done, that of the failure on record (failed, oom, diverged,
    wrong), or unreadable (a file of the folder is damaged or foreign, so that nothing is known to be done)."""

    state: str
    error: str
    missing: tuple[str, ...]


def look(task: Task) -> Look:
    """The state of a task."""
    try:
        records: list[Row] = []
        for folder in (*([Path(task.training)] if task.training else []), task.path):
            if (folder / "config.json").exists():
                read_info(folder)
            records = read_records(folder / "record.jsonl")
    except InputError as error:
        return Look("unreadable", str(error), task.stages)
    except OSError as error:
        return Look("unreadable", f"cannot read {error.filename}: {error.strerror}", task.stages)
    left = tuple(missing(task, records))
    if not left:
        return Look("done", "", left)
    if is_locked(task.path):
        return Look("running", "", left)
    if (row := failure(task, left, records)) is not None:
        return Look(row.state, row.error or "", left)
    output = {"training": "metrics.jsonl", "samples": "shards"}.get(task.kind)
    # And asked since for more steps, or for what was not kept of the samples.
    extended = any(row.kind in ("train", "sample") and row.state == "done" for row in records)
    begun = output is not None and left[0] != "evaluate" and (task.path / output).exists() and not extended
    return Look("stopped" if begun else "planned", "", left)


def failure(task: Task, left: Sequence[str], records: Sequence[Row]) -> Row | None:
    """The newest record of the stages that are to do, if it is a failure, else None."""
    keys = keys_of(replace(task, metrics=tuple(missing_metrics(task)) if "evaluate" in left else ()))
    theirs = (row for row in reversed(records) if row.key in keys and STAGE_OF.get(row.kind) in left)
    last = next(theirs, None)
    return last if last is not None and last.state != "done" else None


def keys_of(task: Task) -> set[str]:
    """The keys of the records that answer a task, without those of measurements."""
    keys = {task.key, *(plan_key(task, one) for one in task.plans)}
    if task.metrics:
        config = config_from_dict(task.config)
        keys |= {score_key(config, task.key, metric) for metric in task.metrics}
    return keys


def left_of(task: Task, left: Sequence[str]) -> set[str]:
    """The keys, among `keys_of`, of what is to do of a task: `left` are its stages to do."""
    rows = newest(read_records(task.path / "record.jsonl"))
    model = config_from_dict(task.config).model
    to_measure = (one for one in task.plans if next_measurement(model, one, rows.values()) is not None)
    plans = tuple(to_measure) if "bench" in left else ()
    metrics = tuple(missing_metrics(task, rows)) if "evaluate" in left else ()
    keys = keys_of(replace(task, plans=plans, metrics=metrics))
    return keys if {"cost", "train", "sample"} & {*left} else keys - {task.key}


@dataclass(frozen=True)
class Piece:
    """One task, done by one job: the run that it is named after, the cluster settings of the job, and its plug-ins."""

    run: str
    task: Task
    cluster: tuple[Override, ...] = ()
    plugins: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The run and its stages: `dit_nano (sample, evaluate at 500)`."""
        step = f" at {self.task.step}" if self.task.kind == "samples" else ""
        return f"{self.run} ({', '.join(self.task.stages)}{step})"

    @property
    def folder(self) -> Path:
        return self.task.path

    @property
    def id(self) -> tuple[str, str]:
        return self.task.kind, self.task.key

    def ready(self) -> bool:
        """Whether the weights that the task needs exist."""
        return ready(self.task)

    def missing(self) -> list[str]:
        """The stages that are to do."""
        return missing(self.task)

    def state(self) -> str:
        return look(self.task).state

    def error(self) -> str | None:
        """The error that stopped the task, if there is one."""
        return look(self.task).error or None

    def progress(self) -> dict[str, Any]:
        return progress(self.folder)


@dataclass(frozen=True)
class Planned:
    """One run of a study: its name (that of the variant, with the seed if there are several), its entries in
    config.json (`about`), its configuration, and its tasks."""

    name: str
    variant: str
    about: dict[str, Any]
    config: Config
    tasks: tuple[Task, ...]
    overrides: tuple[Override, ...] = ()
    cluster: tuple[Override, ...] = ()  # settings `cluster.KEY=…` of the study or the command; not part of its identity
    plugins: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        return Path(self.config.run.root)

    @property
    def training(self) -> Task | None:
        return next((task for task in self.tasks if task.kind == "training"), None)

    @property
    def id(self) -> str:
        """The key of its training, or of its model if it has no training."""
        main = next((task for task in self.tasks if task.kind != "model"), self.tasks[0])
        return training_folder(self.root, self.config).name.rsplit("-", 1)[1] if main.kind != "model" else main.key

    @property
    def folder(self) -> Path:
        """The folder of its training, or of its model."""
        needs_training = any(task.kind != "model" for task in self.tasks)
        return training_folder(self.root, self.config) if needs_training else model_folder(self.root, self.config.model)

    def looks(self) -> list[Look]:
        """The states of its tasks."""
        return [look(task) for task in self.tasks]

    def missing(self) -> list[str]:
        """The stages that are to do."""
        return to_do(self.looks())

    def state(self) -> str:
        """The state of the run: the one of its tasks' states that comes first in `ORDER`."""
        looks = self.looks()
        return looks[first([one.state for one in looks])].state

    def unreadable(self) -> str:
        """Which file of its tasks' folders is damaged or foreign, and why; empty if all can be read."""
        return next((one.error for one in self.looks() if one.state == "unreadable"), "")

    def problems(self) -> list[str]:
        """What prevents the run from doing what is missing."""
        texts = [text for task in self.tasks if (text := problem(task)) is not None]
        sampled = {task.step for task in self.tasks if task.kind == "samples"}  # these moments serve only samples
        if (training := self.training) is not None:
            kept = kept_steps(training.path)
            texts += [not_kept(step, kept) for step in lost(training) if step not in sampled]
        return list(dict.fromkeys(texts))


def to_do(looks: Sequence[Any]) -> list[str]:
    """The missing stages of several tasks."""
    return list(dict.fromkeys(stage for one in looks for stage in one.missing))


def first(states: Sequence[str]) -> int:
    """The index of the state that comes first in `ORDER`."""
    ranks = [ORDER.index(state) if state in ORDER else ORDER.index("") for state in states]
    return ranks.index(min(ranks))


def progress(folder: Path) -> dict[str, Any]:
    """The newest progress that the job in a folder wrote; empty if it wrote none."""
    return read_progress(folder) or {}


def plan(
    study: Study, overrides: Sequence[str] = (), check_owner: Callable[[Path, str, str | None], None] = check_study
) -> list[Planned]:
    """Every run of a study, with a checked configuration. Nothing is written. `check_owner` is called in place of
    `check_study`.

    Raises InputError for an override that does not fit, and if two runs ask for the same tasks.
    """
    names = [*study.plugins, *plugin_names(overrides)]
    plugins.load(names)
    overrides = [text for text in overrides if not text.startswith("plugins=")]
    runs: dict[tuple[Any, ...], Planned] = {}
    titles = {name: preset.title for name, preset in registry.presets().items()}
    for variant in study.expand():
        words = [*variant.overrides, *overrides]
        settings = tuple(one for word in words if of_cluster(word) for one in flat(word))
        load_cluster("local", settings)
        words = [word for word in words if not of_cluster(word)]
        config, choice_of = compose(words)
        check_fit(config)
        check_loggers(config.run.log_to)
        if config.sample.guide is not None and config.sample.guide_at == "last":
            steps = ", ".join(map(str, kept_steps(open_guide(config).home, config.sample.guide_weights))) or "none"
            raise InputError(
                "a study needs sample.guide_at=STEP, because the last step is another one after further training of "
                f"sample.guide {config.sample.guide} (steps that it has: {steps})"
            )
        name, model = study.run_name(variant), choice_of["model"]
        if name in TAKEN:
            raise InputError(f"study {study.name}: a run cannot be called {name!r}, where the study's {name} lies")
        about = {"study": study.name, "name": name, "variant": variant.values, "seed": config.seed, "model": model}
        about |= {"family": registry.family_of(config.model).name, "title": titles[model]}
        run_tasks = tuple(tasks(config, about, study.stages))
        run = Planned(name, variant.name, about, config, run_tasks, tuple(words), settings, tuple(names))
        request = tuple(_request(task) for task in run_tasks)
        if request in runs:
            other = runs[request]
            more = "; they differ in how samples are scored: `lamabench sweep run STUDY evaluate.…` scores them again"
            same = config.evaluate == other.config.evaluate
            raise InputError(f"study {study.name}: {name} and {other.name} are the same run{'' if same else more}")
        runs[request] = run
    planned = list(runs.values())
    if len(roots := {run.config.run.root for run in planned}) > 1:
        raise InputError(f"study {study.name}: all runs must have the same run.root, not {', '.join(sorted(roots))}")
    check_owner(planned[0].root, study.name, study.file)
    return planned


def _request(task: Task) -> tuple[Any, ...]:
    """What a task asks for, in a form that can be compared."""
    return task.kind, task.key, task.stages, task.moments, frozenset(task.metrics), json.dumps(task.plans)


def home(study: Study, overrides: Sequence[str] = ()) -> Path:
    """The folder ROOT/STUDY, without planning the runs."""
    roots = [text for text in overrides if text.startswith("run.root=")]
    root = text_of(roots[-1]) if roots else study.base.get("run.root", RunConfig().root)
    return Path(os.path.expanduser(str(root))) / study.name


def write(study: Study, runs: Sequence[Planned]) -> Path:
    """Write ROOT/STUDY/.study.json with what the study is about and all its runs, and their links.

    Raises InputError as `check_study` does."""
    return write_study(runs[0].root, study.name, study.file, listing(runs), about=study.about())


def listing(runs: Sequence[Planned]) -> list[dict[str, Any]]:
    """The runs as .study.json lists them (harness/run.py, `read_study`)."""
    entries = []
    for run in runs:
        needs_training = any(task.kind != "model" for task in run.tasks)
        folders: dict[str, Any] = {
            "training": training_folder(run.root, run.config) if needs_training else None,
            "model_folder": model_folder(run.root, run.config.model),
            "samples": [task.path for task in run.tasks if task.kind == "samples"],
            "to_draw": [task.path for task in run.tasks if task.kind == "samples" and needs_samples(task)],
        }
        if (guide := _guide_below(run)) is not None:
            folders["guide"] = guide
        relative = {
            name: [str(path.relative_to(run.root)) for path in value]
            if isinstance(value, list)
            else value and str(value.relative_to(run.root))
            for name, value in folders.items()
        }
        relative |= {
            "steps": run.config.train.steps if needs_training else None,
            "backend": asked(run.config.backend) or {},
        }
        entries.append(run.about | relative)
    return entries


def _guide_below(run: Planned) -> Path | None:
    """The folder of the guide of the samples of a run, if it lies below the run's root."""
    if run.config.sample.guide is None or all(task.kind != "samples" for task in run.tasks):
        return None
    guide, root = Path(os.path.expanduser(run.config.sample.guide)).resolve(), run.root.resolve()
    return run.root / guide.relative_to(root) if guide.is_relative_to(root) else None


def select_stages(runs: Sequence[Planned], stages: Sequence[str], study: Study) -> list[Planned]:
    """The runs with only some of the study's stages. Runs without any of these stages are left out.

    Raises InputError for a stage that the study does not have.
    """
    for stage in stages:
        if stage not in study.stages:
            raise unknown(f"stage of {study.name}", stage, study.stages)

    parts = [replace(run, tasks=tuple(task for one in run.tasks if (task := only(one, stages)).stages)) for run in runs]
    return [run for run in parts if run.tasks]


def select_variants(runs: Sequence[Planned], patterns: str) -> list[Planned]:
    """The runs whose variant or own name matches one of several patterns, such as `window*,ssm`.

    Raises InputError for a pattern that matches none, with the names of the variants.
    """
    selection: set[str] = set()
    for pattern in patterns.split(","):
        names = {run.name for run in runs if fnmatchcase(run.variant, pattern) or fnmatchcase(run.name, pattern)}
        if not names:
            variants = list(dict.fromkeys(run.variant for run in runs))
            more = f", … ({len(variants)})" if len(variants) > 30 else ""
            raise InputError(f"no variant is called {pattern!r}; variants: {', '.join(variants[:30])}{more}")
        selection |= names
    return [run for run in runs if run.name in selection]


def pieces(runs: Sequence[Planned]) -> list[Piece]:
    """The tasks of several runs, one for each folder, models and trainings before samples.

    A task is named after the first run that asks for it. A training is not asked for a moment that it has passed
    without keeping its weights (`Planned.problems` says so).
    """
    owner: dict[tuple[str, str], Planned] = {}
    for run in runs:
        for task in run.tasks:
            owner.setdefault((task.kind, task.key), run)
    every = [_without_lost_moments(task) for task in merged(task for run in runs for task in run.tasks)]
    every.sort(key=lambda task: task.kind == "samples")
    return [Piece(run.name, task, run.cluster, run.plugins) for task in every for run in (owner[task.kind, task.key],)]


def _without_lost_moments(task: Task) -> Task:
    if task.kind != "training" or not (past := lost(task)):
        return task
    return replace(task, moments=tuple(step for step in task.moments if step not in past))


def rows(runs: Sequence[Planned]) -> list[dict[str, Any]]:
    """A row for each run: name, id, state, missing stages, progress, error."""
    lines = []
    for run in runs:
        looks = run.looks()
        main = first([one.state for one in looks])
        now = progress(run.tasks[main].path) if looks[main].state == "running" else {}
        lines.append(
            {
                "run": run.name,
                "id": run.id,
                "state": looks[main].state,
                "to do": " ".join(to_do(looks)),
                "progress": describe(now) if now else "",
                "error": looks[main].error,
                "folder": str(run.folder),
            }
        )
    return lines
