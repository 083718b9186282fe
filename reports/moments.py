"""Scores at every moment of a training, what they had cost by then, and which of them compare models.

This is the one home of images, FLOPs and hours of training, and of the number of images at which models are compared:
tables and figures ask here, so that they agree about the same runs.
"""

import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import inf
from statistics import median_low
from typing import Any, NamedTuple, TypeVar

from .names import axis_values, kind_of, line_of, words
from .queries import Column, column_of, state_of, suffixes
from .runs import Line, Run

Moments = dict[str, dict[Run, list[Line]]]
Key = tuple[Column, bool]  # of a column: what its scores have in common, and whether models have no classes
Value = TypeVar("Value")
LONG = 2.0  # see `pauses`


def moments(runs: Iterable[Run]) -> Moments:
    """The finished scores of each run in the order of images seen: {column: {run: rows}}.

    A column has one protocol of evaluation, and either models that know classes or models that do not. The scores of a
    run are of samples that were drawn as those of its furthest step.
    """
    return named(columns_of(runs))


def curves(runs: Iterable[Run]) -> Moments:
    """The same less what has no curve: runs with a score at a single moment, and columns without another run."""
    several = {
        name: {run: rows for run, rows in scored.items() if len(rows) > 1} for name, scored in moments(runs).items()
    }
    return {name: scored for name, scored in several.items() if scored}


def columns_of(runs: Iterable[Run]) -> dict[Key, dict[Run, list[Line]]]:
    """The same by what the scores of a column have in common."""
    columns: dict[Key, dict[Run, list[Line]]] = {}
    for run in runs:
        for row in [*run.earlier, *run.rows]:
            if row["kind"] == "score" and row["state"] == "done":
                columns.setdefault((column_of(row), is_unconditional(run, row)), {}).setdefault(run, []).append(row)
    return {key: {run: _in_order(run, each) for run, each in rows.items()} for key, rows in columns.items()}


def named(columns: Mapping[Key, Value]) -> dict[str, Value]:
    """Columns by the names of their metrics, with the suffixes of `queries.suffixes` and "(unconditional)" if one
    metric has several."""
    ends = {kind: suffixes(column for column, one in columns if one is kind) for kind in (False, True)}
    kinds = Counter(metric for metric, kind in {(column[0], kind) for column, kind in columns})
    result: dict[str, Value] = {}
    for (column, kind), value in columns.items():
        name = column[0] + ends[kind][column]
        result[name + (" (unconditional)" if kind and kinds[column[0]] > 1 else "")] = value
    return result


def _in_order(run: Run, rows: list[Line]) -> list[Line]:
    """The newest score of each moment, of samples drawn as the last ones were."""
    ordered = sorted(rows, key=lambda row: (images_of(run, row) or 0, row["time"]))
    way = ordered[-1].get("generation_protocol")
    same = {images_of(run, row): row for row in ordered if row.get("generation_protocol") == way}
    return list(same.values())


def is_unconditional(run: Run, row: Line) -> bool:
    """Whether a score is of a model without classes, as its samples or its configuration say."""
    if labels := (row.get("generation") or {}).get("labels"):
        return labels == "none"
    classes = (run.info["config"].get("model") or {}).get("num_classes")
    return classes is not None and classes < 2


def images_of(run: Run, row: Line) -> int | None:
    """Images that the weights of a score had seen; of an earlier version, steps times batch size; None if unknown."""
    if row.get("images_seen") is not None:
        return row["images_seen"]
    batch = (run.info["config"].get("train") or {}).get("batch_size")
    return row["checkpoint_step"] * batch if batch and row.get("checkpoint_step") else None


def flops_of(run: Run, row: Line) -> float | None:
    """FLOPs of training up to a score; of an earlier version, three forward passes for each image; None if unknown."""
    cost, images = run.last("cost", "done"), images_of(run, row)
    return row.get("training_flops") or (3 * cost["flops"] * images if cost and cost.get("flops") and images else None)


