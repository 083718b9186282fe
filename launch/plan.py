"""Plans: what the runs of a study are, which tasks they ask for, and how each stands by what its folders say.

A run is a variant with a seed. It asks for up to three kinds of folders: its model's, its training's, and one for each
set of samples. Runs that ask for the same folder share it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..ablations.study import Study, StudyError
from ..harness.config import Config, RunConfig, check_fit
from ..harness.keys import config_from_dict, model_folder, score_key, training_folder
from ..harness.progress import describe
from ..harness.record import Row, newest, read_records
from ..harness.run import check_study, is_locked, write_study
from ..harness.stages import (
    Task,
    kept_steps,
    merged,
    missing,
    missing_metrics,
    next_measurement,
    not_kept,
    plan_key,
    problem,
    reached_step,
    ready,
    tasks,
)
from ..kernels.errors import InputError, unknown
from ..models import plugins, registry
from .compose import compose, plugin_names, value_of
from .slurm.cluster import load as load_cluster
from .slurm.cluster import of_cluster

STAGE_OF = {"cost": "cost", "train": "train", "sample": "sample", "score": "evaluate", "speed": "bench"}
# The first of these that one of its tasks is in is how a run stands; states that are not here are failures.
ORDER = ("running", "preempted", "queued", "", "stopped", "planned", "done")


@dataclass(frozen=True)
class Look:
    """How a task stands by its folder: planned, running, stopped (begun, and nobody works on it), done, or what the
    record says that stopped it (failed, oom, diverged, wrong), with its error; and the stages that are to do."""

    state: str
    error: str
    missing: tuple[str, ...]


def look(task: Task) -> Look:
    """How a task stands."""
    records = read_records(task.path / "record.jsonl")
    left = tuple(missing(task, records))
    if not left:
        return Look("done", "", left)
    if is_locked(task.path):
        return Look("running", "", left)
    if (failed := failure(task, left, records)) is not None:
        return Look(failed.state, failed.error or "", left)
    begun = {"training": "metrics.jsonl", "samples": "samples.parts"}.get(task.kind)
    trained = any(row.kind == "train" and row.state == "done" for row in records)  # and asked for more steps since
    begins = begun is not None and left[0] != "evaluate" and (task.path / begun).exists() and not trained
    return Look("stopped" if begins else "planned", "", left)


def failure(task: Task, left: Sequence[str], records: Sequence[Row]) -> Row | None:
    """The record that says why stages that are to do are not done; None where the newest of theirs is no failure."""
    keys = keys_of(replace(task, metrics=tuple(missing_metrics(task)) if "evaluate" in left else ()))
    theirs = (row for row in reversed(records) if row.key in keys and STAGE_OF.get(row.kind) in left)
    last = next(theirs, None)
    return last if last is not None and last.state != "done" else None


def keys_of(task: Task) -> set[str]:
    """The keys of the records that answer a task, less those of measurements."""
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
    """One task, done by one job: the run that it is called after, what its job asks for, and plug-ins to import."""

    run: str
    task: Task
    cluster: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The run and what is done for it: `dit_nano (sample, evaluate at 500)`."""
        step = f" at {self.task.step}" if self.task.kind == "samples" else ""
        return f"{self.run} ({', '.join(self.task.stages)}{step})"

    @property
    def folder(self) -> Path:
        return self.task.path

    @property
    def id(self) -> tuple[str, str]:
        return self.task.kind, self.task.key

    def ready(self) -> bool:
        """Whether what the task takes from another one is there."""
        return ready(self.task)

    def missing(self) -> list[str]:
        """The stages that are to do."""
        return missing(self.task)

    def state(self) -> str:
        return look(self.task).state

    def error(self) -> str | None:
        """The error that stopped it, where one did."""
        return look(self.task).error or None

    def progress(self) -> dict[str, Any]:
        return progress(self.folder)


