"""The figure of training losses. The function of a figure returns a Figure or, if there is nothing to show, why not."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from .runs import Run
from .style import Look, blank, legend_below, logarithmic
from .table import Table


def running_median(values: NDArray[np.floating], window: int) -> NDArray[np.floating]:
    """The median over a window around each value. The window is narrower but centred at the start, and cut off at the
    end."""
    halves = [min(window // 2, at) for at in range(len(values))]
    return np.array([np.median(values[at - half : at + half + 1]) for at, half in enumerate(halves)])


def loss(runs: list[Run], overview: Table) -> Figure | str:
    """Training loss against images seen, one line per run: a running median over the raw values."""
    look = Look(overview)
    figure = blank(6.4, 3.8)
    axes = figure.add_subplot()
    keys: dict[str, Line2D] = {}
    ends: list[float] = []
    for row in overview.rows:
        # A resumed run may have logged a step twice: the later line counts.
        pairs = ((line.get("images"), line.get("loss")) for line in row["run"].metrics)
        curve = {images: loss for images, loss in pairs if images is not None and loss is not None}
        if not curve:
            continue
        images = np.array(sorted(curve))
        raw = np.array([curve[seen] for seen in sorted(curve)])
        colour, dash = look.colour(row["group"]), look.dash(row["group"])
        smooth = running_median(raw, max(3, len(raw) // 10))
        axes.plot(images, raw, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(images, smooth, color=colour, linestyle=dash)
        axes.plot(images[-1], smooth[-1], color=colour, marker=look.marker(row["family"]), markersize=5)
        key = row["model_label"] + ("" if row["state"] == "done" else f" ({row['state']})")
        keys[key] = Line2D([], [], color=colour, linestyle=dash, marker=look.marker(row["family"]), markersize=5)
        ends += [float(raw.min()), float(raw.max())]
    if not keys:
        return "no run has logged a training loss"
    if 0 < 5 * min(ends) < max(ends):
        axes.set_yscale("log")
        logarithmic(axes.yaxis, max(ends) / min(ends))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="Images seen in training", ylabel="Training loss")
    legend_below(figure, keys)
    return figure
