"""The figure of a metric against the axis of a study."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lamabench.reports.axis import axis
from lamabench.reports.evidence import Evidence
from lamabench.reports.runs import read
from lamabench.reports.style import COLUMN, ENTRIES, FAINT
from matplotlib.figure import Figure
from run_folders import Line, cost, line, made, scored, write, write_many
from scipy import stats

FD = "FD-EffNetLite0-512"


def fill(root: Path, variants: list[Line], values: list[list[float]], study: str = "demo") -> None:
    for place, (variant, numbers) in enumerate(zip(variants, values, strict=True)):
        for seed, number in enumerate(numbers):
            write(root, f"v{place}-s{seed}", [cost(), made(scored(number))], variant=variant, seed=seed, study=study)


def figures(root: Path) -> dict[str, Any]:
    shown = axis(Evidence(read([root])))
    assert not isinstance(shown, str)
    return dict(shown)


def points(axes: Any) -> list[tuple[float, float]]:
    """The centres of the bars, (x, y), in the order in which they were drawn."""
    data = [bar.lines[0].get_data() for bar in axes.containers]
    return [(float(x[0]), float(y[0])) for x, y in data]


def test_numbers_are_a_logarithmic_axis_and_the_base_is_hollow(tmp_path: Path) -> None:
    values = [[20.0, 21.0, 19.5], [23.1, 24.3, 22.4], [21.2, 22.1, 20.9]]
    fill(tmp_path, [{"model.window_size": size} for size in (32, 4, 8)], values)
    (figure,) = figures(tmp_path).values()
    (axes,) = figure.axes
    assert figure.get_figwidth() == COLUMN and axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["4", "8", "32"]
    rising = [values[1], values[2], values[0]]
    assert points(axes) == [(4, pytest.approx(69.8 / 3)), (8, pytest.approx(21.4)), (32, pytest.approx(60.5 / 3))]
    (joined,) = [row for row in axes.lines if len(row.get_xdata()) == 3]
    assert joined.get_xdata().tolist() == [4, 8, 32]
    for bar, each in zip(axes.containers, rising, strict=True):
        low, high = bar.lines[2][0].get_segments()[0][:, 1]
        assert (low, high) == pytest.approx(stats.t.interval(0.95, 2, np.mean(each), stats.sem(each)))
    hollow = [bar.lines[0].get_markerfacecolor() == "white" for bar in axes.containers]
    assert hollow == [False, False, True]
    (band,) = axes.patches
    assert band.get_bbox().intervaly == pytest.approx(stats.t.interval(0.95, 2, 60.5 / 3, stats.sem(values[0])))
    text = " ".join(figure.get_supxlabel().split())
    assert text == ("Bars: 95 % intervals over 3 training seeds. Hollow: the base, window 32, whose interval is grey.")
    assert (axes.get_xlabel(), " ".join(axes.get_ylabel().split())) == (
        "window",
        f"{FD} 512 samples against 1797 digits; lower is better",
    )


def test_words_are_rows(tmp_path: Path) -> None:
    fill(tmp_path, [{"variant": name} for name in ("ssm+window", "window", "conv")], [[2.0], [3.0], [1.0]])
    write(tmp_path, "v3-s0", [line("train", "oom", error="3 GiB")], variant={"variant": "global"})
    write(tmp_path, "v4-s0", [made(scored(4.0)), line("train", "failed", error="killed")], variant={"variant": "mlp"})
    (figure,) = figures(tmp_path).values()
    (axes,) = figure.axes
    assert points(axes) == [(2.0, 0.0), (3.0, 1.0), (1.0, 2.0), (4.0, 4.0)]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["ssm+window", "window", "conv", "global", "mlp"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first one above
    assert [text.get_text() for text in axes.texts] == ["1 failed"]
    text = " ".join(figure.get_supxlabel().split())
    assert "No score: global (oom)." in text and "Bars" not in text and "whose value is grey" in text


def test_two_axes_are_lines(tmp_path: Path) -> None:
    variants = [{"model.mixers": mixers, "train.lr": lr} for mixers in (["ssm"], ["conv"]) for lr in (1e-4, 2e-4, 4e-4)]
    fill(
        tmp_path, variants, [[3.0, 3.1, 3.3], [2.0, 2.1, 2.2], [1.0, 1.2, 1.3], [5.0, 5.1, 5.4], [6.0, 6.1, 6.2], [7.0]]
    )
    (figure,) = figures(tmp_path).values()
    (axes,) = figure.axes
    lines = [row for row in axes.lines if len(row.get_xdata()) == 3]
    assert [row.get_ydata().tolist() for row in lines] == [
        pytest.approx([9.4 / 3, 2.1, 3.5 / 3]), pytest.approx([15.5 / 3, 6.1, 7.0]),
    ]  # fmt: skip
    assert len({row.get_color() for row in lines}) == 2
    apart = lines[0].get_xdata() / lines[1].get_xdata()
    assert (apart < 1).all() and (apart > 0.9).all()  # bars do not lie on each other
    labels = {text.get_text() for text in axes.texts}
    labels |= {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert labels == {"ssm", "conv"}


def test_many_lines_are_faint_beyond_a_legend(tmp_path: Path) -> None:
    variants = [{"model.window_size": size, "variant": f"v{at}"} for at in range(15) for size in (2, 4)]
    fill(tmp_path, variants, [[float(place)] for place in range(30)])
    (figure,) = figures(tmp_path).values()
    colours = [row.get_color() for row in figure.axes[0].lines if len(row.get_xdata()) == 2 and row.get_zorder() == 2]
    assert len(colours) == 15 and colours.count(FAINT) == 15 - ENTRIES
    (legend,) = figure.legends
    assert len(legend.get_texts()) == ENTRIES


def test_models_have_their_look(tmp_path: Path) -> None:
    write_many(tmp_path, 2, 2, 2, snapshots=1)
    evidence = Evidence(read([tmp_path]))
    shown = axis(evidence)
    assert not isinstance(shown, str) and isinstance(shown["axis_scale"], Figure)
    axes: Any = shown["axis_scale"].axes[0]
    groups = sorted({run.group: run.info["place"] for run in reversed(evidence.runs)}.items(), key=lambda item: item[1])
    assert [bar.lines[0].get_color() for bar in axes.containers] == [evidence.look.colour(group) for group, _ in groups]
    assert [text.get_text() for text in axes.get_yticklabels()][:2] == ["LaMamba-Diff-S", "LaMamba-Diff-B"]


def test_without_scores_or_studies_there_is_a_reason(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path, name, [cost()], variant={"v": name})
    assert figures(tmp_path) == {"axis_demo": "no run has been evaluated"}
    one = tmp_path / "one"
    fill(one, [{"v": 1}], [[1.0]])
    assert axis(Evidence(read([one]))) == "no study with a file has several variants"


def test_a_variant_that_lacks_the_axis_has_none_of_it(tmp_path: Path) -> None:
    fill(tmp_path, [{}, {"model.window_size": 4}, {"model.window_size": 8}], [[20.0], [23.0], [21.0]])
    (figure,) = figures(tmp_path).values()
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["no window", "window 4", "window 8"]
    assert points(axes) == [(20, 0), (23, 1), (21, 2)]


def test_a_limit_that_is_infinite_is_a_row(tmp_path: Path) -> None:
    fill(tmp_path, [{"train.clip": 1.0}, {"train.clip": float("inf")}], [[20.0], [23.0]])
    (figure,) = figures(tmp_path).values()
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["gradient clip 1", "gradient clip inf"]
    figure.canvas.draw()


def test_points_of_many_lines_stay_inside_the_axes(tmp_path: Path) -> None:
    settings = [
        {"model.window_size": window, "model.scan": scan} for window, scan in product((4, 8, 16), "abcdefghijkl")
    ]
    fill(tmp_path, settings, [[float(at)] for at in range(36)])
    (figure,) = figures(tmp_path).values()
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert all(low < x < high for bar in axes.containers for x in bar.lines[0].get_xdata())
