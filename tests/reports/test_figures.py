"""Figures of runs: loss, throughput, samples."""

from pathlib import Path
from typing import Any

import numpy as np
from lamabench.reports.loss import loss
from lamabench.reports.runs import read
from lamabench.reports.samples import mosaic
from lamabench.reports.summary import summary
from lamabench.reports.throughput import throughput
from run_folders import write


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
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["ADM (oom)", "DiT-demo", "LaMamba_demo"]
    assert len({line.get_color() for line in axes.lines}) == 3


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
