"""Scores of models at equal amounts of training: which may be compared, at which amount, and interpolated how."""

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, isclose, log
from typing import NamedTuple

from .moments import Key, columns_of, flops_of, hours_of, images_of, machine_of, named
from .names import axis_values, axis_word
from .protocols import generation_of
from .runs import Line, Run

CLOSE = 1e-9  # two amounts of training that differ by less, relatively, are one


class Moment(NamedTuple):
    """A score of one run, and how much training it had: images, FLOPs, and hours times processes (None: unknown)."""

    row: Line
    images: int
    flops: float | None
    hours: float | None


Series = dict[Run, list[Moment]]  # the moments of each run, from the first to the last


@dataclass(frozen=True)
class Comparison:
    """Scores that may stand in one table: of one data set, one generation protocol (its hash) and, if hours are
    compared, one device and precision. A column has one protocol of evaluation."""

    data: str
    way: str
    columns: dict[str, Series]
    machine: str = ""

    @property
    def runs(self) -> list[Run]:
        return list(dict.fromkeys(run for series in self.columns.values() for run in series))


def models(runs: Iterable[Run]) -> list[Run]:
    """The runs of models as such: of each study those that are like its base in everything but the model. A model that
    has none like that is there with its first variant. Trainings that studies share are there once, for the study with
    the most models."""
    by_study: dict[str, list[Run]] = {}
    for run in runs:
        if not run.damage and run.info.get("trains", True):
            by_study.setdefault(run.info["study"], []).append(run)
    kept: set[Run] = set()
    trained: set[str] = set()  # the folders of trainings that are there
    for each in sorted(by_study.values(), key=lambda runs: -len({run.info["model"] for run in runs})):
        ordered = sorted(each, key=lambda run: run.info.get("place", inf))
        base = _setting(ordered[0])
        covered = {run.info["model"] for run in ordered if _setting(run) == base}
        first = {run.info["model"]: run.group for run in reversed(ordered) if run.info["model"] not in covered}
        alike = [run for run in each if _setting(run) == base or run.group in first.values()]
        new = {run.group for run in alike if run.info["folder"] not in trained}
        kept |= {run for run in alike if run.group in new}
        trained |= {run.info["folder"] for run in alike}
    return [run for each in by_study.values() for run in each if run in kept]


def others_words(runs: Iterable[Run], compared: Collection[Run]) -> list[str]:
    """A sentence for each study of which `models` leaves variants out: with which axis values its runs are compared."""
    left = [run for run in runs if run not in compared]
    words: dict[str, dict[str, dict[str, None]]] = {}
    for run in compared:
        values, about = axis_values(run), (run.info["study"], run.info["model"])
        others = [_setting(other) for other in left if (other.info["study"], other.info["model"]) == about]
        for axis, value in _setting(run).items():
            if any(one.get(axis) != value for one in others) and (word := axis_word(axis, values[axis])):
                words.setdefault(run.info["study"], {}).setdefault(axis, {})[word] = None
    return [
        f"Of {study}, runs with {' and '.join(' or '.join(each) for each in by_axis.values())} stand here; the other "
        "variants are in the table of the study."
        for study, by_axis in words.items()
    ]


def _setting(run: Run) -> dict[str, str]:
    """The axis values of a run, less the ways of sampling, which never share a table."""
    return {axis: str(value) for axis, value in axis_values(run).items() if not axis.startswith("sample.")}


def comparisons(runs: Iterable[Run]) -> list[Comparison]:
    """The scores of models, split by data set and generation protocol. A score without samples, such as a held-out
    loss, is in the table of the samples of its run, or in all of its data set if it has none."""
    scored: dict[tuple[str, str], dict[Key, Series]] = {}
    for key, by_run in columns_of(models(runs)).items():
        for run, rows in by_run.items():
            if points := moments_of(run, rows):
                columns = scored.setdefault((_data_words(run), generation_of(rows[-1])), {})
                columns.setdefault(key, {})[run] = points
    result = []
    for (data, way), columns in sorted(scored.items()):
        ways = {other: _runs(each) for (where, other), each in scored.items() if where == data and other}
        if way or not ways:
            others = {run for other, runs in ways.items() if other != way for run in runs} - ways.get(way, set())
            losses = scored.get((data, ""), {}) if way else {}
            both = columns | {
                key: own for key, each in losses.items() if (own := {k: v for k, v in each.items() if k not in others})
            }
            result.append(Comparison(data, way, named(both)))
    return result


def moments_of(run: Run, rows: Iterable[Line]) -> list[Moment]:
    """The scores of one run, less those of which it is not on record how many images the weights had seen."""
    return [
        Moment(row, images, flops_of(run, row), hours[0] if (hours := hours_of(run, row)) else None)
        for row in rows
        if (images := images_of(run, row))
    ]


