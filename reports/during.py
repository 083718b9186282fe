"""The figure of quality during training: against images seen, training FLOPs and hours."""

from collections.abc import Mapping
from math import nan
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from ..harness.scoring.protocol import target_of
from .differences import seed_of
from .drawing import few_ticks, title_of_scores
from .evidence import Evidence
from .moments import curves, first_column, flops_of, hours_notes, hours_of, images_of, is_marked, main_device
from .protocols import losses_words
from .runs import Line, Run
from .scaling import hours_words
from .style import PAGE, blank, caption, legend, wrapped

HELDOUT = "held-out loss"  # the metric, as a score's record calls it
LOGGED = "held-out loss (log)"
SEEDS, MARKED = "Thick: means over training seeds; thin: seeds.", "*: a run failed or is unfinished."  # under a figure


class Trajectory(NamedTuple):
    """One training's values against one measure, in the order of images."""

    images: list[int]
    at: list[float]
    values: list[float]


def logged_losses(runs: list[Run]) -> dict[Run, list[Line]]:
    """The held-out losses in the logs of trainings, as rows of scores."""
    result: dict[Run, list[Line]] = {}
    for run in runs:
        cost = run.last("cost", "done")
        lines = {line["images"]: line for line in run.metrics if line.get("heldout_loss") is not None}
        rows = [
            {"value": line["heldout_loss"], "images_seen": images, "training_seconds": line.get("seconds")}
            | {"training_flops": 3 * cost["flops"] * images if cost else None}
            for images, line in sorted(lines.items())
        ]
        if rows:
            result[run] = rows
    return result


def columns_of(evidence: Evidence) -> dict[str, dict[Run, list[Line]]]:
    """The columns to draw, with runs that have values at two moments or more: the first Frechet distance (or else the
    first metric), and the held-out loss, of scores or else of the logs."""
    every = curves(evidence.runs)
    losses = {name: scored for name, scored in every.items() if name.startswith(HELDOUT)}
    others = {name: scored for name, scored in every.items() if name not in losses}
    if not losses and (logged := {run: rows for run, rows in logged_losses(evidence.runs).items() if len(rows) > 1}):
        targets = {target_of(run.info["config"]): None for run in logged}
        losses = {
            LOGGED if len(targets) == 1 else f"{LOGGED}, {target}": {
                run: rows for run, rows in logged.items() if target_of(run.info["config"]) == target
            }
            for target in targets
        }
    main = {name: others[name] for name in [first_column(others)]} if others else {}
    return main | losses


def trajectories(scored: Mapping[Run, list[Line]], measure: str) -> dict[Run, Trajectory]:
    """The values of each run against "images", "flops" (of training, in 1e18) or "hours" (on the main device)."""
    device = main_device(scored)
    result: dict[Run, Trajectory] = {}
    for run, rows in scored.items():
        points: list[tuple[int, float, float]] = []
        for row in rows:
            images, hours = images_of(run, row), hours_of(run, row)
            at = {
                "images": images,
                "flops": flops / 1e18 if (flops := flops_of(run, row)) else None,
                "hours": hours[0] if hours and hours[1] == device else None,
            }[measure]
            if images and at:
                points.append((images, float(at), row["value"]))
        if len(points) > 1:
            images, at, values = zip(*points, strict=True)
            result[run] = Trajectory(list(images), list(at), list(values))
    return result


def of_seeds(values: Mapping[Run, Trajectory]) -> list[Trajectory]:
    """The values of each seed. Two folders of one seed are one seed."""
    folders: dict[int, list[Trajectory]] = {}
    for run, one in values.items():
        folders.setdefault(seed_of(run), []).append(one)
    return [mean_trajectory(each) for each in folders.values()]


def mean_trajectory(seeds: list[Trajectory]) -> Trajectory:
    """The mean over seeds at the numbers of images that all of them have."""
    common = sorted(set.intersection(*(set(one.images) for one in seeds)))
    places = [[one.images.index(images) for images in common] for one in seeds]
    at = [fmean(one.at[place[k]] for one, place in zip(seeds, places, strict=True)) for k in range(len(common))]
    values = [fmean(one.values[place[k]] for one, place in zip(seeds, places, strict=True)) for k in range(len(common))]
    return Trajectory(common, at, values)


