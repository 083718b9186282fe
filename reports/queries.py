"""What the records of runs say: states, timings and scores, not yet rounded for a table."""

import re
from collections.abc import Iterable
from typing import Any

from ..harness.record import STAGE_OF
from .names import value_word
from .runs import Line, Run

# The first word of a metric's name says whether lower or higher is better.
LOWER = ("fd", "fid", "sfid", "sfd", "kid", "kd", "mmd", "held", "loss")  # held-out loss
HIGHER = ("is", "isc", "precision", "recall", "density", "coverage", "f")
# The fields that distinguish the measurements of a benchmark, besides the batch and an operator's backend.
MEASURED = ("mode", "operator", "shape", "pass", "input_size", "checkpointing", "compile", "precision", "processes")
SETTINGS = {  # two throughputs share a column where these fields are equal
    "speed": ("batch_size", "precision", "compile", "checkpointing", "threads", "processes", "device"),
    "sample": ("method", "steps", "guidance", "guidance_channels", "guidance_interval", "guide", "compile", "device"),
}
Column = tuple[str, str, str, str]  # see `column_of`

SAMPLING = (
    "Sampling s.e.: the standard error of a score from the choice of its images alone. It has no bias in it and says "
    "nothing about other trainings."
)


def current(rows: Iterable[Line]) -> list[Line]:
    """The newest record of everything that was done or tried, oldest first.

    A failed score counts until there is a later score of its key. A benchmark that failed before it measured anything
    counts until there is a later record of a benchmark.
    """
    newest: dict[tuple[Any, ...], Line] = {}
    failures: dict[tuple[Any, ...], Line] = {}  # those of the newest that a later record may make obsolete
    for row in rows:
        name = row["kind"], row["key"], row.get("metric")
        for other in [name, *(other for other, failure in failures.items() if _is_obsolete(failure, row))]:
            newest.pop(other, None)
            failures.pop(other, None)
        newest[name] = row
        if row["state"] != "done":
            failures[name] = row
    return list(newest.values())


def _is_obsolete(row: Line, later: Line) -> bool:
    """Whether a failure no longer counts because of a later record."""
    if row["state"] == "done" or row["kind"] != later["kind"]:
        return False
    if row["kind"] == "score":
        return row["key"] == later["key"]
    return row["kind"] in ("speed", "operator_speed") and not (row.get("mode") or row.get("operator"))


def state_of(run: Run) -> tuple[str, str]:
    """The run's state and, where the newest attempt of a stage failed, that stage and its error in one line. A run with
    a damaged file is `unreadable`."""
    if run.damage:
        return "unreadable", run.damage
    rows = current(run.rows)
    bad = [row for row in rows if row["state"] != "done"]
    if any(row["state"] == "oom" for row in bad):  # a batch that is too large is no failure if another one was measured
        fits = {measurement_of(row)[:-1] for row in rows if row["kind"] == "speed" and row["state"] == "done"}
        bad = [row for row in bad if row["state"] != "oom" or measurement_of(row)[:-1] not in fits]
    if bad:
        row = min(bad, key=lambda row: list(STAGE_OF).index(row["kind"]))
        what = row.get("metric") or row.get("mode") or row.get("operator")
        stage = " ".join(filter(None, (STAGE_OF[row["kind"]], what)))
        return row["state"], f"{stage}: {' '.join(str(row['error'] or 'no reason recorded').split())}"
    if run.metrics and not run.last("train"):
        return "unfinished", ""
    # The cost and speed of its model may come from another study.
    own = [row for row in run.rows if row["kind"] in ("convert", "train", "sample", "score")]
    begun = own if run.info.get("trains") and not run.metrics else run.rows
    return ("done" if begun else "not started"), ""


def measurement_of(row: Line) -> tuple[Any, ...]:
    """What a record of speed measured: the fields of MEASURED, the implementations and, last, the batch. The
    implementations are those that ran for a single operator, and those that were asked for otherwise."""
    backend = words_of(row["backend"] if row.get("operator") else row.get("asked"))
    return *(row.get(field) for field in MEASURED), backend, row.get("batch_size")


def setting_of(line: Line) -> tuple[Any, ...]:
    """The values of SETTINGS for a throughput. The host's threads do not count where a GPU did the work."""
    where = line.get("provenance") or {}
    values = {**line, "device": where.get("device"), "threads": None if where.get("driver") else line.get("threads")}
    if values.get("guidance") == 1:  # no channel is guided
        values |= {"guidance_channels": None, "guidance_interval": None, "guide": None}
    values["checkpointing"] = "checkpointed" if line.get("checkpointing") else None
    return tuple(values.get(field) for field in SETTINGS[line["kind"]])


