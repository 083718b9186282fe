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
ROUND: tuple[tuple[float, ...], ...] = ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5), (1, 1.5, 2, 3, 4, 5, 7))
ROUND += tuple(tuple(one / parts for one in range(parts, 10 * parts)) for parts in (1, 2, 5, 10))


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


def round_numbers(low: float, high: float) -> list[float]:
    """Up to three round numbers between two ends of which the second is larger, or else the ends."""
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    every = [[number for k in decades for one in steps if low <= (number := one * 10.0**k) <= high] for steps in ROUND]
    best = next((numbers for numbers in every if len(numbers) > 1), [low, high])
    return best if len(best) < 4 else [best[0], best[len(best) // 2], best[-1]]


def face(is_marked: bool) -> Any:
    """How a point of a run that failed or is unfinished is drawn: hollow."""
    return {"markerfacecolor": "white"} if is_marked else {}


def place_labels(
    figure: Figure,
    axes: Axes,
    points: list[tuple[float, float]],
    labels: list[str],
    bars: Sequence[tuple[float, float, float]],
    radii: Sequence[float] | None = None,
) -> bool:
    """Label each point where the text overlaps least with what is already drawn, including bars (x, low, high).
    Points have `radii` in points (by default 4); an empty label is left out.

    Where a long label overlaps something in every place, all labels are removed and the result is False. Short labels
    (numbers) always stay.
    """
    figure.draw_without_rendering()  # nothing can be measured before there is a layout
    pixel = figure.dpi / 72
    sizes = [4.0] * len(points) if radii is None else radii
    boxes = [
        Bbox.from_bounds(x - radius * pixel, y - radius * pixel, 2 * radius * pixel, 2 * radius * pixel)
        for (x, y), radius in zip(axes.transData.transform(points), sizes, strict=True)
    ]
    for x, low, high in bars:
        (left, bottom), (_, top) = axes.transData.transform([(x, low), (x, high)])
        boxes.append(Bbox.from_extents(left - 4, bottom, left + 4, top))
    notes, clear = [], True
    for point, label, radius in zip(points, labels, sizes, strict=True):
        if not label:
            continue
        far, near = radius + 4, 0.7 * radius + 2
        around = [(far, 0, "left", "center"), (-far, 0, "right", "center")]
        around += [(0, far, "center", "bottom"), (0, -far, "center", "top")]
        around += [
            (x, y, "left" if x > 0 else "right", "bottom" if y > 0 else "top")
            for x in (near, -near)
            for y in (near, -near)
        ]
        note = axes.annotate(label, point, (0, 0), textcoords="offset points", fontsize=7, in_layout=False)
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
