"""The figure of scaling curves: quality against FLOPs, hours and parameters, side by side."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .differences import mean_of
from .drawing import face, few_ticks, title_of_scores
from .evidence import Evidence
from .fits import Check, Fit
from .moments import middle, size_word
from .protocols import rankable
from .scaling import (
    MEASURES,
    Curve,
    Scaling,
    check_words,
    ends_words,
    hours_words,
    remarks_of,
    scaling_of,
    target_words,
)
from .style import PAGE, blank, caption, legend, wrapped
from .table import style_of


def scaling(evidence: Evidence) -> Figure | str | Mapping[str, Figure | str]:
    """A figure for each study and each column of scores: quality against FLOPs, hours and parameters, side by side."""
    figures: dict[str, Figure | str] = {}
    for study, part in evidence.studies.items():
        for place, one in enumerate(scaling_of(part)):
            name = "scaling" + (f"_{study}" if len(evidence.studies) > 1 else "")
            figures[name + (f"_{one.column}" if place else "").replace(" ", "_")] = _draw(part, one)
    return figures or "no family has scores of two sizes"


def _draw(evidence: Evidence, one: Scaling) -> Figure:
    titles = {row["group"]: row["title"] for row in evidence.overview.rows}
    figure = blank(PAGE, 2.5)
    panels = figure.subplots(1, len(one.curves), sharey=True, squeeze=False)[0]
    keys: dict[str, Line2D] = {}
    for axes, (name, curves) in zip(panels, one.curves.items(), strict=True):
        axes.set(xscale="log", yscale="log")
        for curve in curves:
            keys |= _draw_curve(evidence, axes, curve)
        few_ticks(axes.xaxis, *axes.get_xlim(), apart=0.25)
        axes.set_xlabel(wrapped(MEASURES[name].axis.format(hours_words(one.device)), 24))
    few_ticks(panels[0].yaxis, *panels[0].get_ylim(), most=7)
    first = next(iter(one.equal.rows.values()))
    panels[0].set_ylabel(title_of_scores(one.column, first, 34))
    caption(figure, captions(one, titles))
    legend(figure, keys)
    return figure


def _draw_curve(evidence: Evidence, axes: Axes, curve: Curve) -> dict[str, Line2D]:
    look, last = evidence.look, curve.groups[-1]
    colour, marker = look.colour(middle(curve.groups)), look.marker(curve.series.family)
    for group in curve.groups:
        mean = mean_of(curve.values[group].values())
        axes.errorbar(
            curve.compute[group], mean.value, mean.half, color=look.colour(group), marker=marker, markersize=4.5,
            capsize=2, linewidth=1, linestyle="none", **face(group in curve.marked),
        )  # fmt: skip
    law = curve.law
    if isinstance(law, Fit):
        reach = curve.target if law.sizes > 2 else curve.compute[last]
        at = np.geomspace(curve.compute[curve.groups[0]], reach, 60)
        inside = at <= curve.compute[last] * (1 + 1e-9)
        heights = np.array([law.at(x) for x in at])
        axes.plot(at[inside], heights[inside], color=colour, linewidth=1.1)
        axes.plot(at[~inside], heights[~inside], color=colour, linewidth=1.1, linestyle=":")
        if law.replicates is not None:
            band = np.array([law.interval_at(x) for x in at])
            axes.fill_between(at, band[:, 0], band[:, 1], color=colour, alpha=0.15, linewidth=0)
    elif len(curve.groups) > 1:
        means = [mean_of(curve.values[group].values()).value for group in curve.groups]
        axes.plot([curve.compute[group] for group in curve.groups], means, color=colour, linewidth=0.7, linestyle="--")
    return {curve.series.label: Line2D([], [], color=colour, marker=marker, markersize=4.5, linewidth=1.1)}


def captions(one: Scaling, titles: Mapping[str, str]) -> list[str]:
    """What stands under the figure: what is drawn, and for each family the check and the prediction of the first
    measure."""
    curves = next(iter(one.curves.values()))
    every = [curve for each in one.curves.values() for curve in each]
    laws = [curve.law for curve in every if isinstance(curve.law, Fit)]
    facts = {
        "Bars: 95 % intervals over training seeds.": any(
            len(each) > 1 for one in every for each in one.values.values()
        ),
        "Lines: a + b·C^-c, dotted where it predicts.": any(law.sizes > 2 for law in laws),
        "Lines: b·C^-c, which predicts nothing from two sizes.": any(law.sizes == 2 for law in laws),
        "Bands: 95 %, bootstrap over seeds.": any(law.replicates is not None for law in laws),
        "No band: one seed.": any(law.replicates is None for law in laws),
        "Dashed: no law.": any(isinstance(one.law, str) and len(one.groups) > 1 for one in every),
        "Hollow: a run failed or is unfinished.": any(one.marked for one in every),
    }
    remarks = remarks_of(one)
    lines = [" ".join([*(text for text, holds in facts.items() if holds), *remarks[:1]]), *remarks[1:]]
    measure = MEASURES[next(iter(one.curves))].cell.format(hours_words(one.device))
    tested = [line for curve in curves if (line := _of_family(curve, titles))]
    lines += [f"Against {measure}, the largest size predicted from the others, and the next:"] if tested else []
    why = rankable(one.equal.rows, one.equal.rows)
    return [*lines, *tested, *([f"No ranking, because {why}."] if why else [])]


def _of_family(curve: Curve, titles: Mapping[str, str]) -> str:
    """One family's check and prediction in a line, or why it has no law; empty for two sizes."""
    sizes = [size_word(titles[group], curve.series.label) for group in curve.groups]
    if isinstance(curve.law, str):
        return f"{curve.series.label}: no law, because {curve.law}" if len(sizes) > 1 else ""
    parts = []
    if isinstance(curve.check, Check):
        predicted = format(curve.check.predicted, style_of(curve.check.predicted, 3))
        parts.append(f"{sizes[-1]} from {', '.join(sizes[:-1])}: {predicted}{check_words(curve)}")
    elif curve.law.sizes > 2:
        parts.append(f"no check, because {curve.check}")
    if curve.prediction is not None:
        ends = ends_words(curve.law.interval_at(curve.target))
        parts.append(f"next {format(curve.prediction, style_of(curve.prediction, 3))}{ends} at {target_words(curve)}")
    return f"{curve.series.label}: {'; '.join(parts)}" if parts else ""
