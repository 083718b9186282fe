"""With `sample.keep=features`, a set has the features of its images and the first images, and the same scores."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from lamabench.baselines.dit import DiTConfig
from lamabench.harness import sampling, shards, signals
from lamabench.harness.config import Config
from lamabench.harness.disk import append
from lamabench.harness.progress import Progress
from lamabench.harness.record import read_records
from lamabench.harness.sampling import generate
from lamabench.harness.scoring.features import Extractor
from lamabench.harness.scoring.kept import FeatureSet, open_set
from lamabench.harness.scoring.networks import network_of
from lamabench.harness.scoring.score import Unscored, score
from lamabench.harness.sections import DataConfig, EvaluateConfig, RunConfig, SampleConfig, TrainConfig
from lamabench.harness.shards import Shards, images_of, labels_at, set_of
from lamabench.harness.stages import execute, missing
from lamabench.harness.tasks import merged, tasks
from lamabench.harness.training.loop import train
from lamabench.kernels.errors import InputError

DIT = DiTConfig(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=16, depth=1, num_heads=2)
ABOUT = {"study": "s", "name": "n", "variant": {}, "seed": 0, "model": "dit_nano", "family": "dit", "title": "DiT-nano"}
COUNT, FIRST = 24, 10


def make(root, evaluate=None, **sample):
    return Config(
        model=DIT,
        data=DataConfig(kind="digits", size=8, channels=1, num_classes=10),
        train=TrainConfig(steps=2, batch_size=4, ema_decay=0.5, precision="float32", lr=1e-2),
        sample=SampleConfig(**{"count": COUNT, "method": "ddim", "steps": 2, "batch_size": 8, **sample}),
        evaluate=EvaluateConfig(
            **{"metrics": ["fd", "isc"], "reference_count": 12, "batch_size": 4, **(evaluate or {})}
        ),
        run=RunConfig(root=str(root), device="cpu"),
    )


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Keep fewer images than a set has."""
    for module in (sampling, shards):
        monkeypatch.setattr(module, "FIRST", FIRST)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    train(folder, make(folder), Progress())
    return folder


@pytest.fixture(scope="module")
def images(training, tmp_path_factory):
    """The folder of a set whose images are kept."""
    folder = tmp_path_factory.mktemp("images")
    return folder / "shards" / generate(folder, training, make(folder), 2, Progress())["shards"]


def drawn(folder, training, **settings):
    row = generate(folder, training, make(folder, keep="features", **settings), 2, Progress())
    return folder / "shards" / row["shards"], row


def features_of_images(images):
    """All at once, by the extractor alone."""
    network = network_of("efficientnet_lite0")
    layers = [network.pooled, network.logits]
    extractor = Extractor(EvaluateConfig(batch_size=COUNT), layers, "cpu")
    batch = torch.tensor(Shards(images)[:]).permute(0, 3, 1, 2)
    features = extractor.features(lambda start, stop: batch[start:stop], COUNT, lambda _: None)
    return np.concatenate([features[layer] for layer in layers], 1)


def test_features_are_those_of_the_images(tmp_path, training, images):
    """For any batch sizes, to rounding."""
    expected = features_of_images(images)
    for number, settings in enumerate(({}, {"batch_size": 7}, {"batch_size": 20, "evaluate": {"batch_size": 9}})):
        (tmp_path / str(number)).mkdir()
        place, row = drawn(tmp_path / str(number), training, **settings)
        assert (row["features"], row["count"]) == ("efficientnet_lite0", COUNT)
        features = Shards(place, "features")[:]
        assert features.shape == (COUNT, 2280) and features.dtype == np.float32
        assert np.abs(features - expected).max() < 1e-5 * np.abs(expected).max(), settings
        first = Shards(place / "first")
        assert len(first) == FIRST and np.array_equal(first[:], Shards(images)[:FIRST])
        assert np.array_equal(labels_at(place / "first"), labels_at(place)[:FIRST])
        assert not [path for path in place.glob("*.npy") if path.name[0].isdigit() and np.load(path).dtype == np.uint8]


def test_scores_are_those_of_images(tmp_path, training, images):
    """To the bit, because the batches of the network are the same."""
    config, metrics = make(tmp_path), ["fd", "isc", "prc"]
    place, _ = drawn(tmp_path, training)
    rows = [list(score(one, config, metrics, tmp_path / "cache", Progress())) for one in (images, place)]
    assert rows[0] == rows[1] and [row["request"] for row in rows[0]] == ["fd", "isc", "prc", "prc"]


