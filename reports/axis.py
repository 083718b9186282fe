"""Figures of ablations: the first metric against the axis of a study, with its base marked."""

import textwrap
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, NullLocator

from .ablation import plain
from .differences import Mean, mean_of
from .drawing import cut_bars, ends_of, log_if_wide, title_of_scores
from .evidence import Evidence
from .names import axis_noun, axis_word, kind_of
from .style import COLOURS, COLUMN, ENTRIES, FAINT, MARKERS, SMALL, Look, blank, caption, label_ends, legend
from .variants import Variants, is_number, of_study

DODGE = 0.014, 0.08  # of the width of the axes: between two lines, and between the first and the last, at most
ROW = 0.19  # inches: the height of a category
LETTER, CLOSEST = 0.028, 0.02  # of the width of the axes: a letter of a tick's label, and between two labels
Lines = dict[tuple[str, ...], list[str]]  # {values of the other axes: groups}


def axis(evidence: Evidence) -> Mapping[str, Figure | str] | str:
    """`axis_STUDY` for each study with a file and several variants: the first metric against its axis, as the mean over
    training seeds with its 95 % interval.

    An axis of numbers lies below, logarithmic if all are above 0; other axes are a list of rows. Of several axes, the
    first one of numbers counts, and each combination of the others has a line, of which at most `ENTRIES` have a
    colour. The base has a hollow marker, and a band is its interval.
    """
    studies = of_study(evidence)
    if not studies:
        return "no study with a file has several variants"
    return {f"axis_{plain(name)}": _draw(study, evidence.look) for name, study in studies.items()}


def _draw(study: Variants, look: Look) -> Figure | str:
    if not study.values:
        return "no run has been evaluated"
    if not study.axes:
        return "the variants of the study differ in no axis"
    metric = next(iter(study.values))
    means, cut = cut_bars({group: mean_of(seeds.values()) for group, seeds in study.values[metric].items()}, metric)
    numeric = [name for name, values in study.axes.items() if all(map(is_number, values))]
    along = (numeric or list(study.axes))[0]
    lines = _lines(study, along)
    styles = _styles(study, look, along, lines)
    count = len(study.axes[along])
    height = 2.2 if numeric else 0.7 + ROW * count * max(1.0, 0.6 * min(len(lines), ENTRIES))
    figure = blank(COLUMN, height)
    axes = figure.add_subplot()
    if numeric:
        _scale(axes, study, along)
    else:
        _rows(axes, study, along)
    _band(axes, means.get(study.base or ""), upright=not numeric)
    keys: dict[str, Line2D] = {}
    ends: list[tuple[float, float, str, str]] = []
    for place, (key, groups) in enumerate(lines.items()):
        shift = (place - (len(lines) - 1) / 2) if len(lines) <= ENTRIES else 0.0
        places = {group: _place(study, group, along) for group in groups if group in means}
        places = {group: _moved(axes, x, shift, bool(numeric), len(lines)) for group, x in places.items()}
        points = [(places[group], means[group], group) for group in sorted(places, key=lambda group: places[group])]
        _points(axes, study, metric, points, styles[key], bool(numeric), look if along == "model" else None)
        if points and place < ENTRIES and len(lines) > 1:
            name = ", ".join(key)
            keys[name] = Line2D([], [], linestyle="-" if numeric else "", **styles[key])
            ends.append((points[-1][0], points[-1][1].value, name, styles[key]["color"]))
    _titles(figure, axes, study, metric, along, bool(numeric), cut)
    log_if_wide(axes.yaxis if numeric else axes.xaxis, ends_of(means), most=5)
    if len(lines) > 1 and not (numeric and len(lines) <= ENTRIES and label_ends(axes, ends)):
        legend(figure, keys, max(0, len(lines) - ENTRIES))
    return figure


def _lines(study: Variants, along: str) -> Lines:
    """The variants of each line, in the order of the study."""
    lines: Lines = {}
    for group in study.on_axes:
        others = tuple(_word(study, other, study.value(group, other)) for other in study.axes if other != along)
        lines.setdefault(others, []).append(group)
    return lines


def _word(study: Variants, name: str, value: Any) -> str:
    return study.word(name, value) if name == "model" else axis_word(name, value)


def _styles(study: Variants, look: Look, along: str, lines: Lines) -> dict[tuple[str, ...], dict[str, Any]]:
    """Colour and marker of each line: those of its model if the lines differ in models alone, or else hues in order."""
    styles: dict[tuple[str, ...], dict[str, Any]] = {}
    of_models = [name for name in study.axes if name != along] in ([], ["model"])
    for place, (key, groups) in enumerate(lines.items()):
        info = study.members[groups[0]][0].info
        marker = look.marker(kind_of(info["title"], info["family"]))
        style = {"color": look.colour(groups[0]), "marker": marker}
        if len(lines) > 1 and not of_models:
            style = {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}
        if len(lines) == 1:
            style["color"] = look.colour(study.base if study.base in groups else groups[-1])
        styles[key] = style if place < ENTRIES else {"color": FAINT, "marker": "."}
    return styles


