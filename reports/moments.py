"""Scores at every moment of a training, what they had cost by then, and which of them compare models."""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .names import axis_values, words
from .queries import state_of
from .runs import Line, Run

Moments = dict[str, dict[Run, list[Line]]]


def moments(runs: Iterable[Run]) -> Moments:
    """The finished scores of each run in the order of images seen: {column: {run: rows}}.

    A column has one protocol of evaluation, and either models that know classes or models that do not. Its name is the
    metric's, with @PROTOCOL and "(unconditional)" if one metric has several. The scores of a run are of samples that
    were drawn as those of its furthest step.
    """
    columns: dict[tuple[str, str, bool], dict[Run, list[Line]]] = {}
    for run in runs:
        for row in [*run.earlier, *run.rows]:
            if row["kind"] == "score" and row["state"] == "done":
                key = row["metric"], str(row["protocol"]), is_unconditional(run, row)
                columns.setdefault(key, {}).setdefault(run, []).append(row)
    protocols = Counter((metric, free) for metric, _, free in columns)
    kinds = Counter(metric for metric, free in {(metric, free) for metric, _, free in columns})
    result: Moments = {}
    for (metric, protocol, free), rows in columns.items():
        name = metric + (f"@{protocol}" if protocols[metric, free] > 1 else "")
        name += " (unconditional)" if free and kinds[metric] > 1 else ""
        result[name] = {run: _in_order(run, each) for run, each in rows.items()}
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


def hours_of(run: Run, row: Line) -> tuple[float, str] | None:
    """Hours of training up to a score times the processes (with GPUs, GPU-hours), and the device; None if unknown."""
    train = run.last("train", "done")
    device = ((train or {}).get("provenance") or {}).get("device")
    devices = {stretch["device"] for stretch in (train or {}).get("stretches") or () if stretch.get("device")}
    if not train or not device or devices - {device} or row.get("training_seconds") is None:
        return None
    processes = train.get("processes") or 1
    if train.get("process_seconds") and train.get("seconds"):
        processes = train["process_seconds"] / train["seconds"]
    return row["training_seconds"] * processes / 3600, device


def main_device(rows: Mapping[Run, Iterable[Line]]) -> str | None:
    """The device that most runs were trained on; hours of others do not compare with its own."""
    devices = Counter(hours[1] for run, each in rows.items() for row in each if (hours := hours_of(run, row)))
    return min(devices, key=lambda device: (-devices[device], device)) if devices else None


def first_column(names: Mapping[str, Mapping[Run, Any]]) -> str:
    """The column that a report is about: the Frechet distance of most runs, or else the metric of most runs."""
    return min(names, key=lambda name: (not re.match("FI?D", name), -len(names[name])))


@dataclass(frozen=True)
class AtEqualImages:
    """The score of each run at the largest number of images at which all have one.

    images    that number; None if there is none: then scores are those of the furthest steps
    left_out  runs whose training failed or is unfinished, and which have no score at that number
    """

    rows: dict[Run, Line]
    images: int | None
    left_out: list[Run] = field(default_factory=list)


def at_equal_images(scored: Mapping[Run, list[Line]]) -> AtEqualImages:
    """Scores of one column at equal images. A training that failed or is unfinished holds nobody back."""
    seen = {run: {images: row for row in rows if (images := images_of(run, row))} for run, rows in scored.items()}
    finished = [run for run in scored if not is_unfinished(run)] or list(scored)
    common = set.intersection(*(set(seen[run]) for run in finished)) if finished else set()
    if not common:
        return AtEqualImages({run: rows[-1] for run, rows in scored.items()}, None)
    images = max(common)
    rows = {run: by_images[images] for run, by_images in seen.items() if images in by_images}
    return AtEqualImages(rows, images, [run for run in scored if run not in rows])


def images_words(equal: AtEqualImages) -> str:
    """At how many images the scores are, in a sentence."""
    if equal.images is None:
        return "Scores are those of the furthest steps, because no number of images is common to all."
    return f"Scores are at {equal.images:,} images seen, the most that all have in common."


def is_unfinished(run: Run) -> bool:
    """Whether a training has no record that it reached its end, though it has a log or failed."""
    return not run.last("train", "done") and (bool(run.metrics) or run.last("train") is not None)


def is_marked(run: Run) -> bool:
    """Whether a number of a run must be marked, because the run failed or is unfinished."""
    return state_of(run)[0] not in ("done", "not started")


class Series(NamedTuple):
    """The sizes of a family that differ in the preset alone, by FLOPs: what a line joins."""

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
            lines.setdefault((row["study"], row["family"], axes), {}).setdefault(row["group"], row)
    parts: list[tuple[str, str, list[Line]]] = []
    for (study, family, _), by_group in lines.items():
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
