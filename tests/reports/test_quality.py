"""Bubbles of quality, the front of quality and speed, and quality during training: the data of the figures."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lamabench.reports import fits
from lamabench.reports.differences import Mean
from lamabench.reports.drawing import cut_bars, ends_of, few_ticks, log_if_wide, place_labels, round_numbers
from lamabench.reports.during import columns_of, during, trajectories
from lamabench.reports.evidence import Evidence
from lamabench.reports.pareto import front, pareto, speeds_of
from lamabench.reports.quality import LARGEST, LEAST, quality_vs_flops
from lamabench.reports.runs import read
from lamabench.reports.scaling_figure import scaling
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from run_folders import FD, HELDOUT, IMAGES, cost, made, scored, swept, timed, write, write_many


def evidence_of(root: Path) -> Evidence:
    return Evidence(read([root]))


def is_a_figure(figure: Any) -> Figure:
    assert isinstance(figure, Figure), figure
    return figure


def test_bubbles_have_the_area_of_their_parameters_and_families_are_joined(tmp_path: Path) -> None:
    write_many(tmp_path, 2, 3, 2, noise=0.0)
    figure = is_a_figure(quality_vs_flops(evidence_of(tmp_path)))
    axes: Any = figure.axes[0]
    sizes = [one.get_sizes()[0] for one in axes.collections if isinstance(one, PathCollection)]
    params = [33.0, 130.5, 458.1, 28.0, 127.0, 464.0]  # DiT first, as in the summary
    np.testing.assert_allclose(sizes, np.maximum(LEAST, LARGEST * np.array(params) / 464.0))
    lines = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert [list(line.get_xdata()) for line in lines] == [[12.12, 46.03, 161.4], [4.972, 21.31, 70.85]]
    assert [text.get_text() for text in axes.texts] == ["S/2", "B/2", "L/2", "S", "B", "L"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["DiT", "LaMamba-Diff"]
    assert next(text.get_text() for text in axes.get_legend().get_texts()).startswith("parameters: ")
    caption = " ".join(figure.get_supxlabel().split())
    assert "Means over 2 training seeds with their 95 % intervals." in caption and "25,600,000 images" in caption
    assert figure.get_figwidth() == 3.35


def test_bubbles_compare_at_equal_images(tmp_path: Path) -> None:
    for name, steps in (("dit_s", (100, 200, 300)), ("dit_b", (100, 200))):
        for step in steps:
            lines = [made(scored(6000.0 / step, metric=FD)), *([cost()] if step == 100 else [])]
            write(tmp_path, name, lines, title=name, variant={"model": name}, step=step)
    figure = is_a_figure(quality_vs_flops(evidence_of(tmp_path)))
    axes: Any = figure.axes[0]
    assert {container.lines[0].get_ydata()[0] for container in axes.containers} == {30.0}
    assert "12,800 images" in " ".join(figure.get_supxlabel().split())  # 200 steps of 64


def test_published_rows_stand_behind_scores_of_their_protocol_alone(tmp_path: Path) -> None:
    """FID of 50,000 samples, ImageNet at 256 px, in latents, 250 ancestral steps, no guidance, 400K steps of 256."""
    way = {"sampler": "ancestral", "steps": 250, "guidance": 1, "weights": "ema", "labels": "balanced", "encoder": "sd"}
    for name, more in (("same", {}), ("guided", {"guidance": 1.5}), ("early", {})):
        score = made(scored(20.0, metric="FID"), **(way | more)) | {"count": 50_000, "reference": "imagenet"}
        score["evaluation"] = {"images": [256, 256, 3]}
        score["images_seen"] = 400_000 * 256 if name != "early" else 200_000 * 256
        write(tmp_path / name, "dit", [cost(118_000_000_000, 675_000_000), score])
    shown = {}
    for name in ("same", "guided", "early"):
        figure = is_a_figure(quality_vs_flops(evidence_of(tmp_path / name)))
        axes: Any = figure.axes[0]
        shown[name] = [one.get_offsets().tolist() for one in axes.collections if isinstance(one, PathCollection)]
    assert len(shown["guided"]) == len(shown["early"]) == 1
    published = shown["same"][0]
    assert [2 * 118.64, 19.47] in published and [2 * 6.06, 68.4] in published  # DiT-XL/2 and DiT-S/2 of its paper


@pytest.mark.filterwarnings("error")
def test_intervals_below_zero_do_not_break_logarithmic_axes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "REPLICATES", 20)
    write_many(tmp_path, 2, 3, 2, noise=1.0)
    evidence = evidence_of(tmp_path)
    assert quality_vs_flops(evidence) and pareto(evidence) and during(evidence)
    figures: Any = scaling(evidence)
    is_a_figure(figures["scaling"]).draw_without_rendering()
    axes: Any = figures["scaling"].axes[0]
    assert axes.get_ylim()[0] > 0.01


def test_many_models_have_numbers_and_twelve_entries(tmp_path: Path) -> None:
    for place in range(20):
        name = f"window-{place}"
        write(
            tmp_path, name, [cost(10_000_000 + place), scored(50.0 + place / 10)], variant={"model.window_size": place}
        )
    figure = is_a_figure(quality_vs_flops(evidence_of(tmp_path)))
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(entries) == 12 and entries[-1] == "9 others"
    axes: Any = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == [str(number) for number in range(1, 12)]


def test_the_front_is_what_its_definition_says() -> None:
    """Against the definition on all triples of a grid, and in closed form: of points on a falling line all are members,
    of points on a rising line one."""
    grid = list(product((1.0, 2.0, 3.0), (1.0, 2.0)))
    for chosen in product(grid, repeat=3):
        points = dict(enumerate(chosen))
        members = {
            name
            for name, (speed, value) in points.items()
            if not any(s >= speed and v <= value and (s > speed or v < value) for s, v in points.values())
        }
        assert set(front(points, "min")) == members
        assert set(front({name: (s, -v) for name, (s, v) in points.items()}, "max")) == members
    line = {k: (float(k), float(k)) for k in range(5)}
    assert front(line, "min") == [0, 1, 2, 3, 4] and front(line, "max") == [4]


def test_pareto_draws_the_front_and_names_its_members(tmp_path: Path) -> None:
    for name, value, speed in (
        ("fast", 60.0, 900.0),
        ("good", 40.0, 300.0),
        ("beaten", 65.0, 500.0),
        ("slow", 50.0, 200.0),
    ):
        lines = [scored(value), timed("forward", speed), timed("train", speed / 3)]
        write(tmp_path, name, lines, title=name, variant={"model": name})
    figure = is_a_figure(pareto(evidence_of(tmp_path)))
    panels: list[Any] = figure.axes
    assert [axes.get_title() for axes in panels] == ["Forward", "Training step"]
    (line,) = (line for line in panels[0].lines if line.get_linestyle() == "--")
    np.testing.assert_array_equal(line.get_xydata(), [[300.0, 40.0], [300.0, 60.0], [900.0, 60.0]])
    assert {text.get_text() for text in panels[0].texts} == {"good", "fast", "beaten", "slow"}
    assert len(panels[0].containers) == 4
    assert "A CPU, float32, batch 16" in figure.get_supxlabel()


def test_speeds_compare_in_the_setting_that_most_models_share(tmp_path: Path) -> None:
    write(tmp_path, "a", [scored(60.0), swept("train", 900.0, 64), swept("train", 990.0, 128)], variant={"model": "a"})
    slow, fast = swept("train", 300.0, 64), swept("train", 350.0, 64, compile="whole-step")
    write(tmp_path, "b", [scored(50.0), slow, fast, timed("train", 5000.0, 64)], variant={"model": "b"})
    runs = read([tmp_path])
    speeds = speeds_of(runs, {run.group for run in runs}, "train")
    assert speeds is not None and speeds.setting == "NVIDIA H100 80GB HBM3, bfloat16, batch 64"
    assert sorted(row["images_per_s"] for row in speeds.rows.values()) == [350.0, 900.0]
    write(tmp_path / "one", "a", [scored(60.0), swept("train", 900.0, 64)])
    assert pareto(evidence_of(tmp_path / "one")) == "no two models with a score were timed in one setting"


def test_during_shows_means_over_seeds_at_every_moment(tmp_path: Path) -> None:
    write_many(tmp_path, 2, 1, 3)
    evidence = evidence_of(tmp_path)
    figures: Any = during(evidence)
    figure = is_a_figure(figures["during"])
    panels: list[Any] = figure.axes
    assert len(panels) == 6 and figure.get_figwidth() == 6.9
    thick = [line for line in panels[0].lines if line.get_marker() != "None"]
    thin = [line for line in panels[0].lines if line.get_marker() == "None"]
    assert len(thick) == 2 and [len(line.get_xdata()) for line in thin] == [3 * 6] * 2
    scored_runs = columns_of(evidence)[FD]
    values = trajectories(scored_runs, "images")
    dit = [one for run, one in values.items() if run.info["family"] == "dit"]
    np.testing.assert_allclose(thick[0].get_ydata(), np.mean([one.values for one in dit], axis=0))
    np.testing.assert_allclose(thick[0].get_xdata(), IMAGES * np.arange(1, 6) / 5)
    flops = next(line for line in panels[1].lines if line.get_marker() != "None").get_xdata()
    np.testing.assert_allclose(flops, 3 * 12.12e9 * IMAGES * np.arange(1, 6) / 5 / 1e18)
    hours = next(line for line in panels[2].lines if line.get_marker() != "None").get_xdata()
    np.testing.assert_allclose(hours, IMAGES * np.arange(1, 6) / 5 / (1.2e14 / 12.12e9) / 3600)
    assert panels[0].get_ylabel().startswith(FD) and panels[3].get_ylabel().startswith(HELDOUT)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["DiT-S/2", "LaMamba-Diff-S"]


def test_held_out_losses_of_the_log_stand_in_for_scores(tmp_path: Path) -> None:
    write_many(tmp_path, 1, 1, 1, snapshots=1)
    columns = columns_of(evidence_of(tmp_path))
    ((name, scored_runs),) = columns.items()
    (rows,) = scored_runs.values()
    assert name == "held-out loss (log)" and [row["images_seen"] for row in rows] == [
        IMAGES * k // 5 for k in range(1, 6)
    ]
    figures: Any = during(evidence_of(tmp_path))
    assert len(is_a_figure(figures["during"]).axes) == 3
    write(tmp_path / "none", "bare", [scored(60.0)])
    assert during(evidence_of(tmp_path / "none")) == "no training was scored at two moments"


@pytest.mark.parametrize(
    ("low", "high", "most", "ticks"),
    [
        (3.0, 1100.0, 4, [10, 100, 1000]),
        (3.0, 40.0, 4, [3, 10, 30]),
        (1.2, 9.0, 4, [2, 3, 5]),
        (12.0, 13.2, 4, [12, 12.5, 13]),
        (4.3, 14.0, 6, [6, 8, 10, 12, 14]),
        (0.057, 0.073, 4, [0.06, 0.065, 0.07]),
        (1e-6, 1e9, 4, [1e-5, 1, 1e5]),
    ],
)
def test_ticks_are_few_and_round(low: float, high: float, most: int, ticks: list[float]) -> None:
    axis = Figure().add_subplot().xaxis
    few_ticks(axis, low, high, most)
    np.testing.assert_allclose(np.asarray(axis.get_majorticklocs()), ticks)
    assert round_numbers(28e6, 680e6) == [3e7, 1e8, 3e8]


def test_bars_that_reach_below_0_are_cut() -> None:
    means = {"a": Mean(30.0, 4.0, 3), "b": Mean(150.0, 450.0, 3), "c": Mean(50.0, None, 1), "d": Mean(8.0, 8.0, 3)}
    cut, words = cut_bars(means, "FD-EffNetLite0-10k")
    assert cut == means | {"b": Mean(150.0, 75.0, 3), "d": Mean(8.0, 4.0, 3)}
    assert words.startswith("Bars that reach below 0 are cut")
    assert min(ends_of(cut)) == 4.0 and max(ends_of(cut)) == 225.0
    assert cut_bars(means, "KD-EffNetLite0-10k") == (means, "")  # may be negative
    assert cut_bars({"a": means["a"]}, "FD-EffNetLite0-10k") == ({"a": means["a"]}, "")


@pytest.mark.parametrize(("numbers", "scale"), [([1.0, 4.1], "log"), ([1.0, 4.0], "linear"), ([0.0, 4.1], "linear")])
def test_an_axis_of_a_wide_range_is_logarithmic(numbers: list[float], scale: str) -> None:
    axes = Figure().add_subplot()
    axes.plot(numbers, numbers)
    log_if_wide(axes.yaxis, numbers)
    assert (axes.get_yscale(), axes.get_xscale()) == (scale, "linear")


def test_labels_avoid_lines_points_and_each_other() -> None:
    figure = Figure(figsize=(3.35, 2.5))
    axes: Any = figure.add_subplot()
    points = [(0.2, 0.5), (0.5, 0.5), (0.8, 0.5)]
    axes.plot([0.0, 1.0], [0.5, 0.5])
    axes.set(xlim=(0, 1), ylim=(0, 1))
    figure.draw_without_rendering()
    assert place_labels(axes, points, ["one", "two", "three"], ["#0072B2"] * 3, [])
    boxes = [note.get_window_extent() for note in axes.texts]
    height = axes.transData.transform((0.5, 0.5))[1]
    assert all(box.y0 > height or box.y1 < height for box in boxes), "the line crosses no label"
    assert not any(one.overlaps(other) for at, one in enumerate(boxes) for other in boxes[:at])
    crowd = [(0.5, 0.5 + 0.001 * at) for at in range(20)]
    before = len(axes.texts)
    assert not place_labels(axes, crowd, ["a long name"] * 20, ["#0072B2"] * 20, []) and len(axes.texts) == before
    assert place_labels(axes, crowd, [str(at) for at in range(20)], ["#0072B2"] * 20, [])
