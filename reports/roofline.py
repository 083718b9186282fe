"""The roofline of operators: work per second against work per byte, below the limits of the machine."""

from statistics import median
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from .runs import Line, Run
from .speed import measurements
from .style import COLOURS, COLUMN, MARKERS, PAGE, blank, caption, legend

KINDS = {"flops": ("FLOPs", "FLOP/s"), "exponentials": ("Exponentials", "/s")}  # and the unit of their rate
DISTURBED = "Crosses: something else kept the host busy during the measurement."


class Point(NamedTuple):
    """One measurement: work per byte, work per second, and its row."""

    intensity: float
    rate: float
    row: Line


def points(rows: list[Line], kind: str) -> list[Point]:
    """The measurements that have work of a kind, `flops` (of matrix products and convolutions) or `exponentials`.

    Work and bytes are those that the floors count, so that both are of the operator and not of an implementation: the
    inputs and outputs once through memory.
    """
    result = []
    for row in rows:
        work, memory = (_amount(row, name) for name in (kind, "bytes"))
        if work and memory:
            result.append(Point(work / memory, 1000 * work / row["p50_ms"], row))
    return result


def _amount(row: Line, name: str) -> float:
    """FLOPs, exponentials or bytes of one call."""
    return (row.get(f"{name}_floor_ms") or 0.0) * (row.get(f"{name}_per_s") or 0.0) / 1000


def roofline(runs: list[Run]) -> Figure | str:
    """FLOPs per second of each operator against its FLOPs per byte, and the same of exponentials, which bound a scan.

    A colour is an operator, a marker a backend, and an empty marker both passes. The roof is the lower of two limits:
    that of the memory, which is what a large copy reaches, and that of the arithmetic units. Points are of the device
    and precision that most have.
    """
    rows = [row for row in measurements(runs, "operator_speed") if row["state"] == "done" and row.get("p50_ms")]
    settings = [(str(row["device"]), str(row["precision"])) for row in rows]
    main = max(settings, key=lambda setting: (settings.count(setting), setting), default=("", ""))
    rows = [row for row, setting in zip(rows, settings, strict=True) if setting == main]
    panels = {kind: drawn for kind in KINDS if (drawn := points(rows, kind))}
    if not panels:
        return "no operator was timed beside the floors of its machine"
    operators = sorted({row["operator"] for row in rows})
    colours = {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(operators)}
    backends = sorted({_backend(point.row) for drawn in panels.values() for point in drawn})
    markers = {name: MARKERS[at % len(MARKERS)] for at, name in enumerate(backends)}
    figure = blank(PAGE if len(panels) > 1 else COLUMN, 2.5)
    for axes, (kind, drawn) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        _roof(axes, drawn, kind)
        _points(axes, drawn, colours, markers)
        axes.set(xlabel=f"{KINDS[kind][0]} per byte", ylabel=f"{KINDS[kind][0]} per second")
    note = [DISTURBED] if any(point.row.get("disturbed") for drawn in panels.values() for point in drawn) else []
    caption(figure, [f"{main[0]}, {main[1]}. Filled: forward; empty: forward and backward.", *note])
    keys: dict[str, Any] = {
        name.replace("_", " "): Line2D([], [], color=colours[name], linewidth=4)
        for name in operators
        if any(point.row["operator"] == name for drawn in panels.values() for point in drawn)
    }
    for name, marker in markers.items():
        keys[name] = Line2D([], [], color="0.3", linestyle="none", marker=marker, markersize=4.5)
    legend(figure, keys)
    return figure


def _backend(row: Line) -> str:
    return row["backend"].partition("=")[2]


def _points(axes: Axes, drawn: list[Point], colours: dict[str, str], markers: dict[str, str]) -> None:
    clouds: dict[tuple[str, str, str], list[Point]] = {}
    for point in drawn:
        clouds.setdefault((point.row["operator"], _backend(point.row), point.row["pass"]), []).append(point)
    for (operator, backend, part), members in clouds.items():
        colour, marker = colours[operator], markers[backend]
        fill = colour if part == "forward" else "white"
        x, y = [point.intensity for point in members], [point.rate for point in members]
        axes.plot(x, y, linestyle="none", color=colour, marker=marker, markersize=4, markerfacecolor=fill, mew=0.7)
    bad = [point for point in drawn if point.row.get("disturbed")]
    if bad:
        axes.plot([point.intensity for point in bad], [point.rate for point in bad], "kx", markersize=6, mew=0.7)


def _roof(axes: Axes, drawn: list[Point], kind: str) -> None:
    """The limits of the memory and of the arithmetic units, each with its number."""
    memory = median(point.row["bytes_per_s"] for point in drawn)
    most = median(point.row[f"{kind}_per_s"] for point in drawn)
    ridge = most / memory
    low = min(*(point.intensity for point in drawn), ridge) / 2
    high = max(*(point.intensity for point in drawn), ridge) * 3
    axes.plot([low, ridge, high], [memory * low, most, most], color="0.15", linewidth=1)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_ylim(min(*(point.rate for point in drawn), memory * low) / 2, most * 4)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=7))
        axis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_formatter("{x:g}")
    word = EngFormatter(places=1)
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "color": "0.15"}
    axes.annotate(f"{word(most)}{KINDS[kind][1]}", (high, most), (-2, 3), ha="right", **style)
    middle = (low * ridge) ** 0.5
    axes.annotate(f"{word(memory)}B/s", (middle, memory * middle), (-4, 3), ha="right", **style)
