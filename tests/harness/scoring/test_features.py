"""Features batch by batch, and what is held of them."""

import numpy as np
import torch
from lamabench.harness.scoring.features import collect, extract
from lamabench.harness.scoring.networks import build, find_weights


def test_grey_is_three_equal_channels_and_batches_do_not_matter(digits):
    extractor = build("efficientnet_lite0", find_weights("efficientnet_lite0", None), ["1280"], "cpu")
    grey = torch.from_numpy(digits[:5]).permute(0, 3, 1, 2)
    whole = next(extract(extractor, [grey]))["1280"]
    batches = extract(extractor, [grey[:3].repeat(1, 3, 1, 1), grey[3:]])
    parts = np.concatenate([layers["1280"] for layers in batches])
    assert whole.shape == (5, 1280) and whole.dtype == np.float32
    assert np.linalg.norm(whole - parts) < 1e-5 * np.linalg.norm(whole)


def test_what_is_collected():
    """Whole features and moments of some layers; a layer that nobody asks for is not held."""
    rows = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    batches = [{"a": part, "b": 2 * part, "c": part} for part in np.split(rows, [3, 9])]
    whole, moments = collect(iter(batches), {"a"}, {"a", "b"})
    assert list(whole) == ["a"] and np.array_equal(whole["a"], rows) and moments.keys() == {"a", "b"}
    np.testing.assert_allclose(moments["b"].mean, 2 * rows.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments["b"].covariance, 4 * np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-12)
