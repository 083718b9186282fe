"""Records to figures. Each function gives a matplotlib Figure or, where there is nothing to show, why not."""

import itertools
import re
import textwrap
from collections.abc import Mapping
from math import ceil
from typing import Any, Literal

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from ..harness.record import Run
from .queries import Row, better, score_words, scores, setting_words, timings
from .table import Table

# Okabe and Ito's colours, safe for the colour-blind, but wine and grey for their pale yellow and their black.
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
    """A fixed look: a family has its marker and its first model's colour, every further model a colour of its own."""

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


def running_median(values: NDArray[np.floating], window: int) -> NDArray[np.floating]:
    """The median over a window around each value: narrower, but centred, at the start; cut off at the end."""
    halves = [min(window // 2, at) for at in range(len(values))]
    return np.array([np.median(values[at - half : at + half + 1]) for at, half in enumerate(halves)])


def loss(runs: list[Run], overview: Table) -> Figure | str:
    """Training loss against images seen, one line a run: a running median over the raw values."""
    look, folders = Look(overview), {run.path: run for run in runs}
    figure = blank(6.4, 3.8)
    axes = figure.add_subplot()
    keys: dict[str, Line2D] = {}
    ends: list[float] = []
    for row in overview.rows:
        # A run that was resumed may have logged a step twice: the later line counts.
        lines = folders[row["folder"]].metrics
        curve = {line["images"]: line["loss"] for line in lines if line.get("loss") is not None}
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


def legend_below(figure: Figure, keys: Mapping[str, Artist]) -> None:
    """A legend under the axes, in as many columns as its labels leave room for; the figure grows by its height."""
    labels = [wrapped(label, 78) for label in keys]
    columns = max(1, min(len(labels), 84 // (8 + max(map(len, labels)))))
    lines = sum(1 + label.count("\n") for label in labels)
    figure.set_figheight(figure.get_figheight() + 0.19 * ceil(lines / columns))
    figure.legend(list(keys.values()), labels, loc="outside lower center", ncols=columns)


def quality_vs_macs(runs: list[Run], overview: Table) -> Figure | str:
    """The first Frechet distance (else the first metric) against MACs; a point a model, with the spread over seeds."""
    found = scores(runs)
    if not found:
        return "no run has been evaluated"
    name = min(found, key=lambda name: (not re.match("FI?D", name), -len(found[name])))
    values: dict[str, list[float]] = {}
    macs, said = {}, {}
    for row in overview.rows:
        if row.get(name) is not None and row["macs"]:
            values.setdefault(row["group"], []).append(row[name])
            macs[row["group"]], said[row["group"]] = row["macs"] / 1e9, row
    if not values:
        return f"no run has both {name} and a cost"
    look, figure = Look(overview), blank(6.4, 4.2)
    axes = figure.add_subplot()
    points, labels, marks = [], [], []
    for group, seeds in values.items():
        mean, spread = float(np.mean(seeds)), float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None
        colour, marker = look.colour(group), look.marker(said[group]["family"])
        axes.errorbar(macs[group], mean, spread, color=colour, marker=marker, markersize=8, capsize=3)
        marks.append(Line2D([], [], color=colour, marker=marker, linestyle=""))
        points.append((macs[group], mean))
        labels.append(said[group]["model_label"] + (f" ({len(seeds)} seeds)" if len(seeds) > 1 else ""))
    span = max(macs.values()) / min(macs.values())
    if span > 4:
        axes.set_xscale("log")
        logarithmic(axes.xaxis, span)
    axes.margins(0.15, 0.2)
    facts = score_words(next(iter(found[name].values())))
    end = {"min": "; lower is better", "max": "; higher is better", "": ""}[better(name)]
    axes.set_xlabel("MACs (G) of one forward pass of one image")
    axes.set_ylabel(f"{name}\n{wrapped(facts + end, 60)}")
    if not place_labels(figure, axes, points, [wrapped(label, 30) for label in labels]):
        legend_below(figure, {f"{at}  {label}": marks[at - 1] for at, label in enumerate(labels, start=1)})
        place_labels(figure, axes, points, [str(number) for number in range(1, len(points) + 1)])
    return figure


def place_labels(figure: Figure, axes: Axes, points: list[tuple[float, float]], labels: list[str]) -> bool:
    """Label each point where its text meets the least of what is there already. With long labels that meet something
    wherever they go, nothing is labelled and False comes back; short ones (numbers) always stay."""
    figure.draw_without_rendering()  # the layout must stand before anything can be measured
    around = [(9, 0, "left", "center"), (-9, 0, "right", "center")]
    around += [(0, 9, "center", "bottom"), (0, -9, "center", "top")]
    around += [(x, y, "left" if x > 0 else "right", "bottom" if y > 0 else "top") for x in (7, -7) for y in (7, -7)]
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in axes.transData.transform(points)]
    notes, clear = [], True
    for point, label in zip(points, labels, strict=True):
        note = axes.annotate(label, point, (0, 0), textcoords="offset points", fontsize=8, in_layout=False)
        choices = []
        for right, up, side, level in around:
            note.set(position=(right, up), horizontalalignment=side, verticalalignment=level)
            box = note.get_window_extent()
            met = [box.width * box.height - _shared(box, axes.bbox), *(_shared(box, other) for other in taken)]
            choices.append((sum(met), len(choices), box))
        overlap, best, box = min(choices, key=lambda choice: choice[:2])
        right, up, side, level = around[best]
        note.set(position=(right, up), horizontalalignment=side, verticalalignment=level)
        notes.append(note)
        taken.append(box)
        clear = clear and overlap < 1
    if clear or max(map(len, labels)) < 3:
        return True
    for note in notes:
        note.remove()
    return False


def _shared(one: Bbox, other: Bbox) -> float:
    both = Bbox.intersection(one, other)
    return both.width * both.height if both else 0.0


def logarithmic(axis: Axis, span: float) -> None:
    """Ticks such as 0.2 and 30 for a logarithmic axis whose ends are a factor `span` apart."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span > 8 else (1, 1.5, 2, 3, 4, 5, 7)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def throughput(runs: list[Run], overview: Table) -> Figure | str:
    """Images a second, forward and training, a bar a model (of several seeds, the one in the middle); whiskers from the
    20th to the 80th percentile of a step."""
    panels = []
    for mode, title in (("forward", "Forward"), ("train", "Training step")):
        found = timings(runs, "bench", mode)
        panels += [(title, setting, found, lines) for setting, lines in found.items()]
    if not panels:
        return "no run has been timed"
    look = Look(overview)
    timed = {path for *_, lines in panels for path in lines}
    models: dict[str, list[Row]] = {}
    for row in overview.rows:
        if row["folder"] in timed:
            models.setdefault(row["group"], []).append(row)
    labels = [wrapped(rows[0]["model_label"], 32) for rows in models.values()]
    pitch = max(0.42, 0.18 * (1 + max(label.count("\n") for label in labels)))
    down = ceil(len(panels) / 2)
    figure = blank(7.6, 0.8 + down * (0.6 + pitch * len(models)))
    grid = figure.subplots(down, min(2, len(panels)), sharey=True, squeeze=False)
    for axes, panel in itertools.zip_longest(grid.flat, panels):
        if panel is None:
            axes.set_visible(False)
            continue
        title, setting, found, lines = panel
        for place, (group, rows) in enumerate(models.items()):
            seeds = [lines[row["folder"]] for row in rows if row["folder"] in lines]
            if not seeds:
                continue
            line = sorted(seeds, key=lambda line: line["images_per_s"])[len(seeds) // 2]
            speed = line["images_per_s"]
            ends = [speed * line["p50_ms"] / line[key] for key in ("p80_ms", "p20_ms")]
            axes.barh(place, speed, color=look.colour(group), height=0.26 / pitch)
            axes.errorbar(speed, place, xerr=[[speed - ends[0]], [ends[1] - speed]], color="0.15", capsize=3, lw=1)
            number = f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
            axes.annotate(number, (max(ends), place), (5, 0), textcoords="offset points", va="center", fontsize=8)
        words = setting_words("bench", setting, among=found)
        axes.set_title(title + (f", {words}" if words else ""), fontsize=9)
        axes.set_yticks(range(len(models)), labels)
        axes.set_ylim(len(models) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.2)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("images/s")
    settings = dict.fromkeys(setting_words("bench", setting) for _, setting, *_ in panels)
    caption = [wrapped("; ".join(settings), 110), "Bars: median step; whiskers: 20th to 80th percentile"]
    figure.supxlabel("\n".join(caption), fontsize=8, color="0.35")
    return figure
