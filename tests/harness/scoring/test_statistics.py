"""Metrics against closed forms and plain sums on synthetic features, and the names of metrics."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
from lamabench.harness.scoring import statistics
from lamabench.harness.scoring.counts import kid_subset_size, shortage
from lamabench.harness.scoring.statistics import Moments, RunningMoments, compute, definition, frechet, metric_name
from lamabench.harness.sections import METRICS
from lamabench.kernels.errors import InputError
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric


def exact_moments(n, d, seed):
    """Samples [n, d] whose mean is 0 and whose covariance is the identity."""
    x = np.random.default_rng(seed).normal(size=(n, d))
    x -= x.mean(axis=0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T


def test_frechet_distance_of_known_gaussians():
    means, scales = np.random.default_rng(0).normal(size=(2, 6)), np.array([[1, 2, 3, 4, 5, 6], [2, 2, 1, 4, 9, 3]])
    samples, reference = (exact_moments(40 + i, 6, i) * scales[i] + means[i] for i in range(2))
    expected = ((means[0] - means[1]) ** 2).sum() + ((scales[0] - scales[1]) ** 2).sum()
    assert compute("fd", samples, reference, 0)[0].value == pytest.approx(expected, rel=1e-9)
    assert compute("fd", samples, reference, 0)[0].std is None


def test_frechet_distance_by_matrix_square_root():
    rng = np.random.default_rng(2)
    samples, reference = (rng.normal(size=(n, 12)) @ rng.normal(size=(12, 12)) for n in (60, 50))
    a, b = np.cov(samples, rowvar=False), np.cov(reference, rowvar=False)
    root = np.asarray(scipy.linalg.sqrtm(a))
    cross = np.asarray(scipy.linalg.sqrtm(root @ b @ root))
    expected = ((samples.mean(0) - reference.mean(0)) ** 2).sum() + np.trace(a + b - 2 * cross)
    assert compute("fd", samples, reference, 0)[0].value == pytest.approx(expected, rel=1e-8)
    assert abs(compute("fd", samples, samples, 0)[0].value) < 1e-9 * np.trace(a)


@pytest.mark.parametrize(("count", "size"), [(12, 1280), (64, 512), (300, 64)])
def test_the_distance_of_a_set_to_itself_is_not_negative(count, size):
    """With fewer images than features, most eigenvalues are zero except for rounding."""
    samples = np.random.default_rng(count).normal(size=(count, size)).astype(np.float32)
    for scale in (1, 30):
        value = compute("fd", scale * samples, scale * samples, 0)[0].value
        assert 0 <= value < 1e-5 * scale**2 * size


def skewed(count, size, seed):
    """Features float32 as networks have them: not negative, of very unequal variances, far from 0."""
    rng, weights = np.random.default_rng(seed), np.random.default_rng(99)
    directions = weights.normal(size=(size, size)) * np.exp(-np.arange(size) / 12)[:, None]
    return np.maximum(rng.normal(0.1 * seed, 1, size=(count, size)) @ directions + 4, 0).astype(np.float32)


@pytest.mark.parametrize("sizes", [[300], [1] * 300, [7, 0, 250, 1, 42]])
def test_moments_are_equal_for_any_batches_and_processes(sizes):
    features = 50 + skewed(300, 20, 1)
    exact = features.astype(np.float64)
    parts = np.split(features[np.random.default_rng(0).permutation(300)], np.cumsum(sizes)[:-1])
    one, shares = RunningMoments(), [RunningMoments() for _ in range(3)]
    for i, part in enumerate(parts):
        one.add(part)
        shares[i % 3].add(part)
    several = RunningMoments()
    for share in shares:
        if share.count:
            several.merge(share.moments()) if share.count > 1 else several.add(parts[0])
    for moments in (one.moments(), several.moments(), Moments.of(features)):
        assert moments.count == 300 and moments.covariance.dtype == np.float64
        np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=1e-14)
        scale = np.cov(exact, rowvar=False).max()
        np.testing.assert_allclose(moments.covariance, np.cov(exact, rowvar=False), rtol=0, atol=1e-13 * scale)


def test_moments_of_one_image_do_not_exist():
    with pytest.raises(InputError, match="moments need at least 2 images, 1 given"):
        Moments.of(np.zeros((1, 3)))
    with pytest.raises(InputError, match="moments of 3 features cannot be compared with those of 4"):
        frechet(Moments.of(np.eye(3)), Moments.of(np.eye(4)))


@pytest.mark.parametrize(("counts", "tolerance"), [((900, 700), 1e-10), ((60, 50), 1e-6)])
def test_frechet_distance_by_torch_fidelity_and_by_centred_features(counts, tolerance):
    """With fewer images than features, torch-fidelity keeps six digits. The sum of the singular values of the product
    of centred features needs no covariance."""
    sets = [skewed(count, 120, i) for i, count in enumerate(counts)]
    got = frechet(*map(Moments.of, sets))
    theirs = [fid_features_to_statistics(torch.from_numpy(features).double()) for features in sets]
    distance = fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]
    assert got == pytest.approx(distance, rel=tolerance)
    means = [features.astype(np.float64).mean(0) for features in sets]
    a, b = ((x.astype(np.float64) - mean) / np.sqrt(len(x) - 1) for x, mean in zip(sets, means, strict=True))
    expected = ((means[0] - means[1]) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * np.linalg.norm(a @ b.T, "nuc")
    assert got == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_constant_features():
    one, same = np.full((4, 3), 2.0), Moments.of(np.full((9, 3), 2.0))
    assert frechet(Moments.of(one), same) == 0
    assert frechet(Moments.of(one + np.array([3, 0, 4])), same) == pytest.approx(25)


def kernel_distance(x, y):
    """The unbiased squared MMD with the kernel (x·y / d + 1)³, as a plain double sum."""
    n, kernel = len(x), lambda a, b: (float(a @ b) / x.shape[1] + 1) ** 3
    pairs = [(i, j) for i in range(n) for j in range(n)]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j) / (n * (n - 1))
    return within - 2 * sum(kernel(x[i], y[j]) for i, j in pairs) / n**2


def test_kernel_distance_of_whole_sets():
    rng = np.random.default_rng(3)
    samples, reference = rng.normal(size=(100, 8)), rng.normal(0.3, 1, size=(100, 8))
    expected = kernel_distance(samples, reference)
    for seed in (0, 7):
        one = compute("kid", samples, reference, seed)[0]
        assert one.value == pytest.approx(expected, rel=1e-10) and one.std is not None and one.std < 1e-12


def test_kernel_distance_of_seeded_subsets(monkeypatch):
    monkeypatch.setattr(statistics, "KID_SUBSETS", 4)
    rng = np.random.default_rng(4)
    samples, reference = rng.normal(size=(130, 8)), rng.normal(0.3, 1, size=(110, 8))
    draws, expected = np.random.RandomState(5), []
    for _ in range(4):
        subset = samples[draws.choice(130, 100, replace=False)]
        expected.append(kernel_distance(subset, reference[draws.choice(110, 100, replace=False)]))
    one = compute("kid", samples, reference, 5)[0]
    assert one.value == pytest.approx(np.mean(expected), rel=1e-10)
    assert one.std == pytest.approx(np.std(expected), rel=1e-8)
    assert compute("kid", samples, reference, 6)[0].value != one.value


def test_kernel_distance_is_that_of_torch_fidelity(monkeypatch):
    """With its subsets, of features whose number is not that of the other set."""
    monkeypatch.setattr(statistics, "KID_SUBSETS", 6)
    rng = np.random.default_rng(6)
    x, y = (torch.from_numpy(shift + rng.gamma(2, size=(n, 96))) for shift, n in ((0.1, 1300), (0.0, 1500)))
    kwargs = statistics.definition("kid", len(x), len(y))
    expected = kid_features_to_metric(x, y, rng_seed=11, verbose=False, **kwargs)
    one = compute("kid", x.numpy(), y.numpy(), 11)[0]
    assert one.value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert one.std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-8)


@pytest.mark.gpu
@pytest.mark.parametrize("metric", ["kid", "prc"])
def test_metrics_on_a_gpu_are_those_of_the_cpu(metric):
    rng = np.random.default_rng(12)
    x, y = (shift + rng.standard_normal((n, 64)).astype(np.float32) for shift, n in ((0.2, 2500), (0.0, 3000)))
    here, there = (compute(metric, x, y, 0, lambda: [x], device) for device in ("cpu", "cuda"))
    for one, other in zip(here, there, strict=True):
        for a, b in ((one.value, other.value), (one.std, other.std), (one.error, other.error)):
            assert (a is None and b is None) or a == pytest.approx(b, rel=1e-9)


def test_a_gpu_without_memory_leaves_a_metric_to_the_cpu(monkeypatch):
    right = statistics.prc_features_to_metric

    def limited(x, *args, **kwargs):
        if x.device.type == "meta":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(x, *args, **kwargs)

    rng = np.random.default_rng(13)
    x, y = rng.normal(0.1, 1, size=(200, 8)), rng.normal(size=(300, 8))
    expected = compute("prc", x, y, 0)
    monkeypatch.setattr(statistics, "prc_features_to_metric", limited)
    assert compute("prc", x, y, 0, device="meta") == expected


def test_precision_and_recall_by_counting():
    rng = np.random.default_rng(6)
    samples, reference = rng.normal(size=(30, 3)), rng.normal(0.5, 2, size=(40, 3))

    def covered(points, centres):
        """The share of points that are closer to a centre than the centre's third neighbour is."""
        radii = [sorted(np.linalg.norm(centres - centre, axis=1))[3] for centre in centres]
        inside = [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
        return np.mean(inside)

    precision, recall = compute("prc", samples, reference, 0)
    assert (precision.name, recall.name) == ("precision", "recall")
    assert precision.value == pytest.approx(covered(samples, reference))
    assert recall.value == pytest.approx(covered(reference, samples))
    assert precision.value != recall.value


def test_modes_that_are_dropped_lower_recall_and_modes_that_are_invented_lower_precision():
    """Four clusters far apart. Swapping the two numbers, or the two sets, fails here."""
    rng = np.random.default_rng(1)
    real, inside = (rng.normal(size=(400, 2)) + 100 * np.arange(400)[:, None] % 400 for _ in range(2))
    dropped, invented = inside[np.arange(400) % 4 == 0], inside.copy()
    invented[np.arange(400) % 4 < 2] += 1000
    for samples, precision, recall in ((inside, 1, 1), (dropped, 1, 0.25), (invented, 0.5, 0.5)):
        got = {one.name: one.value for one in compute("prc", samples, real, 0)}
        assert got == {"precision": pytest.approx(precision, abs=0.1), "recall": pytest.approx(recall, abs=0.1)}
    got = {one.name: one.value for one in compute("prc", real, dropped, 0)}
    assert got["precision"] < 0.3 and got["recall"] > 0.9


def test_inception_score_by_splits():
    logits = np.random.default_rng(7).normal(0, 3, size=(50, 6))
    p = scipy.special.softmax(logits[np.random.RandomState(3).permutation(50)], axis=1).reshape(10, 5, 6)
    expected = np.exp([(q * np.log(q / q.mean(0))).sum(1).mean() for q in p])
    one = compute("isc", logits, None, 3)[0]
    assert one.value == pytest.approx(expected.mean()) and one.std == pytest.approx(expected.std())


@pytest.mark.parametrize("metric", METRICS)
def test_features_that_are_not_finite(metric):
    features = np.random.default_rng(8).normal(size=(100, 3))
    broken = features.copy()
    broken[4, 1] = np.nan
    with pytest.raises(InputError, match=f"{metric} cannot be computed: features of the samples are not finite"):
        compute(metric, broken, features, 0)


def test_result_that_is_not_finite():
    huge = np.random.default_rng(9).normal(size=(100, 3)) * 1e120
    with np.errstate(all="ignore"), pytest.raises(InputError, match="kid is not finite"):
        compute("kid", huge, huge[::-1].copy(), 0)


def test_every_configured_metric_exists():
    for metric in METRICS:
        assert isinstance(definition(metric, 10, 10), dict)


@pytest.mark.parametrize(
    ("quantity", "network", "count", "name"),
    [
        ("fd", "Inception", 50_000, "FID"),
        ("sfid", "Inception", 50_000, "sFID"),
        ("sfid", "Inception", 10_000, "sFID-10k"),
        ("sfid", "Inception-0123abcd", 50_000, "sFD-Inception-0123abcd-50k"),
        ("fd", "DINOv2", 50_000, "FD-DINOv2-50k"),
        ("kid", "DINOv2", 50_000, "KD-DINOv2-50k"),
        ("fd", "Inception", 10_000, "FID-10k"),
        ("fd", "Inception", 1797, "FID-1797"),
        ("fd", "Inception", 49_999, "FID-49999"),
        ("fd", "Inception-0123abcd", 50_000, "FD-Inception-0123abcd-50k"),
        ("fd", "EffNetLite0", 512, "FD-EffNetLite0-512"),
        ("fd", "EffNetLite0", 50_000, "FD-EffNetLite0-50k"),
        ("kid", "Inception", 50_000, "KID"),
        ("kid", "EffNetLite0", 512, "KD-EffNetLite0-512"),
        ("isc", "Inception", 50_000, "IS"),
        ("isc", "EffNetLite0", 1000, "IS-EffNetLite0-1k"),
        ("precision", "Inception", 50_000, "precision-Inception-50k"),
        ("recall", "EffNetLite0", 512, "recall-EffNetLite0-512"),
    ],
)
def test_names(quantity, network, count, name):
    assert metric_name(quantity, network, count) == name


def test_subset_size():
    assert [kid_subset_size(*counts) for counts in ((1000, 1000), (999, 5000), (5000, 999), (10, 10))] == [
        1000,
        100,
        100,
        100,
    ]


@pytest.mark.parametrize(
    ("metric", "samples", "reference", "text"),
    [
        ("kid", 99, None, "kid needs at least 100 samples, 99 given"),
        ("kid", 100, None, None),
        ("kid", 1200, 99, "kid needs at least 100 reference images, 99 given"),
        ("kid", 1200, 999, None),
        ("isc", 10, 0, None),
        ("isc", 9, None, "isc needs at least 10 samples, 9 given"),
    ],
)
def test_what_a_metric_lacks(metric, samples, reference, text):
    assert shortage(metric, samples, reference) == text


def test_counts_need_no_torch():
    code = "import sys, lamabench.harness.scoring.counts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
