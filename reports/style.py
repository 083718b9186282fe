"""What all figures share: colours, markers, dashes, empty figures, legends and axes."""

import itertools
import textwrap
from collections.abc import Mapping
from math import ceil
from typing import Any, Literal

from matplotlib.artist import Artist
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .table import Table

# Okabe and Ito's colours, safe for the colour-blind, with wine and grey instead of their pale yellow and black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999999")
MARKERS = "osD^vPXp<>h*"
FAMILIES = ("lamamba", "dit", "adm")  # these keep their colour and marker in every report
DASHES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
STYLE: dict[Any, Any] = {
    "font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True,
    "grid.color": "0.9", "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.6,
    "pdf.fonttype": 42, "figure.constrained_layout.h_pad": 0.06, "figure.constrained_layout.w_pad": 0.06,
}  # fmt: skip


class Look:
    """Colours, dashes and markers of models: each family has a marker and the colour of its first model; every further
    model has a colour of its own."""

    def __init__(self, overview: Table) -> None:
        self.families = [*FAMILIES, *sorted({row["family"] for row in overview.rows} - set(FAMILIES))]
        further = itertools.count(len(self.families))
        self.place: dict[str, int] = {}
        started = set()
        for row in overview.rows:
            if row["group"] not in self.place:
                first = row["family"] not in started
                started.add(row["family"])
                self.place[row["group"]] = self.families.index(row["family"]) if first else next(further)

    def colour(self, group: str) -> str:
        return COLOURS[self.place[group] % len(COLOURS)]

    def dash(self, group: str) -> Literal["-", "--", ":", "-."]:
        return DASHES[self.place[group] // len(COLOURS) % len(DASHES)]

    def marker(self, family: str) -> str:
        return MARKERS[self.families.index(family) % len(MARKERS)]


def blank(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def wrapped(label: str, width: int) -> str:
    return textwrap.fill(label, width, break_on_hyphens=False)


def legend_below(figure: Figure, keys: Mapping[str, Artist]) -> None:
    """A legend below the axes, with as many columns as fit; the figure grows by the height of the legend."""
    labels = [wrapped(label, 78) for label in keys]
    columns = max(1, min(len(labels), 84 // (8 + max(map(len, labels)))))
    lines = sum(1 + label.count("\n") for label in labels)
    figure.set_figheight(figure.get_figheight() + 0.19 * ceil(lines / columns))
    figure.legend(list(keys.values()), labels, loc="outside lower center", ncols=columns)


def logarithmic(axis: Axis, span: float) -> None:
    """Ticks such as 0.2 and 30 for a logarithmic axis whose ends differ by a factor `span`."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span > 8 else (1, 1.5, 2, 3, 4, 5, 7)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
