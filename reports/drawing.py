"""What figures of quality share: ticks of narrow logarithmic axes, and labels beside points."""

from collections.abc import Sequence
from math import ceil, floor, log10
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

# Steps of a decade for ticks, the roundest first.
ROUND = ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5), (1, 1.5, 2, 3, 4, 5, 7), tuple(one / 10 for one in range(10, 100)))


def few_ticks(axis: Axis, low: float, high: float, most: int = 4) -> None:
    """At most `most` ticks between the ends of a logarithmic axis, as round as they can be."""
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    every = [sorted(step * 10.0**k for k in decades for step in steps) for steps in ROUND]
    every += [[10.0**k for k in decades if k % apart == 0] for apart in (2, 3, 5, 10)]
    inside = [[tick for tick in ticks if low <= tick <= high] for ticks in every]
    ticks = max((ticks for ticks in inside if len(ticks) <= most), key=len, default=[low, high])
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}" if value < 1e6 else f"{value:.0e}"))
    axis.set_minor_locator(NullLocator())


def logarithmic_axes(axes: Axes, most: int = 5) -> None:
    """Both axes logarithmic, with few ticks; draw first, because the ends are those of what is drawn."""
    axes.set(xscale="log", yscale="log")
    few_ticks(axes.xaxis, *axes.get_xlim(), most=most)
    few_ticks(axes.yaxis, *axes.get_ylim(), most=most + 2)


def face(is_marked: bool) -> Any:
    """How a point of a run that failed or is unfinished is drawn: hollow."""
    return {"markerfacecolor": "white"} if is_marked else {}


def place_labels(
    figure: Figure,
    axes: Axes,
    points: list[tuple[float, float]],
    labels: list[str],
    bars: Sequence[tuple[float, float, float]],
) -> bool:
    """Label each point where the text overlaps least with what is already drawn, including bars (x, low, high).

    Where a long label overlaps something in every place, all labels are removed and the result is False. Short labels
    (numbers) always stay.
    """
    figure.draw_without_rendering()  # nothing can be measured before there is a layout
    around = [(9, 0, "left", "center"), (-9, 0, "right", "center")]
    around += [(0, 9, "center", "bottom"), (0, -9, "center", "top")]
    around += [(x, y, "left" if x > 0 else "right", "bottom" if y > 0 else "top") for x in (7, -7) for y in (7, -7)]
    boxes = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in axes.transData.transform(points)]
    for x, low, high in bars:
        (left, bottom), (_, top) = axes.transData.transform([(x, low), (x, high)])
        boxes.append(Bbox.from_extents(left - 4, bottom, left + 4, top))
    notes, clear = [], True
    for point, label in zip(points, labels, strict=True):
        note = axes.annotate(label, point, (0, 0), textcoords="offset points", fontsize=8, in_layout=False)
        choices = []
        for right, up, side, level in around:
            note.set(position=(right, up), horizontalalignment=side, verticalalignment=level)
            box = note.get_window_extent()
            areas = [box.width * box.height - _shared(box, axes.bbox), *(_shared(box, other) for other in boxes)]
            choices.append((sum(areas), len(choices), box))
        overlap, best, box = min(choices, key=lambda choice: choice[:2])
        right, up, side, level = around[best]
        note.set(position=(right, up), horizontalalignment=side, verticalalignment=level)
        notes.append(note)
        boxes.append(box)
        clear = clear and overlap < 1
    if clear or max(map(len, labels)) < 3:
        return True
    for note in notes:
        note.remove()
    return False


def _shared(one: Bbox, other: Bbox) -> float:
    both = Bbox.intersection(one, other)
    return both.width * both.height if both else 0.0
