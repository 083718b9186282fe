"""Fixtures of the tests of scoring."""

import numpy as np
import pytest
import torch
from lamabench.harness.scoring import features
from sklearn.datasets import load_digits
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    return np.rint(load_digits()["images"] * (255 / 16)).astype(np.uint8)[..., None]


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """A file of weights for Inception with random values, because tests do not download the published one."""

    class Random(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, strict=True, assign=False):
            return super().load_state_dict(state_dict, strict=False)

    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    torch.save(Random("inception-v3-compat", ["2048"], str(path)).state_dict(), path)
    return path


@pytest.fixture
def extracted(monkeypatch):
    """Replaces the slow network by a random projection of the pixels, and lists the images of each pass by layer."""
    shapes = []

    def project(extractor, batches):
        shapes.append(passed := dict.fromkeys(extractor.features_list, 0))
        for batch in batches:
            pixels = batch.flatten(1).float() / 255
            torch.manual_seed(0)
            maps = {"1280": torch.randn(pixels.shape[1], 1280), "logits": torch.randn(pixels.shape[1], 1000)}
            yield {layer: (pixels @ maps[layer]).numpy() for layer in extractor.features_list}
            for layer in passed:
                passed[layer] += len(batch)

    monkeypatch.setattr(features, "extract", project)
    return shapes
