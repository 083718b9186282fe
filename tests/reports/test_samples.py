"""The figure of samples of all models from equal noise."""

from pathlib import Path
from typing import Any

import numpy as np
from lamabench.reports.contents import FIGURES
from lamabench.reports.evidence import Evidence
from lamabench.reports.runs import read
from lamabench.reports.style import ENTRIES
from matplotlib.figure import Figure
from run_folders import samples_of, write

PITCH = 48 + 3


def figure_of(root: Path) -> Figure:
    figure = FIGURES["samples"].draw(Evidence(read([root])))
    assert isinstance(figure, Figure)
    return figure


def cells(figure: Figure) -> list[list[int]]:
    """The grey value of each cell of the picture."""
    picture: Any = figure.axes[0].images[0].get_array()
    return [[int(value) for value in row[20::PITCH, 0]] for row in picture[20::PITCH]]


def test_models_are_rows_and_columns_have_equal_noise(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for seed in (0, 1):
            write(tmp_path, f"{name}-s{seed}", [], variant={"variant": name}, seed=seed, labels=[1, 0, 1, 2])
    write(tmp_path, "c-s1", [], variant={"variant": "c"}, seed=1, labels=[1, 0, 1, 2])
    figure = figure_of(tmp_path)
    assert cells(figure) == [[1, 0, 3]] * 3  # image k has the value k; the first images of the classes 0, 1, 2
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["a", "b", "c \N{DOUBLE DAGGER}"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0", "1", "2"]
    text = figure.get_supxlabel().replace("\n", " ")
    assert text.startswith(
        "Seed 0. Images in a column begin with the same noise and class. No real images are on record"
    )
    assert text.endswith("\N{DOUBLE DAGGER}: other noise, classes or images.")


def test_real_images_stand_above_the_samples_of_their_class(tmp_path: Path) -> None:
    run = write(tmp_path, "a", [], labels=[1, 0, 1, 2])
    images = np.broadcast_to(np.array([50, 51, 52, 53], np.uint8)[:, None, None, None], (4, 4, 4, 1))
    training = samples_of(run).resolve().parents[2]
    np.savez(training / "real.npz", images=images, labels=np.array([3, 2, 1, 0]))
    figure = figure_of(tmp_path)
    assert cells(figure) == [[53, 52, 51], [1, 0, 3]]
    assert figure.axes[0].get_yticklabels()[0].get_text() == "Real images"
    assert "not on record" not in figure.get_supxlabel()
    (training / "real.npz").write_bytes(b"PK")
    text = FIGURES["samples"].draw(Evidence(read([tmp_path])))
    assert isinstance(text, str) and text.startswith("one model has samples, and no real images are on record")


def test_without_classes_the_first_images_are_columns(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path, name, [], variant={"variant": name}, labels=[0] * 40)
    figure = figure_of(tmp_path)
    assert cells(figure) == [list(range(10))] * 2 and not figure.axes[0].get_xticklabels()


def test_of_many_models_no_more_than_a_legend_has_are_shown(tmp_path: Path) -> None:
    for at in range(15):
        write(tmp_path, f"v{at:02d}", [], variant={"variant": f"v{at:02d}"}, labels=[0, 1])
    write(tmp_path, "none", [], variant={"variant": "none"})
    figure = figure_of(tmp_path)
    assert len(cells(figure)) == 11
    assert figure.get_supxlabel().replace("\n", " ").endswith("4 more with samples are not shown.")


def test_there_is_no_figure_without_samples(tmp_path: Path) -> None:
    write(tmp_path, "a", [])
    assert FIGURES["samples"].draw(Evidence(read([tmp_path]))) == "no run has samples"


def test_of_many_runs_the_first_seed_of_models_has_a_grid(tmp_path: Path) -> None:
    for at in range(15):
        for seed in (1, 0):
            write(tmp_path, f"v{at}-s{seed}", [], variant={"variant": f"v{at}"}, seed=seed, labels=[0, 1])
    figures: Any = FIGURES["samples_*"].draw(Evidence(read([tmp_path])))
    drawn = [name for name, figure in figures.items() if not isinstance(figure, str)]
    assert len(drawn) == ENTRIES and all(name.endswith("-s0") for name in drawn)