def _runs(columns: Mapping[Key, Series]) -> set[Run]:
    return {run for series in columns.values() for run in series}


def by_machine(compared: Comparison) -> list[Comparison]:
    """The same for each device and precision of trainings. Runs without one are left out."""
    machines = sorted({machine_of(run) for run in compared.runs} - {""})
    parts = []
    for machine in machines:
        columns = {
            name: {run: moments for run, moments in series.items() if machine_of(run) == machine}
            for name, series in compared.columns.items()
        }
        filled = {name: series for name, series in columns.items() if series}
        parts.append(Comparison(compared.data, compared.way, filled, machine))
    return parts


def _data_words(run: Run) -> str:
    data = run.info["config"].get("data") or {}
    name = data.get("name") or data.get("kind") or ""
    return f"{name} at {data['size']} px" if data.get("size") else str(name)


def equal_budgets(amounts: Mapping[Run, Sequence[float]]) -> list[float]:
    """Amounts, rising, each between the first and last moments of two models or more: first the one that the most runs
    reach, then the one that the most of the others reach, and so on. A large model may have begun to be scored only
    after a small one has ended, so that one amount is rarely enough."""
    left = {run for run, each in amounts.items() if each}
    ends = {each[-1] for each in amounts.values() if each}
    everyone = [each for each in amounts.values() if each]
    result: list[float] = []
    while left:
        others = [amounts[run] for run in left]
        counts = zip(_reaching(others, ends), _reaching(everyone, ends), ends, strict=True)
        for new, _, amount in sorted(counts, reverse=True):
            reached = {run for run, each in amounts.items() if reaches(each, amount)} if new else set()
            if reached & left and len({run.group for run in reached}) > 1:
                result.append(amount)
                left -= reached
                break
        else:
            break
    return sorted(result)


def _reaching(several: Sequence[Sequence[float]], ends: Iterable[float]) -> list[int]:
    """How many of several rising amounts reach each of `ends`."""
    firsts, lasts = (sorted(each[place] for each in several) for place in (0, -1))
    return [bisect_right(firsts, end * (1 + CLOSE)) - bisect_left(lasts, end * (1 - CLOSE)) for end in ends]


def reaches(amounts: Sequence[float], amount: float) -> bool:
    """Whether an amount lies between the first and the last of rising ones."""
    return bool(amounts) and amounts[0] <= amount * (1 + CLOSE) and amount * (1 - CLOSE) <= amounts[-1]


def interpolated(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """The value at x of points (x, y) with rising, positive x. Between two neighbours y = y0 · (x / x0)^k, a line in
    the logarithms of both; if one of their values is not positive, a line in log x. None beyond the points."""
    for place, value in points:
        if isclose(place, x, rel_tol=CLOSE):
            return value
    right = bisect_left(points, x, key=lambda point: point[0])
    if right in (0, len(points)):
        return None
    (x0, y0), (x1, y1) = points[right - 1], points[right]
    share = log(x / x0) / log(x1 / x0)
    return exp(log(y0) + share * log(y1 / y0)) if min(y0, y1) > 0 else y0 + share * (y1 - y0)


def rising(moments: Iterable[Moment], name: str) -> list[tuple[float, Moment]]:
    """The moments at which an amount (a field of Moment) is known and above that of the moment before, with it."""
    points: list[tuple[float, Moment]] = []
    for moment in moments:
        amount = getattr(moment, name)
        if amount and (not points or amount > points[-1][0]):
            points.append((amount, moment))
    return points


def at_amount(moments: Iterable[Moment], name: str, amount: float) -> Moment | None:
    """A run at an amount (a field of Moment) of its training: one of its moments, or an interpolated one whose row is
    that of the nearest but for its value. None before its first moment and after its last."""
    points = rising(moments, name)
    value = interpolated([(x, one.row["value"]) for x, one in points], amount)
    if value is None:
        return None
    x, nearest = min(points, key=lambda point: abs(point[0] - amount))
    if isclose(x, amount, rel_tol=CLOSE):
        return nearest
    right = bisect_left(points, amount, key=lambda point: point[0])
    (x0, before), (x1, after) = points[right - 1], points[right]
    share = (amount - x0) / (x1 - x0)

    def between(low: float | None, high: float | None) -> float | None:
        return None if low is None or high is None else low + share * (high - low)

    images = round(before.images + share * (after.images - before.images))
    flops, hours = between(before.flops, after.flops), between(before.hours, after.hours)
    return Moment({**nearest.row, "value": value}, images, flops, hours)
