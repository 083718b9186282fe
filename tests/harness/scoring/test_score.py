"""Scores against closed forms, plain sums and torch-fidelity's own pipeline; names, caches and refusals."""

import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
import torch_fidelity
from lamabench.harness.config import FEATURES, METRICS, EvaluateConfig
from lamabench.harness.scoring import features as networks
from lamabench.harness.scoring import score as evaluation
from lamabench.harness.scoring.features import NETWORKS, EfficientNetLite0, build, extract, find_weights
from lamabench.harness.scoring.score import evaluate, kid_subset_size, metric_name, score
from lamabench.kernels.errors import InputError
from sklearn.datasets import load_digits, load_sample_images
from timm.data.imagenet_info import ImageNetInfo
from timm.models.efficientnet import tf_efficientnet_lite0
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.transforms.v2 import functional as vision


class Images(torch.utils.data.Dataset):
    """uint8 [N, H, W, C] as a reference: items (uint8 [C, H, W], label)."""

    def __init__(self, images):
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)
        self.read = 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        self.read += 1
        return self.images[i], 0


class Rgb(torch.utils.data.Dataset):
    """The same images as torch-fidelity takes them: uint8 [3, H, W] alone."""

    def __init__(self, images):
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).repeat(1, 3, 1, 1)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    return np.rint(load_digits()["images"] * (255 / 16)).astype(np.uint8)[..., None]


def run(samples, reference, cache, metrics=("prc",), **given):
    settings = {"reference_name": "digits", "reference_fingerprint": "f", "device": "cpu", "seed": 0, **given}
    config = settings.pop("config", None) or EvaluateConfig(metrics=list(metrics))
    reference = reference if isinstance(reference, Images) else Images(reference)
    return evaluate(samples, reference, config, cache_dir=cache, **settings)


