"""How samples were made and how they were scored, in words, and whether two scores may be ranked against each other."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..harness.scoring.protocol import words
from .moments import images_of
from .names import is_released, joined, labels
from .queries import score_words
from .runs import Line, Run

HASH = re.compile(r"[0-9a-f]{16,}")
UNKNOWN = "unknown"
STEPS = "the weights are of different steps"
IMAGES = "the weights have seen different numbers of images"
RELEASED = "it is not on record how long released weights were trained"
SPREADS = {"is": "splits", "isc": "splits"}  # what the `std` of a score is over; that of other metrics: subsets


def spread_of(metric: str) -> str:
    """What a metric's own standard deviation is over: splits or subsets of the samples."""
    return SPREADS.get(re.split(r"[^A-Za-z]", metric.lower(), maxsplit=1)[0], "subsets")


def words_of_protocol(protocol: Mapping[str, Any] | None) -> str:
    """A protocol in words, such as "sampler ddim, steps 50, clip yes". Hashes are cut to 12 digits, and entries without
    a value are left out. Empty for an empty protocol."""
    parts = []
    for name, value in (protocol or {}).items():
        if isinstance(value, dict):
            inner = words_of_protocol(value)
            parts += [f"{name.replace('_', ' ')} ({inner})"] if inner else []
        elif value is not None:
            parts.append(f"{name.replace('_', ' ')} {_plain(value)}")
    return ", ".join(parts)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return (" × " if len(value) < 4 else " ").join(map(_plain, value))  # a size, or a list
    return str(value)[:12] if HASH.fullmatch(str(value)) else str(value)


def generation_of(row: Line) -> str:
    """The hash of how the samples of a score were made: "unknown" if that is not on record or nobody knows it, and ""
    for a score without samples, such as a held-out loss."""
    if not row.get("samples") and not row.get("generation"):
        return ""
    known = row.get("generation") and row["generation"].get("source") != UNKNOWN
    return str(row["generation_protocol"]) if known else UNKNOWN


def by_design(runs: Iterable[Run], rows: Mapping[Run, Line]) -> bool:
    """Whether scores differ in how their samples were made only because the variants of one study do: all runs are of
    one study with a file, nobody added samples by hand, and all seeds of a variant have the same protocol."""
    scored = [run for run in runs if run in rows]
    if len({run.info["study"] for run in scored}) != 1 or not all(run.info.get("of_file") for run in scored):
        return False
    protocols: dict[str, set[str]] = {}
    for run in scored:
        protocols.setdefault(run.group, set()).add(generation_of(rows[run]))
    return not any(run.info.get("by_hand") for run in scored) and all(len(each) == 1 for each in protocols.values())


def ends_by_design(runs: Iterable[Run], rows: Mapping[Run, Line]) -> bool:
    """Whether scores are of weights of different steps only because the variants of one study are: each is of the last
    step that the study planned for it, or the moments are an axis."""
    scored = [run for run in runs if run in rows]
    if len({run.info["study"] for run in scored}) != 1 or not all(run.info.get("of_file") for run in scored):
        return False
    for run in scored:
        planned = run.info.get("steps") or (run.info["config"].get("train") or {}).get("steps")
        if rows[run]["checkpoint_step"] != planned and "sample.at" not in run.info["variant"]:
            return False
    return True


def rankable(runs: Iterable[Run], rows: Mapping[Run, Line]) -> str:
    """Why the best of the scores of one column cannot be named, empty if it can: samples that were made in several ways
    or in unknown ways have no best, nor have released weights beside trainings, nor weights of different steps or
    numbers of images unless the study asks for them."""
    runs = dict.fromkeys(runs)  # in order, and quick to search
    released = {is_released(run) for run in rows if run in runs}
    if len(released) > 1:
        return RELEASED
    steps = {(run.group, row["checkpoint_step"]) for run, row in rows.items() if run in runs}
    if len(steps) > len({group for group, _ in steps}):
        return "seeds of one variant have weights of different steps"
    if len({step for _, step in steps} - {None}) > 1 and not ends_by_design(runs, rows):
        return STEPS
    images = {images_of(run, row) for run, row in rows.items() if run in runs} - {None}
    if len(images) > 1 and not ends_by_design(runs, rows):
        return IMAGES
    return unlike(runs, rows)


