"""The grid beside the samples, and the settings that `train` proposes for them."""

import numpy as np
import pytest
from lamabench.launch.commands.sample import fitting
from lamabench.launch.grid import choose, write_grid
from PIL import Image


@pytest.mark.parametrize(
    ("labels", "classes", "rows"),
    [
        ([*range(3)] * 20, [0, 1, 2], [list(range(row, 24, 3)) for row in range(3)]),
        ([*range(10)] * 2, [0, 1, 2, 3, 5, 6, 7, 8], [[row, row + 10] for row in (0, 1, 2, 3, 5, 6, 7, 8)]),
        ([*range(1000)] * 2, list(range(0, 1000, 125)), [[row, row + 1000] for row in range(0, 1000, 125)]),
        ([0] * 100, [], np.split(np.arange(64) * 100 // 64, 8)),  # without classes
        ([0, 2, 4, 6, 8], [], [list(range(5))]),  # fewer images than classes
        ([3, 3, 3, 1, 1] * 2, [], [list(range(8)), [8, 9]]),  # random classes
    ],
)
def test_rows_of_a_grid(labels, classes, rows):
    actual, names = choose(np.array(labels))
    assert names == classes and [row.tolist() for row in actual] == [list(row) for row in rows]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_the_images_enlarged(tmp_path, channels):
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, channels), np.uint8)
    assert write_grid(tmp_path / "grid.png", images, np.arange(20) % 2) == [0, 1]
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    assert picture.shape == (2 * 48 + 3, 8 * 48 + 7 * 3, 3)  # every pixel is 3 × 3, with 3 white pixels between images
    for row, column in ((0, 0), (1, 7)):
        cell = picture[row * 51 :, column * 51 :][:48, :48]
        assert np.array_equal(cell[1::3, 1::3], np.broadcast_to(images[2 * column + row], (16, 16, 3)))
    assert (picture[48:51] == 255).all()


@pytest.mark.parametrize(("speed", "count"), [(0.1, 160), (70, 1000), (700, 10_000), (1e6, 10_000)])
def test_the_proposed_settings_take_about_two_minutes(speed, count):
    """A forward pass is a third of a step of training."""
    for objective, method in (("ddpm", "ddim"), ("v", "ddim"), ("flow", "euler")):
        words = [f"sample.count={count}", f"sample.method={method}", "sample.steps=25"]
        assert fitting(speed, objective) == words
    assert count == 160 or count * 25 / (3 * speed) <= 120
