"""Figures of benchmarks: speed against FLOPs, and speed and memory against the size of the image."""

from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from .drawing import few_ticks
from .names import line_of
from .runs import Line, Run
from .speed import MODES, baseline_of, crossings, fastest, measurements, turns
from .style import COLUMN, PAGE, Look, blank, caption, legend
from .table import Table

DISTURBED = "Empty markers: something else kept the host busy during the measurement"
MOST = 4  # sentences about crossings below the figure


def _main_setting(measured: list[Line]) -> tuple[list[Line], str]:
    """The measurements with the most frequent precision and device, and those two in words."""
    settings = [(row["precision"], row["device"]) for row in measured]
    main = max(settings, key=lambda setting: (settings.count(setting), str(setting)))
    return [row for row, setting in zip(measured, settings, strict=True) if setting == main], ", ".join(map(str, main))


def _panels(measured: list[Line]) -> list[str]:
    return [mode for mode in MODES if any(row["mode"] == mode and row["state"] == "done" for row in measured)]


def _of_one_process(runs: list[Run]) -> list[Line]:
    return [row for row in measurements(runs) if not row["processes"]]


def _lines(measured: list[Line], mode: str) -> list[dict[int, list[Line]]]:
    """The measurements of each model in a mode, by the side of the image; models are ordered by family and cost."""
    lines: dict[str, dict[int, list[Line]]] = {}
    for row in sorted(measured, key=lambda row: (row["family"], row.get("flops") or 0, row["label"])):
        if row["mode"] == mode:
            lines.setdefault(row["group"], {}).setdefault(row["px"], []).append(row)
    return list(lines.values())


def speed_vs_flops(runs: list[Run], baseline: str | None = None) -> Figure | str:
    """The most images per second against FLOPs: one panel per mode, one line per model through the sizes of the image.

    Along the dotted line, FLOPs per second are the most that the baseline reaches.
    """
    measured = [row for row in _of_one_process(runs) if row.get("flops")]
    if not _panels(measured):
        return "no model was timed with its cost"
    measured, setting = _main_setting(measured)
    modes, name, look = _panels(measured), baseline_of(measured, baseline), _look(measured)
    figure = blank(COLUMN if len(modes) == 1 else PAGE, 2.5)
    keys: dict[str, Any] = {}
    reach, disturbed = "", False
    for axes, mode in zip(figure.subplots(1, len(modes), squeeze=False).flat, modes, strict=True):
        lines = [[row for px in sorted(sizes) if (row := fastest(sizes[px]))] for sizes in _lines(measured, mode)]
        for best in filter(None, lines):
            style = look.points(best[0]["group"])
            axes.plot([row["flops"] / 1e9 for row in best], [row["images_per_s"] for row in best], **style)
            _mark_disturbed(axes, [(row["flops"] / 1e9, row) for row in best], style)
            disturbed = disturbed or any(row.get("disturbed") for row in best)
            if not look.faint(best[0]["group"]):
                keys[best[0]["label"]] = Line2D([], [], **style)
        every = [row for best in lines for row in best]
        if all(len(best) < 2 for best in lines):
            _join_sizes(axes, every, look)
        _logarithmic(axes, "x", [row["flops"] / 1e9 for row in every])
        _logarithmic(axes, "y", [row["images_per_s"] for row in every])
        rates = {row["images_per_s"] * row["flops"] / 1e9: row["label"] for row in every if row["model"] == name}
        if rates:
            ends = axes.get_xlim()
            same: dict[str, Any] = {"color": "0.5", "linewidth": 1, "scalex": False, "scaley": False}
            axes.plot(ends, [max(rates) / end for end in ends], ":", **same)
            reach = f"Dotted: as many FLOPs per second as {rates[max(rates)]} reaches at most"
        axes.set(title=MODES[mode], xlabel="FLOPs (G) of one forward pass of one image")
        axes.set_ylabel("Images/s at the best batch")
    caption(figure, [". ".join(filter(None, [setting, reach])), *([DISTURBED] if disturbed else [])])
    legend(figure, keys, _others(look, measured))
    return figure


