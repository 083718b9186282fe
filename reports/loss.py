"""The figure of training and held-out losses. The function of a figure returns a Figure or, if there is nothing to
show, why not."""

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from .drawing import few_ticks
from .names import shared
from .protocols import losses_words
from .runs import Line, Run
from .style import COLUMN, PAGE, Look, blank, caption, label_ends, legend
from .table import Table

HELD_OUT = "held-out loss"  # the metric of scores
RAW = 6  # the raw values are drawn too if there are no more runs than that


def running_median(values: NDArray[np.floating], window: int) -> NDArray[np.floating]:
    """The median over a window around each value. The window is narrower but centred at the start, and cut off at the
    end."""
    half, series = window // 2, pd.Series(values)
    medians = series.rolling(2 * half + 1, center=True, min_periods=1).median().to_numpy(copy=True)
    of_first = series.iloc[: 2 * half].expanding().median().to_numpy()  # of the first 1, 2, 3 values
    for at in range(min(half, len(values))):
        medians[at] = of_first[min(2 * at, len(values) - 1)]
    return medians


def logged(run: Run, field: str) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    """Images seen and the values of a field of metrics.jsonl. A resumed run may have logged a step twice: the later
    line counts."""
    pairs = ((line.get("images"), line.get(field)) for line in run.metrics)
    curve = {images: value for images, value in pairs if images is not None and value is not None}
    return np.array(sorted(curve), dtype=np.int64), np.array([curve[images] for images in sorted(curve)])


def loss(runs: list[Run], overview: Table) -> Figure | str:
    """Training loss against images seen, and beside it the held-out loss if there is one: one line per run.

    The training loss is a running median, over the raw values if there are few runs. The held-out loss is that of the
    log; points are scores at kept moments, of the protocol that most have.
    """
    rows = [row for row in overview.rows if len(logged(row["run"], "loss")[0])]
    scores, left_out = _held_out_scores([row["run"] for row in overview.rows])
    held = [row for row in overview.rows if len(logged(row["run"], "heldout_loss")[0]) or scores.get(row["run"])]
    if not rows and not held:
        return "no run has logged a training loss"
    look = Look(overview)
    panels = [title for title, members in (("Training loss", rows), ("Held-out loss", held)) if members]
    figure = blank(PAGE if len(panels) > 1 else COLUMN, 2.6)
    ends: dict[str, list[tuple[float, float]]] = {}
    for axes, title in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        values: list[float] = []
        for row in rows if title == "Training loss" else held:
            drawn = _training(axes, row, look, len(rows)) if title == "Training loss" else []
            drawn = drawn or _held_out(axes, row, look, scores.get(row["run"], {}), len(held))
            ends.setdefault(row["group"], []).append(drawn[-1])
            values += [value for _, value in drawn]
        if 0 < 2 * min(values) < max(values):
            axes.set_yscale("log")
            few_ticks(axes.yaxis, *axes.get_ylim(), most=6)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set(xlabel="Images seen in training", ylabel=title)
    text = [shared(runs)] if len({row["title"] for row in overview.rows}) == 1 else []
    if left_out:
        rest = "1 score under another protocol is" if left_out == 1 else f"{left_out} scores under other protocols are"
        text.append(f"Held-out loss: {rest} left out")
    shown = {row["run"]: None for row in (*rows, *held)}
    if words := losses_words(shown):
        text.append(words.removesuffix("."))
    states = {group: [row["state"] for row in overview.rows if row["group"] == group] for group in ends}
    counts = set(Counter(run.group for run in shown).values())
    if same := len(counts) == 1 and max(counts) > 1:
        text.insert(0, f"A line for each of the {max(counts)} training seeds of a model")
    caption(figure, [". ".join(filter(None, text))])
    labels = {row["group"]: row["model_label"] for row in overview.rows}
    names = {group: labels[group] + group_words(states[group], same) for group in ends}
    _name(figure, names, look, ends, len(panels))
    return figure


