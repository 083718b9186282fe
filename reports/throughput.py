"""The figure of throughput, forward and training."""

import itertools
from math import ceil

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from .queries import setting_words, timings
from .runs import Line, Run
from .style import Look, blank, wrapped
from .table import Table


def throughput(runs: list[Run], overview: Table) -> Figure | str:
    """Images per second, forward and training: one bar per model (of several seeds, the one in the middle). Whiskers go
    from the 20th to the 80th percentile of a step."""
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
    labels = [wrapped(rows[0]["model_label"], 32) for rows in models.values()]
    pitch = max(0.42, 0.18 * (1 + max(label.count("\n") for label in labels)))
    down = ceil(len(panels) / 2)
    figure = blank(7.6, 0.8 + down * (0.6 + pitch * len(models)))
    grid = figure.subplots(down, min(2, len(panels)), sharey=True, squeeze=False)
    for axes, panel in itertools.zip_longest(grid.flat, panels):
        if panel is None:
            axes.set_visible(False)
            continue
        title, setting, settings, lines = panel
        for place, (group, rows) in enumerate(models.items()):
            seeds = [lines[row["run"]] for row in rows if row["run"] in lines]
            if not seeds:
                continue
            line = sorted(seeds, key=lambda line: line["images_per_s"])[len(seeds) // 2]
            speed = line["images_per_s"]
            ends = [speed * line["p50_ms"] / line[key] for key in ("p80_ms", "p20_ms")]
            axes.barh(place, speed, color=look.colour(group), height=0.26 / pitch)
            axes.errorbar(speed, place, xerr=[[speed - ends[0]], [ends[1] - speed]], color="0.15", capsize=3, lw=1)
            number = f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"
            axes.annotate(number, (max(ends), place), (5, 0), textcoords="offset points", va="center", fontsize=8)
        words = setting_words("speed", setting, among=settings)
        axes.set_title(title + (f", {words}" if words else ""), fontsize=9)
        axes.set_yticks(range(len(models)), labels)
        axes.set_ylim(len(models) - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.2)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("images/s")
    facts = dict.fromkeys(setting_words("speed", setting) for _, setting, *_ in panels)
    caption = [wrapped("; ".join(facts), 110), "Bars: median step; whiskers: 20th to 80th percentile"]
    figure.supxlabel("\n".join(caption), fontsize=8, color="0.35")
    return figure