def crossover(runs: list[Run], baseline: str | None = None) -> Figure | str:
    """The most images per second and the peak memory (at `_common_batches`) against the side of the image.

    There is one column per mode and one line per model. A cross at the bottom or top marks a size at which a model ran
    out of memory.
    """
    measured = _of_one_process(runs)
    if not any(len(sizes) > 1 for mode in _panels(measured) for sizes in _lines(measured, mode)):
        return "no model was timed at two sizes"
    measured, setting = _main_setting(measured)
    modes, look = _panels(measured), _look(measured)
    memory = any(row.get("peak_memory_gib") for row in measured)
    figure = blank(COLUMN if len(modes) == 1 else PAGE, 2.1 * (1 + memory))
    grid = figure.subplots(1 + memory, len(modes), squeeze=False)
    sides = sorted({row["px"] for row in measured})
    for axes in grid.flat:
        axes.set(xscale="log", xlabel="Side of the image (pixels)", xlim=(sides[0] / 1.2, sides[-1] * 1.2))
        axes.set_xticks(sides, [str(px) for px in sides])
        axes.xaxis.set_minor_locator(NullLocator())
    keys: dict[str, Any] = {}
    disturbed = False
    name = baseline_of(measured, baseline)
    for column, mode in enumerate(modes):
        curves: dict[str, dict[int, float]] = {}
        done = [row for row in measured if row["mode"] == mode and row["state"] == "done"]
        batches = _common_batches(_lines(measured, mode))
        differ = len(set(batches.values())) > 1
        for sizes in _lines(measured, mode):
            model = next(iter(sizes.values()))[0]
            style = look.points(model["group"])
            if not look.faint(model["group"]):
                keys[model["label"]] = Line2D([], [], **style)
            fast = {px: best for px in sorted(sizes) if (best := fastest(sizes[px]))}
            speeds = curves[model["group"]] = {px: best["images_per_s"] for px, best in fast.items()}
            _mark_disturbed(grid[0, column], list(fast.items()), style)
            disturbed = disturbed or any(row.get("disturbed") for row in fast.values())
            too_large = [px for px in sizes if px not in speeds]
            _draw(grid[0, column], speeds, too_large, 0.04, style)
            if memory:
                line = {"linestyle": "none"} if differ else {}  # no curve through batches
                _draw(grid[1, column], _peaks(sizes, batches), too_large, 0.96, style | line)
        _mark_crossings(grid[0, column], curves, [row["group"] for row in done if row["model"] == name], look)
        _logarithmic(grid[0, column], "y", [row["images_per_s"] for row in done])
        grid[0, column].set(title=MODES[mode], ylabel="Images/s at the best batch")
        if memory:
            peaks = [peak for sizes in _lines(measured, mode) for peak in _peaks(sizes, batches).values()]
            _logarithmic(grid[1, column], "y", peaks or [1.0])
            one = "" if differ or not batches else f", batch {max(batches.values())}"
            grid[1, column].set_ylabel(f"Peak memory (GiB){one}")
            if differ:
                grid[1, column].set_xlabel("Side of the image (pixels), × batch")
                grid[1, column].set_xticks(
                    sides, [f"{px}\n×{batches[px]}" if px in batches else str(px) for px in sides]
                )
    sentences = sorted(crossings(measured, name), key=lambda text: "no crossing" in text)
    more = [f"{len(sentences) - MOST} more: below bench.md"] if len(sentences) > MOST else []
    caption(figure, [*sentences[:MOST], *more, setting, *([DISTURBED] if disturbed else [])])
    legend(figure, keys, _others(look, measured))
    return figure


def _common_batches(lines: list[dict[int, list[Line]]]) -> dict[int, int]:
    """The batch at which memory is compared at each side: the smallest batch that every model has at every side.

    Where there is none, it is the largest batch that all models at that side have in common.
    """
    common: dict[int, set[int]] = {}
    for sizes in lines:
        for px, rows in sizes.items():
            batches = {row["batch_size"] for row in rows if row["state"] == "done" and row["peak_memory_gib"]}
            if batches:
                common[px] = common.get(px, batches) & batches
    everywhere = set.intersection(*common.values()) if common else set()
    return {px: min(everywhere) if everywhere else max(batches) for px, batches in common.items() if batches}


