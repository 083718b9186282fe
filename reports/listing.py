"""Lists of runs and of studies: `lamabench runs` and `lamabench studies`."""

import operator
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from math import isnan
from pathlib import Path
from typing import Any

from ..harness.run import STUDY, is_locked
from ..kernels.errors import InputError, unknown
from .queries import scores, state_of
from .runs import UNREADABLE, Line, Run
from .summary import summary
from .table import Column, Table

QUERY = re.compile(r"(?P<field>[^<>=!]+)(?P<sign>!=|<=|>=|=|<|>)(?P<value>.*)", re.DOTALL)
COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge
}  # fmt: skip
NOT_FAILED = ("done", "running", "unfinished", "planned", "unreadable")
FIRST = ("study", "run", "model", "family", "title", "variant", "seed", "state", "error")
NUMBERS = ("params", "macs", "flops", "steps", "images", "final_loss")
LAST = ("changed", "id", "folder")
BESIDE = ("_std", "_sampling_error")  # ends of the names of what stands beside a score


@dataclass(frozen=True)
class Query:
    """A condition `field=value` (a text, a number or a pattern such as `dit*`), `field!=value`, or `field<value` and so
    on (a number, or a date of the field changed)."""

    field: str
    sign: str
    value: str

    def __str__(self) -> str:
        return f"{self.field}{self.sign}{self.value}"


def is_query(word: str) -> bool:
    """Whether a word is a condition, not a path: no `/` stands before its sign."""
    match = QUERY.fullmatch(word)
    return match is not None and "/" not in match["field"]


def parsed(word: str) -> Query:
    """The condition that a word is. Raises InputError for another word."""
    match = QUERY.fullmatch(word)
    if match is None or match["value"].startswith(("=", "<", ">")):  # such as == and =>
        raise InputError(f"{word!r} is no condition: write field=value, field<value, field>value or sort=field")
    return Query(*(match[part].strip() for part in ("field", "sign", "value")))


def state_now(run: Run) -> tuple[str, str]:
    """The run's state, and its error: that of the summary, except that a run without records is planned, one that a
    process works on is running, and one that lacks samples which its study asks for is unfinished."""
    state, error = state_of(run)
    if state not in ("done", "unfinished", "not started"):
        return state, error
    complete = state == "done" and not run.info.get("to_do")
    with suppress(*UNREADABLE):
        if not complete and is_locked(Path(run.info["folder"])):
            return "running", ""
    return ("done" if complete else "planned" if state == "not started" else "unfinished"), ""


def changed(run: Run) -> str:
    """When the run changed last, in UTC: the time of its newest record, or of its log if it has no record yet. Empty if
    nothing was written."""
    times = [str(row["time"])[:16].replace("T", " ") for row in (*run.rows, *run.earlier) if row["time"]]
    log = Path(run.info["folder"]) / "metrics.jsonl"
    return max(times) if times else _written(log) if run.metrics else ""


def _written(path: Path) -> str:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).strftime("%Y-%m-%d %H:%M")
    except OSError:
        return ""


def rows_of(runs: list[Run]) -> list[Line]:
    """A row for each run, in the order of the studies, with full precision.

    Fields: `study`, `run` (its name), `model`, `family`, `title`, `variant`, `seed`, `state` (planned, running,
    unfinished, done, unreadable, or that of a failure), `error`; each axis of the studies; `params`, `macs`, `flops`
    (of one image), `paper_gflops`, `final_loss`, `steps` and `images` of the training; scores and speeds (images/s,
    ms, GiB) by their names in the csv of the summary; `changed` (UTC), `id` and `folder`.
    """
    overview = summary(runs)
    by_run = {row["run"]: plain for row, plain in zip(overview.rows, overview.records(), strict=True)}
    rows = []
    for run in sorted(runs, key=lambda run: (run.info["study"], run.info.get("place", 0))):
        train, (state, error) = run.last("train", state="done") or {}, state_now(run)
        row: Line = {name: run.info.get(name) for name in FIRST} | {"run": run.info["name"]}
        row |= {"variant": by_run[run].get("variant", ""), "state": state, "error": error}
        row |= {axis: value for axis, value in (run.info.get("variant") or {}).items() if axis not in row}
        row |= dict.fromkeys(NUMBERS) | {"steps": train.get("steps"), "images": train.get("images")}
        row |= {
            name: value
            for name, value in by_run[run].items()
            if row.get(name) is None and name not in ("name", "label")
        }
        rows.append(row | {"changed": changed(run), "id": run.info["id"], "folder": run.info["folder"]})
    names = list(dict.fromkeys(name for row in rows for name in row))
    ordered = [*FIRST, *(name for name in names if name not in (*FIRST, *LAST)), *LAST]
    kept = [
        name for name in ordered if name in (*FIRST, *NUMBERS) or any(row.get(name) not in (None, "") for row in rows)
    ]
    return [{name: row.get(name) for name in kept} for row in rows]


def field_of(name: str, rows: Sequence[Line]) -> str:
    """The field of rows that a name means: the field itself, in upper or lower case, or the only one whose first word
    (`fd` of FD-EffNetLite0-512) or last word (`window_size` of model.window_size) it is. Raises InputError, with the
    choices, for a name that means none or several."""
    fields = list(rows[0])
    if name in fields:
        return name
    low = name.lower()
    alike = [field for field in fields if field.lower() == low]
    alike = alike or [field for field in fields if low in _ends(field.lower()) and not field.endswith(BESIDE)]
    if len(alike) == 1:
        return alike[0]
    if alike:
        raise InputError(f"{name!r} could mean several fields: {', '.join(alike)}")
    raise unknown("field of runs", name, fields)


