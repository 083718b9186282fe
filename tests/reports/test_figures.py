"""Figures of runs: loss, throughput, samples."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from lamabench.reports.during import columns_of
from lamabench.reports.evidence import Evidence
from lamabench.reports.loss import group_words, loss, running_median
from lamabench.reports.runs import read
from lamabench.reports.samples import mosaic
from lamabench.reports.seeds import seeds
from lamabench.reports.summary import summary
from lamabench.reports.throughput import throughput
from run_folders import scored, timed, write, write_many


def test_loss_figure_shows_the_curve(three: Path) -> None:
    runs = read([three])
    figure = loss(runs, summary(runs))
    assert not isinstance(figure, str)
    axes: Any = figure.axes[0]
    raw, smooth = axes.lines[3], axes.lines[4]  # three artists per run: raw, smooth, the mark at the end
    np.testing.assert_array_equal(raw.get_xdata(), 64 * np.arange(1, 31))
    np.testing.assert_array_equal(raw.get_ydata(), [1 / k for k in range(1, 31)])
    np.testing.assert_allclose(smooth.get_ydata()[:-1], [1 / k for k in range(1, 30)])  # the median of a falling curve
    assert axes.get_yscale() == "log" and axes.get_xlabel() and axes.get_ylabel()
    assert sorted(text.get_text() for text in axes.texts) == ["ADM (oom)", "DiT-demo", "LaMamba_demo"]  # at the ends
    assert len({line.get_color() for line in axes.lines}) == 3
    assert [line.get_marker() for line in axes.lines if len(line.get_xdata()) == 1] == ["x", "s", "o"]


def test_loss_figure_counts_the_seeds_that_it_shows(tmp_path: Path) -> None:
    """A seed that was not started has no line."""
    for name, seed, curve in (
        ("a", 0, [2.0, 1.0]),
        ("a", 1, [2.0, 1.0]),
        ("b", 0, [3.0]),
        ("b", 1, [3.0]),
        ("b", 2, None),
    ):
        write(tmp_path, f"{name}-s{seed}", [], title=name, variant={"model": name}, seed=seed, curve=curve)
    runs = read([tmp_path])
    words = "A line for each of the 2 training seeds of a model"
    figure = loss(runs, summary(runs))
    assert not isinstance(figure, str) and figure.get_supxlabel() == words
    write(tmp_path, "a-s2", [], title="a", variant={"model": "a"}, seed=2, curve=[2.0])
    runs = read([tmp_path])
    figure = loss(runs, summary(runs))
    assert not isinstance(figure, str) and words.partition(" the ")[0] not in figure.get_supxlabel()


def test_loss_figure_has_the_held_out_loss_beside_it(tmp_path: Path) -> None:
    runs = read([write_many(tmp_path, 2, 2, 2, snapshots=3).parent])
    figure = loss(runs, summary(runs))
    assert not isinstance(figure, str)
    training, held = figure.axes
    assert held.get_ylabel() == "Held-out loss" and len(training.lines) == 2 * len(runs)
    logs = {tuple(line.get_ydata()) for line in held.lines if len(line.get_ydata()) == 5}
    expected = {tuple(line["heldout_loss"] for line in run.metrics if "heldout_loss" in line) for run in runs}
    assert logs == expected and len(logs) == 8
    points = [line for line in held.lines if line.get_linestyle() == "None"]
    values = {tuple(line.get_xdata()): None for line in points}
    assert values == {tuple(256 * round(share * 100_000) for share in (1 / 3, 2 / 3, 1)): None} and len(points) == 8
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    titles = ("DiT-S/2", "DiT-B/2", "LaMamba-Diff-S", "LaMamba-Diff-B")
    assert labels == list(titles) and "each of the 2 training seeds" in figure.get_supxlabel()


def test_losses_of_different_objectives_are_kept_apart(tmp_path: Path) -> None:
    """Held-out losses of the logs have a panel for each target. Tables and the figure of training losses say which do
    not compare, where the distribution of t differs too."""
    root = write_many(tmp_path, 2, 2, 2, snapshots=1).parent
    goals = {
        "DiT-S/2": {"kind": "flow", "times": "uniform"},
        "DiT-B/2": {"kind": "flow", "times": "logit_normal"},
        "LaMamba-Diff-S": {"kind": "v", "schedule": "cosine"},
    }
    for path in root.glob("trainings/*/config.json"):
        info = json.loads(path.read_text(encoding="utf-8"))
        info["config"]["objective"] = goals.get(info["title"], {"kind": "ddpm", "schedule": "linear"})
        path.write_text(json.dumps(info), encoding="utf-8")
    evidence = Evidence(read([root]))
    apart = {name: {run.info["title"] for run in rows} for name, rows in columns_of(evidence).items()}
    assert apart == {
        "held-out loss (log), flow matching": {"DiT-S/2", "DiT-B/2"},
        "held-out loss (log), v-prediction, cosine schedule": {"LaMamba-Diff-S"},
        "held-out loss (log), ddpm": {"LaMamba-Diff-B"},
    }
    figure = loss(evidence.runs, evidence.overview)
    assert not isinstance(figure, str)
    texts = [evidence.overview.notes, seeds(evidence.overview).notes, [figure.get_supxlabel().replace("\n", " ")]]
    for each in texts:
        assert any("do not compare, because objectives differ" in one for one in each)


def test_held_out_losses_of_one_protocol_are_drawn(tmp_path: Path) -> None:
    row = scored(0.5, metric="held-out loss", protocol="a") | {"images_seen": 640, "samples": None}
    write(tmp_path, "one", [row], title="One")
    write(
        tmp_path, "two", [row | {"value": 0.25}, row | {"value": 9.0, "protocol": "b"}], title="Two", variant={"v": 2}
    )
    runs = read([tmp_path])
    figure = loss(runs, summary(runs))
    assert not isinstance(figure, str)
    (axes,) = figure.axes
    shown: Any = [line.get_ydata() for line in axes.lines if line.get_marker() != "x"]
    assert sorted(shown) == [[0.25], [0.5]]
    assert figure.get_supxlabel() == "Held-out loss: 1 score under another protocol is left out"


def test_a_group_says_how_many_seeds_it_has_and_how_they_ended() -> None:
    assert group_words(["done"]) == "" and group_words(["oom"]) == " (oom)"
    assert group_words(["done", "oom", "failed", "done"]) == " (4 seeds, 1 oom, 1 failed)"
    assert group_words(["done", "done"], same=True) == "" and group_words(["done", "oom"], same=True) == " (1 oom)"


def test_the_running_median_is_that_of_its_windows() -> None:
    random = np.random.default_rng(0)
    for size, window in itertools.product((1, 2, 3, 10, 57), (1, 2, 3, 6, 11, 60, 200)):
        values = random.integers(0, 9, size) + random.standard_normal(size)
        halves = [min(window // 2, at) for at in range(size)]
        every = [np.median(values[at - half : at + half + 1]) for at, half in enumerate(halves)]
        np.testing.assert_array_equal(running_median(values, window), every)


def test_of_forty_variants_eleven_are_named(tmp_path: Path) -> None:
    for at in range(40):
        write(tmp_path, f"v{at}", [scored(at + 1.0)], variant={"variant": f"v{at}"}, curve=[2.0, 1.0 + at])
    runs = read([tmp_path])
    figure = loss(runs, summary(runs))
    assert not isinstance(figure, str)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {*labels} == {*(f"v{at} (unfinished)" for at in range(11)), "29 others"}
    curves = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    assert len(curves) == 40 and sum(line.get_color() == "0.72" for line in curves) == 29


def test_throughput_figure_shows_bars_and_whiskers(three: Path) -> None:
    runs = read([three])
    figure = throughput(runs, summary(runs))
    assert not isinstance(figure, str)
    panels: list[Any] = figure.axes
    forward, train = panels
    assert [bar.get_width() for bar in forward.patches] == [1200.0, 600.0]
    assert [bar.get_width() for bar in train.patches] == [300.0, 150.0]
    whisker = forward.containers[1].lines[2][0].get_segments()[0]
    np.testing.assert_allclose(whisker[:, 0], [1200 / 1.25, 1200 / 0.8])
    assert [tick.get_text() for tick in forward.get_yticklabels()] == ["DiT-demo", "LaMamba_demo"]
    assert figure.get_supxlabel().startswith("batch 16, float32, eager mode, 2 threads, A CPU\n")


def test_a_disturbed_throughput_has_an_asterisk(tmp_path: Path) -> None:
    write(tmp_path, "one", [timed("forward", 200.0, disturbed="another process")])
    write(tmp_path, "two", [timed("forward", 100.0)], title="DiT-two", variant={"v": 2})
    runs = read([tmp_path])
    figure = throughput(runs, summary(runs))
    assert not isinstance(figure, str)
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.texts]  # in the order of the bars
    assert sorted(texts) == ["100", "200 *"] and "*: something else kept" in " ".join(figure.get_supxlabel().split())
    assert [bool(bar.get_hatch()) for bar in axes.patches] == [text.endswith("*") for text in texts]


def test_a_grid_is_ordered_by_class_and_only_enlarged(tmp_path: Path) -> None:
    labels = [3, 1, 3, 2, 1] + [1] * 20
    folder = write(tmp_path, "run", [], labels=labels)
    grid = mosaic(read([folder])[0])
    assert not isinstance(grid, str) and grid.names == ["1", "2", "3"]
    pitch = 48 + 3
    assert grid.picture.shape == (3 * pitch - 3, 8 * pitch - 3, 3)
    for row, images in enumerate(([1, 4, 5, 6, 7, 8, 9, 10], [3], [0, 2])):
        for column, image in enumerate(images):
            cell = grid.picture[row * pitch :, column * pitch :][:48, :48]
            assert (cell == image).all()
    assert (grid.picture[pitch : 2 * pitch, pitch:] == 255).all()  # class 2 has one image
    many = mosaic(read([write(tmp_path, "many", [], labels=list(range(30)))])[0])
    assert not isinstance(many, str) and many.names == [str(k) for k in range(10)]
    plain = mosaic(read([write(tmp_path, "plain", [], labels=[0] * 12)])[0])
    assert not isinstance(plain, str) and plain.names == [] and plain.picture.shape == (2 * pitch - 3, 8 * pitch - 3, 3)
