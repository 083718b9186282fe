"""What figures share: ticks of logarithmic axes, titles of axes of scores, and labels beside points."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import ceil, floor, log10
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis, YAxis
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from numpy.typing import NDArray

from .differences import Mean
from .queries import better, score_words
from .runs import Line
from .style import SMALL, legible, wrapped

Box = tuple[float, float, float, float]  # left, bottom, right, top in pixels
SPACING = 4.0  # pixels between the boxes along a line

# Steps of a decade for ticks, the roundest first.
ROUND: tuple[tuple[float, ...], ...] = ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5), (1, 1.5, 2, 3, 4, 5, 7))
ROUND += tuple(tuple(one / parts for one in range(parts, 10 * parts)) for parts in (1, 2, 5, 10))


def few_ticks(axis: Axis, low: float, high: float, most: int = 4, apart: float = 0.0) -> None:
    """At most `most` ticks between the ends of a logarithmic axis, as round as they can be: in equal steps if the ends
    differ by a factor of less than 4. Two of them are the share `apart` of the axis from each other, or more."""
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    if high < 4 * low:
        steps = [one * 10.0**k for k in range(floor(log10(high - low)) - 2, decades[-1]) for one in (1, 2, 5)]
        every = [[step * number for number in range(ceil(low / step), floor(high / step) + 1)] for step in steps]
    else:
        every = [sorted(step * 10.0**k for k in decades for step in steps) for steps in ROUND]
        every += [[10.0**k for k in decades if k % apart == 0] for apart in (2, 3, 5, 10)]
    inside = [[tick for tick in ticks if low <= tick <= high] for ticks in every]
    least = (high / low) ** apart
    inside = [ticks for ticks in inside if all(right >= least * left for left, right in pairwise(ticks))]
    ticks = max((ticks for ticks in inside if len(ticks) <= most), key=len, default=[low, high])
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}" if value < 1e6 else f"{value:.0e}"))
    axis.set_minor_locator(NullLocator())


def cut_bars(means: Mapping[str, Mean], metric: str) -> tuple[dict[str, Mean], str]:
    """Means for a figure, and a sentence about bars that are cut. A bar that reaches below 0, where no distance or loss
    is, would leave no room for the others. Kernel distances may be negative, and are not cut."""
    wide = {group for group, mean in means.items() if mean.half is not None and mean.half >= mean.value > 0}
    if metric.startswith("K") or not wide:
        return dict(means), ""
    cut = {group: Mean(mean.value, mean.value / 2, mean.n) if group in wide else mean for group, mean in means.items()}
    return cut, "Bars that reach below 0 are cut to half of their mean on either side."


def ends_of(means: Mapping[str, Mean]) -> list[float]:
    """The ends of the bars of means."""
    return [mean.value + sign * (mean.half or 0.0) for mean in means.values() for sign in (-1, 1)]


def log_if_wide(axis: XAxis | YAxis, numbers: Sequence[float], most: int = 6) -> None:
    """Make an axis logarithmic if its numbers are above 0 and differ by a factor of more than 4."""
    if min(numbers) > 0 and max(numbers) > 4 * min(numbers):
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
        few_ticks(axis, *axis.get_view_interval(), most=most)


def round_numbers(low: float, high: float) -> list[float]:
    """Up to three round numbers between two ends of which the second is larger, or else the ends."""
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    every = [[number for k in decades for one in steps if low <= (number := one * 10.0**k) <= high] for steps in ROUND]
    best = next((numbers for numbers in every if len(numbers) > 1), [low, high])
    return best if len(best) < 4 else [best[0], best[len(best) // 2], best[-1]]


def face(is_marked: bool) -> Any:
    """How a point of a run that failed or is unfinished is drawn: hollow."""
    return {"markerfacecolor": "white"} if is_marked else {}


def title_of_scores(metric: str, row: Line, width: int) -> str:
    """The title of an axis of scores: the metric, what it compares in lines of `width` letters, and which end is
    better."""
    facts = score_words(row) if "count" in row else "of the logs"
    end = {"min": "; lower is better", "max": "; higher is better", "": ""}[better(metric)]
    return f"{metric}\n{wrapped(facts + end, width)}"


def place_labels(
    axes: Axes,
    points: list[tuple[float, float]],
    labels: list[str],
    colours: list[str],
    bars: Sequence[tuple[float, float, float]],
    radii: Sequence[float] | None = None,
) -> bool:
    """Label each point where the text overlaps least with what is already drawn: points, bars (x, low, high), lines and
    other labels. The figure must have been drawn, because there is nothing to measure before.
    Points have `radii` in points (by default 4); an empty label is left out.

    If a long label overlaps something but a line in every place, all labels are removed and the result is False. Short
    labels (numbers) always stay.
    """
    pixel = axes.figure.get_figure(root=True).dpi / 72
    sizes = [4.0] * len(points) if radii is None else radii
    places = axes.transData.transform(points)
    boxes: list[Box] = [
        (x - radius * pixel, y - radius * pixel, x + radius * pixel, y + radius * pixel)
        for (x, y), radius in zip(places.tolist(), sizes, strict=True)
    ]
    for x, low, high in bars:
        (left, bottom), (_, top) = axes.transData.transform([(x, low), (x, high)])
        boxes.append((left - 4, bottom, left + 4, top))
    lines = np.array(_along_lines(axes)).reshape(-1, 4)
    notes, are_long = [], max(map(len, labels)) > 2
    for point, (x, y), label, colour, radius in zip(points, places, labels, colours, sizes, strict=True):
        if not label:
            continue
        note = axes.annotate(label, point, (0, 0), textcoords="offset points", fontsize=SMALL, in_layout=False)
        note.set(color=legible(colour))
        notes.append(note)
        size, others = note.get_window_extent(), np.array(boxes)
        choices: list[tuple[bool, float, int, Box]] = []
        for right, up in _around(radius):
            left, bottom = x + right * pixel - _before(right, size.width), y + up * pixel - _before(up, size.height)
            box = (left, bottom, left + size.width, bottom + size.height)
            outside = size.width * size.height - _shared(box, np.array([axes.bbox.extents]))
            overlap = outside + _shared(box, others)
            choices.append((overlap >= 1, overlap + 0.5 * _shared(box, lines), len(choices), box))
        overlaps, _, best, box = min(choices)
        if are_long and overlaps:
            for each in notes:
                each.remove()
            return False
        right, up = _around(radius)[best]
        side = "left" if right > 0 else "right" if right else "center"
        level = "bottom" if up > 0 else "top" if up else "center"
        note.set(position=(right, up), horizontalalignment=side, verticalalignment=level)
        boxes.append(box)
    return True


def _around(radius: float) -> list[tuple[float, float]]:
    """The places of a label around a point in points: right, left, above, below and the corners."""
    far, near = radius + 4, 0.7 * radius + 2
    return [(far, 0), (-far, 0), (0, far), (0, -far), *((x, y) for x in (near, -near) for y in (near, -near))]


def _before(offset: float, size: float) -> float:
    """How much of the size of a label lies to the left of, or below, its place."""
    return 0.0 if offset > 0 else size if offset < 0 else size / 2


def _along_lines(axes: Axes) -> list[Box]:
    """Small boxes along the lines of axes."""
    boxes: list[Box] = []
    for line in axes.lines:
        if line.get_linestyle() not in ("None", "none", "", " "):
            corners = line.get_transform().transform(line.get_xydata())
            for start, end in pairwise(corners):
                steps = np.linspace(start, end, 1 + ceil(float(np.hypot(*(end - start))) / SPACING))
                boxes += [(x - 2, y - 2, x + 2, y + 2) for x, y in steps.tolist()]
    return boxes


def _shared(box: Box, others: NDArray[np.floating]) -> float:
    """The area that a box shares with others [N, 4], summed."""
    widths = np.minimum(box[2], others[:, 2]) - np.maximum(box[0], others[:, 0])
    heights = np.minimum(box[3], others[:, 3]) - np.maximum(box[1], others[:, 1])
    return float(np.sum(np.maximum(widths, 0) * np.maximum(heights, 0)))
