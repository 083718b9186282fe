"""What all figures share: sizes, colours, markers, dashes, captions, legends, and labels at the ends of lines."""

import re
import textwrap
from collections.abc import Mapping, Sequence
from math import log10
from typing import Any, Literal

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .names import axis_values, kind_of, words
from .queries import better
from .runs import Line
from .table import Table

COLUMN, PAGE = 3.35, 6.9  # inches: the widths of one column and of both columns of a paper
SMALL = 7.0  # points: the smallest text of a figure
ENTRIES = 12  # the most entries of a legend
DASHED = 3.0  # the length of a line in a legend, in letters, where some are dashed: a marker hides the middle
# Okabe and Ito's colours, safe for the colour-blind, with wine instead of their pale yellow; black is for no model.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
FAINT = "0.72"  # the grey of what has no entry in a legend
MARKERS = "osD^vPXp<>h*"
FAMILIES = ("lamamba", "dit", "adm", "uvit", "dit_modern")  # these keep their colour and marker in every report
DASHES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", "-.", ":")
LIGHTEST, DARKEST = 68.0, 26.0  # CIE L* of the smallest and the largest size of a family
SHADES = 7  # the most shades of one hue
AREAS = (14.0, 62.0)  # points²: of the markers of the smallest and the largest model
STYLE: dict[Any, Any] = {
    "font.size": 8.0, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True,
    "axes.titlesize": 8.0, "axes.labelsize": SMALL, "xtick.labelsize": SMALL, "ytick.labelsize": SMALL,
    "grid.color": "0.9", "grid.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": SMALL,
    "legend.handlelength": 1.8, "legend.columnspacing": 1.2, "lines.linewidth": 1.4, "lines.markersize": 4.5,
    "pdf.fonttype": 42, "figure.constrained_layout.h_pad": 0.05, "figure.constrained_layout.w_pad": 0.05,
}  # fmt: skip


class Look:
    """Colours, dashes and markers of the groups of a summary.

    A family (`kind_of`) has one hue and one marker. Its presets are shades from light to dark and markers from small to
    large, in the order of their FLOPs. Variants of one preset differ by their dash. Those of a family's only preset
    have shades instead where they are numbers on one axis, and more than there are dashes. If all groups are one
    preset, its variants have shades if they are numbers on one axis, and otherwise hues of their own.

    Of more than `ENTRIES` groups, the first variant of each study and those with the best scores are shown as above;
    the others are `faint`.
    """

    def __init__(self, overview: Table) -> None:
        rows = _of_groups(overview)
        ordered = sorted(rows.values(), key=_place)
        self.families = [*FAMILIES, *sorted(set(map(_kind, overview.rows)) - set(FAMILIES))]
        self._colours: dict[str, str] = {}
        self._dashes: dict[str, int] = {}
        self._markers: dict[str, str] = {}
        presets: dict[tuple[str, str], list[Line]] = {}
        for row in ordered:
            presets.setdefault((_kind(row), row["model"]), []).append(row)
        for family in self.families:
            own = sorted((key for key in presets if key[0] == family), key=lambda key: _size(presets[key]))
            hue = COLOURS[self.families.index(family) % len(COLOURS)]
            for key, colour in zip(own, shades(hue, len(own)), strict=True):
                for row in presets[key]:
                    self._colours[row["group"]] = colour
                    self._markers[row["group"]] = self.marker(family)
        variants = list(dict.fromkeys(_variant(row) for row in ordered))
        for members in presets.values():
            of_preset = sorted({_variant(row) for row in members}, key=variants.index)
            self._dashes |= {row["group"]: of_preset.index(_variant(row)) for row in members}
        alone = len(presets) == 1 and len(ordered) > 1
        for family in self.families:
            own = [members for key, members in presets.items() if key[0] == family]
            many = len(own) == 1 and len(own[0]) > len(DASHES)
            if own and (alone or many) and not self._shaded(family, own[0]) and alone:
                self._hued(ordered)
        sizes = {group: row["params"] for group, row in rows.items() if row.get("params")}
        ends = (log10(min(sizes.values())), log10(max(sizes.values()))) if sizes else (0.0, 0.0)
        self._areas = {
            group: AREAS[0] + (AREAS[1] - AREAS[0]) * (log10(value) - ends[0]) / (ends[1] - ends[0])
            for group, value in sizes.items()
            if ends[1] > ends[0]
        }
        self._faint = set() if len(rows) <= ENTRIES else {row["group"] for row in _ranked(overview)[ENTRIES - 1 :]}

    def _shaded(self, family: str, members: list[Line]) -> bool:
        """Give variants of one preset shades if they are different numbers on one axis, and say whether they are."""
        numbers = {row["group"]: _number(row) for row in members}
        if len(members) > SHADES or None in numbers.values() or len({*numbers.values()}) < len(numbers):
            return False
        rising = sorted(numbers, key=lambda group: numbers[group] or 0.0)
        hue = COLOURS[self.families.index(family) % len(COLOURS)]
        self._colours |= dict(zip(rising, shades(hue, len(rising)), strict=True))
        self._dashes |= dict.fromkeys(rising, 0)
        return True

    def _hued(self, members: list[Line]) -> None:
        for at, row in enumerate(members):
            self._colours[row["group"]] = COLOURS[at % len(COLOURS)]
            self._dashes[row["group"]] = at // len(COLOURS)
            self._markers[row["group"]] = MARKERS[at % len(MARKERS)]

    def colour(self, group: str) -> str:
        return self._colours[group]

    def dash(self, group: str) -> Literal["-", "--", ":", "-."]:
        return DASHES[self._dashes[group] % len(DASHES)]

    def marker(self, name: str) -> str:
        """The marker of a group or of a family."""
        return self._markers.get(name) or MARKERS[self.families.index(name) % len(MARKERS)]

    def size(self, group: str) -> float:
        """The area of a group's marker in points², by the logarithm of its parameters."""
        return self._areas.get(group, 24.0)

    def faint(self, group: str) -> bool:
        return group in self._faint

    def line(self, group: str) -> dict[str, Any]:
        """How a line of a group is drawn: keywords of `Axes.plot`, without a marker."""
        if self.faint(group):
            return {"color": FAINT, "linestyle": "-", "linewidth": 0.7, "zorder": 1.5}
        return {"color": self.colour(group), "linestyle": self.dash(group), "zorder": 2}

    def key(self, group: str) -> Line2D:
        """The marker of a group for a legend."""
        return Line2D([], [], color=self.colour(group), marker=self.marker(group), linestyle="")

    def points(self, group: str) -> dict[str, Any]:
        """The same with markers."""
        marker = {"marker": self.marker(group), "markersize": self.size(group) ** 0.5}
        return self.line(group) | (marker | {"markersize": 2.5} if self.faint(group) else marker)