def _scale(axes: Axes, study: Variants, along: str) -> None:
    """A horizontal axis of numbers with a tick at each value."""
    values = sorted(study.axes[along])
    if values[0] > 0:
        axes.set_xscale("log")
    axes.set_xlim(*_limits(values))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(values)
    labels: list[str] = []
    end = -1.0
    for value in values:
        x = float(axes.transAxes.inverted().transform(axes.transData.transform((value, 0)))[0])
        label = study.word(along, value)
        half = LETTER * len(label) / 2
        fits = x - half - end > CLOSEST
        labels.append(label if fits else "")
        end = x + half if fits else end
    axes.set_xticklabels(labels)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """A little more than the values, as a factor if all are above 0."""
    low, high = values[0], values[-1]
    if low > 0:
        margin = (high / low) ** 0.07
        return low / margin, high * margin
    return low - 0.07 * (high - low), high + 0.07 * (high - low)


def _rows(axes: Axes, study: Variants, along: str) -> None:
    """A row for each category, the first one above."""
    words = [_word(study, along, value) for value in study.axes[along]]
    axes.set_yticks(range(len(words)), [textwrap.fill(word, 32, break_long_words=False) for word in words])
    axes.set_ylim(len(words) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def _band(axes: Axes, base: Mean | None, upright: bool) -> None:
    """The mean of the base as a thin line, and its interval as a band."""
    if base is None:
        return
    line, span = (axes.axvline, axes.axvspan) if upright else (axes.axhline, axes.axhspan)
    line(base.value, color="0.5", linewidth=0.7, zorder=1.2)
    if isfinite(base.low):
        span(base.low, base.high, color="0.5", alpha=0.15, linewidth=0, zorder=1.1)


def _place(study: Variants, group: str, along: str) -> float:
    value = study.value(group, along)
    return float(value) if all(map(is_number, study.axes[along])) else float(study.axes[along].index(value))


def _moved(axes: Axes, x: float, shift: float, numeric: bool, count: int) -> float:
    """A place moved sideways, so that the bars of several lines do not lie on each other."""
    if not numeric:
        return x + 0.7 * shift / max(count, 2)
    low, high = axes.get_xlim()
    shift *= min(DODGE[0], DODGE[1] / count)
    return x * (high / low) ** shift if low > 0 else x + shift * (high - low)


def _points(
    axes: Axes,
    study: Variants,
    metric: str,
    points: list[tuple[float, Mean, str]],
    style: dict[str, Any],
    numeric: bool,
    looks: Look | None,
) -> None:
    """The means of one line with their intervals, a hollow one for the base, and what is not done beside its point.
    With `looks`, each point looks like its model."""
    if numeric and len(points) > 1:
        xs, means = [x for x, _, _ in points], [mean.value for _, mean, _ in points]
        axes.plot(xs, means, color=style["color"], linewidth=1.0, zorder=2)
    for x, mean, group in points:
        look = style | ({"markerfacecolor": "white", "markersize": 5.5} if group == study.base else {})
        if looks is not None:
            info = study.members[group][0].info
            look |= {"color": looks.colour(group), "marker": looks.marker(kind_of(info["title"], info["family"]))}
        if numeric:
            axes.errorbar(x, mean.value, mean.half, capsize=2, elinewidth=0.9, linestyle="", zorder=3, **look)
        else:
            axes.errorbar(mean.value, x, xerr=mean.half, capsize=2, elinewidth=0.9, linestyle="", zorder=3, **look)
        if marked := study.marked(metric, group):
            end = mean.high if isfinite(mean.high) else mean.value
            text: dict[str, Any] = {"textcoords": "offset points", "fontsize": SMALL, "color": "0.35"}
            if numeric:
                axes.annotate(marked, (x, end), (0, 3), ha="center", va="bottom", **text)
            else:
                axes.annotate(marked, (end, x), (4, 0), ha="left", va="center", **text)


def _titles(figure: Figure, axes: Axes, study: Variants, metric: str, along: str, numeric: bool, more: str) -> None:
    """The titles of both axes, and below them what the marks mean, `more`, and which variants are not shown."""
    lines = study.evidence.scores[metric]
    if numeric:
        axes.set_xlabel(axis_noun(along))
        axes.set_ylabel(title_of_scores(metric, next(iter(lines.values())), 30))
        axes.margins(y=0.12)
    else:
        title = title_of_scores(metric, next(iter(lines.values())), 50)
        axes.set_xlabel(title, loc="right")
    shown = [mean_of(seeds.values()).n for seeds in study.values[metric].values()]
    words = []
    if max(shown) > 1:
        low, high = min(shown), max(shown)
        words.append(f"Bars: 95 % intervals over {f'{low} to ' * (low != high)}{high} training seeds.")
    words += [more] if more else []
    if study.base in study.values[metric]:
        band = "interval" if len(study.values[metric][study.base or ""]) > 1 else "value"
        words.append(f"Hollow: the base, {study.labels[study.base or '']}, whose {band} is grey.")
    if absent := [group for group in study.members if group not in study.values[metric]]:
        names = [f"{study.labels[group]} ({study.state(group)})" for group in absent[:4]]
        words.append(f"No score: {', '.join(names)}{f' and {len(absent) - 4} more' * (len(absent) > 4)}.")
    by_hand = [study.labels[group] for group in study.values[metric] if group not in study.on_axes]
    words += [f"Not on the axis: {', '.join(by_hand[:4])}."] if by_hand else []
    caption(figure, [" ".join(words)])
