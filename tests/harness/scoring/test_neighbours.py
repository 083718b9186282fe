"""Copies of training images among samples are found, and shown beside them."""

import json
from dataclasses import replace

import numpy as np
import pytest
from lamabench.baselines.dit import DiTConfig
from lamabench.harness.config import Config
from lamabench.harness.data.images import load
from lamabench.harness.progress import Quiet
from lamabench.harness.scoring import neighbours as module
from lamabench.harness.scoring.neighbours import Neighbours, nearest, neighbours, write
from lamabench.harness.sections import DataConfig, RunConfig
from lamabench.kernels.errors import InputError
from lamabench.launch.cli import main
from PIL import Image
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits

DIGITS = np.rint(load_digits()["images"] * (255 / 16)).astype(np.uint8)
COPIES = {0: 17, 2: 3, 5: 29}  # {sample: training image}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """30 training images and 20 test images."""
    folder = tmp_path_factory.mktemp("data")
    np.savez(folder / "train.npz", images=DIGITS[:30])
    np.savez(folder / "test.npz", images=DIGITS[30:50])
    data = DataConfig("npz", path=f"{folder}/train.npz", size=8, channels=1, num_classes=0)
    model = DiTConfig(input_size=8, in_channels=1, num_classes=0, patch_size=2, hidden_size=16, depth=1, num_heads=2)
    return Config(model, data, run=RunConfig(device="cpu", root=str(folder)))


@pytest.fixture(scope="module")
def samples():
    """Three copies among noise."""
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    for sample, image in COPIES.items():
        images[sample, :, :, 0] = DIGITS[image]
    return images


def test_the_nearest_is_that_of_scipy(monkeypatch):
    """In chunks of any size; of equal ones, the first."""
    rng = np.random.default_rng(1)
    vectors, queries = rng.integers(0, 256, (50, 3, 4, 4), dtype=np.uint8), rng.integers(0, 256, (7, 3, 4, 4), np.uint8)
    vectors[40] = vectors[9] = queries[2]
    expected = cdist(queries.reshape(7, -1).astype(float), vectors.reshape(50, -1).astype(float))
    for chunk in (2**24, 48 * 7, 1):
        monkeypatch.setattr(module, "CHUNK", chunk)
        index, distance = nearest(queries, 50, lambda start, stop: vectors[start:stop])
        assert index.tolist() == expected.argmin(1).tolist() and index[2] == 9 and distance[2] == 0
        np.testing.assert_allclose(distance, expected.min(1), rtol=1e-6)


def test_copies_are_found_in_pixels_and_features(tmp_path, config, samples):
    data = load(config.data)
    spaces = neighbours(samples, data, config, tmp_path / "cache", Quiet())
    assert list(spaces) == ["pixels", "efficientnet_lite0"]
    for result in spaces.values():
        assert {sample: int(result.index[sample]) for sample in COPIES} == COPIES
        assert result.distance[[*COPIES]] == pytest.approx([0, 0, 0], abs=1e-4)
        assert result.distance[[1, 3, 4]].min() > result.test.max() > result.test.min() > 0 and len(result.test) == 20
        assert result.row()["nearer"] == 0.5
    train, test = DIGITS[:30].reshape(30, -1).astype(float), DIGITS[30:50].reshape(20, -1).astype(float)
    theirs = cdist(test, train).min(1) / 8  # the root of 64 pixels
    assert np.sort(spaces["pixels"].test) == pytest.approx(np.sort(theirs), rel=1e-6)
    assert spaces["pixels"].row()["test_median"] == pytest.approx(np.median(theirs))

    pictures = write(tmp_path, samples, data, spaces)
    table = json.loads((tmp_path / "neighbours.json").read_text())
    assert [table["pixels"]["training_image"][sample] for sample in COPIES] == list(COPIES.values())
    picture = np.asarray(Image.open(pictures["pixels"]))[..., 0]
    cells = [picture[0:48:6, 51 * i : 51 * i + 48 : 6] for i in range(11)]  # of the first row
    for pair, image in enumerate(COPIES.values()):
        assert np.array_equal(cells[3 * pair], DIGITS[image]) and np.array_equal(cells[3 * pair + 1], DIGITS[image])
        assert (cells[3 * pair + 2] == 255).all()


def test_mirror_images_are_copies_if_the_training_flips(tmp_path, config, samples):
    data = load(config.data)
    mirrored = np.ascontiguousarray(samples[:3, :, ::-1])
    for flip in (False, True):
        flipping = replace(config, data=replace(config.data, flip=flip))
        for result in neighbours(mirrored, data, flipping, tmp_path, Quiet()).values():
            assert ((result.distance < 1e-4) == [flip, False, flip]).all()
            assert not flip or result.index[[0, 2]].tolist() == [17, 3]


def test_without_a_test_split_there_is_nothing_to_compare_with():
    row = Neighbours(np.arange(3), np.array([1.0, 2.0, 4.0]), None).row()
    assert row == {"low": pytest.approx(1.1), "median": 2.0}


def test_samples_of_another_size_are_refused(tmp_path, config):
    with pytest.raises(InputError, match=r"samples are \[4, 4, 1\] .*, but training images are \[8, 8, 1\]"):
        neighbours(np.zeros((2, 4, 4, 1), np.uint8), load(config.data), config, tmp_path, Quiet())


def test_the_command_writes_beside_the_samples(tmp_path, config, capsys):
    words = "model=dit_nano model.depth=1 model.hidden_size=16 model.num_heads=2 data=npz data.size=8 train.steps=1"
    words += f" data.channels=1 data.num_classes=0 data.path={config.data.path} train.batch_size=8 run.device=cpu"
    assert main(["train", *words.split(), f"run.root={tmp_path}", "train.precision=float32"]) == 0
    (run,) = (tmp_path / "train").glob("dit_nano*")
    asked = ["sample.count=5", "sample.method=ddim", "sample.steps=2"]
    assert main(["evaluate", str(run), *asked, "--neighbours"]) == 2
    assert "has no samples to compare; draw them first: lamabench sample" in capsys.readouterr().err
    assert main(["sample", str(run), *asked]) == 0
    capsys.readouterr()
    (tmp_path / "train/.study.json").unlink()  # it adds nothing that would have to be noted
    assert main(["evaluate", str(run), *asked, "--neighbours", "4", "--json"]) == 0
    assert not (tmp_path / "train/.study.json").exists()
    rows = json.loads(capsys.readouterr().out)
    assert [(row["space"], row["samples"]) for row in rows] == [("pixels", 4), ("efficientnet_lite0", 4)]
    (folder,) = (run / "samples").iterdir()
    for row in rows:
        assert row["picture"] == str(folder.resolve() / f"neighbours-{row['space']}.png")
        assert Image.open(row["picture"]).width == 11 * 51 - 3
    (tmp_path / "weights").mkdir()
    network = ["evaluate.features=inception_v3", f"evaluate.features_path={tmp_path / 'weights'}"]
    for download, text in (("false", "the weights of inception_v3 are missing"), ("file:///none", "cannot download")):
        assert main(["evaluate", str(run), *asked, *network, f"evaluate.download={download}", "--neighbours"]) == 2
        assert text in capsys.readouterr().err
    assert main(["evaluate", "few.npz", "--neighbours"]) == 2
    assert "--neighbours compares samples with the training images of a run" in capsys.readouterr().err
