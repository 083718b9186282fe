"""The figure of quality against speed, with the models that no other one beats in both."""

from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from .differences import Mean, by_seed, mean_of, seed_of
from .drawing import face, few_ticks, place_labels, title_of_scores
from .evidence import Evidence
from .moments import at_equal_images, first_column, images_words, is_marked, middle, moments, series_of
from .protocols import rankable
from .queries import better
from .runs import Line, Run
from .style import COLUMN, FAINT, PAGE, blank, caption, legend, wrapped

Name = TypeVar("Name", bound=Hashable)
MODES = {"forward": "Forward", "train": "Training step"}
# Speeds compare where these are equal. Any compile mode may be the fastest of its model.
SAME = ("precision", "batch_size", "input_size", "checkpointing", "processes")
MOST_NAMES = 6  # models that are all named, whether or not they are members of the front


class Speeds(NamedTuple):
    """The fastest measurement of each model in one mode and setting: {group: row}, and the setting in words."""

    rows: dict[str, Line]
    setting: str


def front(points: Mapping[Name, tuple[float, float]], best: str) -> list[Name]:
    """The names whose (speed, quality) no other point reaches or exceeds in both and exceeds in one, by rising speed.

    More speed is better; `best` says which quality is: "min" or "max". Equal points are both members.
    """
    sign = -1 if best == "min" else 1
    values = {name: (speed, sign * quality) for name, (speed, quality) in points.items()}

    def is_beaten(own: tuple[float, float]) -> bool:
        return any(other[0] >= own[0] and other[1] >= own[1] and other != own for other in values.values())

    return sorted((name for name, own in values.items() if not is_beaten(own)), key=lambda name: points[name][0])


def speeds_of(runs: list[Run], groups: set[str], mode: str) -> Speeds | None:
    """The images per second of models in the setting (device, precision, batch, size of the input) that most of them
    share; of several such settings, that of the largest batch."""
    settings: dict[tuple[Any, ...], dict[str, Line]] = {}
    for run in runs:
        for row in run.rows:
            if run.group in groups and row["kind"] == "speed" and row["state"] == "done" and row["mode"] == mode:
                device = (row.get("provenance") or {}).get("device")
                rows = settings.setdefault((device, *(row.get(name) for name in SAME)), {})
                known = rows.get(run.group)
                if known is None or row["images_per_s"] > known["images_per_s"]:
                    rows[run.group] = row
    if not settings:
        return None
    setting = max(settings, key=lambda one: (len(settings[one]), one[2] or 0, str(one)))
    device, precision, batch, _, checkpointing, processes = setting
    words = [
        device,
        precision,
        f"batch {batch}",
        checkpointing and "checkpointed",
        processes and f"{processes} processes",
    ]
    return Speeds(settings[setting], ", ".join(str(word) for word in words if word))


def pareto(evidence: Evidence) -> Figure | str:
    """The first Frechet distance (or else the first metric) at equal images against images per second, forward and in
    training. The line is the front of the means: no other model is both as fast and as good."""
    columns = {name: rows for name, rows in moments(evidence.runs).items() if better(name)}
    if not columns:
        return "no run has been evaluated"
    name = first_column(columns)
    equal = at_equal_images(columns[name])
    values: dict[str, list[tuple[int, float]]] = {}
    for run, row in equal.rows.items():
        values.setdefault(run.group, []).append((seed_of(run), row["value"]))
    means = {group: mean_of(by_seed(pairs).values()) for group, pairs in values.items()}
    panels = {mode: speeds for mode in MODES if (speeds := speeds_of(evidence.runs, set(means), mode))}
    panels = {mode: speeds for mode, speeds in panels.items() if len(speeds.rows) > 1}
    if not panels:
        return "no two models with a score were timed in one setting"
    marked = {run.group for run in equal.rows if is_marked(run)}
    figure = blank(PAGE if len(panels) > 1 else COLUMN, 2.7)
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    grid[0].set_ylabel(title_of_scores(name, next(iter(equal.rows.values())), 34))
    shown = {group for speeds in panels.values() for group in speeds.rows}
    fronts = {}
    for axes, (mode, speeds) in zip(grid, panels.items(), strict=True):
        points = {group: (row["images_per_s"], means[group].value) for group, row in speeds.rows.items()}
        fronts[mode] = front(points, better(name))
        _draw(evidence, axes, points, means, speeds, marked, fronts[mode], few=len(shown) <= MOST_NAMES)
        axes.set_title(MODES[mode])
        axes.set_xlabel("Images/s")
    facts = {
        "Line: the front of the means.": any(len(each) > 1 for each in fronts.values()),
        "Bars: 95 % intervals over training seeds.": any(means[group].half is not None for group in shown),
        "Hollow: disturbed, or of a run that failed or is unfinished.": any(
            _is_hollow(group, speeds, marked) for speeds in panels.values() for group in speeds.rows
        ),
    }
    settings: dict[str, list[str]] = {}
    for mode, speeds in panels.items():
        settings.setdefault(speeds.setting, []).append(MODES[mode])
    lines = [" ".join([*(text for text, holds in facts.items() if holds), images_words(equal)])]
    for setting, modes in settings.items():
        lines.append(f"{' and '.join(modes).capitalize()}: {setting}, each in its fastest mode.")
    lines += [f"The front is no ranking, because {why}."] if (why := rankable(equal.rows, equal.rows)) else []
    caption(figure, lines)
    _label(evidence, figure, list(grid), panels, means, fronts)
    return figure


