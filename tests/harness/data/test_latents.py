"""Caches of latents: what is read of them, and what is refused."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch
from lamabench.harness.data.encoder import encoder
from lamabench.harness.data.images import load
from lamabench.harness.data.items import TrainItems, whole
from lamabench.harness.data.latents import INDEX, LatentData, posterior_noise, read_index
from lamabench.harness.diffusion.gaussian import DDPM
from lamabench.harness.random import Stream, generator
from lamabench.harness.sections import DataConfig
from lamabench.kernels.errors import InputError
from scipy import stats
from torch.utils.data import DataLoader

from ...latent_caches import FACTS, section, write_cache

DATA = DataConfig("synthetic", size=8, channels=1, num_classes=4, flip=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    return folder, write_cache(folder, DATA)


def items(folder, seed=3, noise=True, data=DATA):
    coder = encoder(section(folder))
    options = {"seed": seed, "flip": data.flip, "class_dropout": 0.0, "null_class": None}
    return TrainItems(coder.load(data), DDPM(), **options, encoder=coder, noise=noise)


def test_an_item_is_a_sample_of_the_posterior_of_the_image_or_of_its_mirror_image(cache):
    """Against the formula in float64, with the tensors that were written."""
    folder, tensors = cache
    numbers, count = [0, 1, 7, 100, 319, 320, 1000], len(load(DATA))
    batch = items(folder).__getitems__(numbers)
    mirrored = 0
    for row, i in enumerate(numbers):
        source = int(generator(3, Stream.ORDER, i // count).permutation(count)[i % count])
        rng = generator(3, Stream.TRAIN, i)
        t, _, flip = DDPM().draw_t(rng), rng.random(), rng.random()
        end = "_mirrored" if flip < 0.5 else ""
        mirrored += bool(end)
        mean, logvar = (tensors[name + end][source].double() for name in ("mean", "logvar"))
        words = generator(3, Stream.POSTERIOR, i).bit_generator.random_raw(32).view(np.int32).astype(np.float64)
        radius, angle = np.sqrt(-2 * np.log((abs(words[:32]) + 0.5) / 2**31)), np.pi * words[32:] / 2**31
        e = torch.from_numpy(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])).view(4, 4, 4)
        expected = (mean + (logvar / 2).exp() * e - FACTS.shift) * FACTS.scale
        assert torch.allclose(batch["x0"][row].double(), expected, atol=1e-5)
        assert (batch["t"][row], batch["y"][row]) == (t, load(DATA).labels[source])
        assert np.array_equal(batch["noise"][row].numpy(), rng.standard_normal((4, 4, 4), dtype=np.float32))
    assert 0 < mirrored < len(numbers)


def test_items_depend_neither_on_their_batch_nor_on_the_process(cache):
    """Equal bits for any batch, in processes that load data, and after pickling."""
    folder, _ = cache
    whole_batch = items(folder).__getitems__(range(12))
    assert torch.equal(pickle.loads(pickle.dumps(items(folder)))[5]["x0"], whole_batch["x0"][5])
    loader = DataLoader(items(folder), batch_size=4, sampler=range(12), num_workers=2, collate_fn=whole)
    assert torch.equal(torch.cat([batch["x0"] for batch in loader]), whole_batch["x0"])
    without = items(folder, noise=False).__getitems__(range(12))
    assert torch.equal(without["x0"], whole_batch["x0"]) and without["index"].tolist() == list(range(12))
    assert not torch.equal(items(folder, seed=4)[5]["x0"], whole_batch["x0"][5])


def test_the_noise_of_the_posterior_is_normal():
    noise = posterior_noise(11, range(64), 4097).numpy()
    assert noise.shape == (64, 4097) and noise.dtype == np.float32
    assert stats.kstest(noise.ravel(), "norm").pvalue > 0.01
    for row, column in ((noise[:, :2048], noise[:, 2049:]), (noise[1:], noise[:-1])):  # of one pair, of two items
        assert abs(np.corrcoef(row.ravel(), column.ravel())[0, 1]) < 4 / np.sqrt(row.size)
        assert abs(np.corrcoef(row.ravel() ** 2, column.ravel() ** 2)[0, 1]) < 4 / np.sqrt(row.size)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_encoder_without_variance_gives_its_mean(tmp_path, dtype):
    tensors = write_cache(tmp_path, DATA, logvar=False, mirrored=False, dtype=dtype)
    coder, some = encoder(section(tmp_path)), np.array([319, 0, 100])
    data = coder.load(replace(DATA, flip=False))
    expected = (tensors["mean"][some].float() - FACTS.shift) * FACTS.scale
    assert torch.equal(coder.inputs(data, some, some.tolist(), 0), expected)
    assert coder.shape(DATA) == (4, 4) and len(data) == 320
    with pytest.raises(InputError, match=r"data\.flip=true needs latents of mirrored images, which .* does not have"):
        coder.load(DATA)


def test_a_cache_stands_for_its_images(cache):
    """Labels, classes and fingerprint are those of the images; without classes, every label is 0."""
    folder, _ = cache
    images, latents = load(DATA), encoder(section(folder)).load(DATA)
    assert np.array_equal(latents.labels, images.labels) and latents.class_names == images.class_names
    assert latents.fingerprint == images.fingerprint
    without = encoder(section(folder)).load(replace(DATA, num_classes=0))
    assert not without.labels.any() and without.class_names == [] and len(without) == len(images)


def test_the_test_split_lies_in_the_cache(tmp_path):
    write_cache(tmp_path, DATA)
    coder = encoder(section(tmp_path))
    names = coder.load(DATA).class_names
    with pytest.raises(InputError, match=r"no latents of the test split: .*test does not exist"):
        coder.load_held_out(DATA, names)
    write_cache(tmp_path / "test", replace(DATA, split="test"))
    held = coder.load_held_out(DATA, names)
    assert held.fingerprint == load(replace(DATA, split="test")).fingerprint
    with pytest.raises(InputError, match="other classes than the training data"):
        coder.load_held_out(DATA, ["a"])
    write_cache(tmp_path / "test", DATA)
    with pytest.raises(InputError, match=r"data\.split is 'test', but the latents in .*test are of data\.split=train"):
        coder.load_held_out(DATA, names)


@pytest.mark.parametrize(("field", "value"), [("identity", "f" * 12), ("scale", 0.18215), ("shift", 0.0), ("side", 8)])
def test_a_cache_is_refused_by_another_encoder(cache, field, value):
    settings = replace(section(cache[0]), **{field: value})
    with pytest.raises(InputError, match=rf"encoder\.{field} is {value}, but the latents in .* have"):
        encoder(settings).load(DATA)


@pytest.mark.parametrize(("field", "value"), [("size", 16), ("kind", "digits"), ("num_classes", 3), ("name", "mine")])
def test_a_cache_is_refused_by_other_data(cache, field, value):
    with pytest.raises(InputError, match=rf"data\.{field} is .*, but the latents in .* are of data\.{field}="):
        encoder(section(cache[0])).load(replace(DATA, **{field: value}))


def test_damage_is_one_line(tmp_path):
    """A file that is missing, cut, empty or another one, and an index that is none."""
    write_cache(tmp_path, DATA)
    index = read_index(tmp_path)
    first, second = (tmp_path / shard.file for shard in index.shards[:2])
    good = first.read_bytes()

    def refused(text):
        with pytest.raises(InputError, match=text) as error:
            LatentData(tmp_path, section(tmp_path), DATA)
        assert "\n" not in str(error.value)

    first.write_bytes(good[:-100])
    refused(r"00000000-00000100\.safetensors is incomplete")
    for content in (b"", b"{}", b"x" * 1000):
        first.write_bytes(content)
        refused(r"00000000-00000100\.safetensors is no shard of latents")
    first.write_bytes(second.read_bytes())
    refused("has other tensors than index.json says: mean, .*, labels of 100 images")
    first.write_bytes(safetensors.torch.save({"mean": torch.zeros(100, 4, 4, 4)}))
    refused("has other tensors than index.json says")
    first.unlink()
    refused(r"cannot read .*00000000-00000100\.safetensors: No such file")
    first.write_bytes(good)
    LatentData(tmp_path, section(tmp_path), DATA)
    path = tmp_path / INDEX
    plain = json.loads(path.read_text(encoding="utf-8"))
    for content, text in (
        ("{", "is no index of latents: JSONDecodeError"),
        ("[]", "is no index of latents: "),
        (json.dumps({**plain, "schema": 2}), "has schema 2, but this version reads 1: encode the data again"),
        (json.dumps({**plain, "extra": 2}), "is no index of latents: TypeError"),
        (json.dumps({**plain, "images": 7}), "names shards of 320 images, but the set has 7"),
        (json.dumps({**plain, "dtype": "int8"}), "unknown dtype of .*; choices: float16, float32"),
        (json.dumps({**plain, "encoder": {**plain["encoder"], "scale": "a"}}), "scale of encoder"),
    ):
        path.write_text(content, encoding="utf-8")
        refused(text)
    path.unlink()
    refused("is no complete cache of latents: it has no index.json")
    with pytest.raises(InputError, match=r"gone does not exist; encoder\.path=FOLDER says where the cache"):
        read_index(tmp_path / "gone")
