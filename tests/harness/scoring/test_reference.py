"""References: moments in one pass, files of moments, and floors, against numpy, scipy and closed forms."""

import re
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from lamabench.baselines.dit import DiTConfig
from lamabench.harness.config import Config
from lamabench.harness.data.items import epoch_order
from lamabench.harness.keys import score_key
from lamabench.harness.record import row
from lamabench.harness.scoring import reference as module
from lamabench.harness.scoring.floor import floor, floor_count, note
from lamabench.harness.scoring.networks import NETWORKS
from lamabench.harness.scoring.reference import Reference, check_contents, reference_of, split
from lamabench.harness.scoring.statistics import Moments, frechet
from lamabench.harness.scoring.statistics_file import POOLED, SPATIAL, read_statistics, write_statistics
from lamabench.harness.sections import DataConfig, EvaluateConfig, RunConfig
from lamabench.kernels.errors import InputError

WIDTH, WIDE = 6, 4
INCEPTION = NETWORKS["inception_v3"]


class Images:
    """Random images uint8 [1, 3, 3], which count how often they are read."""

    def __init__(self, count):
        self.images = torch.from_numpy(np.random.default_rng(count).integers(0, 256, (count, 1, 3, 3), dtype=np.uint8))
        self.read = 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        self.read += 1
        return self.images[i], 0


class Linear:
    """In place of Inception: two random projections of the pixels."""

    def __init__(self, layers=("2048", "spatial"), **identity):
        rng = np.random.default_rng(0)
        self.maps = {"2048": rng.normal(size=(9, WIDTH)) / 255, "spatial": rng.normal(size=(9, WIDE)) / 255}
        self.network, self.layers, self.fails_at = replace(INCEPTION, width=WIDTH), list(layers), None
        self.device = "cpu"
        self.identity = {
            "network": INCEPTION.extractor,
            "weights": INCEPTION.sha256,
            "inputs": INCEPTION.inputs,
        } | identity

    def features(self, images, count, on_batch):
        x = images(0, count).flatten(1).double().numpy()
        on_batch(count)
        if self.fails_at is not None and self.fails_at in x[:, 0]:
            raise KeyboardInterrupt
        return {layer: (x @ self.maps[layer]).astype(np.float32) for layer in self.layers}

    def by_hand(self, images, layer="2048"):
        return (images.images.flatten(1).double().numpy() @ self.maps[layer]).astype(np.float32).astype(float)


@pytest.fixture(params=[True, False], ids=["kept", "streamed"])
def kept(request, monkeypatch):
    """Whether features are small enough to be kept."""
    if not request.param:
        monkeypatch.setattr(module, "KEPT_BYTES", 0)
        monkeypatch.setattr(module, "PART", 7)
    return request.param


def close(moments, features):
    assert moments.count == len(features)
    np.testing.assert_allclose(moments.mean, features.mean(0), rtol=1e-10)
    np.testing.assert_allclose(moments.covariance, np.cov(features, rowvar=False), rtol=1e-9, atol=1e-10)


def distance(a, b):
    """The Fréchet distance of features, with scipy's square root of a matrix."""
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = np.trace(scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real)
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1]) - 2 * root


def test_moments_in_one_pass(tmp_path, kept):
    images, network = Images(40), Linear()
    reference = Reference(images, "r", "f", cache=tmp_path)
    close(reference.moments(network, "2048"), network.by_hand(images))
    assert images.read == 41, "one more for the shape"
    close(reference.moments(network, "spatial"), network.by_hand(images, "spatial"))
    assert images.read == 41, "they were computed in the same pass"
    close(Reference(images, "r", "f", cache=tmp_path).moments(network, "2048"), network.by_hand(images))
    assert images.read == 42, "they come from the cache"
    close(Reference(images, "r", "f").moments(network, "spatial"), network.by_hand(images, "spatial"))
    other = Reference(Images(39), "r", "g", cache=tmp_path)
    close(other.moments(network, "2048"), network.by_hand(other.images))


def test_features_are_in_order_or_a_fixed_random_part(tmp_path, kept):
    images, network = Images(40), Linear(["2048"])
    reference = Reference(images, "r", "f", cache=tmp_path)
    np.testing.assert_allclose(
        reference.features(network, "2048", 9), network.by_hand(images)[epoch_order(0, 0, 40)[:9]]
    )
    np.testing.assert_allclose(reference.features(network, "2048"), network.by_hand(images))
    np.testing.assert_allclose(reference.features(network, "2048", 40), network.by_hand(images))


