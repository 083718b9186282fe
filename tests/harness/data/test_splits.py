"""What a training never sees: every kind's test split has none of its training images, and the same classes."""

import os
from dataclasses import replace

import numpy as np
import pytest
from lamabench.harness.data.images import load, load_held_out
from lamabench.harness.data.splits import held_out
from lamabench.harness.sections import DataConfig
from lamabench.kernels.errors import InputError
from PIL import Image

DIGITS = DataConfig("digits", size=8, split="most")


def contents(data):
    return [image.numpy().tobytes() for image, _ in data]


def write_folder(root, seed, classes=("a", "b")):
    rng = np.random.default_rng(seed)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(root / name / f"{i}.png")


def test_most_and_test_are_the_digits():
    whole, most, test = (load(replace(DIGITS, split=split)) for split in ("train", "most", "test"))
    assert (len(whole), len(most), len(test)) == (1797, 1572, 225)
    assert contents(test) == contents(whole)[::8]
    assert sorted(contents(most) + contents(test)) == sorted(contents(whole))
    assert set(test.labels) == set(range(10)) and test.class_names == most.class_names
    with pytest.raises(InputError, match=r"data.split=train of 'digits' is all of its images, .*data.split=most"):
        held_out(replace(DIGITS, split="train"))
    with pytest.raises(InputError, match=r"data.split=test is the test split itself"):
        held_out(replace(DIGITS, split="test"))


def test_the_test_split_of_synthetic_images_has_others_of_the_same_classes():
    config = DataConfig("synthetic", size=8, channels=3, num_classes=5)
    train, test = load(config), load(held_out(config))
    assert len(test) == len(train) and test.labels.tolist() == train.labels.tolist()
    assert not set(contents(test)) & set(contents(train))


@pytest.mark.parametrize("name", ["test", "val"])
def test_the_test_split_of_a_folder_lies_beside_it(tmp_path, name):
    write_folder(tmp_path / "train", 0)
    write_folder(tmp_path / name, 1)
    config = DataConfig("folder", path=f"{tmp_path}/train", size=8, num_classes=2)
    train, test = load(config), load(held_out(config))
    assert contents(test) == contents(load(replace(config, path=f"{tmp_path}/{name}"))) != contents(train)
    os.rename(tmp_path / "train", tmp_path / "learn")
    with pytest.raises(InputError, match=r"is test or val beside data.path=…/train, and .*learn has none"):
        held_out(replace(config, path=f"{tmp_path}/learn"))
    write_folder(tmp_path / "train", 0)
    os.rename(tmp_path / name, tmp_path / "other")
    with pytest.raises(InputError, match=r"test or val beside data.path=…/train, and .*train has none"):
        load(held_out(config))
    write_folder(tmp_path / name, 1, classes=("a", "c"))
    with pytest.raises(InputError, match=r"the test split of data 'folder' has other classes than .*: c"):
        load_held_out(config, train.class_names)


def test_the_test_split_of_a_file_lies_beside_it(tmp_path):
    for name, seed in (("train", 0), ("test", 1)):
        images = np.random.default_rng(seed).integers(0, 256, (4, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images)
    config = DataConfig("npz", path=f"{tmp_path}/train.npz", size=8, num_classes=0)
    test = load_held_out(config, [])
    assert np.array_equal(test.images_at(np.arange(4))[:, 0], images)
