"""The items of training against their generators."""

import pickle

import numpy as np
import pytest
import torch
from lamabench.harness.data import cifar10
from lamabench.harness.data.encoder import Pixels
from lamabench.harness.data.images import ImageData, load
from lamabench.harness.data.items import TrainItems, epoch_order, whole
from lamabench.harness.random import Stream, generator
from lamabench.harness.sections import DataConfig
from lamabench.kernels.errors import InputError
from PIL import Image
from torch.utils.data import DataLoader


class Even:
    """The part of an objective that items use, with the timesteps of DDPM."""

    def draw_t(self, rng: np.random.Generator) -> float:
        return int(rng.integers(1000))


@pytest.fixture(scope="module")
def small() -> ImageData:
    return load(DataConfig("synthetic", size=8, channels=1, num_classes=4))


def items(data: ImageData, flip: bool = True, class_dropout: float = 0.25, **options) -> TrainItems:
    return TrainItems(
        data, Even(), **{"seed": 5, "flip": flip, "class_dropout": class_dropout, "null_class": 4, **options}
    )


def test_items_follow_from_their_generators(small):
    every = items(small)
    flips = drops = 0
    for i in (0, 1, 319, 320, 641, 5000, *range(40, 60)):
        item = every[i]
        rng = np.random.Generator(np.random.Philox(key=[5, int(Stream.TRAIN)], counter=[0, 0, 0, i]))
        t, drop, flip = rng.integers(1000), rng.random(), rng.random()
        noise = rng.standard_normal((1, 8, 8), dtype=np.float32)
        source = generator(5, Stream.ORDER, i // 320).permutation(320)[i % 320]
        pixels = small[int(source)][0].numpy().astype(np.float64) / 127.5 - 1
        expected = pixels[..., ::-1] if flip < 0.5 else pixels
        assert int(item["t"]) == t and np.array_equal(item["noise"].numpy(), noise)
        assert np.abs(item["x0"].numpy() - expected).max() < 1e-6
        assert int(item["y"]) == (4 if drop < 0.25 else small.labels[source])
        flips, drops = flips + (flip < 0.5), drops + (drop < 0.25)
        assert {name: (value.dtype, tuple(value.shape)) for name, value in item.items()} == {
            "x0": (torch.float32, (1, 8, 8)),
            "y": (torch.int64, ()),
            "t": (torch.float32, ()),
            "noise": (torch.float32, (1, 8, 8)),
        }
    assert 0 < flips < 26 and 0 < drops < 26  # both branches were seen


@pytest.mark.parametrize("start", [0, 300])
def test_workers_and_start_do_not_change_items(small, start):
    stop = 360  # beyond the end of the first epoch
    single = [items(small)[i] for i in range(start, stop)]
    for workers in (0, 2):
        loader = DataLoader(
            items(small), batch_size=20, sampler=range(start, stop), num_workers=workers, collate_fn=whole
        )
        batches = list(loader)
        assert len(batches) == (stop - start) // 20
        for name in ("x0", "y", "t", "noise"):
            together = torch.cat([batch[name] for batch in batches])
            assert torch.equal(together, torch.stack([item[name] for item in single]))


@pytest.fixture(scope="module", params=["digits", "npz", "folder", "cifar10", "synthetic"])
def every_kind(request, tmp_path_factory) -> ImageData:
    """A small set of each kind."""
    kind, path = request.param, tmp_path_factory.mktemp("set")
    rng = np.random.default_rng(0)
    if kind == "npz":
        labels = np.arange(35) % 10
        np.savez(path / "set.npz", images=rng.integers(0, 256, (35, 8, 8, 3), dtype=np.uint8), labels=labels)
        return load(DataConfig("npz", path=str(path / "set.npz"), size=8, channels=3))
    if kind == "folder":
        for i in range(35):
            (path / f"{i % 5}").mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).save(path / f"{i % 5}" / f"{i}.png")
        return load(DataConfig("folder", path=str(path), size=8, channels=3, num_classes=5))
    if kind == "cifar10":
        (folder := path / cifar10.FOLDER).mkdir()
        for name in cifar10.BATCHES["train"]:
            content = {"data": rng.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": list(range(10))}
            (folder / name).write_bytes(pickle.dumps(content))
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(10)]}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cifar10, "IMAGES", 10)
            return load(DataConfig("cifar10", path=str(path), size=32, channels=3))
    return load(DataConfig(kind, size=8, channels=1))