def test_a_killed_pass_goes_on(tmp_path, monkeypatch):
    for name, value in {"KEPT_BYTES": 0, "PART": 7, "SAVE_S": -1.0}.items():
        monkeypatch.setattr(module, name, value)
    images, network = Images(40), Linear()
    reference = Reference(images, "r", "f", cache=tmp_path)
    first = images.images.flatten(1)[:, 0]
    network.fails_at = next(int(value) for value in first[28:35] if value not in first[:28])
    with pytest.raises(KeyboardInterrupt):
        reference.moments(network, "2048")
    assert images.read == 36 and list(tmp_path.glob("*.part"))
    images.read, network.fails_at = 0, None
    close(Reference(images, "r", "f", cache=tmp_path).moments(network, "2048"), network.by_hand(images))
    assert images.read == 13, "28 images were done"
    close(reference.moments(network, "spatial"), network.by_hand(images, "spatial"))
    assert not list(tmp_path.glob("*.part"))


def test_a_damaged_cache_is_computed_again(tmp_path):
    images, network = Images(40), Linear(["2048"])
    Reference(images, "r", "f", cache=tmp_path).moments(network, "2048")
    for file in tmp_path.glob("*-moments.safetensors"):
        content = bytearray(file.read_bytes())
        content[-9] ^= 1
        file.write_bytes(content)
    with pytest.warns(UserWarning, match="moments are computed again"):
        moments = Reference(images, "r", "f", cache=tmp_path).moments(network, "2048")
    close(moments, network.by_hand(images))


def test_the_rest_of_a_set():
    rng = np.random.default_rng(3)
    features = rng.normal(50, [0.1, 1, 10, 3, 2], (200, 5))
    part, rest = split(Moments.of(features), Moments.of(features[:30]))
    close(part, features[:30])
    close(rest, features[30:])
    with pytest.raises(InputError, match="moments need at least 2 images, 1 are left"):
        split(Moments.of(features[:4]), Moments.of(features[:3]))


# floors