def test_an_interrupted_set_continues(tmp_path, training, images):
    """With another batch size: what was done stays, and the rest is as if nothing had happened."""

    class Signalled(Progress):
        def update(self, stage, done, total, **facts):
            os.kill(os.getpid(), signal.SIGTERM)

    config = make(tmp_path, keep="features", batch_size=5)
    with pytest.raises(KeyboardInterrupt), signals.noted():
        generate(tmp_path, training, config, 2, Signalled())
    (place,) = (tmp_path / "shards").iterdir()
    before = np.load(place / "00000000-00000005.npy")
    assert drawn(tmp_path, training, batch_size=12)[0] == place
    features = Shards(place, "features")
    assert features.ranges == [(0, 5), (5, 17), (17, 24)] and np.array_equal(features[:5], before)
    expected = features_of_images(images)
    assert np.abs(features[:] - expected).max() < 1e-5 * np.abs(expected).max()
    assert np.array_equal(Shards(place / "first")[:], Shards(images)[:FIRST])


def task_of(root, training, stages=("sample",), **settings):
    (task,) = tasks(make(root, **settings), ABOUT, stages, training=training)
    return task


def test_what_is_drawn_anew(tmp_path, training):
    """Images serve for everything. Features serve for scores with their network, and for nothing else."""
    features = task_of(tmp_path, training, keep="features")
    plain, inception = task_of(tmp_path, training), {"features": "inception_v3"}
    others = task_of(tmp_path, training, keep="features", evaluate=inception)
    assert features.key == plain.key == others.key and features.folder == plain.folder
    execute(features, Progress())
    assert [missing(task) for task in (features, plain, others)] == [[], ["sample"], ["sample"]]
    assert images_of(features.path).name == "first" and set_of(features.path) == images_of(features.path).parent
    execute(plain, Progress())  # replaces the features
    assert [missing(task) for task in (features, plain, others)] == [[], [], []]
    assert images_of(plain.path) == set_of(plain.path) and len(Shards(images_of(plain.path))) == COUNT
    assert [path.name for path in (plain.path / "shards").iterdir()] == [set_of(plain.path).name]
    execute(features, Progress())
    rows = [row.flat()["features"] for row in read_records(plain.path / "record.jsonl")]
    assert rows == ["efficientnet_lite0", None], "the images serve, and nothing is drawn"


def test_scores_that_are_there_need_no_features(tmp_path, training):
    """Features of one network do not bring those of another back if all of its scores are there."""
    both = ("sample", "evaluate")
    scored = task_of(tmp_path, training, both, keep="features", evaluate={"metrics": ["fd"]})
    execute(scored, Progress())
    (row,) = [row for row in read_records(scored.path / "record.jsonl") if row.kind == "sample"]
    append(scored.path / "record.jsonl", row.as_dict() | {"features": "inception_v3"})  # drawn again for it
    assert missing(scored) == []
    assert missing(replace(scored, stages=("sample",), metrics=())) == ["sample"]
    assert missing(replace(scored, metrics=("fd", "isc"))) == ["sample", "evaluate"]
    assert missing(task_of(tmp_path, training, both, evaluate={"metrics": ["fd"]})) == ["sample"], (
        "images are asked for"
    )


def test_tasks_of_one_set_keep_images_if_any_does(tmp_path, training):
    features, plain = task_of(tmp_path, training, keep="features"), task_of(tmp_path, training)
    for pair in ([features, plain], [plain, features]):
        assert [task.config["sample"]["keep"] for task in merged(pair)] == ["images"]
    assert merged([features, features]) == [features]


def test_damage_is_one_line(tmp_path, training):
    place, _ = drawn(tmp_path, training)
    whole = {path: path.read_bytes() for path in place.rglob("*.*") if path.is_file()}
    other = {"network": "inception_v3", "identity": {}}
    damages = [
        (place / "00000008-00000016.npy", b"", "00000008-00000016.npy cannot be read"),
        (place / "first" / "00000001-00000002.npy", None, "first has no image 1: draw the samples again"),
        (place / "features.json", b"{", "features.json is not JSON"),
        (place / "features.json", b"[]", "features.json was not written by lamabench"),
        (place / "features.json", json.dumps(other).encode(), "has features of inception_v3, .* sample.keep=images"),
    ]
    for path, content, message in damages:
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            list(score(place, make(tmp_path), ["fd"], tmp_path / "cache", Progress()))
        assert "\n" not in str(caught.value)
        path.write_bytes(whole[path])
    assert isinstance(open_set(place), FeatureSet)


def test_spatial_features_are_not_kept(tmp_path, training):
    """sFID of such a set is one line, before weights of a network are looked for."""
    place, _ = drawn(tmp_path, training)
    (place / "features.json").write_text(json.dumps({"network": "inception_v3", "identity": {}}))
    config = make(tmp_path, {"features": "inception_v3", "features_path": "nowhere"})
    with pytest.raises(Unscored, match=r"^sfid needs spatial features, .* sample\.keep=images") as caught:
        list(score(place, config, ["sfid"], tmp_path / "cache", Progress()))
    assert list(caught.value.reasons) == ["sfid"] and "\n" not in str(caught.value)
