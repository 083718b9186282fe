"""Scores of models at equal amounts of training: which may be compared, at which amount, and interpolated how."""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, inf, isclose, log
from typing import NamedTuple

from .names import axis_values
from .protocols import generation_of
from .queries import current
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
    has none like that is there with its first variant."""
    by_study: dict[str, list[Run]] = {}
    for run in runs:
        if not run.damage and run.info.get("trains", True):
            by_study.setdefault(run.info["study"], []).append(run)
    result = []
    for each in by_study.values():
        ordered = sorted(each, key=lambda run: run.info.get("place", inf))
        base = _setting(ordered[0])
        covered = {run.info["model"] for run in ordered if _setting(run) == base}
        first = {run.info["model"]: run.group for run in reversed(ordered) if run.info["model"] not in covered}
        result += [run for run in each if _setting(run) == base or run.group in first.values()]
    return result


def _setting(run: Run) -> dict[str, str]:
    """The axis values of a run, less the ways of sampling, which never share a table."""
    return {axis: str(value) for axis, value in axis_values(run).items() if not axis.startswith("sample.")}


def comparisons(runs: Iterable[Run]) -> list[Comparison]:
    """The scores of models, split by data set and generation protocol. A score without samples, such as a held-out
    loss, is in the table of the samples of its run, or in all of its data set if it has none."""
    scored: dict[tuple[str, str], dict[tuple[str, str], Series]] = {}
    for run in models(runs):
        for row in _scores(run):
            if moment := _moment(run, row):
                columns = scored.setdefault((_data_words(run), generation_of(row)), {})
                columns.setdefault((row["metric"], str(row["protocol"])), {}).setdefault(run, []).append(moment)
    result = []
    for (data, way), columns in sorted(scored.items()):
        ways = {other: _runs(each) for (where, other), each in scored.items() if where == data and other}
        if way or not ways:
            others = {run for other, runs in ways.items() if other != way for run in runs} - ways.get(way, set())
            losses = scored.get((data, ""), {}) if way else {}
            both = columns | {
                key: {run: each for run, each in series.items() if run not in others} for key, series in losses.items()
            }
            count = Counter(metric for metric, _ in both)
            names = {key: key[0] if count[key[0]] == 1 else "@".join(key) for key in both}
            result.append(Comparison(data, way, {names[key]: _ordered(series) for key, series in both.items()}))
    return result


def _runs(columns: Mapping[tuple[str, str], Series]) -> set[Run]:
    return {run for series in columns.values() for run in series}


def by_machine(compared: Comparison) -> list[Comparison]:
    """The same for each device and precision of trainings. Runs without one are left out."""
    machines = sorted({_machine(run) for run in compared.runs} - {""})
    parts = []
    for machine in machines:
        columns = {
            name: {run: moments for run, moments in series.items() if _machine(run) == machine}
            for name, series in compared.columns.items()
        }
        filled = {name: series for name, series in columns.items() if series}
        parts.append(Comparison(compared.data, compared.way, filled, machine))
    return parts


def _scores(run: Run) -> list[Line]:
    """The newest scores of a run at all its moments, of samples that were drawn as its last ones."""
    last = {generation_of(row) for row in run.rows if row["kind"] == "score" and row["state"] == "done"} - {""}
    rows = [row for row in [*run.rows, *run.earlier] if row["kind"] == "score"]
    done = [row for row in current(rows) if row["state"] == "done"]
    return [row for row in done if not last or generation_of(row) in (*last, "")]


def _moment(run: Run, row: Line) -> Moment | None:
    """None for samples that no training on record made."""
    train = run.last("train", state="done") or {}
    batch = (run.info["config"].get("train") or {}).get("batch_size") or train.get("batch_size")
    step = row.get("checkpoint_step")
    images = row.get("images_seen") or (step * batch if step and batch else None)
    if not images:
        return None
    cost = run.last("cost", state="done")
    flops = row.get("training_flops") or (3 * cost["flops"] * images if cost else None)
    seconds, processes = row.get("training_seconds"), _processes(train)
    return Moment(row, images, flops, seconds * processes / 3600 if seconds and processes else None)


def _processes(train: Line) -> int | None:
    """The processes of a training that is on record; None if they changed on the way."""
    counts = {one.get("processes", 1) for one in train.get("stretches") or ()} or {train.get("processes") or 1}
    return counts.pop() if train and len(counts) == 1 else None


def _ordered(series: Series) -> Series:
    """The moments of each run in order; the last of several at one number of images counts."""
    return {run: sorted({one.images: one for one in each}.values(), key=lambda one: one.images)
            for run, each in series.items()}  # fmt: skip


def _data_words(run: Run) -> str:
    data = run.info["config"].get("data") or {}
    name = data.get("name") or data.get("kind") or ""
    return f"{name} at {data['size']} px" if data.get("size") else str(name)


def _machine(run: Run) -> str:
    """The device and precision of a training, such as "NVIDIA H100, bfloat16"; "" if they changed or are not known."""
    train = run.last("train", state="done") or {}
    devices = {one.get("device") for one in train.get("stretches") or ()} - {None}
    devices = devices or {(train.get("provenance") or {}).get("device")} - {None}
    precision = train.get("precision")
    return f"{devices.pop()}, {precision}" if len(devices) == 1 and precision else ""


def equal_images(amounts: Mapping[Run, Sequence[float]]) -> list[float]:
    """The largest amount at which the most runs have a score. Empty if fewer than two models share one."""
    counts = Counter(amount for each in amounts.values() for amount in set(each))
    for amount in sorted(counts, key=lambda amount: (-counts[amount], -amount)):
        if len({run.group for run, each in amounts.items() if amount in each}) > 1:
            return [amount]
    return []


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
