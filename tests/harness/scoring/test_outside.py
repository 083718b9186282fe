"""Whole scores against a script that shares no code with the suite, and formulas of other libraries."""

import os

import numpy as np
import outside
import pytest
import scipy.linalg
import torch
from lamabench.harness.data.images import load
from lamabench.harness.scoring.reference import Reference
from lamabench.harness.scoring.score import evaluate
from lamabench.harness.scoring.statistics import Moments, frechet
from lamabench.harness.sections import DataConfig, EvaluateConfig
from torch.utils.data import TensorDataset
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric


def agree(samples, reference, cache, device="cpu"):
    """Ours and the script's scores of uint8 images [N, H, W, 3] are equal to 1e-6, and shares are the same. On a GPU
    both take batches of 50, because cuDNN chooses its algorithms, which round differently, by the batch."""
    pixels = torch.from_numpy(reference).permute(0, 3, 1, 2)
    data = Reference(TensorDataset(pixels, torch.zeros(len(pixels))), "mine", "f")
    settings = EvaluateConfig(batch_size=64 if device == "cpu" else 50)
    rows = list(evaluate(samples, data, settings, ["fd", "kid", "prc"], cache=cache, device=device))
    got = {row["metric"].split("-")[0]: row["value"] for row in rows}
    expected = outside.scores(samples, reference, device)
    assert got["FD"] == pytest.approx(expected["FD"], rel=1e-6, abs=1e-5)
    assert got["KD"] == pytest.approx(expected["KD"], rel=1e-6, abs=1e-6)
    for name in ("precision", "recall"):
        # By rounding alone, a point on the border of a ball may be inside or not.
        assert got[name] == pytest.approx(expected[name], abs=max(1.01 / min(len(samples), len(reference)), 5e-4))
    return got


def waves(count, smoothness, seed):
    """Smooth colourful images uint8 [count, 32, 32, 3]."""
    rng, side = np.random.default_rng(seed), np.arange(32) / 32
    images = np.zeros((count, 32, 32, 3))
    for frequency in range(4):
        phase = rng.uniform(0, 6.28, (2, count, 1, 3))
        rows, columns = np.sin(6.28 * frequency * side[:, None] + phase)
        images += rng.normal(0, smoothness**frequency, (count, 1, 1, 3)) * rows[:, :, None] * columns[:, None]
    return np.clip(127 + 60 * images, 0, 255).astype(np.uint8)


def two_sets(count):
    """CIFAR-10's test images and training images if the variable CIFAR10 names their folder, else smooth images."""
    if not (folder := os.environ.get("CIFAR10")):
        return waves(count, 0.7, 0), waves(count, 0.8, 1)
    sets = [load(DataConfig("cifar10", path=folder, size=32, channels=3, split=split)) for split in ("test", "train")]
    return [np.stack([one[i][0].permute(1, 2, 0).numpy() for i in range(count)]) for one in sets]


def test_scores_of_few_images(tmp_path):
    got = agree(waves(100, 0.7, 0), waves(104, 0.8, 1), tmp_path)
    assert got["FD"] > 1 and got["KD"] > 0.001 and 0 < got["precision"] != got["recall"] > 0


@pytest.mark.soak
def test_scores_of_512_images(tmp_path):
    agree(*two_sets(512), tmp_path)


@pytest.mark.gpu
def test_scores_of_10_000_images(tmp_path):
    agree(*two_sets(10_000), tmp_path, "cuda")


def pytorch_fid(mu1, sigma1, mu2, sigma2):
    """pytorch-fid: a matrix square root."""
    root = np.real(scipy.linalg.sqrtm(sigma1 @ sigma2))
    return (mu1 - mu2) @ (mu1 - mu2) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root)


def torchmetrics(mu1, sigma1, mu2, sigma2):
    """torchmetrics: eigenvalues of the product."""
    a, b, c, d = map(torch.from_numpy, (mu1, sigma1, mu2, sigma2))
    cross = torch.linalg.eigvals(b @ d).sqrt().real.sum()
    return float((a - c).square().sum() + b.trace() + d.trace() - 2 * cross)


def torch_fidelity(mu1, sigma1, mu2, sigma2):
    sets = {"mu": mu1, "sigma": sigma1}, {"mu": mu2, "sigma": sigma2}
    return fid_statistics_to_metric(*sets, verbose=False)["frechet_inception_distance"]


@pytest.mark.parametrize("theirs", [pytorch_fid, torchmetrics, torch_fidelity])
@pytest.mark.parametrize(("counts", "tolerance"), [((500, 400), 1e-9), ((70, 90), 1e-5)])
def test_distances_of_other_libraries(theirs, counts, tolerance):
    """On the same features. Of fewer images than features they keep fewer digits."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(100, 100)) * np.exp(-np.arange(100) / 20)
    sets = [np.maximum(rng.normal(0.2 * i, 1, size=(count, 100)) @ weights, 0) for i, count in enumerate(counts)]
    statistics = [fid_features_to_statistics(torch.from_numpy(one)) for one in sets]
    expected = theirs(*(one[name] for one in statistics for name in ("mu", "sigma")))
    assert frechet(*map(Moments.of, sets)) == pytest.approx(expected, rel=tolerance)
