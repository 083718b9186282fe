"""The networks against timm and torch-fidelity, their weights, and inputs that are refused."""

import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from lamabench.harness.scoring.features import extract
from lamabench.harness.scoring.networks import NETWORKS, EfficientNetLite0, build, find_weights
from lamabench.harness.sections import FEATURES
from lamabench.kernels.errors import InputError
from sklearn.datasets import load_sample_images
from timm.data.imagenet_info import ImageNetInfo
from timm.models.efficientnet import tf_efficientnet_lite0
from torchvision.transforms.v2 import functional as vision


def test_features_are_those_of_timm():
    images = [torch.tensor(image).permute(2, 0, 1)[None] for image in load_sample_images().images]
    plain = tf_efficientnet_lite0(pretrained=False).eval()
    stored = torch.load(find_weights("efficientnet_lite0", None), weights_only=True)
    plain.load_state_dict(dict(zip(plain.state_dict(), stored.values(), strict=True)))
    extractor = build("efficientnet_lite0", find_weights("efficientnet_lite0", None), ["logits", "1280"], "cpu")
    labels = []
    with torch.no_grad():
        for image in images:
            x = (vision.resize(image.float(), [224, 224], antialias=True) - 127) / 128
            pooled = plain.forward_features(x).mean(dim=(2, 3))
            logits = plain.classifier(pooled)
            got_logits, got_pooled = extractor(image)
            assert (got_pooled - pooled).norm() < 2e-5 * pooled.norm()
            assert (got_logits - logits).norm() < 2e-5 * logits.norm()
            labels.append({ImageNetInfo().index_to_description(int(i)) for i in got_logits[0].topk(5).indices})
    assert {"palace", "castle"} <= labels[0]  # a Chinese palace
    assert "daisy" in labels[1]  # a dahlia


def test_grey_is_three_equal_channels_and_batches_do_not_matter(digits):
    extractor = build("efficientnet_lite0", find_weights("efficientnet_lite0", None), ["1280"], "cpu")
    grey = torch.from_numpy(digits[:5]).permute(0, 3, 1, 2)
    whole = next(extract(extractor, [grey]))["1280"]
    batches = extract(extractor, [grey[:3].repeat(1, 3, 1, 1), grey[3:]])
    parts = np.concatenate([layers["1280"] for layers in batches])
    assert whole.shape == (5, 1280) and whole.dtype == np.float32
    assert np.linalg.norm(whole - parts) < 1e-5 * np.linalg.norm(whole)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("_fc.bias"), "have 295 tensors, but tf_efficientnet_lite0 has 296"),
        (
            lambda state: state.update({"_fc.bias": torch.zeros(10)}),
            r"_fc.bias is \[10\], but classifier.bias needs \[1000",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path, change, words):
    state = torch.load(find_weights("efficientnet_lite0", None), weights_only=True)
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError, match=words):
        EfficientNetLite0("efficientnet-lite0", ["1280"], str(tmp_path / "w.pth"))


def test_network_refuses_other_inputs():
    extractor = build("efficientnet_lite0", find_weights("efficientnet_lite0", None), ["1280"], "cpu")
    with pytest.raises(InputError, match=r"uint8 \[B, 3, H, W\], not torch.float32 \[1, 3, 8, 8\]"):
        extractor(torch.zeros(1, 3, 8, 8))


def test_every_configured_network_exists():
    assert tuple(NETWORKS) == FEATURES
    with pytest.raises(InputError, match=r"unknown evaluate.features 'vgg'.*choices: efficientnet_lite0, inception_v3"):
        find_weights("vgg", None)


# Inception-2015


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("trapped"),))


def test_inception_weights_that_do_not_fit(tmp_path, monkeypatch, random_inception):
    monkeypatch.chdir(tmp_path)
    files = {
        "cut.pth": random_inception.read_bytes()[:100_000],
        "empty.pth": b"",
        "text.pth": b"not weights",
        "trap.pth": pickle.dumps({"a": Trap()}, protocol=2),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=rf"weights .*{name} cannot be read: \S[^\n]*$"):
            build("inception_v3", tmp_path / name, ["2048"], "cpu")
    assert not (tmp_path / "trapped").exists()
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="not a state dict"):
        build("inception_v3", tmp_path / "list.pth", ["2048"], "cpu")
    with pytest.raises(InputError, match=r"do not fit inception_v3: [^\n]*$"):
        build("inception_v3", find_weights("efficientnet_lite0", None), ["2048"], "cpu")


def test_paths_of_weights(tmp_path):
    with pytest.raises(InputError, match=r"evaluate.features_path .*nowhere.pth does not exist"):
        find_weights("inception_v3", str(tmp_path / "nowhere.pth"))
    with pytest.raises(InputError, match="has no effect for efficientnet_lite0"):
        find_weights("efficientnet_lite0", str(tmp_path / "w.pth"))


