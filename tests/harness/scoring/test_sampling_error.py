"""Standard errors of scores against closed forms, bootstraps in float64, and many sets that are drawn again."""

import numpy as np
import pytest
import torch
from lamabench.harness.scoring import features, sampling_error
from lamabench.harness.scoring import score as scoring
from lamabench.harness.scoring.reference import Reference
from lamabench.harness.scoring.score import evaluate
from lamabench.harness.scoring.statistics import Moments, RunningMoments, compute, frechet, frechet_and_map
from lamabench.harness.sections import EvaluateConfig


def error_of(samples, reference, metric="fd", parts=1):
    """The error of a metric, whose second pass has so many batches."""
    return compute(metric, samples, reference, 0, lambda: np.array_split(samples, parts))[0].error


def spread(values):
    return np.std(list(values), ddof=1)


@pytest.mark.parametrize(("mean", "scale"), [(0.7, 1.0), (0.0, 1.6), (0.5, 0.4)])
def test_frechet_distance_of_gaussians_in_one_dimension(mean, scale):
    """(μ - m)² + (σ - s)² has the variance [4 (μ - m)² σ² + 2 (σ - s)² σ²] / N, because μ has the variance σ² / N and σ
    has σ² / 2N."""
    x = mean + scale * np.random.default_rng(0).standard_normal((40_000, 1))
    reference = Moments(10**6, np.zeros(1), np.eye(1))
    expected = scale * np.sqrt((4 * mean**2 + 2 * (scale - 1) ** 2) / len(x))
    assert error_of(x, reference) == pytest.approx(expected, rel=0.02)


def skewed(count, rng):
    """Correlated features [N, 5] that are not Gaussian, far from 0 and of unequal variances."""
    mixing = np.random.default_rng(1).standard_normal((5, 5)) * [3, 2, 1, 0.5, 0.1]
    return np.maximum(rng.standard_normal((count, 5)), -0.5) @ mixing + 10


def test_frechet_distance_by_a_bootstrap():
    rng = np.random.default_rng(2)
    x, reference = skewed(1500, rng), Moments.of(1.3 * skewed(4000, rng))
    bootstrap = spread(frechet(Moments.of(x[rng.integers(0, 1500, 1500)]), reference) for _ in range(700))
    assert error_of(x, reference) == pytest.approx(bootstrap, rel=0.1)


def test_its_influence_is_the_derivative_of_the_distance():
    """The distance of weighted samples, by the weight of each: the definition, with differences in place of a formula
    for the derivative."""
    rng = np.random.default_rng(3)
    x, reference = skewed(30, rng), Moments.of(skewed(300, rng) + 0.2)

    def distance(weights):
        mean = weights @ x / weights.sum()
        covariance = ((x - mean) * weights[:, None]).T @ (x - mean) / weights.sum() * 30 / 29
        return frechet(Moments(30, mean, covariance), reference)

    steps = 1e-4 * np.eye(30)
    slopes = [(distance(1 + step) - distance(1 - step)) / 2e-4 for step in steps]
    assert error_of(x, reference) == pytest.approx(np.sqrt(30) * spread(slopes), rel=0.05)


@pytest.mark.parametrize("parts", [2, 7, 300])
def test_batches_and_processes_change_it_by_rounding(parts):
    rng = np.random.default_rng(4)
    x, reference = skewed(300, rng), Moments.of(skewed(500, rng) + 0.1)
    shares = [RunningMoments() for _ in range(3)]
    for i, part in enumerate(np.array_split(x, 9)):
        shares[i % 3].add(part)
    several = RunningMoments()
    for share in shares:
        several.merge(share.moments())
    moments = several.moments()
    error = compute("fd", moments, reference, 0, lambda: np.array_split(x, parts))[0].error
    assert error == pytest.approx(error_of(x, reference), rel=1e-9)


@pytest.mark.parametrize(("count", "ratio"), [(20, (1, 1.6)), (40, (1, 1.5)), (400, (1, 1.5))])
def test_fewer_samples_than_features(count, ratio):
    """40 features. Σ is singular for 20 and 40 samples. Samples of the reference's distribution are the worst case, in
    which the error is up to √2 too large."""
    rng, scale = np.random.default_rng(5), np.linspace(1, 8, 40) ** -0.5
    reference = Moments(10**6, np.zeros(40), np.diag(scale**2))
    sets = [rng.standard_normal((count, 40)) * scale for _ in range(200)]
    actual = spread(frechet(Moments.of(x), reference) for x in sets)
    low, high = ratio
    assert low * actual < np.mean([error_of(x, reference) for x in sets[:20]]) < high * actual


def test_singular_covariances_on_both_sides():
    """A feature that never varies in the samples, another that never does in the reference, and constant samples."""
    rng = np.random.default_rng(6)
    x, y = rng.standard_normal((2000, 3)), rng.standard_normal((900, 3))
    x[:, 0], y[:, 1] = 2, 0
    error = error_of(x, Moments.of(y))
    # By feature: (2 - m)² has no error; z² and 2 μ z; that of one dimension.
    z = x - x.mean(0)
    influence = 2 * (x.mean(0) - y.mean(0))[1:] @ z[:, 1:].T + z[:, 1] ** 2
    influence += (1 - y[:, 2].std(ddof=1) / x[:, 2].std(ddof=1)) * z[:, 2] ** 2
    # The reference's other two features are correlated a little, which is why this is not exact.
    assert error == pytest.approx(np.std(influence) / np.sqrt(2000), rel=0.02)
    assert error_of(np.full((9, 3), 2.0), Moments.of(y)) == 0