def hours_of(run: Run, row: Line) -> tuple[float, str] | None:
    """Hours of training up to a score without its `pauses`, each counted once for each process (with GPUs, GPU-hours),
    and `machine_of` the run; None if unknown."""
    train, machine, seconds = run.last("train", "done") or {}, machine_of(run), row.get("training_seconds")
    if not machine or seconds is None:
        return None
    stretches = train.get("stretches") or [{"processes": train.get("processes")}]
    counts = [one.get("processes") or 1 for one in stretches]
    starts = [0.0, *(one.get("from_seconds") for one in stretches[1:])]
    if len(set(counts)) == 1:
        counts, starts = counts[:1], starts[:1]
    if None in starts:
        return None
    gone = pauses(run)

    def at_work(until: float) -> float:
        until = min(until, seconds)
        return until - sum(min(length, max(0.0, until - start)) for start, length in gone)

    spans = zip(counts, starts, [*starts[1:], inf], strict=True)
    return sum(count * max(0.0, at_work(end) - at_work(start)) for count, start, end in spans) / 3600, machine


@lru_cache(maxsize=1000)
def pauses(run: Run) -> list[tuple[float, float]]:
    """When a training made no steps, as its log shows: seconds of training before a pause, and those of the pause.

    A line of the log that took more than LONG times the median time of as many images in its stretch holds a pause,
    and that time is what it took beside. It is compilation at the start of a process, and lies at the line's start.
    Waiting for data is none, where the log has it. A stretch of one line shows none.
    """
    train, batch = run.last("train", "done") or {}, (run.info.get("config") or {}).get("train", {}).get("batch_size")
    points = {0: (0.0, 0.0)}
    for line in run.metrics:
        if line.get("images") and line.get("seconds") is not None:
            points[line["images"]] = line["seconds"], line.get("waited") or 0.0
    later = [one for one in (train.get("stretches") or [])[1:] if batch and one.get("from_step")]
    for one in later:
        if one.get("from_seconds") is not None:
            waited = max((value for images, (_, value) in points.items() if images <= one["from_step"] * batch))
            points.setdefault(one["from_step"] * batch, (one["from_seconds"], waited))
    lines: dict[int, list[tuple[float, float, int]]] = {}
    for (before, (start, waited)), (images, (end, more)) in itertools.pairwise(sorted(points.items())):
        stretch = sum(one["from_step"] * batch <= before for one in later)
        lines.setdefault(stretch, []).append((start, end - start - max(0.0, more - waited), images - before))
    return [
        (start, seconds - pace * images)
        for each in lines.values()
        for pace in [median_low(seconds / images for _, seconds, images in each)]
        for start, seconds, images in each
        if seconds > LONG * pace * images
    ]


def hours_notes(runs: Iterable[Run]) -> list[str]:
    """What is said of the hours of some runs."""
    words = "Hours are without compilation and other pauses, as far as the logs of the trainings show them."
    return [words] if any(map(pauses, runs)) else []


def machine_of(run: Run) -> str:
    """The device and precision of a finished training, such as "NVIDIA H100, bfloat16"; "" if the device changed on the
    way, or if one of them is unknown. Hours compare on one machine only."""
    train = run.last("train", "done") or {}
    devices = {one.get("device") for one in train.get("stretches") or ()} - {None}
    devices = devices or {(train.get("provenance") or {}).get("device")} - {None}
    precision = train.get("precision")
    return f"{devices.pop()}, {precision}" if len(devices) == 1 and precision else ""


def main_device(rows: Mapping[Run, Iterable[Line]]) -> str | None:
    """The device and precision of most scores; hours of others do not compare with theirs."""
    machines = Counter(hours[1] for run, each in rows.items() for row in each if (hours := hours_of(run, row)))
    return min(machines, key=lambda machine: (-machines[machine], machine)) if machines else None


def first_column(names: Mapping[str, Mapping[Run, Any]]) -> str:
    """The column that a report is about: the Frechet distance of most runs, or else the metric of most runs."""
    return min(names, key=lambda name: (not re.match("FI?D", name), -len(names[name])))


@dataclass(frozen=True)
class AtEqualImages:
    """The score of each run at one number of images.

    images    that number; None if no two models share one: then scores are those of the furthest steps
    left_out  runs without a score at that number
    """

    rows: dict[Run, Line]
    images: int | None
    left_out: list[Run] = field(default_factory=list)


def at_equal_images(scored: Mapping[Run, list[Line]]) -> AtEqualImages:
    """Scores of one column at equal images, as `equal_images` chooses them."""
    seen = {run: {images: row for row in rows if (images := images_of(run, row))} for run, rows in scored.items()}
    images = equal_images(seen)
    if images is None:
        return AtEqualImages({run: rows[-1] for run, rows in scored.items()}, None)
    rows = {run: by_images[images] for run, by_images in seen.items() if images in by_images}
    return AtEqualImages(rows, images, [run for run in scored if run not in rows])


