"""Scaling curves, quality against FLOPs, hours and parameters: their power laws, predictions and table."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

from .differences import by_seed, count_of, seed_of
from .evidence import Evidence
from .fits import Check, Fit, check, fit
from .moments import (
    AtEqualImages,
    Series,
    at_equal_images,
    first_column,
    flops_of,
    hours_notes,
    hours_of,
    images_words,
    is_marked,
    main_device,
    moments,
    series_of,
)
from .protocols import generation_of, notes
from .queries import better
from .runs import Line, Run
from .table import Column, Table, style_of

NEXT = 4.0  # where a law predicts, in the largest compute, if the records have no larger size


class Measure(NamedTuple):
    """What quality is drawn against: a unit in numbers of the records, and words for an axis and a cell."""

    unit: float
    axis: str
    cell: str


MEASURES = {
    "forward": Measure(1e9, "FLOPs (G) of a forward pass", "forward FLOPs (G)"),
    "training": Measure(1e18, "FLOPs (1e18) of the training", "training FLOPs (1e18)"),
    "hours": Measure(1.0, "{}", "{}"),
    "params": Measure(1e6, "Parameters (M)", "parameters (M)"),
}


@dataclass(frozen=True)
class Curve:
    """A family's sizes in one column of scores, against one measure.

    groups   by compute, with `compute` in the measure's unit and `values` of the training seeds
    marked   groups of which a run failed or is unfinished
    further  the next size on record, without a score: its label and compute; None: four times the largest
    """

    series: Series
    groups: list[str]
    compute: dict[str, float]
    values: dict[str, dict[int, float]]
    law: Fit | str
    check: Check | str
    marked: set[str] = field(default_factory=set)
    further: tuple[str, float] | None = None

    @property
    def target(self) -> float:
        return self.further[1] if self.further else NEXT * self.compute[self.groups[-1]]

    @property
    def law_words(self) -> str:
        return self.law.law if isinstance(self.law, Fit) else ""

    @property
    def prediction(self) -> float | None:
        """What the law says of the next size; None for two sizes, which predict nothing."""
        return self.law.at(self.target) if isinstance(self.law, Fit) and self.law.sizes > 2 else None


@dataclass(frozen=True)
class Scaling:
    """The curves of one column of one study: {measure: curves}."""

    column: str
    equal: AtEqualImages
    curves: dict[str, list[Curve]]
    device: str | None


def scaling_of(evidence: Evidence) -> list[Scaling]:
    """The scaling curves of one study, one for each column of scores in which some family has two sizes; that of the
    first Frechet distance first. Only metrics that fall with quality have laws, and curves."""
    columns = {name: rows for name, rows in moments(evidence.runs).items() if better(name) == "min"}
    order = sorted(columns, key=lambda name: name != first_column(columns))
    found = [_scaling(evidence, name, columns[name]) for name in order]
    return [one for one in found if any(len(curve.groups) > 1 for curves in one.curves.values() for curve in curves)]


def _scaling(evidence: Evidence, column: str, scored: Mapping[Run, list[Line]]) -> Scaling:
    equal = at_equal_images(scored)
    device = main_device({run: [row] for run, row in equal.rows.items()})
    rows = {row["group"]: row for row in evidence.overview.rows}
    measures: dict[str, Callable[[Run, Line], float | None]] = {
        "forward": lambda run, row: rows[run.group]["flops"],
        "training": flops_of,
        "hours": lambda run, row: hours[0] if (hours := hours_of(run, row)) and hours[1] == device else None,
        "params": lambda run, row: rows[run.group]["params"],
    }
    every = series_of(evidence.overview.rows)
    curves = {
        name: [curve for one in every if (curve := _curve(one, equal, measure, MEASURES[name].unit, rows, name))]
        for name, measure in measures.items()
    }
    return Scaling(column, equal, {name: each for name, each in curves.items() if each}, device)


def _curve(
    series: Series,
    equal: AtEqualImages,
    measure: Callable[[Run, Line], float | None],
    unit: float,
    rows: Mapping[str, Line],
    name: str,
) -> Curve | None:
    compute: dict[str, float] = {}
    values: dict[str, dict[int, float]] = {}
    marked: set[str] = set()
    ways: set[str] = set()
    for group in series.groups:
        scores = [(run, row, measure(run, row)) for run, row in equal.rows.items() if run.group == group]
        if costs := [cost for *_, cost in scores if cost]:  # a seed without it has no place there
            compute[group] = fmean(costs) / unit
            values[group] = by_seed((seed_of(run), row["value"]) for run, row, cost in scores if cost)
            ways |= {generation_of(row) for _, row, cost in scores if cost} - {""}
            marked |= {group} if any(is_marked(run) for run, _, cost in scores if cost) else set()
    if not compute:
        return None
    groups = sorted(compute, key=lambda group: (compute[group], group))
    points = {compute[group]: list(values[group].values()) for group in groups}
    why = "two sizes have the same compute" if len(points) < len(groups) else ""
    if len(groups) > 1:
        why = "the sizes were not scored at the same number of images" if equal.images is None else why
        why = "the samples were made in several ways" if len(ways) > 1 else why
    law, tested = why or fit(points), why or check(points)
    return Curve(series, groups, compute, values, law, tested, marked, _further(series, groups, compute, rows, name))


def _further(
    series: Series, groups: list[str], compute: Mapping[str, float], rows: Mapping[str, Line], name: str
) -> tuple[str, float] | None:
    """The next larger size of a family whose cost is on record, without a score, and its compute by cost."""
    kind = "params" if name == "params" else "flops"
    last = rows[groups[-1]]
    larger = [rows[group] for group in series.groups if group not in groups and rows[group][kind] > last[kind]]
    if name == "hours" or not larger:
        return None
    row = min(larger, key=lambda row: row[kind])
    return row["model_label"], compute[groups[-1]] * row[kind] / last[kind]


def scaling_table(evidence: Evidence) -> Table:
    """A row for each law: a column of scores, a family, and what quality is drawn against.

    Columns of the csv: `a`, `b`, `c` of a + b·C^-c, with C in the unit of `against`, and the ends of their 95 %
    intervals over training seeds as `a_low` and `a_high`; `predicted` at compute `at`; the leave-one-out check as
    `check_predicted`, `check_measured` (the largest size) and `check_error` (relative); or `why` there is no law.
    """
    rows: list[Line] = []
    remarks: list[str] = []
    marks: dict[str, dict[Run, Line]] = {}
    several = len(evidence.studies) > 1
    for study, part in evidence.studies.items():
        for one in scaling_of(part):
            marks[one.column] = marks.get(one.column, {}) | one.equal.rows
            remarks += [f"{one.column}: {remark}" for remark in remarks_of(one)]
            for name, curves in one.curves.items():
                rows += [{"study": study, **_row(one, name, curve)} for curve in curves]
    if not rows:
        return Table("scaling", "", [], [])
    columns = [
        Column("study", "Study" if several else None),
        Column("metric", "Metric"),
        Column("family", "Family"),
        Column("against", "C", width=18),
        Column("sizes", "Sizes", digits=0, rank=8),
        Column("seeds", "Seeds", digits=0, rank=9),
        *(Column(law, law, 1.0, 3, mark=f"{law}_ends", rank=rank) for law, rank in (("a", 4), ("b", 5), ("c", 0))),
        *(Column(f"{law}_{end}") for law in "abc" for end in ("low", "high")),
        Column("at", "Next C", 1.0, 4, mark="at_words", rank=3),
        Column("predicted", "Predicted there", 1.0, 3, mark="predicted_ends", rank=1),
        *(Column(name) for name in ("predicted_low", "predicted_high", "check_law")),
        Column("check_predicted", "Check: predicted", 1.0, 3, mark="check_by", rank=7),
        Column("check_measured", "Check: measured", 1.0, 3, rank=6),
        Column("check_error", "Check: error (%)", 0.01, 2, rank=2),
        Column("why", "No law", rank=7),
    ]
    caption = "Scaling: laws a + b·C^-c of quality against compute."
    return Table("scaling", caption, columns, rows, [*LAWS, *dict.fromkeys(remarks), *notes(evidence.runs, marks)])


LAWS = [
    "a + b·C^-c: least squares of the logarithms of the means of three sizes or more, C in the unit given; two sizes "
    "have b·C^-c and predict nothing.",
    "[low, high]: 95 % intervals of a bootstrap over training seeds; they know nothing of an error in the law itself. "
    "Families without several seeds have none.",
    f"Next C: that of the next size on record, in brackets, or else {NEXT:g} × the largest.",
    "Check: the largest size, as the law of the others predicts it, and as it was measured.",
]


def _row(one: Scaling, name: str, curve: Curve) -> Line:
    law, tested = curve.law, curve.check
    marked = " (a run failed or is unfinished)" if curve.marked else ""
    row: Line = {"metric": one.column, "family": curve.series.label + marked, "sizes": len(curve.groups)}
    row |= {
        "against": MEASURES[name].cell.format(hours_words(one.device)),
        "seeds": max(map(count_of, curve.values.values())),
    }
    if isinstance(law, str):
        row["why"] = law
    else:
        for key, value, pair in zip("abc", (law.a, law.b, law.c), law.intervals or (None, None, None), strict=True):
            row |= _with_ends(key, value, pair) if key != "a" or law.sizes > 2 else {}
    if curve.prediction is not None and isinstance(law, Fit):
        row |= {"at": curve.target, "at_words": f" ({curve.further[0]})" if curve.further else ""}
        row |= _with_ends("predicted", curve.prediction, law.interval_at(curve.target))
    if isinstance(tested, Check):
        row |= {"check_law": tested.law, "check_predicted": tested.predicted, "check_measured": tested.measured}
        row |= {"check_error": tested.error, "check_by": f" by {tested.law}" if tested.law != curve.law_words else ""}
    return row


def _with_ends(name: str, value: float, ends: tuple[float, float] | None) -> Line:
    low, high = ends or (None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high, f"{name}_ends": ends_words(ends)}


def ends_words(ends: tuple[float, float] | None) -> str:
    """Such as " [11.6, 13.0]"; empty without an interval."""
    return f" [{', '.join(format(end, style_of(end, 3)) for end in ends)}]" if ends else ""


def target_words(curve: Curve) -> str:
    """Where a law predicts: "C = 387, 4 × the largest"."""
    return f"C = {curve.target:.4g}, {curve.further[0] if curve.further else f'{NEXT:g} × the largest'}"


def check_words(curve: Curve) -> str:
    """What the leave-one-out check compares its prediction with: " by b·C^-c, measured 15.7 (+1.2 %)". The law is named
    if it is not that of all sizes."""
    tested = curve.check
    if isinstance(tested, str):
        return ""
    law = "" if curve.law_words == tested.law else f" by {tested.law}"
    measured = format(tested.measured, style_of(tested.measured, 3))
    return f"{law}, measured {measured} ({round(100 * tested.error, 1) + 0.0:+.1f} %)"


def remarks_of(one: Scaling) -> list[str]:
    """At how many images the scores are, and which runs are left out and why."""
    remarks = [images_words(one.equal)]
    if left := _names(one.equal.left_out):
        remarks.append(f"Left out, because they have no score at that number of images: {left}.")
    if "hours" in one.curves:
        hours = {run: hours_of(run, row) for run, row in one.equal.rows.items()}
        if left := _names(run for run, each in hours.items() if each and each[1] != one.device):
            remarks.append(
                f"Left out of hours, because they were trained on another device or in another precision: {left}."
            )
        if left := _names(run for run, each in hours.items() if not each):
            remarks.append(f"Left out of hours, because theirs are not on record: {left}.")
        remarks += hours_notes(hours)
    return remarks


def _names(runs: Iterable[Run]) -> str:
    return ", ".join(sorted({run.info["name"] for run in runs}))


def hours_words(device: str | None) -> str:
    """Hours on a device in a precision: "GPU-hours (H100 80GB HBM3, bfloat16)"."""
    name = (device or "").removeprefix("NVIDIA ")
    return f"{'GPU-hours' if name != device else 'hours'} ({name})" if name else "hours"
