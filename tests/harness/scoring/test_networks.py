"""The networks against timm, torch-fidelity and plain equations, their weights, and inputs that are refused."""

import dataclasses
import itertools
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from lamabench.harness.record import row
from lamabench.harness.scoring import networks
from lamabench.harness.scoring.features import FeatureNetwork
from lamabench.harness.scoring.networks import (
    NETWORKS,
    DinoV2,
    EfficientNetLite0,
    build,
    check_weights,
    find_weights,
    missing_weights,
    sha256,
)
from lamabench.harness.scoring.reference import Reference
from lamabench.harness.scoring.score import evaluate
from lamabench.harness.scoring.statistics import Moments, frechet
from lamabench.harness.sections import FEATURES, EvaluateConfig
from lamabench.kernels.errors import InputError
from sklearn.datasets import load_sample_images
from timm.data.imagenet_info import ImageNetInfo
from timm.models.efficientnet import tf_efficientnet_lite0
from timm.models.vision_transformer import vit_large_patch14_dinov2
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
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


def test_scores_by_other_weights_are_refused(tmp_path):
    """Because keys do not have the path of weights."""
    (tmp_path / "mine.pth").write_bytes(b"mine")
    same = {"key": "k", "metric": "FD", "value": 1.0, "count": 2, "protocol": "p"}
    old = row("score", **same)
    ours = row("score", **same, evaluation={"weights": sha256(tmp_path / "mine.pth")})
    theirs = row("score", **same, evaluation={"weights": "ab" * 32})
    config = EvaluateConfig("inception_v3", str(tmp_path / "mine.pth"), ["fd"])
    check_weights(config, [old, ours])
    check_weights(EvaluateConfig("inception_v3", None, ["fd"]), [theirs])
    with pytest.raises(
        InputError, match=r"mine\.pth has other weights \(.{8}\) than those .* scored \(abababab\): [^\n]*$"
    ):
        check_weights(config, [old, ours, theirs])


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


