"""Scores against torch-fidelity's own pipeline, caches, protocols, seeds, and inputs that are refused."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch_fidelity
from lamabench.baselines.dit import DiTConfig
from lamabench.harness.config import Config
from lamabench.harness.progress import Progress
from lamabench.harness.random import Stream, generator
from lamabench.harness.scoring import features, networks
from lamabench.harness.scoring import score as scoring
from lamabench.harness.scoring.networks import sha256
from lamabench.harness.scoring.reference import Reference, reference_of
from lamabench.harness.scoring.score import Unscored, evaluate, score
from lamabench.harness.scoring.statistics import compute
from lamabench.harness.sections import DataConfig, EvaluateConfig, RunConfig
from lamabench.harness.shards import open_samples
from lamabench.kernels.errors import InputError
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


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
    """The same images for torch-fidelity: items are uint8 [3, H, W] without labels."""

    def __init__(self, images):
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2).repeat(1, 3, 1, 1)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


def run(samples, reference, cache, metrics=("prc",), *, name="digits", fingerprint="f", config=None, seed=0, **options):
    images = reference if isinstance(reference, Images) else Images(reference)
    config = replace(config or EvaluateConfig(metrics=list(metrics)), seed=seed)
    options = {"cache": cache, "device": "cpu", **options}
    return list(evaluate(samples, Reference(images, name, fingerprint), config, config.metrics, **options))


def noisy(images, sigma):
    noise = np.random.default_rng(1).normal(0, sigma, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


# the whole evaluation


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
    assert [row["metric"] for row in rows] == [f"{name}-EffNetLite0-20" for name in ("FD", "precision", "recall", "IS")]
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
    assert reference.read < 8 and seen == [(4, 6), (6, 6)]  # the first image is read for the shape

    flipped = bytearray(whole)
    flipped[-5] ^= 1
    features.write_cache(cache, np.zeros((8, 3), dtype=np.float32))
    damaged = {
        "is not a complete file": whole[: len(whole) // 2],
        "is not a complete file of": b"",
        "match its checksum": bytes(flipped),
        r"has float32 \[8, 3\], not float32 \[8, 1280\]": cache.read_bytes(),
    }
    for words, data in damaged.items():
        cache.write_bytes(data)
        with pytest.warns(UserWarning, match=words):
            assert run(samples, reference, tmp_path, config=config) == first
        assert cache.read_bytes() == whole


def test_scores_at_once_compute_the_reference_once(tmp_path, digits):
    """The second score begins while the first one computes, and waits for it."""
    begun, resume = threading.Event(), threading.Event()

    class Slow(Images):
        def __getitem__(self, i):
            if self.read == 3:
                begun.set()
                assert resume.wait(60)
            return super().__getitem__(i)

    config = EvaluateConfig(metrics=["prc"], batch_size=4)
    first, second = Slow(digits[10:18]), Images(digits[10:18])
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(run, digits[:6], first, tmp_path, config=config)
        assert begun.wait(60)
        other = pool.submit(run, digits[:6], second, tmp_path, config=config)
        assert wait([other], timeout=1.5).not_done, "it would be done if it computed them itself"
        resume.set()
        assert one.result() == other.result()
    assert first.read >= 8 and second.read < 8, "the first image is read for the shape"
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_comparable_scores_have_the_same_protocol(tmp_path, digits):
    def protocol(samples=digits[:5], reference=digits[10:14], **options):
        rows = run(samples, reference, tmp_path, **options)
        assert len({row["protocol"] for row in rows}) == 1
        return rows[0]["protocol"]

    same = protocol()
    assert protocol(noisy(digits[20:25], 9)) == same
    assert protocol(seed=5, config=EvaluateConfig(metrics=["prc"], batch_size=3)) == same
    others = [
        protocol(digits[:4]),
        protocol(reference=digits[10:15]),
        protocol(name="other"),
        protocol(fingerprint="g"),
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
    reference = Reference(Images(digits[:9]), "digits", "f")
    with pytest.raises(InputError, match=r"unknown evaluate.metrics 'fid'.*choices: fd, kid, prc, isc"):
        list(evaluate(digits[:9], reference, EvaluateConfig(), ["fd", "fid"], cache=tmp_path, device="cpu"))


# Inception-2015


def test_inception_of_a_given_path(tmp_path, digits, random_inception, monkeypatch):
    config, digest = EvaluateConfig("inception_v3", str(random_inception), ["prc"]), sha256(random_inception)
    rows = run(digits[:5], digits[:4], tmp_path, config=config)
    # With weights other than the published ones, no metric has a published name.
    assert [row["metric"] for row in rows] == [f"{name}-Inception-{digest[:8]}-5" for name in ("precision", "recall")]
    assert rows[1]["value"] == 1.0  # the reference is part of the samples
    published = replace(networks.NETWORKS["inception_v3"], sha256=digest)
    monkeypatch.setitem(networks.NETWORKS, "inception_v3", published)
    config = EvaluateConfig("inception_v3", str(random_inception), ["isc"])
    rows = run(digits[:10], digits[:4], tmp_path, config=config, seed=2)
    assert [row["metric"] for row in rows] == ["IS-10"]
    extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["logits_unbiased"], str(random_inception))
    logits = extractor(torch.from_numpy(digits[:10]).permute(0, 3, 1, 2).repeat(1, 3, 1, 1))[0]
    assert rows[0]["value"] == pytest.approx(compute("isc", logits.numpy(), None, 2)[0].value, rel=1e-9)


# a file of samples, and the data of a configuration


def config_of(**evaluate):
    model = DiTConfig(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=16, depth=1, num_heads=2)
    data = DataConfig(kind="digits", size=8, channels=1, num_classes=10)
    return Config(model=model, data=data, evaluate=EvaluateConfig(**evaluate), run=RunConfig(device="cpu"))


def test_an_added_metric_computes_only_itself(tmp_path, digits, extracted):
    """The rows of a metric are the same with and without others, and features are computed once for all metrics."""
    np.savez(tmp_path / "samples.npz", images=noisy(digits[:110], 30))
    config = config_of(reference_count=120)

    def rows_of(*metrics):
        return list(score(tmp_path / "samples.npz", config, metrics, tmp_path / "cache", Progress()))

    every = rows_of("fd", "kid", "prc", "isc")
    assert extracted == [{"1280": 120, "logits": 120}, {"1280": 110, "logits": 110}]
    assert [row["request"] for row in every] == ["fd", "kid", "prc", "prc", "isc"]
    kd = every[1]  # 60 images, half of the reference, are too few for a floor, so that no remark is about it
    assert (kd["request"], kd["floor"], kd["note"]) == ("kid", None, None) and every[0]["floor"] > 0
    extracted.clear()
    for metric in ("fd", "kid", "prc", "isc"):
        assert rows_of(metric) == [row for row in every if row["request"] == metric]
    assert extracted == [{"1280": 110}] * 3 + [{"logits": 110}]  # the reference is cached or not needed


def test_what_can_be_computed_is_computed(tmp_path, digits, extracted):
    """KID needs 100 samples and IS 10. The rows of the others are those without them."""
    np.savez(tmp_path / "samples.npz", images=noisy(digits[:9], 30))

    def rows_of(*metrics):
        rows = score(tmp_path / "samples.npz", config_of(reference_count=20), metrics, tmp_path / "cache", Progress())
        result = []
        try:
            for row in rows:
                result.append(row)
        except Unscored as error:
            return result, error.reasons
        return result, {}

    expected = rows_of("fd", "prc")
    assert len(expected[0]) == 3 and not expected[1]
    kid, isc = "kid needs at least 100 samples, 9 given", "isc needs at least 10 samples, 9 given"
    assert rows_of("kid", "fd", "isc", "prc") == (expected[0], {"kid": kid, "isc": isc})
    extracted.clear()
    assert rows_of("kid", "isc") == ([], {"kid": kid, "isc": isc}) and extracted == []


def test_a_result_that_is_not_finite_leaves_the_others(tmp_path, digits, extracted, monkeypatch):
    right = scoring.compute

    def spoil(metric, *args):
        if metric == "fd":
            raise InputError("fd is not finite: fd nan, std None")
        return right(metric, *args)

    monkeypatch.setattr(scoring, "compute", spoil)
    rows = evaluate(
        noisy(digits[:9], 30), Reference(Images(digits[:9]), "d", "f"), EvaluateConfig(), ["fd", "prc"],
        cache=tmp_path, device="cpu",
    )  # fmt: skip
    assert [next(rows)["request"] for _ in range(2)] == ["prc", "prc"]
    with pytest.raises(Unscored, match="fd is not finite"):
        next(rows)


def test_the_seed_of_the_training_does_not_change_scores(tmp_path, digits, extracted):
    np.savez(tmp_path / "samples.npz", images=noisy(digits[:110], 30))
    config = config_of(reference_count=120)

    def values(config):
        rows = score(tmp_path / "samples.npz", config, ["kid", "isc"], tmp_path / "cache", Progress())
        return [row["value"] for row in rows]

    assert values(replace(config, seed=5)) == values(config)
    other = values(replace(config, evaluate=replace(config.evaluate, seed=5)))
    assert all(one != two for one, two in zip(other, values(config), strict=True))


def test_the_reference_of_a_configuration(digits):
    whole = reference_of(config_of())
    assert (whole.name, len(whole.images), whole.identity["count"]) == ("digits", 1797, 1797)
    named = config_of(reference_count=30)
    named.data.name, named.seed = "mine", 4
    part = reference_of(named)
    assert (part.name, part.fingerprint) == ("mine", f"{whole.fingerprint}-30")
    subset = generator(0, Stream.ORDER, 0).permutation(1797)[:30]  # the same for every seed
    assert np.array_equal(part.batch(0, 30)[:, 0].numpy(), digits[subset][..., 0])
    with pytest.raises(InputError, match=r"evaluate\.reference_count 2000 is more than the 1797 images"):
        reference_of(config_of(reference_count=2000))


def plain_array():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((2, 8, 8, 1), np.uint8))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"no samples: .*x\.npz does not exist; draw them first"),
        (b"not an npz", r"x\.npz is not a readable \.npz file"),
        (b"", r"x\.npz is not a readable \.npz file"),
        (plain_array(), r"x\.npz is not a readable \.npz file"),
        ({"pictures": np.zeros((2, 8, 8, 1), np.uint8)}, r"x\.npz has no array `images`"),
        ({"images": np.zeros((2, 8, 8))}, r"`images` in .*x\.npz must be uint8 .*, not float64 \[2, 8, 8\]"),
        ({"images": np.array([{}])}, r"x\.npz is not a readable \.npz file: .*allow_pickle"),
    ],
)
def test_bad_sample_files(tmp_path, content, words):
    path = tmp_path / "x.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **content)
    with pytest.raises(InputError, match=words) as caught:
        open_samples(path)
    assert "\n" not in str(caught.value)
