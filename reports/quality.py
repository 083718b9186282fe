"""The figure of quality against FLOPs."""

import re

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .differences import mean_of
from .drawing import place_labels
from .protocols import rankable
from .queries import better, score_words, scores
from .runs import Run
from .seeds import over_seeds
from .style import Look, blank, legend_below, logarithmic, wrapped
from .table import Table


def quality_vs_flops(runs: list[Run], overview: Table) -> Figure | str:
    """The first Frechet distance (or else the first metric) against FLOPs, in which scans count: one point per model.

    The point is the mean over training seeds, and its bar the 95 % interval (Student's t) if there are several.
    """
    columns = scores(runs)
    if not columns:
        return "no run has been evaluated"
    name = min(columns, key=lambda name: (not re.match("FI?D", name), -len(columns[name])))
    flops = {row["group"]: row["flops"] / 1e9 for row in overview.rows if row["flops"]}
    members = {row["group"]: row for row in overview.rows}
    values = {group: seeds for group, seeds in over_seeds(overview.rows, name).items() if group in flops}
    if not values:
        return f"no run has both {name} and a cost"
    look, figure = Look(overview), blank(6.4, 4.2)
    axes = figure.add_subplot()
    points, labels, marks, bars = [], [], [], []
    for group, seeds in values.items():
        mean = mean_of(seeds.values())
        colour, marker = look.colour(group), look.marker(members[group]["family"])
        axes.errorbar(flops[group], mean.value, mean.half, color=colour, marker=marker, markersize=8, capsize=3)
        marks.append(Line2D([], [], color=colour, marker=marker, linestyle=""))
        points.append((flops[group], mean.value))
        bars += [(flops[group], mean.low, mean.high)] if mean.half is not None else []
        labels.append(members[group]["model_label"] + (f" ({mean.n}\N{NO-BREAK SPACE}seeds)" if mean.n > 1 else ""))
    shown = [flops[group] for group in values]
    span = max(shown) / min(shown)
    if span > 4:
        axes.set_xscale("log")
        logarithmic(axes.xaxis, span)
    axes.margins(0.15, 0.2)
    facts = score_words(next(iter(columns[name].values())))
    end = {"min": "; lower is better", "max": "; higher is better", "": ""}[better(name)]
    caption = ["Bars: 95 % intervals of means over training seeds"] if bars else []
    caption += [f"No best: {why}"] if (why := rankable(runs, columns[name])) and len(values) > 1 else []
    figure.supxlabel("\n".join(caption), fontsize=8, color="0.35")
    axes.set_xlabel("FLOPs (G) of one forward pass of one image")
    axes.set_ylabel(f"{name}\n{wrapped(facts + end, 60)}")
    if not place_labels(figure, axes, points, [wrapped(label, 30) for label in labels], bars):
        legend_below(figure, {f"{at}  {label}": marks[at - 1] for at, label in enumerate(labels, start=1)})
        place_labels(figure, axes, points, [str(number) for number in range(1, len(points) + 1)], bars)
    return figure