def test_floors_of_a_reference_that_is_split_by_hand(tmp_path, kept):
    images, network = Images(400), Linear()
    reference = Reference(images, "r", "f", cache=tmp_path)
    order = epoch_order(0, 0, 400)
    for layer, metric in (("2048", "fd"), ("spatial", "sfid")):
        features = network.by_hand(images, layer)[order]
        assert floor(reference, network, layer, 50, metric) == pytest.approx(distance(features[:50], features[50:]))
        # More samples than half of the reference: halves.
        assert floor(reference, network, layer, 300, metric) == pytest.approx(distance(features[:200], features[200:]))
    # With 100 images, each of KID's subsets is the whole set, and KID the unbiased estimate of Gretton et al. (2012).
    features = network.by_hand(images)[order]
    x, y = features[:100], features[100:200]
    kernels = [(a @ b.T / WIDTH + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    same = sum((k.sum() - np.trace(k)) / (100 * 99) for k in kernels[:2])
    assert floor(reference, network, "2048", 100, "kid") == pytest.approx(same - 2 * kernels[2].mean(), abs=1e-9)
    half = floor(reference, network, "2048", 999, "kid")
    assert half is not None and abs(half) < 0.1 * frechet(Moments.of(x), Moments.of(y + 1))

    images.read = 0
    assert floor(Reference(images, "r", "f", cache=tmp_path), network, "2048", 999, "kid") == half
    assert images.read == 1, "it is kept"
    assert floor(reference, network, "2048", 99, "kid") is None, "KID needs 100 images"
    assert floor(reference, network, "2048", 50, "prc") is None
    assert floor(reference, network, "2048", 1, "fd") is None


def test_what_is_said_of_a_score():
    bias = "fewer than twice the 1280 features: bias dominates; compare kid"
    assert note("fd", 512, 1280, 50_000, 512) == f"512 samples, {bias}"
    assert note("fd", 40, 1280, 50_000, 40) == f"40 samples, {bias.removesuffix('; compare kid')}", "too few for kid"
    assert note("fd", 5000, 1280, 300, 150) == (
        f"300 reference images, {bias}; the floor is that of 150 images, half of the reference"
    )
    assert note("fd", 2560, 1280, 2560, None) is None and note("fd", 2560, 1280, None, None) is None
    assert note("kid", 512, 0, 600, 300) == "the floor is that of 300 images, half of the reference"
    assert note("prc", 5, 0, 600, 5) is note("isc", 512, 0, None, None) is None
    assert floor_count(Reference(Images(9), "r", "f"), 3) == 3 and floor_count(Reference(Images(9), "r", "f"), 5) == 4


# files


def adm(path, **arrays):
    """A file as ADM's, written by numpy alone. Returns its features, pooled and spatial."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(1, 2, (500, 12)), rng.normal(0, 1, (500, 8))
    content = {"mu": x.mean(0).astype(np.float32), "sigma": np.cov(x, rowvar=False)}
    content |= {"mu_s": y.mean(0), "sigma_s": np.cov(y, rowvar=False), **arrays}
    np.savez(path, **{name: array for name, array in content.items() if array is not None})
    return x, y


def config_of(path, **evaluate):
    model = DiTConfig(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=16, depth=1, num_heads=2)
    data = DataConfig(kind="digits", size=8, channels=1, num_classes=10)
    settings = EvaluateConfig(**{"features": "inception_v3", "reference": path and str(path), **evaluate})
    return Config(model=model, data=data, evaluate=settings, run=RunConfig(device="cpu"))


def test_moments_of_adm(tmp_path):
    x, y = adm(tmp_path / "VIRTUAL_imagenet256_labeled.npz")
    reference = reference_of(config_of(tmp_path / "VIRTUAL_imagenet256_labeled.npz"))
    assert (reference.name, reference.count(), reference.shape) == ("VIRTUAL_imagenet256_labeled", None, None)
    samples = np.random.default_rng(2).normal(0, 1, (300, 12))
    value = frechet(reference.moments(Linear(), "2048"), Moments.of(samples))
    assert value == pytest.approx(distance(x, samples), rel=1e-6)  # mu is float32
    assert frechet(reference.moments(Linear(), "spatial"), Moments.of(y)) == pytest.approx(0, abs=1e-9)
    assert floor(reference, Linear(), "2048", 50, "fd") is None
    words = r"kid needs features of the reference, and .*labeled\.npz has moments only; choices of evaluate"
    assert re.search(words, str(reference.lack("kid")))
    assert reference.lack("fd") is reference.lack("sfid") is reference.lack("isc") is None
    with pytest.raises(InputError, match=r"features .* are needed, and .*labeled\.npz has moments only"):
        reference.features(Linear(), "2048")
    with pytest.raises(InputError, match=r"evaluate\.reference_count 5 has no effect on moments of "):
        reference_of(config_of(tmp_path / "VIRTUAL_imagenet256_labeled.npz", reference_count=5))


def test_moments_of_another_network_are_refused(tmp_path):
    adm(tmp_path / "adm.npz")
    reference = reference_of(config_of(tmp_path / "adm.npz"))
    other = "moments of inception_v3, which cannot be compared with features of efficientnet_lite0: set evaluate.feat"
    with pytest.raises(InputError, match=other):
        reference.moments(Linear(network="efficientnet-lite0"), "2048")
    with pytest.raises(InputError, match=other):
        reference_of(config_of(tmp_path / "adm.npz", features="efficientnet_lite0"))
    with pytest.raises(
        InputError, match=r"inception_v3 with weights 6726825d, which .* inception_v3 with weights 0000"
    ):
        reference.moments(Linear(weights="0" * 64), "2048")
    adm(tmp_path / "pooled.npz", mu_s=None, sigma_s=None)
    with pytest.raises(InputError, match="has no moments of layer spatial of inception-v3-compat"):
        reference_of(config_of(tmp_path / "pooled.npz")).moments(Linear(), "spatial")


def test_images_in_a_file(tmp_path):
    """`arr_0` alone is a set of images. Beside moments, features are those of the images, as in ADM's own files."""
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", arr_0=images)
    reference = reference_of(config_of(tmp_path / "set.npz"))
    assert (reference.name, reference.count(), reference.shape) == ("set", 20, [4, 4, 3])
    assert torch.equal(reference.batch(3, 5), torch.from_numpy(images[3:5]).permute(0, 3, 1, 2))
    assert reference.statistics is None and reference.lack("kid") is None
    assert reference_of(config_of(tmp_path / "set.npz", reference_count=7)).count() == 7

    x, _ = adm(tmp_path / "both.npz", arr_0=images)
    both = reference_of(config_of(tmp_path / "both.npz"))
    assert (both.count("fd"), both.count("prc"), both.lack("prc")) == (None, 20, None)
    np.testing.assert_allclose(both.moments(Linear(), "2048").covariance, np.cov(x, rowvar=False))
    assert both.batch(0, 20).shape == (20, 3, 4, 4)


def test_a_file_of_ours(tmp_path):
    rng = np.random.default_rng(1)
    moments = {POOLED: Moments.of(rng.normal(size=(50, WIDTH))), SPATIAL: Moments.of(rng.normal(size=(50, WIDE)))}
    network = Linear()
    facts = {**network.identity, "name": "digits", "fingerprint": "0" * 16}
    write_statistics(tmp_path / "ours.npz", moments, facts, [8, 8, 1])
    with np.load(tmp_path / "ours.npz") as there:
        assert sorted(there) == sorted(
            [
                "mu",
                "sigma",
                "mu_s",
                "sigma_s",
                "count",
                "network",
                "weights",
                "inputs",
                "name",
                "fingerprint",
                "images",
                "checksum",
            ]
        )
        assert np.array_equal(there["sigma"], moments[POOLED].covariance) and there["count"] == 50
        content = dict(there)
    reference = reference_of(config_of(tmp_path / "ours.npz"))
    assert (reference.name, reference.fingerprint, reference.shape) == ("digits", "0" * 16, [8, 8, 1])
    assert reference.count() == 50 and reference.identity == {"fingerprint": "0" * 16, "count": 50}
    assert np.array_equal(reference.moments(network, "spatial").mean, moments[SPATIAL].mean)
    with pytest.raises(
        InputError,
        match=r"moments of inception_v3 with inputs bilinear TensorFlow 1 299, .*, which .* with inputs cooked: set",
    ):
        reference.moments(Linear(inputs="cooked"), "2048")

    content["mu"] = content["mu"] + 1e-9
    np.savez(tmp_path / "ours.npz", **content)
    with pytest.raises(InputError, match=r"ours\.npz is damaged: its moments do not match its checksum"):
        read_statistics(tmp_path / "ours.npz")
    del content["network"], content["images"]
    np.savez(tmp_path / "ours.npz", **content)
    with pytest.raises(InputError, match=r"ours\.npz lacks network, images"):
        read_statistics(tmp_path / "ours.npz")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"sigma": None}, r"has no array sigma: moments are mu \[D\] and sigma \[D, D\]"),
        ({"mu": None}, r"has no array mu:"),
        ({"mu_s": None}, r"has no array mu_s:"),
        ({"sigma": np.eye(11)}, r"mu \[12\] and sigma \[11, 11\] must be \[D\] and \[D, D\]"),
        ({"sigma": np.triu(np.ones((12, 12)))}, "sigma is not symmetric, so it is no covariance"),
        ({"mu": np.full(12, np.nan)}, "mu must be finite floating-point numbers"),
        ({"mu_s": np.arange(8)}, "mu_s must be finite floating-point numbers, not int64"),
        ({"count": np.array(1)}, "count must be one number of 2 or more"),
        ({"count": np.array([50])}, "count must be one number of 2 or more"),
        ({"arr_0": np.zeros((3, 4, 5, 3), np.uint8)}, r"arr_0 is \[3, 4, 5, 3\], not images \[N, S, S, C\]"),
    ],
)
def test_bad_files(tmp_path, arrays, words):
    adm(tmp_path / "bad.npz", **arrays)
    with pytest.raises(InputError, match=words) as caught:
        reference_of(config_of(tmp_path / "bad.npz"))
    assert str(tmp_path / "bad.npz") in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_reference(tmp_path):
    with pytest.raises(InputError, match=r"evaluate\.reference .*no\.npz does not exist"):
        reference_of(config_of(tmp_path / "no.npz"))
    np.savez(tmp_path / "x.npz", x=np.zeros(3))
    with pytest.raises(InputError, match=r"x\.npz has no moments \(mu, sigma\) and no images \(arr_0\)"):
        reference_of(config_of(tmp_path / "x.npz"))
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(InputError, match=r"text\.npz is not a readable \.npz"):
        reference_of(config_of(tmp_path / "text.npz"))


def test_keys_have_the_name_of_a_file_without_its_folder():
    def key(path, **data):
        config = config_of(path)
        return score_key(replace(config, data=replace(config.data, **data)), "samples", "fd")

    assert key("a/r.npz") == key("b/r.npz") == key("r.npz", name="other")
    assert len({key("r.npz"), key("q.npz"), key(None)}) == 3


def test_other_contents_under_the_same_name_are_refused(tmp_path):
    path = tmp_path / "r.npz"
    adm(path)
    config = config_of(path)
    score = {"key": "k", "metric": "FD", "value": 1.0, "count": 2, "protocol": "p"}
    rows = [row("score", **score, data_fingerprint=reference_of(config).fingerprint), row("score", **score)]
    check_contents(config, rows)
    adm(path, count=np.array(500))
    with pytest.raises(InputError, match=r"r\.npz has other contents than the file .*; give it another name"):
        check_contents(config, rows)