def _training(axes: Axes, row: Line, look: Look, count: int) -> list[tuple[float, float]]:
    """Draw the training loss of one of `count` runs. Returns what was drawn: images and the running median."""
    images, values = logged(row["run"], "loss")
    smooth = running_median(values, max(3, len(values) // 10))
    if count <= RAW:
        axes.plot(images, values, color=look.colour(row["group"]), alpha=0.25, linewidth=0.6)
    axes.plot(images, smooth, **_line(look, row["group"], count))
    _end(axes, images[-1], smooth[-1], row, look)
    return list(zip(images.tolist(), smooth.tolist(), strict=True))


def _line(look: Look, group: str, count: int) -> dict[str, Any]:
    """How the line of one of `count` runs is drawn: thin if there are many."""
    style = look.line(group)
    return style | {"linewidth": 0.8} if count > 2 * RAW and not look.faint(group) else style


def _held_out(axes: Axes, row: Line, look: Look, scores: dict[int, float], count: int) -> list[tuple[float, float]]:
    """Draw the held-out loss of one of `count` runs: the log as a line, and scores as points."""
    images, values = logged(row["run"], "heldout_loss")
    style = _line(look, row["group"], count)
    if len(images):
        axes.plot(images, values, **style)
    if scores:
        points: dict[str, Any] = {
            "marker": look.marker(row["group"]),
            "markersize": 2.5 if look.faint(row["group"]) else 4,
        }
        points |= {"linestyle": "none"} if len(images) else {}
        axes.plot(list(scores), list(scores.values()), **style | points)
    drawn = sorted({**dict(zip(images.tolist(), values.tolist(), strict=True)), **scores}.items())
    if row["state"] != "done":
        _end(axes, *drawn[-1], row, look)
    return drawn


def _end(axes: Axes, x: float, y: float, row: Line, look: Look) -> None:
    """The last point of a line: the model's marker, or a cross if the run is not done."""
    marker = look.marker(row["group"]) if row["state"] == "done" else "x"
    style = {**look.line(row["group"]), "linestyle": "none", "marker": marker}
    axes.plot(x, y, **style, markersize=2.5 if look.faint(row["group"]) else 4.5)


def _held_out_scores(runs: list[Run]) -> tuple[dict[Run, dict[int, float]], int]:
    """The scores of each run that are held-out losses by images seen, under the protocol that most have, and how many
    have another one."""
    rows = [
        (run, row)
        for run in runs
        for row in (*run.earlier, *run.rows)
        if row["kind"] == "score" and row["state"] == "done" and row["metric"] == HELD_OUT and row.get("images_seen")
    ]
    counts = Counter(str(row["protocol"]) for _, row in rows)
    main = max(counts, key=lambda protocol: (counts[protocol], protocol), default="")
    scores: dict[Run, dict[int, float]] = {}
    for run, row in sorted(rows, key=lambda pair: pair[1]["images_seen"]):
        if str(row["protocol"]) == main:
            scores.setdefault(run, {})[row["images_seen"]] = row["value"]
    return scores, len(rows) - counts[main]


def _name(
    figure: Figure, names: dict[str, str], look: Look, ends: dict[str, list[tuple[float, float]]], panels: int
) -> None:
    """Names at the ends of the lines of a single panel if they fit, or else a legend."""
    clear = [group for group in names if not look.faint(group)]
    others = len(names) - len(clear)
    points = [(*np.mean(ends[group], axis=0).tolist(), names[group], look.colour(group)) for group in clear]
    if panels > 1 or others or not label_ends(figure.axes[0], points):
        keys: dict[str, Any] = {}
        for group in clear:
            keys[names[group]] = Line2D([], [], **look.line(group), marker=look.marker(group), markersize=4.5)
        legend(figure, keys, others)


def group_words(states: list[str], same: bool = False) -> str:
    """What stands behind the name of a group: the number of its runs, unless all groups have the `same`, and how those
    ended that are not done."""
    bad = Counter(state for state in states if state != "done")
    if len(states) == 1:
        return "".join(f" ({state})" for state in bad)
    words = [*([] if same else [f"{len(states)} seeds"]), *(f"{count} {state}" for state, count in bad.items())]
    return f" ({', '.join(words)})" if words else ""
