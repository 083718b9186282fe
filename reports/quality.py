"""The paper's bubbles: quality against FLOPs, with the number of parameters as the area."""

from collections.abc import Collection, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .differences import Mean, count_of, mean_of
from .drawing import cut_bars, ends_of, log_if_wide, place_labels, round_numbers, title_of_scores
from .evidence import Evidence
from .moments import (
    AtEqualImages,
    Series,
    at_equal_images,
    first_column,
    images_words,
    is_marked,
    middle,
    moments,
    series_of,
    size_word,
)
from .protocols import rankable
from .runs import Line
from .scale import STEPS_400K, as_in_papers
from .seeds import over_seeds
from .style import COLUMN, ENTRIES, FAINT, PAGE, blank, caption, legend, wrapped

LARGEST = 170.0  # points²: the area of the model with the most parameters
LEAST = 14.0  # points²: of models that are too small to be seen, or without a count
SIMILAR = 1.5  # models whose parameters differ by less have equal areas
MOST_NARROW = 8  # models in the width of one column
MOST_NAMES = 6  # that stand in full beside bubbles


def quality_vs_flops(evidence: Evidence) -> Figure | str:
    """The first Frechet distance (or else the first metric) against FLOPs, in which scans count: one bubble per model.

    Its area is the number of parameters, and sizes of a family are joined. The point is the mean over training seeds at
    equal images, and its bar the 95 % interval (Student's t) if there are several.
    """
    columns = moments(evidence.runs)
    if not columns:
        return "no run has been evaluated"
    name = first_column(columns)
    equal = at_equal_images(columns[name])
    models = {row["group"]: row for row in reversed(evidence.overview.rows) if row["flops"]}
    scores = [
        {**row, name: equal.rows[row["run"]]["value"]} for row in evidence.overview.rows if row["run"] in equal.rows
    ]
    values = {group: seeds for group, seeds in over_seeds(scores, name).items() if group in models}
    if not values:
        return f"no run has both {name} and a cost"
    means, cut = cut_bars({group: mean_of(seeds.values()) for group, seeds in values.items()}, name)
    marked = {run.group for run in equal.rows if is_marked(run)}
    params = sorted({float(models[group]["params"]) for group in values if models[group]["params"]})
    areas = {group: max(LEAST, LARGEST * (models[group]["params"] or 0) / params[-1]) for group in values if params}
    differ = bool(params) and params[-1] > SIMILAR * params[0]
    areas = areas if differ else dict.fromkeys(values, 30.0)
    figure = blank(COLUMN if len(values) <= MOST_NARROW else PAGE, 2.7)
    axes = figure.add_subplot()
    series = [one for one in series_of(evidence.overview.rows) if len(set(one.groups) & set(values)) > 1]
    if printed := published_rows(evidence, name, equal):
        axes.scatter([2 * x for x, _ in printed], [y for _, y in printed], 12, color=FAINT, zorder=1.5)
    _draw(evidence, axes, means, models, areas, marked, series)
    axes.margins(0.15, 0.15)
    for axis, numbers in (
        (axes.xaxis, [*(models[group]["flops"] / 1e9 for group in values), *(2 * x for x, _ in printed)]),
        (axes.yaxis, [*ends_of(means), *(y for _, y in printed)]),
    ):
        log_if_wide(axis, numbers)
    axes.set_xlabel("FLOPs (G) of one forward pass of one image")
    axes.set_ylabel(title_of_scores(name, next(iter(equal.rows.values())), 36))
    several = {count_of(seeds) for seeds in values.values()}
    seeds = f"{max(several)} training seeds" if len(several) == 1 else "training seeds"
    facts = [f"Means over {seeds} with their 95 % intervals."] if max(several) > 1 else []
    facts += [cut] if cut else []
    facts += ["Hollow: a run failed or is unfinished."] if marked & set(values) else []
    facts += ["Grey: published rows, at twice the multiply-adds that they print."] if printed else []
    why = rankable(equal.rows, equal.rows) if len(values) > 1 else ""
    caption(figure, [" ".join([*facts, images_words(equal)]), f"No best: {why}." if why else ""])
    if differ:
        _legend_of_areas(axes, params)
    _label(evidence, figure, axes, values, means, models, areas, series)
    return figure


def published_rows(evidence: Evidence, name: str, equal: AtEqualImages) -> list[tuple[float, float]]:
    """(multiply-adds in 1e9, FID) of published rows, if all scores are of their protocol and number of images."""
    if equal.images != STEPS_400K or not all(map(as_in_papers, equal.rows.values())):
        return []
    rows = evidence.published.steps_400k
    return [(row.macs_g, row.fid) for row in rows if row.macs_g and row.conditional != name.endswith("(unconditional)")]