def _is_hollow(group: str, speeds: Speeds, marked: set[str]) -> bool:
    return group in marked or bool(speeds.rows[group].get("disturbed"))


def _draw(
    evidence: Evidence,
    axes: Axes,
    points: Mapping[str, tuple[float, float]],
    means: Mapping[str, Mean],
    speeds: Speeds,
    marked: set[str],
    members: list[str],
    few: bool,
) -> None:
    look = evidence.look
    joined = {
        group for series in series_of(evidence.overview.rows) if len(series.groups) > 1 for group in series.groups
    }
    for group, (speed, quality) in points.items():
        is_named = few or group in members or group in joined
        colour, order = look.colour(group) if is_named else FAINT, 3 if group in members else 2
        axes.errorbar(
            speed, quality, means[group].half, color=colour, marker=look.marker(group), zorder=order,
            markersize=look.size(group) ** 0.5, capsize=2, linewidth=1, **face(_is_hollow(group, speeds, marked)),
        )  # fmt: skip
    corners = [points[members[0]]]
    for group in members[1:]:  # as fast as the next member, as good as it
        corners += [(corners[-1][0], points[group][1]), points[group]]
    axes.plot(*zip(*corners, strict=True), color="0.35", linewidth=0.9, linestyle="--", zorder=1)
    axes.margins(0.15, 0.2)
    if max(speed for speed, _ in points.values()) > 4 * min(speed for speed, _ in points.values()):
        axes.set_xscale("log")
        few_ticks(axes.xaxis, *axes.get_xlim(), most=6)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))


def _label(
    evidence: Evidence,
    figure: Figure,
    grid: list[Axes],
    panels: Mapping[str, Speeds],
    means: Mapping[str, Mean],
    fronts: Mapping[str, list[str]],
) -> None:
    """The names of all models if they are few, or else of the members of each front; numbers with a legend if names do
    not fit. The others have the colour of their family."""
    look = evidence.look
    names = {row["group"]: row["model_label"] for row in evidence.overview.rows}
    members = list(dict.fromkeys(group for each in fronts.values() for group in each))
    every = list(dict.fromkeys(group for speeds in panels.values() for group in speeds.rows))
    named = every if len(every) <= MOST_NAMES else members
    numbers = {group: str(number) for number, group in enumerate(named, start=1)}

    def place(texts: Mapping[str, str]) -> bool:
        figure.draw_without_rendering()  # nothing can be measured before there is a layout
        clear = True
        for axes, (mode, speeds) in zip(grid, panels.items(), strict=True):
            groups = list(speeds.rows)
            points = [(speeds.rows[group]["images_per_s"], means[group].value) for group in groups]
            shown = fronts[mode] if named is members else named
            labels = [texts[group] if group in shown else "" for group in groups]
            colours = [look.colour(group) for group in groups]
            bars = [
                (at, means[group].low, means[group].high)
                for (at, _), group in zip(points, groups, strict=True)
                if means[group].half is not None
            ]
            clear = place_labels(axes, points, labels, colours, bars) and clear
        return clear

    members_of = {
        series.label: series.groups
        for series in series_of(evidence.overview.rows)
        if len(series.groups) > 1 and {*series.groups} & {*every}
    }
    families = {label: look.key(middle(groups)) for label, groups in members_of.items()}
    joined = {group for groups in members_of.values() for group in groups}
    height = figure.get_figheight()
    if families:
        legend(figure, families)
    if place({group: wrapped(names[group], 22) for group in named}):
        return
    for axes in grid:
        for note in list(axes.texts):
            note.remove()
    for drawn in list(figure.legends):
        drawn.remove()
    figure.set_figheight(height)
    keys = {f"{numbers[group]}  {names[group]}": look.key(group) for group in named}
    keys |= {label: key for label, key in families.items() if not {*members_of[label]} <= {*named}}
    legend(figure, keys, len({*every} - {*named} - joined))
    place(numbers)
