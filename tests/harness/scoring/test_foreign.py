"""Folders of images of any origin, read as samples."""

import numpy as np
import pytest
from lamabench.harness.scoring.foreign import Pictures, open_foreign
from lamabench.kernels.errors import InputError
from PIL import Image


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_images_come_in_the_order_of_their_paths(tmp_path):
    paths = ["a/1.png", "a/b/0.png", "a0.png", "b/2.png", "b.PNG"]  # of the parts: the folder a comes before a0.png
    images = {path: noise(number, 4, 6, 3) for number, path in enumerate(paths)}
    for path in reversed(paths):
        write(tmp_path / path, images[path])
    (tmp_path / "readme.txt").write_text("no image")
    write(tmp_path / ".hidden" / "x.png", noise(9, 4, 6, 3))
    said = []
    pictures = Pictures(tmp_path, said.append)
    assert (pictures.shape, len(pictures), pictures.dtype) == ((5, 4, 6, 3), 5, np.uint8)
    np.testing.assert_array_equal(pictures[:], [images[path] for path in paths])
    np.testing.assert_array_equal(pictures[3:9], [images[path] for path in paths[3:]])
    assert pictures[5:].shape == (0, 4, 6, 3)
    assert said == [f"{tmp_path}: left out are 1 with another suffix (readme.txt)"]


def test_grey_images_are_grey_and_grey_among_colours_is_colour(tmp_path):
    grey, colour = noise(1, 5, 5), noise(2, 5, 5, 3)
    write(tmp_path / "a.png", grey)
    np.testing.assert_array_equal(Pictures(tmp_path)[:], grey[None, ..., None])
    write(tmp_path / "b.png", colour)
    np.testing.assert_array_equal(Pictures(tmp_path)[:], [np.stack([grey] * 3, -1), colour])


def test_the_digest_is_of_names_and_contents(tmp_path):
    for folder in ("one", "two"):
        for number in range(3):
            write(tmp_path / folder / f"{number}.png", noise(number, 4, 4))
    digest = open_foreign(tmp_path / "one")[1]
    assert open_foreign(tmp_path / "two")[1] == digest
    write(tmp_path / "two" / "2.png", noise(7, 4, 4))
    assert open_foreign(tmp_path / "two")[1] != digest
    (tmp_path / "one" / "2.png").rename(tmp_path / "one" / "-.png")
    assert open_foreign(tmp_path / "one")[1] != digest, "another order"


def test_several_sizes(tmp_path):
    write(tmp_path / "a.png", noise(1, 4, 6))
    write(tmp_path / "b" / "c.png", noise(1, 6, 4))
    with pytest.raises(InputError, match=r"several sizes: a\.png has 6 × 4 pixels, b/c\.png has 4 × 6; give them one"):
        Pictures(tmp_path)


def test_a_changed_image_is_an_error(tmp_path):
    write(tmp_path / "a.png", noise(1, 4, 6))
    pictures = Pictures(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"unreadable image .*a\.png"):
        pictures[:]
    write(tmp_path / "a.png", noise(1, 6, 4))
    with pytest.raises(InputError, match=r"a\.png was changed while it was in use"):
        pictures[:]