def _draw(
    evidence: Evidence,
    axes: Axes,
    means: Mapping[str, Mean],
    models: Mapping[str, Line],
    areas: Mapping[str, float],
    marked: set[str],
    series: list[Series],
) -> None:
    look = evidence.look
    for one in series:
        groups = [group for group in one.groups if group in means]
        flops, heights = [models[group]["flops"] / 1e9 for group in groups], [means[group].value for group in groups]
        axes.plot(flops, heights, color=look.colour(middle(groups)), linewidth=1, zorder=1)
    for group, mean in means.items():
        faint = look.faint(group) and not _are_families(series, means)
        colour, hollow = FAINT if faint else look.colour(group), group in marked
        at = models[group]["flops"] / 1e9
        bar: dict[str, Any] = {"color": colour, "linestyle": "none", "linewidth": 1, "zorder": 1.8 if faint else 2}
        axes.errorbar(at, mean.value, mean.half, capsize=2, **bar)
        marker = look.marker(group)
        faces: dict[str, Any] = {"facecolor": "white" if hollow else colour, "edgecolor": colour if hollow else "white"}
        axes.scatter(
            [at], [mean.value], areas[group], marker=marker, linewidth=0.6, zorder=1.9 if faint else 3, **faces
        )


def _label(
    evidence: Evidence,
    figure: Figure,
    axes: Axes,
    values: Mapping[str, Mapping[int, float]],
    means: Mapping[str, Mean],
    models: Mapping[str, Line],
    areas: Mapping[str, float],
    series: list[Series],
) -> None:
    """Names beside the bubbles: in full, else sizes with a legend of families, else numbers with a legend of at most
    `ENTRIES` models."""
    look, groups = evidence.look, list(values)
    points = [(models[group]["flops"] / 1e9, means[group].value) for group in groups]
    bars = [(point[0], means[group].low, means[group].high) for point, group in zip(points, groups, strict=True)]
    bars = [bar for bar, group in zip(bars, groups, strict=True) if means[group].half is not None]
    radii = [areas[group] ** 0.5 / 2 for group in groups]
    counts = {group: count_of(values[group]) for group in groups}
    apart = len(set(counts.values())) > 1
    seeds = {
        group: f" ({counts[group]}\N{NO-BREAK SPACE}seeds)" if apart and counts[group] > 1 else "" for group in groups
    }
    names = {group: models[group]["model_label"] + seeds[group] for group in groups}

    def place(texts: Mapping[str, str]) -> bool:
        labels, colours = [texts.get(group, "") for group in groups], [look.colour(group) for group in groups]
        figure.draw_without_rendering()  # nothing can be measured before there is a layout
        return place_labels(axes, points, labels, colours, bars, radii)

    full = {group: wrapped(names[group], 24) for group in groups}
    if not series and len(groups) <= MOST_NAMES and place(full):
        return
    sizes = {
        group: size_word(models[group]["title"], one.label.split(",")[0]) for one in series for group in one.groups
    }
    if _are_families(series, groups):
        height = figure.get_figheight()
        legend(figure, {one.label: look.key(middle(one.groups)) for one in series})
        if place(sizes):
            return
        figure.legends[-1].remove()
        figure.set_figheight(height)
    shown = [group for group in groups if not look.faint(group)]
    numbered = {group: str(number) for number, group in enumerate(shown, start=1)}
    keys = {f"{numbered[group]}  {names[group]}": look.key(group) for group in shown}
    legend(figure, keys, len(groups) - len(shown))
    place(numbered)


def _are_families(series: list[Series], groups: Collection[str]) -> bool:
    """Whether a legend of families tells all models apart, beside their sizes."""
    joined = {group for one in series for group in one.groups}
    return len(series) <= ENTRIES and all(group in joined for group in groups)


def _legend_of_areas(axes: Axes, params: list[float]) -> None:
    """Circles above the axes, as large as those of two or three round numbers of parameters."""
    unit = LARGEST / max(params)
    numbers = [number for number in round_numbers(min(params), max(params)) if unit * number >= LEAST]
    keys = [Line2D([], [], color="0.6", marker="o", linestyle="", markersize=(unit * one) ** 0.5) for one in numbers]
    labels = [f"{one / 1e6:,.3g} M" for one in numbers]
    labels[0] = f"parameters: {labels[0]}"
    axes.legend(keys, labels, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(keys), handletextpad=0.8)
