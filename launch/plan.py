"""Sweeps: what a study's runs are, and what is missing of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..ablations.study import Study, StudyError
from ..harness.progress import describe as describe_progress
from ..harness.record import Run, identity, read_lines
from ..harness.run import check_fit, describe, folder_of, is_locked, is_ready, missing_stages
from ..kernels.errors import unknown
from .compose import compose
from .slurm import manifest
from .slurm.cluster import load as load_cluster
from .slurm.cluster import of_cluster

TRAINED = ("model", "data", "train", "backend", "seed")  # all that a checkpoint depends on


@dataclass(frozen=True)
class Planned:
    """One run of a study before it runs: what config.json will say, and where."""

    info: dict[str, Any]
    folder: Path
    stages: tuple[str, ...]
    cluster: tuple[str, ...] = ()  # settings `cluster.KEY=…` of the study or the command; no part of the run

    @property
    def name(self) -> str:
        return self.info["name"]

    def ready(self) -> bool:
        """Whether the checkpoint that the run takes from another one is there, if its stages take one."""
        return is_ready(self.info, self.stages)

    def missing(self) -> list[str]:
        """The stages that are not done."""
        return missing_stages(Run(self.folder, self.info, self.records()), self.stages)

    def records(self) -> list[dict[str, Any]]:
        """What record.jsonl says; nothing for a run that is not there."""
        return read_lines(self.folder / "record.jsonl")

    def exists(self) -> bool:
        return (self.folder / "config.json").is_file()

    def error(self) -> str | None:
        """The error of the newest record, where the run stopped on one."""
        records = self.records()
        return records[-1].get("error") if records and records[-1]["state"] != "done" else None

    def state(self) -> str:
        """planned, running, done, or what the newest record says: failed, oom, diverged; stopped if its training was
        begun and more is to do."""
        if not self.exists():
            return "planned"
        if is_locked(self.folder):
            return "running"
        if not self.missing():
            return "done"
        records = self.records()
        if records and records[-1]["state"] != "done":
            return records[-1]["state"]
        return "stopped" if (self.folder / "metrics.jsonl").exists() else "planned"

    def progress(self) -> dict[str, Any]:
        """What the job last said of its work; empty before it said anything."""
        try:
            return json.loads((self.folder / "progress.json").read_text())
        except (OSError, ValueError):
            return {}


def plan(study: Study, overrides: Sequence[str] = ()) -> list[Planned]:
    """Every run of a study, each a checked configuration; nothing is written.

    Runs that differ in nothing that training sees (`TRAINED`) are trained once: one of them trains, the others have it
    as their `source`, sample its checkpoint, and wait for it.

    Raises InputError for an override that does not fit, StudyError where two variants are the same run.
    """
    runs: dict[str, Planned] = {}
    for variant in study.expand():
        words = [*variant.overrides, *overrides]
        settings = tuple(text for text in words if of_cluster(text))
        load_cluster("local", settings)
        words = [text for text in words if not of_cluster(text)]
        config, chosen = compose(words)
        check_fit(config)
        info = describe(
            config,
            study=study.name,
            name=variant.name,
            model=chosen["model"],
            variant=variant.values,
            overrides=words,
        )
        if info["id"] in runs:
            raise StudyError(f"study {study.name}: {variant.name} and {runs[info['id']].name} are the same run")
        runs[info["id"]] = Planned(info, folder_of(info), tuple(study.stages), settings)
    return _train_once(list(runs.values())) if "train" in study.stages else list(runs.values())


def _train_once(runs: Sequence[Planned]) -> list[Planned]:
    groups: dict[str, list[Planned]] = {}
    for run in runs:
        groups.setdefault(identity({name: run.info["config"][name] for name in TRAINED}), []).append(run)
    if len(groups) == len(runs):
        return list(runs)
    tasks = [task for array in manifest.arrays(manifest.home_of(runs[0].folder)) for task in array.tasks]
    submitted = {task["info"]["id"]: place for place, task in enumerate(tasks) if "train" in task["stages"]}
    source: dict[str, Planned] = {}
    for group in groups.values():
        # A study that was given another first variant since does not train again, nor while the first training waits.
        trainer = next(
            (run for run in group if (run.folder / "checkpoints").is_dir()),
            max(group, key=lambda run: submitted.get(run.info["id"], -1)),  # the first, where none was submitted
        )
        source |= {run.info["id"]: trainer for run in group if run is not trainer}
    return [
        replace(
            run,
            info=run.info | {"source": str(source[run.info["id"]].folder.resolve())},
            stages=tuple(stage for stage in run.stages if stage != "train"),
        )
        if run.info["id"] in source
        else run
        for run in runs
    ]


def only(runs: Sequence[Planned], stages: Sequence[str], study: Study) -> list[Planned]:
    """The runs with some of the study's stages, without those that have none of them.

    Raises InputError for a stage that the study does not have.
    """
    for stage in stages:
        if stage not in study.stages:
            raise unknown(f"stage of {study.name}", stage, study.stages)
    kept = [replace(run, stages=tuple(stage for stage in run.stages if stage in stages)) for run in runs]
    return [run for run in kept if run.stages]


def rows(runs: Sequence[Planned]) -> list[dict[str, Any]]:
    """A row a run: name, id, state, missing stages, progress, error."""
    made = []
    for run in runs:
        state, progress = run.state(), run.progress()
        made.append(
            {
                "run": run.name,
                "id": run.info["id"],
                "state": state,
                "to do": " ".join(run.missing()),
                "progress": describe_progress(progress) if state == "running" and progress else "",
                "error": (run.error() or "") if state not in ("running", "done") else "",
                "folder": str(run.folder),
            }
        )
    return made
