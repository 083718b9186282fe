"""Colours, markers, legends and labels of figures."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from lamabench.reports.runs import read
from lamabench.reports.style import (
    COLUMN,
    ENTRIES,
    PAGE,
    STYLE,
    Look,
    blank,
    label_ends,
    legend,
    lightness,
    shades,
)
from lamabench.reports.summary import summary
from lamabench.reports.table import Column, Table
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from run_folders import cost, scored, write, write_many

# Machado, Oliveira and Fernandes 2009, table 1, severity 1.0; of linear RGB.
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
D65 = np.array([0.95047, 1.0, 1.08883])
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


@pytest.fixture(autouse=True)
def _style() -> Iterator[None]:
    with matplotlib.rc_context():
        matplotlib.rcParams.update(STYLE)
        yield


def lab(colour: str, matrix: Sequence[Sequence[float]] | None = None) -> np.ndarray:
    """CIE L*a*b* of a colour as seen with a deficiency."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = linear if matrix is None else np.clip(np.array(matrix) @ linear, 0, 1)
    ratio = XYZ @ linear / D65
    x, y, z = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def look_of(root: Path) -> tuple[Look, Table]:
    overview = summary(read([root]))
    return Look(overview), overview


def test_lightness_is_that_of_cie() -> None:
    for colour in ("#000000", "#0072B2", "#D55E00", "#808080", "#ffffff"):
        assert lightness(colour) == pytest.approx(lab(colour)[0], abs=0.01)


def test_a_family_is_one_hue_from_light_to_dark(tmp_path: Path) -> None:
    look, overview = look_of(write_many(tmp_path, 3, 4, 1).parent)
    hues = {}
    for family in ("lamamba", "dit", "adm"):
        rows = sorted((row for row in overview.rows if row["family"] == family), key=lambda row: row["flops"])
        colours = [look.colour(row["group"]) for row in rows]
        levels = [lightness(colour) for colour in colours]
        assert len(rows) == 4 and all(a - b > 10 for a, b in itertools.pairwise(levels))
        assert {look.marker(row["group"]) for row in rows} == {look.marker(family)}
        assert [look.size(row["group"]) for row in rows] == sorted(look.size(row["group"]) for row in rows)
        angles = [np.arctan2(*lab(colour)[:0:-1]) for colour in colours]
        hues[family] = np.angle(np.mean(np.exp(1j * np.array(angles))))
        assert np.abs(np.angle(np.exp(1j * (np.array(angles) - hues[family])))).max() < 0.5  # half a radian
    assert len({look.marker(family) for family in hues}) == 3
    assert {look.dash(row["group"]) for row in overview.rows} == {"-"}


@pytest.mark.parametrize("deficiency", BLINDNESS)
def test_families_are_distinct_to_the_colour_blind(deficiency: str) -> None:
    """Differences of the shades of one size; 2.3 is just noticeable. Tritanopia is rare, and markers differ."""
    least = 6 if deficiency == "tritanopia" else 20
    for count in (1, 4):
        families = [shades(colour, count) for colour in ("#0072B2", "#D55E00", "#009E73")]
        for sizes in zip(*families, strict=True):
            seen = [lab(colour, BLINDNESS[deficiency]) for colour in sizes]
            apart = [np.linalg.norm(one - other) for at, one in enumerate(seen) for other in seen[:at]]
            assert min(apart) > least, (count, sizes)
        for family in families:
            levels = [lab(colour, BLINDNESS[deficiency])[0] for colour in family]
            assert levels == sorted(levels, reverse=True)


def test_variants_of_one_preset_have_dashes_beside_other_models(tmp_path: Path) -> None:
    for family, title in (("lamamba", "LaMamba"), ("dit", "DiT")):
        for place, rate in enumerate((1e-4, 2e-4, 4e-4)):
            variant = {"train.lr": rate, "model": f"{family}_s"}
            write(tmp_path, f"{family}-{place}", [cost()], family, title, variant)
    look, overview = look_of(tmp_path)
    by_rate = {row["model_label"]: (look.colour(row["group"]), look.dash(row["group"])) for row in overview.rows}
    assert by_rate["DiT, lr 1e-4"] == ("#D55E00", "-") and by_rate["LaMamba, lr 1e-4"] == ("#0072B2", "-")
    assert by_rate["DiT, lr 4e-4"] == ("#D55E00", "-.") and by_rate["LaMamba, lr 4e-4"] == ("#0072B2", "-.")


def test_more_numbers_than_dashes_are_shades_of_their_family(tmp_path: Path) -> None:
    for family, title in (("lamamba", "LaMamba"), ("dit", "DiT")):
        for rate in (3e-4, 1e-4, 2e-4, 5e-4, 4e-4):
            variant = {"train.lr": rate, "model": f"{family}_s"}
            write(tmp_path, f"{family}-{rate}", [cost()], family, title, variant)
    look, overview = look_of(tmp_path)
    colours = {row["model_label"]: look.colour(row["group"]) for row in overview.rows}
    assert len({*colours.values()}) == 10 and {look.dash(row["group"]) for row in overview.rows} == {"-"}
    for title in ("LaMamba", "DiT"):
        levels = [lightness(colours[f"{title}, lr {rate}e-4"]) for rate in range(1, 6)]
        assert levels == sorted(levels, reverse=True)