@dataclass(frozen=True)
class Planned:
    """One run of a study: its name (the variant's, and the seed where there are several), what config.json says of it
    beside the configuration, the configuration, and what it asks for."""

    name: str
    variant: str
    about: dict[str, Any]
    config: Config
    tasks: tuple[Task, ...]
    overrides: tuple[str, ...] = ()
    cluster: tuple[str, ...] = ()  # settings `cluster.KEY=…` of the study or the command; no part of the run
    plugins: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        return Path(self.config.run.root)

    @property
    def training(self) -> Task | None:
        return next((task for task in self.tasks if task.kind == "training"), None)

    @property
    def id(self) -> str:
        """The key of its training, or of its model where it has none."""
        main = next((task for task in self.tasks if task.kind != "model"), self.tasks[0])
        return training_folder(self.root, self.config).name.rsplit("-", 1)[1] if main.kind != "model" else main.key

    @property
    def folder(self) -> Path:
        """The folder of its training, or of its model."""
        trained = any(task.kind != "model" for task in self.tasks)
        return training_folder(self.root, self.config) if trained else model_folder(self.root, self.config.model)

    def looks(self) -> list[Look]:
        """How each of its tasks stands."""
        return [look(task) for task in self.tasks]

    def missing(self) -> list[str]:
        """The stages that are to do."""
        return to_do(self.looks())

    def state(self) -> str:
        """How it stands: as the task of it that comes first in `ORDER`."""
        looks = self.looks()
        return looks[first([one.state for one in looks])].state

    def problems(self) -> list[str]:
        """What stands against doing what is missing."""
        texts = [text for task in self.tasks if (text := problem(task)) is not None]
        sampled = {task.step for task in self.tasks if task.kind == "samples"}  # that is all that is asked of them
        training = self.training
        if training is not None and (end := reached_step(training.path)) is not None:
            kept = kept_steps(training.path)
            lost = [step for step in training.moments if step <= end and step not in {*kept, *sampled}]
            texts += [not_kept(step, kept) for step in lost]
        return list(dict.fromkeys(texts))


def to_do(looks: Sequence[Any]) -> list[str]:
    """The stages that are missing of several tasks."""
    return list(dict.fromkeys(stage for one in looks for stage in one.missing))


def first(states: Sequence[str]) -> int:
    """The place of the state that stands for all of them."""
    ranks = [ORDER.index(state) if state in ORDER else ORDER.index("") for state in states]
    return ranks.index(min(ranks))


def progress(folder: Path) -> dict[str, Any]:
    """What the job in a folder last said of its work; empty before it said anything."""
    try:
        return json.loads((folder / "progress.json").read_text())
    except (OSError, ValueError):
        return {}


def plan(study: Study, overrides: Sequence[str] = ()) -> list[Planned]:
    """Every run of a study, each a checked configuration; nothing is written.

    Raises InputError for an override that does not fit, StudyError where two runs ask for the same.
    """
    names = [*study.plugins, *plugin_names(overrides)]
    plugins.load(names)
    overrides = [text for text in overrides if not text.startswith("plugins=")]
    runs: dict[tuple[Any, ...], Planned] = {}
    titles = {name: preset.title for name, preset in registry.presets().items()}
    for variant in study.expand():
        words = [*variant.overrides, *overrides]
        settings = tuple(text for text in words if of_cluster(text))
        load_cluster("local", settings)
        words = [text for text in words if not of_cluster(text)]
        config, chosen = compose(words)
        check_fit(config)
        name, model = study.run_name(variant), chosen["model"]
        about = {"study": study.name, "name": name, "variant": variant.values, "seed": config.seed, "model": model}
        about |= {"family": registry.family_of(config.model).name, "title": titles[model]}
        found = tuple(tasks(config, about, study.stages))
        run = Planned(name, variant.name, about, config, found, tuple(words), settings, tuple(names))
        request = tuple(_request(task) for task in found)
        if request in runs:
            raise StudyError(f"study {study.name}: {name} and {runs[request].name} are the same run")
        runs[request] = run
    planned = list(runs.values())
    if len(roots := {run.config.run.root for run in planned}) > 1:
        raise StudyError(f"study {study.name}: all its runs have one run.root, not {', '.join(sorted(roots))}")
    check_study(planned[0].root, study.name, study.file)
    return planned