def _peaks(sizes: dict[int, list[Line]], batches: dict[int, int]) -> dict[int, float]:
    """{side of the image: peak memory at its batch}, the least over compile modes."""
    peaks = {}
    for px in sorted(sizes):
        rows = [row for row in sizes[px] if row["state"] == "done" and row["batch_size"] == batches.get(px)]
        if values := [row["peak_memory_gib"] for row in rows if row["peak_memory_gib"]]:
            peaks[px] = min(values)
    return peaks


def _look(measured: list[Line]) -> Look:
    every = [next(iter(sizes.values()))[0] for mode in MODES for sizes in _lines(measured, mode)]
    return Look(Table("", "", [], every))


def _mark_crossings(axes: Axes, curves: dict[str, dict[int, float]], baselines: list[str], look: Look) -> None:
    """A ring and the size in pixels where a model that is not faint overtakes the baseline or falls behind it."""
    base = curves.get(baselines[0], {}) if baselines else {}
    for group, curve in curves.items():
        common = sorted(curve.keys() & base.keys())
        if group in baselines or look.faint(group) or len(common) < 2:
            continue
        for px, _ in turns(common, [curve[size] / base[size] for size in common]):
            speed = float(np.exp(np.interp(np.log(px), np.log(common), [np.log(base[size]) for size in common])))
            axes.plot(px, speed, "o", markersize=9, markerfacecolor="none", color="0.15", markeredgewidth=0.8)
            axes.annotate(f"{px:.0f} px", (px, speed), (6, 5), textcoords="offset points", fontsize=7)


def _join_sizes(axes: Axes, best: list[Line], look: Look) -> None:
    """A thin line through the presets of a family at one size of the image, in the order of their FLOPs."""
    families: dict[tuple[str, str, int], dict[str, Line]] = {}
    for row in best:
        if not row["axes"]:
            families.setdefault((row["family"], line_of(row["title"], row["family"]), row["px"]), {})[row["group"]] = (
                row
            )
    for members in families.values():
        rows = sorted(members.values(), key=lambda row: row["flops"])
        if len(rows) > 1 and len(rows) == len({row["model"] for row in rows}):
            points = [row["flops"] / 1e9 for row in rows], [row["images_per_s"] for row in rows]
            axes.plot(*points, "-", color=look.colour(rows[len(rows) // 2]["group"]), linewidth=0.8, zorder=1)


def _others(look: Look, measured: list[Line]) -> int:
    return sum(look.faint(group) for group in {row["group"] for row in measured})


def _mark_disturbed(axes: Axes, points: list[tuple[float, Line]], style: dict[str, Any]) -> None:
    """Empty markers over the points (x, row) that were disturbed."""
    bad = [(x, row["images_per_s"]) for x, row in points if row.get("disturbed")]
    if bad:
        empty = {"linestyle": "none", "markerfacecolor": "white", "zorder": 3}
        axes.plot([x for x, _ in bad], [y for _, y in bad], **style | empty)


def _draw(axes: Axes, values: dict[int, float], absent: list[int], height: float, style: dict[str, Any]) -> None:
    axes.plot(list(values), list(values.values()), **style)
    axes.plot(absent, [height] * len(absent), "x", color=style["color"], transform=axes.get_xaxis_transform())


def _logarithmic(axes: Axes, side: Literal["x", "y"], values: list[float]) -> None:
    """A logarithmic axis around the values, with so few ticks that they are legible."""
    margin = max(1.15, (max(values) / min(values)) ** 0.07)
    low, high = min(values) / margin, max(values) * margin
    axes.set(**{f"{side}scale": "log", f"{side}lim": (low, high)})
    few_ticks(axes.xaxis if side == "x" else axes.yaxis, low, high, most=6)