def _ends(field: str) -> tuple[str, str]:
    return re.split(r"[^a-z0-9]", field)[0], field.rpartition(".")[2]


def selected(rows: list[Line], queries: Sequence[Query]) -> list[Line]:
    """The rows that satisfy all conditions, sorted as `sort=field` or `sort=-field` says (downwards), rows without a
    value last. Raises InputError for an unknown field, and for `<` or `>` with a value that is no number."""
    result = rows
    for query in queries:
        if query.field != "sort":
            name = field_of(query.field, rows)
            result = [row for row in result if _satisfies(row.get(name), name, query)]
    for query in reversed([query for query in queries if query.field == "sort"]):
        down = query.value.startswith("-")
        name = field_of(query.value.removeprefix("-"), rows)
        there = [row for row in result if row.get(name) not in (None, "")]
        absent = [row for row in result if row.get(name) in (None, "")]
        result = [*sorted(there, key=lambda row: _order(row[name]), reverse=down), *absent]
    return result


def _order(value: Any) -> tuple[bool, Any]:
    """Numbers by their size, then texts by their letters."""
    number = isinstance(value, int | float)
    return not number, value if number else str(value)


def _satisfies(value: Any, name: str, query: Query) -> bool:
    wanted = _number(query.value)
    if query.sign in COMPARE:
        if wanted is None and name != "changed":
            raise InputError(f"{query}: {query.value!r} is no number; {name}=PATTERN compares texts")
        if name == "changed":
            return bool(value) and COMPARE[query.sign](value[: len(query.value)], query.value)
        return isinstance(value, int | float) and COMPARE[query.sign](value, wanted)
    equal = fnmatchcase("" if value is None else str(value), query.value)
    if isinstance(value, int | float) and wanted is not None:
        equal = value == wanted
    return equal == (query.sign == "=")


def _number(text: str) -> float | None:
    try:
        return None if isnan(value := float(text)) else value
    except ValueError:
        return None


def values_of(rows: Sequence[Line], query: Query, most: int = 12) -> str:
    """The values that there are of a condition's field, in words."""
    name = field_of(query.field, rows)
    values = list(dict.fromkeys(str(row[name]) for row in rows if row[name] not in (None, "")))
    more = f", … ({len(values)})" if len(values) > most else ""
    return f"{name} has {', '.join(values[:most])}{more}" if values else f"no run has a value of {name}"


def runs_table(rows: list[Line], runs: list[Run], queries: Sequence[Query] = ()) -> Table:
    """The rows for a terminal; the fields of conditions are always shown, and errors stand below."""
    listed = [Column("study", "Study"), Column("run", "Run"), Column("model", "Model", rank=8)]
    listed += [Column("params", "Params (M)", 1e6, 4, rank=6), Column("macs", "MACs (G)", 1e9, 4, rank=5)]
    listed += [Column("steps", "Steps", 1.0, 0, rank=4), Column("final_loss", "Final loss", 1.0, 4, rank=3)]
    listed += [Column(name, name, 1.0, 4, rank=7 if place else 1) for place, name in enumerate(scores(runs))]
    listed += [Column("changed", "Changed (UTC)", rank=2), Column("state")]
    columns = {column.name: column for column in listed}
    for query in queries:
        name = field_of(query.value.removeprefix("-") if query.field == "sort" else query.field, rows)
        if name not in ("state", "error"):
            values = [row[name] for row in rows if row[name] is not None]
            number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
            digits = (0 if all(isinstance(value, int) for value in values) else 4) if number else None
            columns[name] = replace(columns.get(name) or Column(name, name, 1.0, digits), rank=0)
    notes = [f"{row['study']}/{row['run']}: {row['error']}" for row in rows if row["error"]]
    return Table("runs", "", list(columns.values()), rows, notes)


def studies_of(runs: list[Run], root: Path) -> list[Line]:
    """A row for each study of some runs: `study`, `question` and `claim` as its listing has them, `runs`, how many of
    them are `done`, `running`, `unfinished`, `planned`, `failed` and `unreadable`, `state` in words, `changed` (UTC),
    `error` (the first one), and `folder` below the root."""
    by_study: dict[str, list[Run]] = {}
    for run in runs:
        by_study.setdefault(run.info["study"], []).append(run)
    rows = []
    for study, members in by_study.items():
        states = [state_now(run) for run in members]
        words = [state if state in NOT_FAILED else "failed" for state, _ in states]
        counts = {name: words.count(name) for name in (*NOT_FAILED, "failed")}
        listing = root / study / STUDY
        about = next((run.info["about"] for run in members if run.info["about"]), {})
        row: Line = {"study": study, "runs": len(members), **counts, "state": _in_words(counts)}
        row["changed"] = max(*map(changed, members), "") or _written(listing)
        row |= {"question": about.get("question", ""), "claim": about.get("claim", "")}
        errors = [f"{run.info['name']}: {error}" for run, (_, error) in zip(members, states, strict=True) if error]
        row["error"] = errors[0] if errors else ""
        rows.append(row | {"folder": str(root / study) if listing.exists() else None})
    return rows


def _in_words(counts: dict[str, int]) -> str:
    """`done`, or `3 done, 1 failed`."""
    present = {name: count for name, count in counts.items() if count}
    return next(iter(present)) if len(present) == 1 else ", ".join(f"{n} {name}" for name, n in present.items())
