"""Fixtures of the tests of scoring."""

import numpy as np
import pytest
import torch
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