def test_the_map_turns_one_covariance_into_the_other():
    rng = np.random.default_rng(7)
    a, b = Moments.of(skewed(200, rng)), Moments.of(skewed(300, rng))
    value, root = frechet_and_map(a, b)
    assert value == frechet(a, b) or value == pytest.approx(frechet(a, b), rel=1e-9)
    np.testing.assert_allclose(root @ root.T @ a.covariance @ root @ root.T, b.covariance, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("shift", "ratio"), [(0.2, (0.85, 1.15)), (0.0, (1, 1.5))])
def test_kernel_distance_of_sets_that_are_drawn_again(shift, ratio):
    """With many subsets. Of equal distributions the error is up to √2 too large."""
    rng = np.random.default_rng(8)
    y = rng.standard_normal((800, 20))

    def distance(x):  # the mean over all subsets but for what depends on the reference alone
        within, across = (x @ x.T / 20 + 1) ** 3, (x @ y.T / 20 + 1) ** 3
        return (within.sum() - np.trace(within)) / (len(x) * (len(x) - 1)) - 2 * across.mean()

    sets = [shift + rng.standard_normal((150, 20)) for _ in range(150)]
    actual = spread(map(distance, sets))
    y = torch.from_numpy(y)
    mean = np.mean([sampling_error.of_kernel(torch.from_numpy(x), y, 0.0, 100) for x in sets])
    assert ratio[0] * actual < mean < ratio[1] * actual
    of_subsets = sampling_error.of_kernel(torch.from_numpy(sets[0]), y, 3.0, 100)
    assert of_subsets == pytest.approx(0.3, rel=0.1)


def test_kernel_distance_from_some_of_the_images(monkeypatch):
    rng = np.random.default_rng(9)
    x, y = 0.5 + rng.standard_normal((900, 8)), rng.standard_normal((800, 8))
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    whole = sampling_error.of_kernel(x, y, 0.0, 100)
    monkeypatch.setattr(sampling_error, "MOST", 400)
    some = sampling_error.of_kernel(x, y, 0.0, 100)
    assert some != whole and some == pytest.approx(whole, rel=0.15)


def test_precision_of_sets_that_are_drawn_again():
    """The balls of the reference stay, so that precision is binomial. Those of recall are of the samples."""
    rng = np.random.default_rng(10)
    y = rng.standard_normal((300, 6))
    every = [compute("prc", 1.2 * rng.standard_normal((200, 6)) + 0.3, y, 0, lambda: []) for _ in range(150)]
    precision, errors = zip(*((one.value, one.error) for one, _ in every), strict=True)
    assert np.mean(errors) == pytest.approx(spread(precision), rel=0.15)
    assert all(recall.error is None for _, recall in every)
    assert 0 < sampling_error.of_share(1.0, 50) < 0.03


def test_inception_score_of_sets_that_are_drawn_again():
    rng = np.random.default_rng(11)
    every = [compute("isc", rng.normal(0, 2, size=(300, 5)), None, 0, lambda: [])[0] for _ in range(100)]
    assert np.mean([one.error for one in every]) == pytest.approx(spread(one.value for one in every), rel=0.2)


def test_no_error_without_a_second_pass():
    rng = np.random.default_rng(12)
    x, y = rng.standard_normal((2, 120, 4))
    for metric in ("fd", "kid", "prc", "isc"):
        assert all(one.error is None for one in compute(metric, x, None if metric == "isc" else y, 0))


class Images(torch.utils.data.Dataset):
    """uint8 [N, H, W, C] as a reference."""

    def __init__(self, images):
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i], 0


def test_the_error_of_a_score(tmp_path, digits, extracted, monkeypatch):
    """Alone, where features go to a file, and with kid, which holds them, it is the same for any batches; images go
    through the network once; and nothing is left in the cache but the reference."""
    reference = Reference(Images(digits[1000:1150]), "digits", "f")

    def rows(*metrics, size):
        settings = EvaluateConfig(metrics=list(metrics), batch_size=size)
        return list(evaluate(digits[:110], reference, settings, metrics, cache=tmp_path, device="cpu"))

    monkeypatch.setattr(scoring, "floor", lambda *_: None)
    every = rows("fd", "kid", "prc", "isc", size=64)
    assert extracted == [{"1280": 150, "logits": 150}, {"1280": 110, "logits": 110}]
    assert [one["sampling_error"] is None for one in every] == [False, False, False, True, False]
    monkeypatch.setattr(features, "BLOCK", 7)
    monkeypatch.setattr(scoring, "SPOOL_BYTES", 1000)  # a file on disk
    (alone,) = rows("fd", size=9)
    assert extracted[-1] == {"1280": 110}
    assert alone["sampling_error"] == pytest.approx(every[0]["sampling_error"], rel=1e-9)
    assert {path.suffix for path in tmp_path.iterdir()} <= {".safetensors", ".json"}
    torch.manual_seed(0)
    network = torch.randn(64, 1280)  # that of the fixture
    sets = [torch.from_numpy(part).flatten(1).float() / 255 @ network for part in (digits[:110], digits[1000:1150])]
    expected = error_of(sets[0].numpy(), Moments.of(sets[1].numpy()))
    assert alone["sampling_error"] == pytest.approx(expected, rel=1e-6) and expected < alone["value"]