@pytest.mark.parametrize("flip, class_dropout", [(True, 0.25), (False, 0.25), (True, 0.0), (False, 0.0)])
def test_a_batch_has_the_numbers_of_its_items_to_the_last_bit(every_kind, flip, class_dropout):
    """Image by image, with a generator for each, over the end of an epoch."""
    data, n = every_kind, len(every_kind)
    indices = [*range(n - 15, n + 16), 3 * n, 2 * n - 1]
    batch = items(data, flip, class_dropout, null_class=data.num_classes).__getitems__(indices)
    assert {name: len(values) for name, values in batch.items()} == dict.fromkeys(("x0", "y", "t", "noise"), 33)
    for row, i in enumerate(indices):
        rng = np.random.Generator(np.random.Philox(key=[5, int(Stream.TRAIN)], counter=[0, 0, 0, i]))
        t, drop, flipped = int(rng.integers(1000)), rng.random(), flip and rng.random() < 0.5
        image, label = data[int(generator(5, Stream.ORDER, i // n).permutation(n)[i % n])]
        if not flip:
            rng.random()
        assert torch.equal(batch["x0"][row], (image.flip(-1) if flipped else image).float() / 127.5 - 1)
        assert int(batch["y"][row]) == (data.num_classes if drop < class_dropout else label)
        assert float(batch["t"][row]) == t
        noise = rng.standard_normal(tuple(image.shape), dtype=np.float32)
        assert torch.equal(batch["noise"][row], torch.from_numpy(noise))


def test_options_do_not_change_the_other_draws(small):
    plain, both = items(small, flip=False, class_dropout=0.0), items(small)
    flipped = dropped = 0
    for i in range(320):
        a, b = plain[i], both[i]
        assert torch.equal(a["t"], b["t"]) and torch.equal(a["noise"], b["noise"])
        assert torch.equal(a["x0"], b["x0"]) or torch.equal(a["x0"].flip(-1), b["x0"])
        assert int(a["y"]) < 4 and int(b["y"]) in (int(a["y"]), 4)
        flipped += not torch.equal(a["x0"], b["x0"])
        dropped += int(b["y"]) == 4
    assert 120 < flipped < 200  # 160 ± 4.5 standard deviations
    assert 50 < dropped < 115  # 80 ± 4.5 standard deviations


def test_without_flips_an_epoch_is_every_image_once(small):
    every = items(small, flip=False, class_dropout=0.0)
    images = torch.stack([small[i][0] for i in range(320)]).reshape(320, -1) / 127.5 - 1
    for epoch in (0, 3):
        seen = torch.stack([every[i]["x0"].flatten() for i in range(320 * epoch, 320 * (epoch + 1))])
        assert sorted(seen.tolist()) == sorted(images.tolist())


def test_timesteps_and_noise_are_fair(small):
    drawn = [items(small)[i] for i in range(2000)]
    t = torch.stack([item["t"] for item in drawn]).double()
    assert t.min() >= 0 and t.max() <= 999 and abs(t.mean() - 499.5) < 4 * 288.7 / 2000**0.5
    noise = torch.stack([item["noise"] for item in drawn]).double()
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5 and abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5


def test_epoch_orders_are_different_permutations():
    orders = [epoch_order(0, 0, 50), epoch_order(0, 1, 50), epoch_order(1, 0, 50)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert np.array_equal(epoch_order(0, 1, 50), orders[1])


def test_label_dropout_needs_a_null_class_and_labels(small):
    with pytest.raises(InputError, match=r"class_dropout is 0\.25, but the model has no null class"):
        items(small, null_class=None)
    assert int(items(small, null_class=None, class_dropout=0.0)[0]["y"]) < 4
    unlabelled = load(DataConfig("synthetic", size=8, num_classes=0))
    for null_class in (0, None):
        assert not any(int(items(unlabelled, null_class=null_class)[i]["y"]) for i in range(50))


def test_a_custom_objective_and_a_custom_encoder(small):
    """The objective draws t before anything else is drawn, and noise has the shape of the encoded image."""

    class Uniform:
        def draw_t(self, rng: np.random.Generator) -> float:
            return rng.random()

    class Halves(Pixels):
        def shape(self, data):
            return 2 * data.channels, data.size

        def inputs(self, data, indices, items, seed, mirrored=None):
            images = data.images_at(indices)
            assert (items, seed, mirrored) == ([3], 5, None)
            return torch.cat([images // 16, images % 16], dim=-3).float()

    options = {"seed": 5, "flip": False, "class_dropout": 0.0, "null_class": None}
    item = TrainItems(small, Uniform(), **options, encoder=Halves())[3]
    rng = np.random.Generator(np.random.Philox(key=[5, int(Stream.TRAIN)], counter=[0, 0, 0, 3]))
    assert float(item["t"]) == np.float32(rng.random())
    rng.random(2)
    assert np.array_equal(item["noise"].numpy(), rng.standard_normal((2, 8, 8), dtype=np.float32))
    image = small[int(generator(5, Stream.ORDER, 0).permutation(320)[3])][0]
    assert torch.equal(16 * item["x0"][:1] + item["x0"][1:], image.float())