def during(evidence: Evidence) -> Figure | str | Mapping[str, Figure | str]:
    """Quality at every moment of training that was scored, for each study: a thick line a model, the mean over seeds,
    with a thin line for each of several seeds. Panels: images seen, training FLOPs and hours."""
    several = len(evidence.studies) > 1
    figures = {
        f"during_{study}" if several else "during": figure
        for study, part in evidence.studies.items()
        if (figure := _draw(part)) is not None
    }
    return dict(figures) or "no training was scored at two moments"


def _draw(evidence: Evidence) -> Figure | None:
    columns = columns_of(evidence)
    if not columns:
        return None
    every = {
        name: {m: trajectories(scored, m) for m in ("images", "flops", "hours")} for name, scored in columns.items()
    }
    measures = [m for m in ("images", "flops", "hours") if any(every[name][m] for name in columns)]
    if not measures:
        return None
    look = evidence.look
    figure = blank(PAGE, 0.25 + 1.85 * len(columns))
    grid = figure.subplots(len(columns), len(measures), sharex="col", sharey="row", squeeze=False)
    keys: dict[str, Line2D] = {}
    drawn = set()
    seeds_shown = marked = False
    labels = {row["group"]: row["model_label"] for row in evidence.overview.rows}
    for row, (name, panels) in zip(grid, every.items(), strict=True):
        for axes, measure in zip(row, measures, strict=True):
            by_group: dict[str, list[Run]] = {}
            for run in panels[measure]:
                by_group.setdefault(run.group, []).append(run)
            for group in (group for group in labels if group in by_group):
                runs = by_group[group]
                seeds_shown |= len({seed_of(run) for run in runs}) > 1
                marked |= any(map(is_marked, runs))
                draw_group(evidence, axes, group, {run: panels[measure][run] for run in runs})
                drawn.add(group)
                if not look.faint(group):
                    end = " *" if any(is_marked(run) for run in runs) else ""
                    keys[labels[group] + end] = Line2D([], [], **style_of(evidence, group))
        row[0].set_ylabel(title_of_scores(name, next(iter(columns[name].values()))[0], 30))
    device = main_device(next(iter(columns.values())))
    titles = {"images": "Images seen", "flops": "FLOPs (1e18) of the training", "hours": hours_words(device)}
    for axes, measure in zip(grid[-1], measures, strict=True):
        axes.set_xlabel(wrapped(titles[measure], 24))
    for axes in grid.flat:
        _scale(axes)
    text = SEEDS if seeds_shown else ""
    text += f" {MARKED}" * marked
    text += " " + losses_words(columns.get(LOGGED, {}), heldout=True)
    notes = hours_notes({run for scored in columns.values() for run in scored}) if "hours" in measures else []
    caption(figure, [text.strip(), *notes])
    legend(figure, keys, len(drawn) - len(keys))
    return figure


def draw_group(evidence: Evidence, axes: Axes, group: str, values: Mapping[Run, Trajectory]) -> None:
    """Draw the mean of a model's trainings, and a thin line for each of several seeds."""
    look, seeds = evidence.look, of_seeds(values)
    if len(seeds) > 1 and not look.faint(group):
        line = ([x for one in seeds for x in (*getattr(one, name), nan)] for name in ("at", "values"))
        axes.plot(*line, color=look.colour(group), linewidth=0.5, alpha=0.5, zorder=1)  # one line is fast
    mean = mean_trajectory(seeds)
    axes.plot(mean.at, mean.values, **style_of(evidence, group))


def style_of(evidence: Evidence, group: str) -> dict[str, Any]:
    """How the line of a model's mean looks."""
    style = evidence.look.points(group)
    return style | {"markersize": min(style["markersize"], 4.0)}


def _scale(axes: Axes) -> None:
    """Logarithmic axes if the values differ by a factor of 4 or more; whole numbers of images as 5M."""
    for axis, ends in ((axes.xaxis, axes.dataLim.intervalx), (axes.yaxis, axes.dataLim.intervaly)):
        low, high = float(ends[0]), float(ends[1])
        if 0 < 4 * low < high:
            axes.set(**{f"{axis.axis_name}scale": "log"})
            few_ticks(axis, *axis.get_view_interval(), most=3 if axis.axis_name == "x" else 5)
        elif axis.axis_name == "x":
            axis.set_major_locator(MaxNLocator(4))
        if high >= 1e4:
            axis.set_major_formatter(EngFormatter(sep=""))
