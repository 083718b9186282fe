"""The figure of throughput, forward and training."""

import itertools
from math import ceil

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from .names import shared
from .queries import setting_words, timings
from .runs import Line, Run
from .style import COLUMN, FAINT, PAGE, Look, blank, caption, wrapped
from .table import Table

DISTURBED = "*: something else kept the host busy during the measurement"


def throughput(runs: list[Run], overview: Table) -> Figure | str:
    """Images per second, forward and training: one bar per model (of several seeds, the one in the middle). Whiskers go
    from the 20th to the 80th percentile of a step. A bar that was disturbed is hatched and has an asterisk."""
    panels = []
    for mode, title in (("forward", "Forward"), ("train", "Training step")):
        settings = timings(runs, "speed", mode)
        panels += [(title, setting, settings, lines) for setting, lines in settings.items()]
    if not panels:
        return "no run was timed in exactly one way"
    look = Look(overview)
    timed = {run for *_, lines in panels for run in lines}
    models: dict[str, list[Line]] = {}
    for row in overview.rows:
        if row["run"] in timed:
            models.setdefault(row["group"], []).append(row)
    across, down = min(2, len(panels)), ceil(len(panels) / 2)
    labels = [wrapped(rows[0]["model_label"], 44 if across > 1 else 32) for rows in models.values()]
    heights = [0.06 + 0.11 * (1 + label.count("\n")) for label in labels]  # inches
    places = [end - height / 2 for end, height in zip(itertools.accumulate(heights), heights, strict=True)]
    figure = blank(PAGE if across > 1 else COLUMN, 0.05 + down * (0.5 + sum(heights)))
    disturbed = False
    for axes, panel in itertools.zip_longest(figure.subplots(down, across, sharey=True, squeeze=False).flat, panels):
        if panel is None:
            axes.set_visible(False)
            continue
        title, setting, settings, lines = panel
        for place, (group, rows) in zip(places, models.items(), strict=True):
            if seeds := [lines[row["run"]] for row in rows if row["run"] in lines]:
                line = sorted(seeds, key=lambda line: line["images_per_s"])[len(seeds) // 2]
                _bar(axes, place, line, FAINT if look.faint(group) else look.colour(group))
                disturbed = disturbed or bool(line.get("disturbed"))
        words = setting_words("speed", setting, among=settings)
        axes.set_title(title + (f", {words}" if words else ""))
        axes.set_yticks(places, labels)
        axes.set_ylim(sum(heights), 0)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.25)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("Images/s")
    facts: dict[str, dict[str, None]] = {}
    for title, setting, *_ in panels:
        facts.setdefault(setting_words("speed", setting), {})[title] = None
    settings = [f"{' and '.join(titles).capitalize()}: {words}" for words, titles in facts.items()]
    one = [shared(runs)] if len({rows[0]["title"] for rows in models.values()}) == 1 else []
    marks = "Bars: median step; whiskers: 20th to 80th percentile" + (f". {DISTURBED}" if disturbed else "")
    caption(figure, [*one, *(settings if len(settings) > 1 else facts), marks])
    return figure


def _bar(axes: Axes, place: float, line: Line, colour: str) -> None:
    speed, disturbed = line["images_per_s"], bool(line.get("disturbed"))
    ends = [speed * line["p50_ms"] / line[key] for key in ("p80_ms", "p20_ms")]
    hatch = {"hatch": "////", "edgecolor": "white", "linewidth": 0} if disturbed else {}
    axes.barh(place, speed, color=colour, height=0.11, **hatch)
    whisker = [[speed - ends[0]], [ends[1] - speed]]
    axes.errorbar(speed, place, xerr=whisker, color="0.15", capsize=2, lw=0.8, capthick=0.8)
    number = (f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}") + " *" * disturbed
    axes.annotate(number, (max(ends), place), (4, 0), textcoords="offset points", va="center", fontsize=7)