def noisy(images, sigma):
    noise = np.random.default_rng(1).normal(0, sigma, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


def exact_moments(n, d, seed):
    """[n, d] whose sample mean is 0 and whose sample covariance is the identity."""
    x = np.random.default_rng(seed).normal(size=(n, d))
    x -= x.mean(axis=0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T


# the network


def test_features_are_those_of_timm():
    images = [torch.tensor(image).permute(2, 0, 1)[None] for image in load_sample_images().images]
    plain = tf_efficientnet_lite0(pretrained=False).eval()
    stored = torch.load(find_weights("efficientnet_lite0", None), weights_only=True)
    plain.load_state_dict(dict(zip(plain.state_dict(), stored.values(), strict=True)))
    ours = build("efficientnet_lite0", find_weights("efficientnet_lite0", None), ["logits", "1280"], "cpu")
    found = []
    with torch.no_grad():
        for image in images:
            x = (vision.resize(image.float(), [224, 224], antialias=True) - 127) / 128
            pooled = plain.forward_features(x).mean(dim=(2, 3))
            logits = plain.classifier(pooled)
            got_logits, got_pooled = ours(image)
            assert (got_pooled - pooled).norm() < 2e-5 * pooled.norm()
            assert (got_logits - logits).norm() < 2e-5 * logits.norm()
            found.append({ImageNetInfo().index_to_description(int(i)) for i in got_logits[0].topk(5).indices})
    assert {"palace", "castle"} <= found[0]  # a Chinese palace
    assert "daisy" in found[1]  # a dahlia


def test_grey_is_three_equal_channels_and_batches_do_not_matter(digits):
    extractor = build("efficientnet_lite0", find_weights("efficientnet_lite0", None), ["1280"], "cpu")
    grey = torch.from_numpy(digits[:5]).permute(0, 3, 1, 2)
    whole = extract(extractor, [grey])["1280"]
    parts = extract(extractor, [grey[:3].repeat(1, 3, 1, 1), grey[3:]])["1280"]
    assert whole.shape == (5, 1280) and whole.dtype == np.float32
    assert np.linalg.norm(whole - parts) < 1e-5 * np.linalg.norm(whole)


def test_every_configured_network_and_metric_exists():
    assert tuple(NETWORKS) == FEATURES
    for metric in METRICS:
        assert isinstance(evaluation.settings(metric, 10, 10), dict)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("_fc.bias"), "hold 295 tensors, tf_efficientnet_lite0 has 296"),
        (
            lambda state: state.update({"_fc.bias": torch.zeros(10)}),
            r"_fc.bias is \[10\], classifier.bias needs \[1000",
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


# the metrics, on features made for the purpose


def test_frechet_distance_of_known_gaussians():
    means, scales = np.random.default_rng(0).normal(size=(2, 6)), np.array([[1, 2, 3, 4, 5, 6], [2, 2, 1, 4, 9, 3]])
    ours, theirs = (exact_moments(40 + i, 6, i) * scales[i] + means[i] for i in range(2))
    expected = ((means[0] - means[1]) ** 2).sum() + ((scales[0] - scales[1]) ** 2).sum()
    assert score("fd", ours, theirs, 0)[0].value == pytest.approx(expected, rel=1e-9)
    assert score("fd", ours, theirs, 0)[0].std is None


def test_frechet_distance_by_matrix_square_root():
    rng = np.random.default_rng(2)
    ours, theirs = (rng.normal(size=(n, 12)) @ rng.normal(size=(12, 12)) for n in (60, 50))
    a, b = np.cov(ours, rowvar=False), np.cov(theirs, rowvar=False)
    root = np.asarray(scipy.linalg.sqrtm(a))
    cross = np.asarray(scipy.linalg.sqrtm(root @ b @ root))
    expected = ((ours.mean(0) - theirs.mean(0)) ** 2).sum() + np.trace(a + b - 2 * cross)
    assert score("fd", ours, theirs, 0)[0].value == pytest.approx(expected, rel=1e-8)
    assert abs(score("fd", ours, ours, 0)[0].value) < 1e-9 * np.trace(a)


def kernel_distance(x, y):
    """The unbiased squared MMD with the kernel (x·y / d + 1)³, as a plain double sum."""
    n, kernel = len(x), lambda a, b: (float(a @ b) / x.shape[1] + 1) ** 3
    pairs = [(i, j) for i in range(n) for j in range(n)]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j) / (n * (n - 1))
    return within - 2 * sum(kernel(x[i], y[j]) for i, j in pairs) / n**2


def test_kernel_distance_of_whole_sets():
    rng = np.random.default_rng(3)
    ours, theirs = rng.normal(size=(100, 8)), rng.normal(0.3, 1, size=(100, 8))
    expected = kernel_distance(ours, theirs)
    for seed in (0, 7):
        one = score("kid", ours, theirs, seed)[0]
        assert one.value == pytest.approx(expected, rel=1e-10) and one.std is not None and one.std < 1e-12


def test_kernel_distance_of_seeded_subsets(monkeypatch):
    monkeypatch.setattr(evaluation, "KID_SUBSETS", 4)
    rng = np.random.default_rng(4)
    ours, theirs = rng.normal(size=(130, 8)), rng.normal(0.3, 1, size=(110, 8))
    draws, expected = np.random.RandomState(5), []
    for _ in range(4):
        mine = ours[draws.choice(130, 100, replace=False)]
        expected.append(kernel_distance(mine, theirs[draws.choice(110, 100, replace=False)]))
    one = score("kid", ours, theirs, 5)[0]
    assert one.value == pytest.approx(np.mean(expected), rel=1e-10)
    assert one.std == pytest.approx(np.std(expected), rel=1e-8)
    assert score("kid", ours, theirs, 6)[0].value != one.value


def test_precision_and_recall_by_counting():
    rng = np.random.default_rng(6)
    ours, theirs = rng.normal(size=(30, 3)), rng.normal(0.5, 2, size=(40, 3))

    def covered(points, centres):
        """The share of points within some centre's distance to its third neighbour."""
        radii = [sorted(np.linalg.norm(centres - centre, axis=1))[3] for centre in centres]
        inside = [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
        return np.mean(inside)

    precision, recall = score("prc", ours, theirs, 0)
    assert (precision.quantity, recall.quantity) == ("precision", "recall")
    assert precision.value == pytest.approx(covered(ours, theirs))
    assert recall.value == pytest.approx(covered(theirs, ours))
    assert precision.value != recall.value


def test_inception_score_by_splits():
    logits = np.random.default_rng(7).normal(0, 3, size=(50, 6))
    p = scipy.special.softmax(logits[np.random.RandomState(3).permutation(50)], axis=1).reshape(10, 5, 6)
    expected = np.exp([(q * np.log(q / q.mean(0))).sum(1).mean() for q in p])
    one = score("isc", logits, None, 3)[0]
    assert one.value == pytest.approx(expected.mean()) and one.std == pytest.approx(expected.std())


@pytest.mark.parametrize("metric", METRICS)
def test_features_that_are_not_finite(metric):
    features = np.random.default_rng(8).normal(size=(100, 3))
    broken = features.copy()
    broken[4, 1] = np.nan
    with pytest.raises(InputError, match=f"{metric} cannot be computed: features of the samples are not finite"):
        score(metric, broken, features, 0)


def test_result_that_is_not_finite():
    huge = np.random.default_rng(9).normal(size=(100, 3)) * 1e120
    with np.errstate(all="ignore"), pytest.raises(InputError, match="kid is not finite"):
        score("kid", huge, huge[::-1].copy(), 0)


# names


@pytest.mark.parametrize(
    ("quantity", "network", "count", "name"),
    [
        ("fd", "Inception", 50_000, "FID"),
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


# the whole


def test_agrees_with_torch_fidelitys_own_pipeline(tmp_path, digits):
    samples, reference = noisy(digits[:20], 30), digits[20:50]
    rows = run(samples, reference, tmp_path, ("fd", "prc", "isc"), seed=11)
    expected = torch_fidelity.calculate_metrics(
        input1=Rgb(samples),
        input2=Rgb(reference),
        fid=True,
        prc=True,
        isc=True,
        feature_extractor="efficientnet-lite0",
        rng_seed=11,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    found = {row["metric"]: row for row in rows}
    assert list(found) == [f"{name}-EffNetLite0-20" for name in ("FD", "precision", "recall", "IS")]
    keys = ["frechet_inception_distance", "precision", "recall", "inception_score_mean"]
    assert [row["value"] for row in rows] == pytest.approx([expected[key] for key in keys], rel=1e-4)
    assert [row["std"] for row in rows] == [None, None, None, pytest.approx(expected["inception_score_std"], rel=1e-4)]
    facts = {(row["count"], row["reference"], row["reference_count"], row["features"]) for row in rows}
    assert facts == {(20, "digits", 30, "efficientnet_lite0"), (20, None, None, "efficientnet_lite0")}
    assert all(len(row["protocol"]) == 8 and int(row["protocol"], 16) >= 0 for row in rows)


def test_noise_makes_the_distance_grow(tmp_path, digits):
    reference = digits[100:130]
    values = [run(noisy(digits[:30], sigma), reference, tmp_path, ("fd",))[0]["value"] for sigma in (0, 25, 80)]
    assert 0 < values[0] < 0.9 * values[1] < 0.8 * values[2]


def test_cache_and_progress(tmp_path, digits):
    samples, reference, seen = digits[:6], Images(digits[10:18]), []
    config = EvaluateConfig(metrics=["prc"], batch_size=4)
    first = run(samples, reference, tmp_path, config=config, progress=lambda *state: seen.append(state))
    assert seen == [(4, 14), (8, 14), (12, 14), (14, 14)]
    (cache,) = tmp_path.iterdir()
    whole = cache.read_bytes()

    seen.clear()
    reference.read = 0
    assert run(samples, reference, tmp_path, config=config, progress=lambda *state: seen.append(state)) == first
    assert reference.read == 1 and seen == [(4, 6), (6, 6)]  # one look at the shape

    flipped = bytearray(whole)
    flipped[-5] ^= 1
    networks.write_cache(cache, np.zeros((8, 3), dtype=np.float32))
    damaged = {
        "is not a whole file": whole[: len(whole) // 2],
        "is not a whole file of": b"",
        "agree with its checksum": bytes(flipped),
        r"holds float32 \[8, 3\], not float32 \[8, 1280\]": cache.read_bytes(),
    }
    for words, data in damaged.items():
        cache.write_bytes(data)
        with pytest.warns(UserWarning, match=words):
            assert run(samples, reference, tmp_path, config=config) == first
        assert cache.read_bytes() == whole


def test_protocol_tells_what_may_be_compared(tmp_path, digits):
    def protocol(samples=digits[:5], reference=digits[10:14], **given):
        rows = run(samples, reference, tmp_path, **given)
        assert len({row["protocol"] for row in rows}) == 1
        return rows[0]["protocol"]

    same = protocol()
    assert protocol(noisy(digits[20:25], 9)) == same
    assert protocol(seed=5, config=EvaluateConfig(metrics=["prc"], batch_size=3)) == same
    others = [
        protocol(digits[:4]),
        protocol(reference=digits[10:15]),
        protocol(reference_name="other"),
        protocol(reference_fingerprint="g"),
        protocol(digits[:5].repeat(2, axis=1), digits[10:14].repeat(2, axis=1)),
    ]
    assert len({same, *others}) == 6


@pytest.mark.parametrize(
    ("metric", "samples", "reference", "words"),
    [
        ("fd", 1, 9, "fd needs at least 2 samples, 1 given"),
        ("fd", 9, 1, "fd needs at least 2 reference images, 1 given"),
        ("kid", 99, 200, "kid needs at least 100 samples, 99 given"),
        ("kid", 1200, 99, "kid needs at least 100 reference images, 99 given"),
        ("prc", 3, 9, "prc needs at least 4 samples, 3 given"),
        ("prc", 9, 3, "prc needs at least 4 reference images, 3 given"),
        ("isc", 9, 9, "isc needs at least 10 samples, 9 given"),
    ],
)
def test_short_sets(tmp_path, digits, metric, samples, reference, words):
    with pytest.raises(InputError, match=words):
        run(digits[:samples], digits[:reference], tmp_path, (metric,))
    assert not list(tmp_path.iterdir())


def test_shapes_that_do_not_fit(tmp_path, digits):
    with pytest.raises(InputError, match=r"samples must be uint8 \[N, H, W, C\].* not float64 \[9, 8, 8, 1\]"):
        run(digits[:9] / 255.0, digits[:9], tmp_path)
    with pytest.raises(InputError, match=r"C 1 or 3, not uint8 \[9, 8, 8\]"):
        run(digits[:9, ..., 0], digits[:9], tmp_path)
    with pytest.raises(InputError, match=r"samples are \[16, 8, 1\] \[H, W, C\], but reference images are \[8, 8, 1\]"):
        run(digits[:9].repeat(2, axis=1), digits[:9], tmp_path)
    with pytest.raises(InputError, match=r"reference images must be uint8 \[C, S, S\], not torch.float32 \[1, 8, 8\]"):
        run(digits[:9], digits[:9].astype(np.float32), tmp_path)


def test_unknown_names(tmp_path, digits):
    with pytest.raises(
        InputError, match=r"unknown evaluate.metrics 'fdd' \(did you mean 'fd'\?\); choices: fd, kid, prc, isc"
    ):
        EvaluateConfig(metrics=["fdd"])
    with pytest.raises(InputError, match=r"evaluate.metrics is empty; choices: fd"):
        EvaluateConfig(metrics=[])
    with pytest.raises(InputError, match=r"unknown evaluate.features 'inception' .*choices: efficientnet_lite0, incep"):
        EvaluateConfig(features="inception")
    with pytest.raises(InputError, match=r"evaluate.batch_size must be above 0, not 0"):
        EvaluateConfig(batch_size=0)
    config = EvaluateConfig()
    config.metrics = ["fd", "fid"]
    with pytest.raises(InputError, match=r"unknown evaluate.metrics 'fid'.*choices: fd, kid, prc, isc"):
        run(digits[:9], digits[:9], tmp_path, config=config)
    with pytest.raises(InputError, match=r"unknown evaluate.features 'vgg'.*choices: efficientnet_lite0, inception_v3"):
        find_weights("vgg", None)


# Inception-2015


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """A file of Inception's shape with random weights: the published one is not to be downloaded by a test."""

    class Random(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, strict=True, assign=False):
            return super().load_state_dict(state_dict, strict=False)

    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({}, path)
    torch.manual_seed(0)
    torch.save(Random("inception-v3-compat", ["2048"], str(path)).state_dict(), path)
    return path


def test_inception_of_a_given_path(tmp_path, digits, random_inception, monkeypatch):
    config, digest = EvaluateConfig("inception_v3", str(random_inception), ["prc"]), networks.sha256(random_inception)
    rows = run(digits[:5], digits[:4], tmp_path, config=config)
    # Weights other than the published ones give no metric the name of a published one.
    assert [row["metric"] for row in rows] == [f"{name}-Inception-{digest[:8]}-5" for name in ("precision", "recall")]
    assert rows[1]["value"] == 1.0  # the reference is part of the samples
    monkeypatch.setattr(evaluation, "INCEPTION_2015", digest)
    config = EvaluateConfig("inception_v3", str(random_inception), ["isc"])
    rows = run(digits[:10], digits[:4], tmp_path, config=config, seed=2)
    assert [row["metric"] for row in rows] == ["IS-10"]
    extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["logits_unbiased"], str(random_inception))
    logits = extractor(torch.from_numpy(digits[:10]).permute(0, 3, 1, 2).repeat(1, 3, 1, 1))[0]
    assert rows[0]["value"] == pytest.approx(score("isc", logits.numpy(), None, 2)[0].value, rel=1e-9)


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
    with pytest.raises(InputError, match="of no use to efficientnet_lite0"):
        find_weights("efficientnet_lite0", str(tmp_path / "w.pth"))


def test_download_that_fails_and_one_that_works(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def fail(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(InputError, match=r"no route to host.*; get https://\S+\.pth and give its path as eval"):
        find_weights("inception_v3", None)
    asked = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda _, to, **__: asked.append(Path(to).write_text("")))
    file = find_weights("inception_v3", None)
    assert file.parent == tmp_path / "checkpoints" and find_weights("inception_v3", None) == file and len(asked) == 1
