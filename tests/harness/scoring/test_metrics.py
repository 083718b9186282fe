"""Which images and which layers each metric reads, and what a score says about that."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from lamabench.baselines.dit import DiTConfig
from lamabench.harness.config import Config
from lamabench.harness.progress import Progress
from lamabench.harness.random import Stream, generator
from lamabench.harness.scoring import counts, networks
from lamabench.harness.scoring.networks import sha256
from lamabench.harness.scoring.reference import Reference, short_hash
from lamabench.harness.scoring.score import evaluate, score
from lamabench.harness.sections import METRICS, DataConfig, EvaluateConfig, RunConfig
from lamabench.kernels.errors import InputError
from torch.utils.data import TensorDataset


def reference_of(images):
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    return Reference(TensorDataset(pixels, torch.zeros(len(pixels))), "digits", "f")


def run(samples, reference, cache, metrics=None, *, config=None, seed=0):
    config = replace(config or EvaluateConfig(metrics=list(metrics)), seed=seed)
    return list(evaluate(samples, reference_of(reference), config, config.metrics, cache=cache, device="cpu"))


def noisy(images, sigma):
    noise = np.random.default_rng(1).normal(0, sigma, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


def test_precision_and_recall_take_reference_images_of_their_own(tmp_path, digits, extracted, monkeypatch):
    """A fixed random subset, drawn once; KID a larger one. The Fréchet distance takes all images."""
    monkeypatch.setattr(counts, "KID_REFERENCE", 110)
    samples, images = noisy(digits[:110], 30), digits[200:320]
    config = EvaluateConfig(metrics=["fd", "kid", "prc"], prc_reference_count=20)
    rows = {row["metric"].split("-")[0]: row for row in run(samples, images, tmp_path, config=config)}
    assert {name: row["reference_count"] for name, row in rows.items()} == {
        "FD": 120, "KD": 110, "precision": 20, "recall": 20,
    }  # fmt: skip
    order = generator(0, Stream.ORDER, 0).permutation(120)
    some = run(samples, images[order[:20]], tmp_path / "some", ("prc",))
    assert [row["value"] for row in some] == [rows["precision"]["value"], rows["recall"]["value"]]
    some = run(samples, images[order[:110]], tmp_path / "some", ("kid",))
    assert some[0]["value"] == pytest.approx(rows["KD"]["value"], rel=1e-9)
    whole = {row["metric"].split("-")[0]: row for row in run(samples, images, tmp_path, ("fd", "prc"))}
    assert whole["FD"]["protocol"] == rows["FD"]["protocol"]
    assert whole["precision"]["protocol"] != rows["precision"]["protocol"]
    assert (rows["recall"]["evaluation"]["reference_images"], rows["KD"]["evaluation"]["reference_images"]) == (20, 110)
    assert "reference_images" not in whole["precision"]["evaluation"], "all of them, as in earlier versions"
    with pytest.raises(InputError, match="prc needs at least 4 reference images, 3 given"):
        run(samples, images, tmp_path, config=EvaluateConfig(metrics=["prc"], prc_reference_count=3))


def test_a_metric_may_name_its_split(tmp_path, digits, extracted):
    """The scores are those of two calls with `evaluate.split`."""
    model = DiTConfig(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=16, depth=1, num_heads=2)
    data = DataConfig(kind="digits", size=8, channels=1, num_classes=10, split="most")
    config = Config(model, data, run=RunConfig(root=str(tmp_path), device="cpu"))
    np.savez(tmp_path / "samples.npz", images=noisy(digits[:110], 30))

    def values(split, *metrics):
        asked = replace(config, evaluate=EvaluateConfig(split=split, metrics=list(metrics)))
        rows = score(tmp_path / "samples.npz", asked, asked.evaluate.metrics, tmp_path / ".cache", Progress())
        return {row["request"]: (row["metric"], row["value"], row["reference"], row["protocol"]) for row in rows}

    both = values("test", "fd", "kid@train", "fd@train", "fd@test")
    assert both.keys() == {"fd", "kid@train", "fd@train"}
    assert {"fd": both["fd"]} == values("test", "fd") != {"fd": both["fd@train"]} == values("train", "fd")
    assert {"kid": both["kid@train"]} == values("train", "kid")
    assert [both[name][2] for name in ("fd", "fd@train")] == ["digits test", "digits"]


def test_a_score_says_how_it_was_computed(tmp_path, digits, extracted):
    """The seed belongs to the protocol of what draws."""
    samples = noisy(digits[:110], 30)
    rows, others = (run(samples, digits[200:320], tmp_path, METRICS[:4], seed=seed) for seed in (3, 4))
    for row, other in zip(rows, others, strict=True):
        evaluation, draws = row["evaluation"], row["request"] in ("kid", "isc")
        assert row["protocol"] == short_hash(json.loads(json.dumps(evaluation)), 8)
        assert (evaluation["metric"], evaluation["count"], evaluation["images"]) == (row["request"], 110, [8, 8, 1])
        assert len(evaluation["weights"]) == 64 and evaluation["network"] == "efficientnet-lite0"
        assert (evaluation["settings"].get("seed") == 3) == draws == (row["protocol"] != other["protocol"])
    assert rows[0]["evaluation"]["reference"] == {"name": "digits", "fingerprint": "f", "count": 120}
    assert rows[-1]["evaluation"]["reference"] is None


def test_spatial_features_have_a_distance(tmp_path, digits, random_inception):
    config = EvaluateConfig("inception_v3", str(random_inception), ["sfid"])
    (row,) = run(digits[:3], digits[3:7], tmp_path, config=config)
    assert (row["metric"], row["request"]) == (f"sFD-Inception-{sha256(random_inception)[:8]}-3", "sfid")
    assert row["evaluation"]["layer"] == "spatial" and row["reference_count"] == 4
    extractor = networks.build("inception_v3", random_inception, ["spatial"], "cpu")
    images = torch.from_numpy(digits[:7]).permute(0, 3, 1, 2).repeat(1, 3, 1, 1)
    a, b = np.split(extractor(images)[0].double().numpy(), [3])
    mean, a, b = ((a.mean(0) - b.mean(0)) ** 2).sum(), a - a.mean(0), b - b.mean(0)
    expected = mean + (a**2).sum() / 2 + (b**2).sum() / 3 - 2 * np.linalg.norm(a @ b.T, "nuc") / 6**0.5
    assert row["value"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("features", "metric", "choices"),
    [
        ("efficientnet_lite0", "sfid", "inception_v3"),
        ("dinov2_vitl14", "sfid", "inception_v3"),
        ("dinov2_vitl14", "isc", "efficientnet_lite0, inception_v3"),
    ],
)
def test_metrics_that_a_network_cannot_give(tmp_path, digits, features, metric, choices):
    words = f"evaluate.metrics={metric} cannot be computed with evaluate.features={features}; choices of .*: {choices}$"
    with pytest.raises(InputError, match=words):
        EvaluateConfig(features, metrics=["fd", metric])
    settings = EvaluateConfig(features)
    with pytest.raises(InputError, match=words):
        list(evaluate(digits[:9], reference_of(digits[:9]), settings, [metric], cache=tmp_path, device="cpu"))


def test_bad_addresses_of_mirrors():
    for value in ("yes", 1, "folder/of/weights"):
        with pytest.raises(InputError, match=r"evaluate\.download must be true, false or the address of a mirror"):
            EvaluateConfig(download=value)