def test_spatial_features_are_the_first_maps_of_mixed_6(random_inception, digits):
    """Seven of 192 maps of the first branch of TensorFlow's mixed_6, which is Mixed_6d here, row by row."""
    images = torch.from_numpy(digits[:2]).permute(0, 3, 1, 2).repeat(1, 3, 1, 1)
    extractor = build("inception_v3", random_inception, ["2048", "spatial"], "cpu")
    pooled, spatial = extractor(images)
    plain = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(random_inception))
    seen = []
    plain.Mixed_6d.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    assert torch.equal(plain(images)[0], pooled)
    block = plain.Mixed_6d.branch1x1
    x, norm = F.conv2d(seen[0], block.conv.weight), block.bn
    x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
    x = (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
    expected = torch.stack([x[:, channel, row, column] for row, column, channel in PLACES], 1)
    assert spatial.shape == (2, 2023) and spatial.std() > 0
    torch.testing.assert_close(spatial, expected, rtol=1e-4, atol=1e-5)
    alone = build("inception_v3", random_inception, ["spatial"], "cpu")
    assert torch.equal(alone(images)[0], spatial)
    assert extractor.features_list == ["2048", "spatial"] and extractor(images)[0].shape == (2, 2048)


PLACES = list(itertools.product(range(17), range(17), range(7)))


# DINOv2

WIDTH, HEADS, SIDE = 32, 2, 37  # SIDE: of the position embeddings in Meta's file


@pytest.fixture
def small_dino(tmp_path, monkeypatch):
    """A file as Meta publishes it, of a network of two blocks with random weights."""

    def make():
        return vit_large_patch14_dinov2(
            pretrained=False, img_size=224, num_classes=0, embed_dim=WIDTH, depth=2, num_heads=HEADS
        )

    monkeypatch.setattr(DinoV2, "make", staticmethod(make))
    monkeypatch.setitem(NETWORKS, "dinov2_vitl14", dataclasses.replace(NETWORKS["dinov2_vitl14"], width=WIDTH))
    state, rng = make().state_dict(), torch.Generator().manual_seed(0)
    state |= {"pos_embed": torch.empty(1, 1 + SIDE**2, WIDTH), "mask_token": torch.empty(1, WIDTH)}
    state = {name: torch.randn(value.shape, generator=rng) * 0.2 for name, value in state.items()}
    torch.save(state, path := tmp_path / "dinov2_vitl14_pretrain.pth")
    return path


def dino_by_hand(images, w):
    """The class token of images uint8 [B, 3, H, W], in float64, written from Meta's equations."""
    w = {name: value.double() for name, value in w.items()}
    x = F.interpolate(images.double(), (224, 224), mode="bicubic", antialias=True) / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    x = x.reshape(len(x), 3, 16, 14, 16, 14).permute(0, 2, 4, 1, 3, 5).reshape(len(x), 256, 588)
    x = x @ w["patch_embed.proj.weight"].reshape(WIDTH, 588).T + w["patch_embed.proj.bias"]
    grid = w["pos_embed"][:, 1:].reshape(1, SIDE, SIDE, WIDTH).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=16.1 / SIDE, mode="bicubic").flatten(2).transpose(1, 2)
    first = (w["cls_token"] + w["pos_embed"][:, :1]).expand(len(x), 1, WIDTH)
    x = torch.cat((first, x + grid), 1)

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for block in ("blocks.0", "blocks.1"):
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.reshape(len(x), 257, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(2, 3) / (WIDTH // HEADS) ** 0.5).softmax(-1) @ v
        x = x + w[f"{block}.ls1.gamma"] * linear(attention.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        x = x + w[f"{block}.ls2.gamma"] * linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "norm")[:, 0]


def test_dino_by_hand(small_dino, tmp_path):
    images = torch.stack([torch.tensor(image[:400, :400]).permute(2, 0, 1) for image in load_sample_images().images])
    weights = torch.load(small_dino)
    extractor = build("dinov2_vitl14", small_dino, ["cls"], "cpu")
    got = extractor(images)[0]
    assert got.shape == (2, WIDTH) and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), dino_by_hand(images, weights), rtol=1e-4, atol=1e-4)
    # timm publishes the same tensors in another format.
    weights.pop("mask_token")
    safetensors.torch.save_file(weights, other := tmp_path / "model.safetensors")
    assert torch.equal(build("dinov2_vitl14", other, ["cls"], "cpu")(images)[0], got)
    with pytest.raises(InputError, match=r"dinov2-vitl14-timm takes uint8 \[B, 3, H, W\], not torch.float32"):
        extractor(torch.zeros(1, 3, 8, 8))


def test_scores_by_dino(small_dino, tmp_path, digits, monkeypatch):
    """Other weights than the published ones are named. Features that are kept have no logits, which it lacks."""
    settings = EvaluateConfig("dinov2_vitl14", str(small_dino.parent), ["fd", "prc"])
    pixels = torch.from_numpy(digits[20:40]).permute(0, 3, 1, 2)
    reference = Reference(TensorDataset(pixels, torch.zeros(20)), "digits", "f")

    def rows():
        return list(evaluate(digits[:20], reference, settings, settings.metrics, cache=tmp_path / "c", device="cpu"))

    first, digest = rows(), sha256(small_dino)
    names = [f"{name}-DINOv2-{digest[:8]}-20" for name in ("FD", "precision", "recall")]
    assert [row["metric"] for row in first] == names
    evaluation = first[0]["evaluation"]
    assert (evaluation["weights"], evaluation["layer"]) == (digest, "cls") and "bicubic" in evaluation["inputs"]
    network = FeatureNetwork(settings, "cpu")
    x, y = (network(images) for images in (digits[:20], digits[20:40]))
    assert x.shape == (20, WIDTH)
    assert frechet(Moments.of(x), Moments.of(y)) == pytest.approx(first[0]["value"], rel=1e-6)
    monkeypatch.setitem(NETWORKS, "dinov2_vitl14", dataclasses.replace(NETWORKS["dinov2_vitl14"], sha256=digest))
    assert [row["metric"] for row in rows()] == [f"{name}-DINOv2-20" for name in ("FD", "precision", "recall")]