def _request(task: Task) -> tuple[Any, ...]:
    """What a task asks for, to compare."""
    return task.kind, task.key, task.stages, task.moments, frozenset(task.metrics), json.dumps(task.plans)


def home(study: Study, overrides: Sequence[str] = ()) -> Path:
    """ROOT/STUDY, without a look at the runs."""
    named = [text for text in overrides if text.startswith("run.root=")]
    return Path(value_of(named[-1]) if named else study.base.get("run.root", RunConfig().root)) / study.name


def write(study: Study, runs: Sequence[Planned]) -> Path:
    """Write ROOT/STUDY/.study.json, with all runs of the study, and their links. Raises InputError as `check_study`."""
    return write_study(runs[0].root, study.name, study.file, listing(runs))


def listing(runs: Sequence[Planned]) -> list[dict[str, Any]]:
    """The runs as .study.json has them (run.py, `read_study`)."""
    entries = []
    for run in runs:
        trained = any(task.kind != "model" for task in run.tasks)
        folders: dict[str, Any] = {
            "training": training_folder(run.root, run.config) if trained else None,
            "model_folder": model_folder(run.root, run.config.model),
            "samples": [task.path for task in run.tasks if task.kind == "samples"],
        }
        relative = {
            name: [str(path.relative_to(run.root)) for path in value]
            if isinstance(value, list)
            else value and str(value.relative_to(run.root))
            for name, value in folders.items()
        }
        entries.append(run.about | relative)
    return entries


def of_stages(runs: Sequence[Planned], stages: Sequence[str], study: Study) -> list[Planned]:
    """The runs with some of the study's stages, without those that have none of them.

    Raises InputError for a stage that the study does not have.
    """
    for stage in stages:
        if stage not in study.stages:
            raise unknown(f"stage of {study.name}", stage, study.stages)

    def less(task: Task) -> Task:
        metrics = task.metrics if "evaluate" in stages else ()
        plans = task.plans if "bench" in stages else ()
        kept = tuple(stage for stage in task.stages if stage in stages)
        return replace(task, stages=kept, metrics=metrics, plans=plans)

    kept = [replace(run, tasks=tuple(task for one in run.tasks if (task := less(one)).stages)) for run in runs]
    return [run for run in kept if run.tasks]


def only(runs: Sequence[Planned], patterns: str) -> list[Planned]:
    """The runs whose variant, or whose own name, fits one of several patterns such as `window*,ssm`.

    Raises InputError for a pattern that fits none, naming the variants.
    """
    kept: set[str] = set()
    for pattern in patterns.split(","):
        names = {run.name for run in runs if fnmatchcase(run.variant, pattern) or fnmatchcase(run.name, pattern)}
        if not names:
            variants = list(dict.fromkeys(run.variant for run in runs))
            more = f", … ({len(variants)})" if len(variants) > 30 else ""
            raise InputError(f"no variant is called {pattern!r}; variants: {', '.join(variants[:30])}{more}")
        kept |= names
    return [run for run in runs if run.name in kept]


def pieces(runs: Sequence[Planned]) -> list[Piece]:
    """The tasks of several runs, one a folder, called after the first run that asks for it: models and trainings
    before samples. A training is not asked for moments that it has passed and not kept (`Planned.problems`)."""
    owner: dict[tuple[str, str], Planned] = {}
    for run in runs:
        for task in run.tasks:
            owner.setdefault((task.kind, task.key), run)
    found = [_less_lost(task) for task in merged(task for run in runs for task in run.tasks)]
    found.sort(key=lambda task: task.kind == "samples")
    return [Piece(run.name, task, run.cluster, run.plugins) for task in found for run in (owner[task.kind, task.key],)]


def _less_lost(task: Task) -> Task:
    if task.kind != "training" or (end := reached_step(task.path)) is None:
        return task
    kept = kept_steps(task.path)
    return replace(task, moments=tuple(step for step in task.moments if step > end or step in kept))


def rows(runs: Sequence[Planned]) -> list[dict[str, Any]]:
    """A row a run: name, id, state, missing stages, progress, error."""
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