def unlike(runs: Iterable[Run], rows: Mapping[Run, Line]) -> str:
    """Why scores of one column do not compare because of their samples, empty if they do: samples that were made in
    several ways, unless the study asks for that, or in unknown ways."""
    runs = dict.fromkeys(runs)
    protocols = {generation_of(row) for run, row in rows.items() if run in runs}
    if by_design(runs, rows) or protocols <= {""} or (len(protocols) == 1 and UNKNOWN not in protocols):
        return ""
    if UNKNOWN in protocols:
        return "it is not on record how all samples were made"
    return "the samples were made in several ways"


def losses_words(runs: Iterable[Run], heldout: bool = False) -> str:
    """Why training losses of runs (or held-out losses, which are at the same times for all of an objective) do not
    compare, in a sentence; empty if they do. A loss is of what an objective predicts, of pixels or of latents."""
    places = ("path", "decoder", *(("times",) if heldout else ()))  # what changes no loss
    configs = [run.info["config"] for run in runs]
    words = {"objective": "objectives", "encoder": "encoders", "data": "data"}
    values = {word: [_without(config.get(name), places) for config in configs] for name, word in words.items()}
    apart = [word for word, each in values.items() if any(value != each[0] for value in each)]
    return f"Losses are of different quantities and do not compare, because {joined(apart)} differ." if apart else ""


def _without(section: Mapping[str, Any] | None, names: Iterable[str]) -> Mapping[str, Any]:
    return {name: value for name, value in (section or {}).items() if name not in names}


def notes(runs: list[Run], columns: Mapping[str, Mapping[Run, Line]]) -> list[str]:
    """What stands under a table of scores: for each column how samples were scored, with the floor and the remarks of
    its scores, and for all columns how their samples were made."""
    if not columns:
        return []
    first = {name: next(iter(rows.values())) for name, rows in columns.items()}
    evaluations = {name: row["evaluation"] for name, row in first.items() if row.get("evaluation")}
    shared = _shared(list(evaluations.values())) if len(evaluations) == len(first) > 1 else {}
    facts: dict[str, list[str]] = {}  # {text: names of columns}
    remarks = []
    for name, rows in columns.items():
        row, own = first[name], evaluations.get(name)
        text = f"{score_words(row)}, protocol {row['protocol']}."
        if own is None and row.get("features"):
            text = f"{score_words(row)}, features {row['features']}, protocol {row['protocol']}."
        apart = {key: value for key, value in (own or {}).items() if key not in (*shared, "metric")}
        if how := words_of_protocol(apart):
            text += f" Scored: {how}."
        if floors := sorted({one["floor"] for one in rows.values() if one.get("floor") is not None}):
            ends = " to ".join(dict.fromkeys(f"{one:.4g}" for one in (floors[0], floors[-1])))
            text += f" Floor (images of the reference against its others): {ends}."
        if any(one.get("std") is not None for one in rows.values()):
            text += f" Its standard deviation over {spread_of(name)} says nothing about other trainings."
        facts.setdefault(text, []).append(name)
        for remark in dict.fromkeys(one["note"] for one in rows.values() if one.get("note")):
            remarks.append(f"{name}: {remark}.")
    text = [f"All scores: {words_of_protocol(shared)}."] if shared else []
    text += [f"{', '.join(names)}: {fact}" for fact, names in facts.items()] + remarks
    return [*text, *_of_generation(runs, columns)]


def _shared(protocols: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        key: value
        for key, value in protocols[0].items()
        if all(key in other and other[key] == value for other in protocols[1:])
    }


def _of_generation(runs: list[Run], columns: Mapping[str, Mapping[Run, Line]]) -> list[str]:
    """How the samples of all columns were made: one line for each way, which names its variants if there are several
    ways."""
    label_of = labels(runs)
    ways: dict[str, tuple[str, dict[str, None]]] = {}
    for rows in columns.values():
        for run, row in rows.items():
            if protocol := generation_of(row):
                text = "it is not on record how they were made" if protocol == UNKNOWN else words(row["generation"])
                ways.setdefault(protocol, (text, {}))[1].setdefault(label_of[run.group])
    lines = []
    for protocol, (text, whose) in ways.items():
        names = list(whose)
        of = f" of {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        mark = "" if protocol == UNKNOWN else f" (protocol {protocol})"
        lines.append(f"Samples{of if len(ways) > 1 else ''}: {text}{mark}.")
    return lines