def equal_images(amounts: Mapping[Run, Collection[int]]) -> int | None:
    """The number of images at which all tables and figures compare models, from the numbers at which runs have a score:
    that of the most runs, and of several such numbers the largest.

    Two models or more must have it (one, if there is only one). Trainings that failed or are unfinished do not count,
    so that they hold nobody back, unless the others have nothing in common. None if there is no such number.
    """
    models = {run.group for run, each in amounts.items() if each}
    for runs in ([run for run in amounts if not is_unfinished(run)], list(amounts)):
        having: dict[int, list[Run]] = {}
        for run in runs:
            for images in set(amounts[run]):
                having.setdefault(images, []).append(run)
        shared = [one for one, those in having.items() if len({run.group for run in those}) >= min(2, len(models))]
        if shared:
            return max(shared, key=lambda images: (len(having[images]), images))
    return None


def images_words(equal: AtEqualImages) -> str:
    """At how many images the scores are, in a sentence."""
    if equal.images is None:
        return "Scores are those of the furthest steps, because no two models were scored at the same number of images."
    which = "most" if equal.left_out else "all"
    return f"Scores are at {equal.images:,} images seen, the largest number at which {which} runs have one."


def is_unfinished(run: Run) -> bool:
    """Whether a training has no record that it reached its end, though it has a log or failed."""
    return not run.last("train", "done") and (bool(run.metrics) or run.last("train") is not None)


def is_marked(run: Run) -> bool:
    """Whether a number of a run must be marked, because the run failed or is unfinished."""
    return state_of(run)[0] not in ("done", "not started")


class Series(NamedTuple):
    """The sizes of one architecture that differ in the preset alone, by FLOPs: what a line joins. `family` is that of
    `kind_of`, which has a colour."""

    label: str
    family: str
    groups: list[str]


def series_of(overview: Iterable[Line]) -> list[Series]:
    """The series of the rows of a summary, by family. Models without a cost have no place in them.

    Two models of one preset that differ in something else than an axis of their study are not joined.
    """
    lines: dict[tuple[Any, ...], dict[str, Line]] = {}
    for row in overview:
        if row["flops"]:
            axes = tuple(sorted((axis, str(value)) for axis, value in axis_values(row["run"]).items()))
            line = line_of(row["title"], row["family"])
            lines.setdefault((row["study"], kind_of(row["title"], row["family"]), line, axes), {}).setdefault(
                row["group"], row
            )
    parts: list[tuple[str, str, list[Line]]] = []
    for (study, family, *_), by_group in lines.items():
        rows = sorted(by_group.values(), key=lambda row: (row["flops"], row["params"] or 0, row["group"]))
        presets = Counter(row["model"] for row in rows)
        joined = [rows] if max(presets.values()) == 1 else [[row] for row in rows]
        parts += [(study, family, each) for each in joined]
    shown = [_values(rows) for _, _, rows in parts]
    differ = {axis for one in shown for axis in one if len({str(other.get(axis)) for other in shown}) > 1}
    several = len({study for study, *_ in parts}) > 1
    result = []
    for study, family, rows in parts:
        title = family_title([row["title"] for row in rows], family)
        label = ", ".join(filter(None, (title, words(_values(rows), differ)))) + (f" [{study}]" if several else "")
        result.append(Series(label, family, [row["group"] for row in rows]))
    return sorted(result, key=lambda one: (one.family, one.label))


def _values(rows: list[Line]) -> Mapping[str, Any]:
    return axis_values(rows[0]["run"])


def family_title(titles: list[str], family: str) -> str:
    """What the titles of a family's sizes begin with: "LaMamba-Diff" of "LaMamba-Diff-S" and "LaMamba-Diff-B"."""
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*titles, strict=False))
    prefix = "".join(letters[0] for letters in alike)
    if len(set(titles)) > 1:
        prefix = re.sub(r"\W+$", "", prefix if re.search(r"\W$", prefix) else re.sub(r"\w+$", "", prefix))
    return prefix or family


def size_word(title: str, family: str) -> str:
    """The size alone, "XL" of "DiT-XL/2" in the family "DiT"."""
    return re.sub(r"^\W+", "", title.removeprefix(family)) or title


def middle(groups: list[str]) -> str:
    """The size whose shade stands for a family: that in the middle."""
    return groups[len(groups) // 2]