def _kind(row: Line) -> str:
    return kind_of(row["title"], row["family"])


def _of_groups(overview: Table) -> dict[str, Line]:
    """The first row of each group."""
    rows: dict[str, Line] = {}
    for row in overview.rows:
        rows.setdefault(row["group"], row)
    return rows


def _place(row: Line) -> tuple[bool, str, int]:
    """The order of studies: runs of a file first, as they are listed."""
    info = row["run"].info if "run" in row else {}
    return not info.get("of_file"), str(info.get("study", "")), info.get("place") or 0


def _size(rows: list[Line]) -> tuple[float, float, str]:
    """The order of the presets of a family: FLOPs, then parameters, then the name."""
    flops = [row["flops"] for row in rows if row.get("flops")]
    return min(flops, default=0.0), min((row.get("params") or 0.0 for row in rows), default=0.0), rows[0]["model"]


def _axes(row: Line) -> Mapping[str, Any]:
    return axis_values(row["run"]) if "run" in row else row.get("axes") or {}


def _variant(row: Line) -> str:
    return words(_axes(row))


def _number(row: Line) -> float | None:
    """The value of the only axis of a variant beside the model, if it is a number."""
    values = [value for axis, value in _axes(row).items() if axis != "model"]
    return float(values[0]) if len(values) == 1 and type(values[0]) in (int, float) else None


def _ranked(overview: Table) -> list[Line]:
    """A row of each group: the first variants of the studies, then those with a score, the best first, then the others.
    The score is the first Fréchet distance, or else the first metric."""
    rows = _of_groups(overview)
    names = [column.name for column in overview.columns if column.name and better(column.name)]
    metric = min(names, key=lambda name: not re.match("FI?D", name), default="")
    sign = -1 if metric and better(metric) == "max" else 1
    bases: dict[str, str] = {}
    for row in sorted((row for row in rows.values() if "run" in row and row["run"].info.get("of_file")), key=_place):
        bases.setdefault(row["run"].info["study"], row["group"])
    values = (
        {group: [row[metric] for row in overview.rows if row["group"] == group] for group in rows} if metric else {}
    )
    means = {
        group: sum(numbers) / len(numbers)
        for group, each in values.items()
        if (numbers := [value for value in each if value is not None])
    }

    def key(row: Line) -> tuple[Any, ...]:
        group = row["group"]
        return group not in bases.values(), group not in means, sign * means.get(group, 0.0), _place(row)

    return sorted(rows.values(), key=key)