def test_dino_weights_that_do_not_fit(small_dino, tmp_path):
    with pytest.raises(InputError, match=r"do not fit dinov2_vitl14: [^\n]*$"):
        build("dinov2_vitl14", find_weights("efficientnet_lite0", None), ["cls"], "cpu")
    (tmp_path / "cut.safetensors").write_bytes(b"abc")
    for name in ("cut.safetensors", "nowhere.pth"):
        with pytest.raises(InputError, match=rf"weights .*{name} cannot be read: \S[^\n]*$"):
            build("dinov2_vitl14", tmp_path / name, ["cls"], "cpu")


def test_dino_has_the_published_size():
    """304 M parameters (Oquab et al.): 343 tensors in Meta's file, of which one is `mask_token`."""
    with torch.device("meta"):
        network = DinoV2.make()
    assert len(network.state_dict()) == 342
    positions = WIDTH_L * (SIDE**2 - 16**2)  # the file has more of them
    assert sum(value.numel() for value in network.parameters()) + positions == 304_368_640 - WIDTH_L  # the mask token


WIDTH_L = 1024


# where weights are


def test_paths_of_weights(tmp_path):
    with pytest.raises(InputError, match=r"evaluate.features_path .*nowhere.pth does not exist"):
        find_weights("inception_v3", str(tmp_path / "nowhere.pth"))
    with pytest.raises(InputError, match="has no effect for efficientnet_lite0"):
        find_weights("efficientnet_lite0", str(tmp_path / "w.pth"))
    name = NETWORKS["dinov2_vitl14"].file
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / name).touch()
    assert find_weights("dinov2_vitl14", str(tmp_path)) == tmp_path / "deep" / "er" / name
    (tmp_path / name).touch()
    assert find_weights("dinov2_vitl14", str(tmp_path)) == tmp_path / name
    assert find_weights("inception_v3", str(tmp_path / name)) == tmp_path / name, "a file may have any name"


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.parametrize("features", ["inception_v3", "dinov2_vitl14"])
def test_missing_weights_are_one_line_with_a_command(tmp_path, no_cache, features):
    network = NETWORKS[features]
    for path, place in ((None, no_cache), (str(tmp_path), tmp_path)):
        with pytest.raises(InputError) as caught:
            find_weights(features, path)
        text = str(caught.value)
        assert f"{place / network.file} does not exist" in text and f"(curl -fLO {network.url})" in text
        assert "evaluate.features_path=FILE" in text and "evaluate.download=true" in text and "\n" not in text
    names = [name for name, _, _ in missing_weights()]
    assert names == ["inception_v3", "dinov2_vitl14"] and not no_cache.exists()
    (tmp_path / network.file).touch()
    (other,) = missing_weights(str(tmp_path))
    place = NETWORKS[other[0]]
    assert other[0] != features and other[1:] == (tmp_path / place.file, f"curl -fLO {place.url}")


def test_a_download_is_allowed_by_name_only(tmp_path, no_cache, monkeypatch):
    """It is checked, leaves nothing behind if it is wrong, and is done once."""
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    file = mirror / NETWORKS["inception_v3"].file
    file.write_bytes(b"right")
    right = dataclasses.replace(NETWORKS["inception_v3"], url=f"{mirror.as_uri()}/{file.name}", sha256=sha256(file))
    monkeypatch.setitem(NETWORKS, "inception_v3", right)
    with pytest.raises(InputError, match="are missing"):
        find_weights("inception_v3", None)
    for source in (True, mirror.as_uri(), f"{mirror.as_uri()}/"):
        got = find_weights("inception_v3", None, source)
        assert got == no_cache / file.name and got.read_bytes() == b"right"
        got.unlink()
    assert find_weights("inception_v3", str(no_cache), True) == got, "it goes into the folder that is given"
    file.write_bytes(b"wrong")
    assert find_weights("inception_v3", None, True) == got
    got.unlink()
    for broken, words in ((mirror.as_uri(), "invalid hash value"), ((tmp_path / "nowhere").as_uri(), "No such file")):
        with pytest.raises(InputError, match=rf"cannot download file:\S+\.pth \(.*{words}.*curl -fLO file:") as caught:
            find_weights("inception_v3", None, broken)
        assert "\n" not in str(caught.value) and not list(no_cache.iterdir())