def setting_words(kind: str, setting: tuple[Any, ...], among: Iterable[tuple[Any, ...]] | None = None) -> str:
    """A setting in words. With `among`, a list of settings, only the values in which those differ."""
    rivals = None if among is None else list(among)
    units = {"batch_size": "batch {}", "threads": "{} threads", "steps": "{} steps", "guidance": "guidance {}"}
    units |= {"guidance_channels": "guided channels {}", "compile": "{} mode"}
    units |= {"guidance_interval": "guided at sigma {}", "guide": "guide {}"}
    words = []
    for place, (field, value) in enumerate(zip(SETTINGS[kind], setting, strict=True)):
        differs = value is not None if rivals is None else len({rival[place] for rival in rivals}) > 1
        if differs:
            none = {"checkpointing": "not checkpointed", "guide": "none"}.get(field, "all")
            words.append(units.get(field, "{}").format(none if value is None else value))
    return ", ".join(words)


def timings(runs: list[Run], kind: str, mode: str | None = None) -> dict[tuple[Any, ...], dict[Run, Line]]:
    """The newest finished measurement of each run under each setting: {setting: {run: row}}.

    A run that was timed in several ways (a sweep of batches or sizes) is left to the table `bench`.
    """
    columns: dict[tuple[Any, ...], dict[Run, Line]] = {}
    for run in runs:
        rows = [row for row in run.rows if row["kind"] == kind and row.get("mode") == mode]
        if kind == "speed" and len({measurement_of(row) for row in rows}) > 1:
            continue
        for row in rows:
            if row["state"] == "done":
                column = columns.setdefault(setting_of(row), {})
                if (row.get("count") or 0) >= (column.get(run, {}).get("count") or 0):  # the largest set of samples
                    column[run] = row
    return dict(sorted(columns.items(), key=lambda item: str(item[0])))


def scores(runs: list[Run]) -> dict[str, dict[Run, Line]]:
    """The scores of each run at its furthest step: {column: {run: row}}.

    A column has one protocol of evaluation (DESIGN.md, rule 8). A metric with several protocols has a column for each,
    named as `suffixes` says.
    """
    columns: dict[Column, dict[Run, Line]] = {}
    for run in runs:
        for row in run.rows:
            if row["kind"] == "score" and row["state"] == "done":
                rows = columns.setdefault(column_of(row), {})
                if run not in rows or (row["checkpoint_step"] or 0) >= (rows[run]["checkpoint_step"] or 0):
                    rows[run] = row
    return {column[0] + suffix: columns[column] for column, suffix in suffixes(columns).items()}


def column_of(row: Line) -> Column:
    """What a score has in common with the others of its column: its metric, its protocol of evaluation, the name of its
    reference and, of a loss, its objective."""
    objective = ((row.get("evaluation") or {}).get("objective") or {}).get("kind") or ""
    return row["metric"], str(row["protocol"]), str(row["reference"]), objective


def suffixes(columns: Iterable[Column]) -> dict[Column, str]:
    """What distinguishes columns in their names: nothing if a metric has one, `@` and reference, objective or both if
    each of its columns has its own, and else `@PROTOCOL`."""
    columns, result = list(columns), {}
    for column in columns:
        rivals = [one for one in columns if one[0] == column[0]]
        places = [place for place in (2, 3) if len({one[place] for one in rivals}) > 1]
        words = ["-".join(one[place].replace(" ", "-") for place in places if one[place]) for one in rivals]
        apart = len(set(words)) == len(rivals) and all(words)
        result[column] = f"@{words[rivals.index(column)] if apart else column[1]}" if len(rivals) > 1 else ""
    return result


def score_words(row: Line) -> str:
    """What a score compared: "512 samples against 1797 digits", or "512 samples" if the metric has no reference."""
    against = " ".join(value_word(row[key]) for key in ("reference_count", "reference") if row.get(key))
    what = "samples" if row.get("samples") else "images"
    return f"{value_word(row['count'])} {what}" + (f" against {against}" if against else "")


def words_of(backends: Line | None) -> str:
    """Implementations by operator in words: "selective_scan=torch, attention=sdpa"."""
    return ", ".join(f"{operator}={name}" for operator, name in (backends or {}).items())


def better(metric: str) -> str:
    """Which value of a metric is the best: "min", "max" or, for an unknown metric, ""."""
    word = re.split(r"[^A-Za-z]", metric.lower(), maxsplit=1)[0]
    return "min" if word in LOWER else "max" if word in HIGHER else ""