def lightness(colour: str | tuple[float, float, float]) -> float:
    """CIE L* of a colour, 0 (black) to 100 (white): what remains of it in grey."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 116 * luminance ** (1 / 3) - 16 if luminance > 216 / 24389 else luminance * 24389 / 27


def shades(colour: str, count: int) -> list[str]:
    """`count` shades of a colour from light to dark, in equal steps of lightness; one shade is the colour itself."""
    if count == 1:
        return [colour]
    step = (LIGHTEST - DARKEST) / max(1, count - 1)
    return [_shade(colour, LIGHTEST - at * step) for at in range(count)]


def _shade(colour: str, target: float) -> str:
    """A colour mixed with white or black, so that its lightness is the target."""
    own, end = to_rgb(colour), (1.0 if target > lightness(colour) else 0.0)
    low, high = 0.0, 1.0
    for _ in range(30):
        share = (low + high) / 2
        if (lightness(_mix(own, end, share)) < target) == (end == 1.0):
            low = share
        else:
            high = share
    return to_hex(_mix(own, end, low))


def legible(colour: str) -> str:
    """A colour for text: the same, but dark enough on white."""
    return _shade(colour, min(lightness(colour), 50.0))


def _mix(colour: tuple[float, float, float], end: float, share: float) -> tuple[float, float, float]:
    red, green, blue = ((1 - share) * part + share * end for part in colour)
    return red, green, blue


def blank(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def wrapped(label: str, width: int) -> str:
    return textwrap.fill(label, width, break_on_hyphens=False)


def caption(figure: Figure, lines: Sequence[str]) -> None:
    """Small text below a figure, a paragraph a line. The figure grows by its height."""
    text = "\n".join(wrapped(line, int(18.5 * figure.get_figwidth())) for line in lines if line)
    if text:
        figure.supxlabel(text, x=0.01, horizontalalignment="left", fontsize=SMALL, color="0.35")
        figure.set_figheight(figure.get_figheight() + 1.25 * SMALL / 72 * (1 + text.count("\n")))


def legend(figure: Figure, keys: Mapping[str, Artist], others: int = 0) -> None:
    """A legend above the axes, with as many columns as fit. The figure grows by its height.

    `others` is the number of groups without an entry, which are drawn faintly. Of more than `ENTRIES` entries, the last
    ones are counted as others too.
    """
    most = ENTRIES if len(keys) + bool(others) <= ENTRIES else ENTRIES - 1
    shown = dict(list(keys.items())[:most])
    if others := others + len(keys) - len(shown):
        name = "1 other" if others == 1 else f"{others} others"
        shown[name] = Line2D([], [], color=FAINT, linewidth=0.7)
    width, height = figure.get_size_inches() * figure.dpi
    labels = [wrapped(label, int(14 * figure.get_figwidth())) for label in shown]
    dashed = any(isinstance(key, Line2D) and key.get_linestyle() not in ("-", "None") for key in shown.values())
    style = {"handlelength": DASHED} if dashed else {}
    for columns in range(min(len(labels), 6), 0, -1):
        drawn = figure.legend(list(shown.values()), labels, loc="outside upper center", ncols=columns, **style)
        box = drawn.get_window_extent()
        if box.width <= 0.97 * width or columns == 1:
            figure.set_figheight((height + box.height) / figure.dpi)
            return
        drawn.remove()


def label_ends(axes: Axes, ends: Sequence[tuple[float, float, str, str]]) -> bool:
    """Name lines to the right of their last points (x, y, text, colour), if the names fit: no more than eight, none
    longer than 40 % of the figure, each near the height of its point. Otherwise nothing is written: False."""
    figure = axes.figure.get_figure(root=True)
    if not ends or len(ends) > 8:
        return False
    figure.draw_without_rendering()  # nothing can be measured before there is a layout
    pixel = figure.dpi / 72
    line = 1.25 * SMALL * pixel
    places = axes.transData.transform([(x, y) for x, y, *_ in ends])
    order = sorted(range(len(ends)), key=lambda at: places[at][1])
    heights = _spread([float(places[at][1]) for at in order], line)
    if any(abs(height - places[at][1]) > 2 * line for at, height in zip(order, heights, strict=True)):
        return False
    right = max(float(x) for x, _ in places)
    notes = []
    for at, height in zip(order, heights, strict=True):
        x, y, text, colour = ends[at]
        offset = ((right - places[at][0]) / pixel + 6, (height - places[at][1]) / pixel)
        note = axes.annotate(text, (x, y), offset, textcoords="offset points", va="center", fontsize=SMALL)
        note.set(color=legible(colour), annotation_clip=False)
        notes.append(note)
    if max(note.get_window_extent().width for note in notes) <= 0.4 * figure.bbox.width:
        return True
    for note in notes:
        note.remove()
    return False


def _spread(heights: list[float], gap: float) -> list[float]:
    """Rising heights moved apart so that neighbours differ by a gap, around the middle of each cluster."""
    clusters: list[list[float]] = []  # members of each
    for height in heights:
        clusters.append([height])
        while len(clusters) > 1 and _low(clusters[-1], gap) - _high(clusters[-2], gap) < gap:
            last = clusters.pop()
            clusters[-1] += last
    return [_low(cluster, gap) + at * gap for cluster in clusters for at in range(len(cluster))]


def _low(cluster: list[float], gap: float) -> float:
    return sum(cluster) / len(cluster) - (len(cluster) - 1) * gap / 2


def _high(cluster: list[float], gap: float) -> float:
    return sum(cluster) / len(cluster) + (len(cluster) - 1) * gap / 2
