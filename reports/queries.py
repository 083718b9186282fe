"""What the records of runs say: names, states, timings and scores, before anything is rounded for a table."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..harness.record import KINDS, RecordError, Run, identity, read_runs

Row = dict[str, Any]
LOWER = ("fd", "fid", "sfid", "kid", "kd", "mmd")  # the first letters of a metric's name say what is better
HIGHER = ("is", "isc", "precision", "recall", "density", "coverage", "f")
# What tells the measurements of a benchmark apart, beside the batch and an operator's backend.
MEASURED = ("mode", "operator", "shape", "pass", "input_size", "checkpointing", "compile", "precision")
SETTINGS = {  # what two throughputs must have in common to share a column
    "bench": ("batch_size", "precision", "compile", "checkpointing", "threads", "device"),
    "sample": ("method", "steps", "guidance", "guidance_channels", "compile", "device"),
}


def load(paths: Iterable[Path]) -> list[Run]:
    """Every run at or below `paths`, each once. RecordError: no folder, no run, a config.json without names."""
    runs = {run.path.resolve(): run for run in read_runs(paths)}
    for run in runs.values():
        missing = [key for key in ("id", "study", "name", "model", "family", "title") if not run.info.get(key)]
        if missing:
            raise RecordError(f"{run.path / 'config.json'} lacks {', '.join(missing)}")
    if not runs:
        raise RecordError("no run folder was given")
    return list(runs.values())


def group_of(run: Run) -> str:
    """What runs that differ in nothing but their seed have in common."""
    info = run.info
    axes = sorted((axis, str(value)) for axis, value in (info.get("variant") or {}).items() if axis != "seed")
    return f"{info['study']} {info['model']} {axes} {identity({**(info.get('config') or {}), 'seed': None})}"


def group_labels(runs: list[Run]) -> dict[str, str]:
    """Each group's name for people: the model, the variant where it says more, whatever else keeps names apart."""
    first = {group_of(run): run.info for run in reversed(runs)}
    labels = {}
    for group, info in first.items():
        axes = (info.get("variant") or {}).items()
        more = [f"{axis}={value}" for axis, value in axes if axis not in ("model", "seed") and value != info["model"]]
        labels[group] = info["title"] + (f" ({', '.join(more)})" if more else "")
    for key in ("study", "name", "id"):
        taken = {(label, first[group][key]) for group, label in labels.items()}
        apart = Counter(label for label, _ in taken)
        for group, label in labels.items():
            labels[group] = f"{label} [{first[group][key]}]" if apart[label] > 1 else label
    return labels


def state_of(run: Run) -> tuple[str, str]:
    """The run's state and, where a stage's newest attempt did not end well, that stage and its error in one line."""
    newest: dict[tuple[Any, ...], Row] = {}
    for line in run.records:
        # An attempt that names no mode or operator is made good by any later one.
        for key in [k for k in newest if k[0] == line["kind"] and k[1:3] == (None, None)]:
            del newest[key]
        newest[(line["kind"], *measurement_of(line))] = line
    fits = {key[:-1] for key, line in newest.items() if line["state"] == "done" and key[0] == "bench"}
    # A batch too large is no failure where another one was measured.
    bad = [
        line
        for key, line in newest.items()
        if line["state"] != "done" and not (line["state"] == "oom" and key[:-1] in fits)
    ]
    if bad:
        line = min(bad, key=lambda line: KINDS.index(line["kind"]))
        stage = " ".join(filter(None, (line["kind"], line.get("mode"), line.get("operator"))))
        return line["state"], f"{stage}: {' '.join(str(line.get('error') or 'no reason recorded').split())}"
    if run.metrics and not run.last("train"):
        return "unfinished", ""
    return ("done" if run.records else "not started"), ""


def measurement_of(line: Row) -> tuple[Any, ...]:
    """What a line of a benchmark measured: the fields of MEASURED, an operator's backend, and the batch at the end."""
    backend = backend_words(line) if "operator" in line else None
    return *(line.get(field) for field in MEASURED), backend, line.get("batch_size")


def setting_of(line: Row) -> tuple[Any, ...]:
    """The circumstances of a throughput, see SETTINGS; the host's threads do not count where a GPU did the work."""
    where = line.get("provenance") or {}
    values = {**line, "device": where.get("device"), "threads": None if where.get("driver") else line.get("threads")}
    values["checkpointing"] = "checkpointed" if line.get("checkpointing") else None
    return tuple(values.get(field) for field in SETTINGS[line["kind"]])


def setting_words(kind: str, setting: tuple[Any, ...], among: Iterable[tuple[Any, ...]] | None = None) -> str:
    """A setting in words; given those `among` which it stands, only what tells it from them."""
    rivals = None if among is None else list(among)
    units = {"batch_size": "batch {}", "threads": "{} threads", "steps": "{} steps", "guidance": "guidance {}"}
    units |= {"guidance_channels": "guided channels {}", "compile": "{} mode"}
    words = []
    for place, (field, value) in enumerate(zip(SETTINGS[kind], setting, strict=True)):
        told = value is not None if rivals is None else len({rival[place] for rival in rivals}) > 1
        if told:
            none = {"checkpointing": "not checkpointed"}.get(field, "all")
            words.append(units.get(field, "{}").format(none if value is None else value))
    return ", ".join(words)


def timings(runs: list[Run], kind: str, mode: str | None = None) -> dict[tuple[Any, ...], dict[Path, Row]]:
    """The newest finished measurement of each run under each setting: {setting: {run folder: line}}.

    A run that was timed in several ways, a sweep of batches or sizes, is left to the table `bench`.
    """
    found: dict[tuple[Any, ...], dict[Path, Row]] = {}
    for run in runs:
        lines = [line for line in run.records if line["kind"] == kind and line.get("mode") == mode]
        if kind == "bench" and len({measurement_of(line) for line in lines}) > 1:
            continue
        for line in lines:
            if line["state"] == "done":
                found.setdefault(setting_of(line), {})[run.path] = line
    return dict(sorted(found.items(), key=lambda item: str(item[0])))


def scores(runs: list[Run]) -> dict[str, dict[Path, Row]]:
    """Evaluated metrics: {column: {run folder: row}}. One column holds one protocol (DESIGN.md, rule 8): a metric under
    several protocols has a column for each, named `METRIC@PROTOCOL`."""
    found: dict[tuple[str, str], dict[Path, Row]] = {}
    for run in runs:
        for line in run.records:
            if line["kind"] == "evaluate" and line["state"] == "done":
                for row in line["rows"]:
                    found.setdefault((row["metric"], str(row["protocol"])), {})[run.path] = row
    protocols = Counter(metric for metric, _ in found)
    return {
        metric if protocols[metric] == 1 else f"{metric}@{protocol}": rows for (metric, protocol), rows in found.items()
    }


def score_words(row: Row) -> str:
    """What a score compared: "512 samples against 1797 digits", or "512 samples" where the metric has no reference."""
    against = " ".join(str(row[key]) for key in ("reference_count", "reference") if row.get(key))
    return f"{row['count']} samples" + (f" against {against}" if against else "")


def backend_words(line: Row) -> str:
    """The implementations that a record names: "selective_scan=torch, attention=sdpa"."""
    return ", ".join(f"{operator}={name}" for operator, name in (line.get("backend") or {}).items())


def better(metric: str) -> str:
    """Which end of a metric is the good one: "min", "max" or, for a metric that we do not know, ""."""
    word = re.split(r"[^A-Za-z]", metric.lower(), maxsplit=1)[0]
    return "min" if word in LOWER else "max" if word in HIGHER else ""