def test_variants_of_a_single_preset_are_shades_of_numbers_or_hues_of_words(tmp_path: Path) -> None:
    for size in (16, 4, 8):
        write(tmp_path / "a", f"w{size}", [cost()], "lamamba", "LaMamba", {"model.window_size": size})
    look, overview = look_of(tmp_path / "a")
    levels = {row["model_label"]: lightness(look.colour(row["group"])) for row in overview.rows}
    assert levels["window 4"] > levels["window 8"] > levels["window 16"]
    for scan in "abcdefghijk":
        write(tmp_path / "b", scan, [cost()], "lamamba", "LaMamba", {"model.scan": scan})
    look, overview = look_of(tmp_path / "b")
    groups = [row["group"] for row in overview.rows]
    assert len({(look.colour(group), look.dash(group)) for group in groups}) == 11
    assert len({look.colour(group) for group in groups}) == 7
    assert len({look.marker(group) for group in groups}) == 11


def test_of_forty_groups_the_base_and_the_best_are_not_faint(tmp_path: Path) -> None:
    for at in range(40):
        write(tmp_path, f"v{at}", [cost(), scored(100.0 - at)], "lamamba", "LaMamba", {"variant": f"v{at}"})
    look, overview = look_of(tmp_path)
    clear = {row["model_label"] for row in overview.rows if not look.faint(row["group"])}
    assert clear == {"v0", *(f"v{at}" for at in range(30, 40))} and len(clear) == ENTRIES - 1
    grey = {look.line(row["group"])["color"] for row in overview.rows if look.faint(row["group"])}
    assert grey == {"0.72"}
    few, overview = look_of(write_many(tmp_path / "few", 3, 4, 1).parent)
    assert not any(few.faint(row["group"]) for row in overview.rows)


def entries(count: int, length: int = 12) -> dict[str, Any]:
    return {f"{at:0{length}d}": Line2D([], []) for at in range(count)}


@pytest.mark.parametrize("width", [COLUMN, PAGE])
@pytest.mark.parametrize(("count", "length"), [(1, 5), (12, 12), (40, 30), (3, 200)])
def test_a_legend_is_neither_cut_off_nor_taller_than_the_plot(width: float, count: int, length: int) -> None:
    figure = blank(width, 2.4)
    axes = figure.add_subplot()
    legend(figure, entries(count, length))
    figure.draw_without_rendering()
    (drawn,) = figure.legends
    box, plot = drawn.get_window_extent(), axes.get_window_extent()
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    assert box.height < plot.height and box.y0 >= plot.y1
    texts = [text.get_text() for text in drawn.get_texts()]
    assert len(texts) == min(count, ENTRIES)
    assert texts[-1] == "29 others" if count == 40 else "others" not in texts[-1]


def test_a_legend_counts_what_is_drawn_faintly() -> None:
    figure = blank(COLUMN, 2.4)
    legend(figure, entries(11), 29)
    assert [text.get_text() for text in figure.legends[0].get_texts()][-2:] == [f"{10:012d}", "29 others"]


def test_dashes_show_beside_the_marker_of_a_legend() -> None:
    """A dash and a gap on either side: 3.7 and 1.6 line widths each, in points."""
    figure = blank(COLUMN, 2.4)
    legend(figure, {dash: Line2D([], [], linestyle=dash, marker="o") for dash in ("-", "--")})
    (_, dashed) = figure.legends[0].legend_handles
    assert isinstance(dashed, Line2D)
    length = float(np.ptp(np.asarray(dashed.get_xdata(), float)))
    assert length > dashed.get_markersize() + 2 * (3.7 + 1.6) * dashed.get_linewidth()


def test_ends_of_lines_are_named_if_the_names_fit() -> None:
    def drawn(heights: list[float], text: str = "model") -> tuple[bool, Any, Any]:
        figure = blank(COLUMN, 2.4)
        axes = figure.add_subplot()
        for height in heights:
            axes.plot([0, 1], [0, height])
        named = label_ends(axes, [(1, height, text, "#0072B2") for height in heights])
        figure.draw_without_rendering()
        return named, figure, axes

    named, figure, axes = drawn([0.1, 0.52, 0.5, 1.0])
    boxes = [text.get_window_extent() for text in axes.texts]
    assert named and len(boxes) == 4
    assert not any(one.overlaps(other) for at, one in enumerate(boxes) for other in boxes[:at])
    assert all(box.x0 >= axes.get_window_extent().x1 - 25 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert [box.y0 for box in boxes] == sorted(box.y0 for box in boxes)
    assert [text.xy[1] for text in axes.texts] == [0.1, 0.5, 0.52, 1.0]
    for heights, text in (([0.5] * 8, "model"), ([0.1 * at for at in range(9)], "model"), ([1.0, 2.0], "model" * 20)):
        named, _, axes = drawn(heights, text)
        assert not named and not axes.texts


def test_a_summary_without_runs_has_a_look() -> None:
    look = Look(Table("", "", [Column("group")], []))
    assert look.marker("dit") != look.marker("lamamba")
