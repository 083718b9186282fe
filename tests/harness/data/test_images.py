"""Loaders against what they were given, and the items of training against their generators."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from lamabench.harness.config import DataConfig
from lamabench.harness.data.images import ImageData, TrainItems, epoch_order, load, to_model_range, to_uint8
from lamabench.harness.random import Stream, generator
from lamabench.kernels.errors import InputError
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10


def stack(data: ImageData) -> np.ndarray:
    return np.stack([data[i][0].numpy() for i in range(len(data))])


def noise_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=shape, dtype=np.uint8)


def refused(message: str, config: DataConfig, split: str = "train") -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(config, split)
    assert "\n" not in str(caught.value)


# --- digits and synthetic


def test_digits_are_scikit_learns():
    data = load(DataConfig("digits", size=8))
    pixels, labels = (np.asarray(part) for part in load_digits(return_X_y=True))
    assert len(data) == 1797 and data.num_classes == 10 and data.class_names == [str(i) for i in range(10)]
    assert np.array_equal(data.labels, labels) and data[5][1] == labels[5]
    assert np.abs(stack(data)[:, 0] / 255 - pixels.reshape(-1, 8, 8) / 16).max() <= 0.5 / 255 + 1e-9


@pytest.mark.parametrize("size", [16, 32])
def test_digits_grow_smoothly_on_black(size):
    grey = stack(load(DataConfig("digits", size=size)))
    assert grey.dtype == np.uint8 and grey.shape == (1797, 1, size, size)
    small = np.asarray(load_digits(return_X_y=True)[0])
    k = size // 8
    back = grey[:, 0].reshape(-1, 8, k, 8, k).mean(axis=(2, 4))
    assert np.corrcoef(back.ravel(), small.ravel())[0, 1] > 0.98
    assert np.median(grey[:, 0, :, 0]) == 0  # the edge of the page
    assert np.array_equal(stack(load(DataConfig("digits", size=size, channels=3))), grey.repeat(3, axis=1))


def test_digits_without_labels():
    data = load(DataConfig("digits", size=16, num_classes=0))
    assert data.num_classes == 0 and data.class_names == [] and not data.labels.any() and data[7][1] == 0


def test_synthetic_images_are_smooth_balanced_and_always_the_same():
    config = DataConfig("synthetic", size=24, channels=3, num_classes=4)
    data, again = load(config), load(config)
    images = stack(data).astype(float)
    assert images.shape == (320, 3, 24, 24) and np.bincount(data.labels).tolist() == [80] * 4
    assert np.array_equal(images, stack(again)) and data.fingerprint == again.fingerprint
    assert np.abs(np.diff(images, axis=2)).mean() < 0.5 * np.abs(images - images.mean()).mean()
    spectra = np.abs(np.fft.fft2(images)).mean(axis=1).reshape(320, -1)  # phases aside, a class has one spectrum
    means = np.stack([spectra[data.labels == label][:40].mean(axis=0) for label in range(4)])
    nearest = np.linalg.norm(spectra[160:, None] - means, axis=2).argmin(axis=1)
    assert (nearest == data.labels[160:]).mean() > 0.5


def test_synthetic_takes_any_number_of_classes():
    assert np.unique(load(DataConfig("synthetic", size=8, num_classes=400)).labels).size == 400


# --- npz


def write_npz(folder: Path, **arrays: np.ndarray) -> str:
    path = folder / "images.npz"
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    return str(path)


def test_npz_round_trip_and_fingerprint(tmp_path):
    images, labels = noise_images(6, 8, 8, 3), np.array([0, 2, 1, 1, 0, 2], dtype=np.int32)
    data = load(
        DataConfig("npz", path=write_npz(tmp_path, images=images, labels=labels), size=8, channels=3, num_classes=3)
    )
    assert np.array_equal(stack(data), images.transpose(0, 3, 1, 2)) and data.labels.tolist() == labels.tolist()
    assert data.labels.dtype == np.int64 and (data.size, data.channels) == (8, 3)
    content = images.transpose(0, 3, 1, 2).tobytes() + labels.astype(np.int64).tobytes()
    assert data.fingerprint == hashlib.sha256(content).hexdigest()[:16]


def test_npz_of_grey_images_without_labels(tmp_path):
    images = noise_images(5, 8, 8)
    path = write_npz(tmp_path, images=images)
    data = load(DataConfig("npz", path=path, size=8, num_classes=0))
    assert np.array_equal(stack(data)[:, 0], images)
    assert load(DataConfig("npz", path=path, size=8, num_classes=1)).class_names == ["0"]


def test_npz_is_resized(tmp_path):
    images = noise_images(3, 4, 4).repeat(4, axis=1).repeat(4, axis=2)  # 16 × 16, blocks of 4 × 4
    data = load(DataConfig("npz", path=write_npz(tmp_path, images=images), size=4, num_classes=0))
    assert np.array_equal(stack(data)[:, 0], images[:, ::4, ::4])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": noise_images(4, 8, 8)}, "no array 'images'"),
        ({"images": np.zeros((4, 8, 8), dtype=np.float32)}, r"float32 \[4, 8, 8\], not uint8"),
        ({"images": noise_images(4, 8)}, r"uint8 \[4, 8\], not uint8 \[N, H, W, C\]"),
        ({"images": noise_images(4, 8, 8, 3)}, "data.channels is 1, but .* have 3"),
        (
            {"images": noise_images(4, 8, 8), "labels": np.array([0, 1, 2])},
            r"labels is int64 \[3\], not \[4\] integers",
        ),
        ({"images": noise_images(4, 8, 8), "labels": np.array([0, 1, -1, 0])}, "integers of 0 or more"),
        ({"images": noise_images(4, 8, 8), "labels": np.array([0.0, 1, 1, 0])}, "labels is float64"),
        (
            {"images": noise_images(4, 8, 8), "labels": np.array([0, 1, 1, 0])},
            "data.num_classes is 10, but .* 2 classes",
        ),
        ({"images": noise_images(0, 8, 8), "labels": np.zeros(0, dtype=int)}, "too few images: 0, at least 2"),
        ({"images": noise_images(4, 8, 8), "labels": np.array([0, 1, 1, 9])}, "too few images: 4, at least 10"),
    ],
)
def test_bad_npz_files(tmp_path, arrays, message):
    refused(message, DataConfig("npz", path=write_npz(tmp_path, **arrays), size=8))


def test_files_that_are_no_npz(tmp_path):
    whole = Path(write_npz(tmp_path, images=noise_images(4, 8, 8))).read_bytes()
    (tmp_path / "torn.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "one.npy", noise_images(4, 8, 8))
    for name in ("torn.npz", "text.npz", "empty.npz", "one.npy", "."):
        refused("is not a readable .npz file", DataConfig("npz", path=str(tmp_path / name), size=8))
    refused("has too few images: 1, at least 2", one_image(tmp_path))


def one_image(folder: Path) -> DataConfig:
    return DataConfig("npz", path=write_npz(folder, images=noise_images(1, 8, 8)), size=8, num_classes=0)


# --- folders


def write_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def class_folders(root: Path) -> DataConfig:
    for i, name in enumerate(["b/1.png", "a/x.PNG", "a/deeper/y.bmp", "b/2.webp", "c/3.jpeg", "c/4.jpg"]):
        write_image(root / name, np.full((8, 8, 3), 40 * i, dtype=np.uint8))
    (root / "a" / "notes.txt").write_text("not an image")
    (root / "a" / "._x.png").write_text("a file system's own")
    (root / ".hidden").mkdir()
    return DataConfig("folder", path=str(root), size=8, channels=3, num_classes=3)


def test_class_folders_sorted_by_name(tmp_path):
    data = load(class_folders(tmp_path))
    assert data.class_names == ["a", "b", "c"] and data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    values = stack(data).mean(axis=(1, 2, 3))
    assert np.abs(values - [80, 40, 0, 120, 160, 200]).max() < 2  # a/deeper/y, a/x, b/1, b/2, c/3, c/4; jpeg is lossy


def test_the_fingerprint_is_of_names_and_sizes(tmp_path):
    config = class_folders(tmp_path / "one")
    first = load(config).fingerprint
    assert load(class_folders(tmp_path / "two")).fingerprint == first  # wherever the folder is
    (tmp_path / "one" / "b" / "1.png").rename(tmp_path / "one" / "b" / "1b.png")
    renamed = load(config).fingerprint
    write_image(tmp_path / "one" / "b" / "1b.png", noise_images(8, 8, 3))
    assert len({first, renamed, load(config).fingerprint}) == 3


def test_flat_folders_and_grey(tmp_path):
    write_image(tmp_path / "2.png", np.full((8, 8), 200, dtype=np.uint8))
    write_image(tmp_path / "1.png", np.dstack([np.full((8, 8), v, dtype=np.uint8) for v in (255, 0, 0)]))
    config = DataConfig("folder", path=str(tmp_path), size=8, channels=1, num_classes=0)
    grey = stack(load(config))
    assert grey.shape == (2, 1, 8, 8) and np.unique(grey[1]).tolist() == [200]
    assert np.unique(grey[0]).tolist() == [76]  # luma of red: 0.299 · 255
    assert load(DataConfig("folder", path=str(tmp_path), size=8, channels=3, num_classes=1)).class_names == ["0"]


def test_box_halving_then_centre_crop_is_exact_on_blocks(tmp_path):
    blocks = noise_images(8, 14, 3)  # enlarged 4 times: 32 × 56
    write_image(tmp_path / "wide.png", blocks.repeat(4, axis=0).repeat(4, axis=1))
    write_image(tmp_path / "tall.png", blocks.transpose(1, 0, 2).repeat(4, axis=0).repeat(4, axis=1))
    tall, wide = stack(load(DataConfig("folder", path=str(tmp_path), size=8, channels=3, num_classes=0)))
    assert np.array_equal(wide.transpose(1, 2, 0), blocks[:, 3:11])
    assert np.array_equal(tall.transpose(1, 2, 0), blocks.transpose(1, 0, 2)[3:11])


def test_bicubic_keeps_a_ramp_in_place(tmp_path):
    ramp = np.broadcast_to(2 * np.arange(100, dtype=np.uint8), (50, 100))
    for name in ("1.png", "2.png"):
        write_image(tmp_path / name, ramp)
    image = load(DataConfig("folder", path=str(tmp_path), size=20, num_classes=0))[0][0][0].double().numpy()
    centres = (np.arange(10, 30) + 0.5) * 100 / 40 - 0.5  # 100 × 50 -> 50 × 25 -> 40 × 20, columns 10 to 29
    assert np.abs(image - 2 * centres).max() <= 1.0


def test_files_are_read_when_asked_for_and_named_when_broken(tmp_path):
    data = load(class_folders(tmp_path))
    torn = tmp_path / "b" / "1.png"
    write_image(torn, noise_images(8, 8, 3))
    torn.write_bytes(torn.read_bytes()[:100])
    (tmp_path / "a" / "x.PNG").unlink()
    assert data[0][0].shape == (3, 8, 8)
    for i, name in ((2, "b/1.png"), (1, "a/x.PNG")):
        with pytest.raises(InputError, match=f"unreadable image .*{name}") as caught:
            data[i]
        assert "\n" not in str(caught.value)


def test_folders_that_cannot_be_read(tmp_path):
    config = class_folders(tmp_path / "set")
    refused(
        "data.num_classes is 2, but .*set has 3 classes", DataConfig("folder", path=config.path, size=8, num_classes=2)
    )
    (tmp_path / "set" / "empty").mkdir()
    refused("set/empty holds no image", config)
    write_image(tmp_path / "set" / "flat.png", noise_images(8, 8))
    refused(r"images \(flat.png\) and folders \(a\)", config)
    (tmp_path / "none").mkdir()
    refused("none holds no image; read are .jpg", DataConfig("folder", path=str(tmp_path / "none")))
    refused("missing does not exist", DataConfig("folder", path=str(tmp_path / "missing")))
    refused("data.path is not set; data 'folder'", DataConfig("folder"))
    refused("flat.png is not a folder", DataConfig("folder", path=str(tmp_path / "set" / "flat.png")))


def test_an_unreadable_image_is_found_at_the_start(tmp_path):
    config = class_folders(tmp_path)
    bad = tmp_path / "c" / "5.png"
    for content in (b"", b"no image at all"):
        bad.write_bytes(content)
        refused("unreadable image .*c/5.png", config)
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(bad)
    refused("unreadable image .*c/5.png: mode I;16, 8 bits", config)


# --- CIFAR-10


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Torchvision's layout with ten images a file, and its checksums replaced by ours."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    images = noise_images(60, 3, 32, 32)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    contents = {
        name: {"data": images[10 * i : 10 * i + 10].reshape(10, -1), "labels": [i, *range(1, 10)]}
        for i, name in enumerate(names)
    }
    contents["batches.meta"] = {"label_names": [f"class{i}" for i in range(10)]}
    sums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    return images


def test_cifar10_in_torchvisions_layout(tmp_path, monkeypatch):
    images = write_cifar10(tmp_path, monkeypatch)
    config = DataConfig("cifar10", path=str(tmp_path), size=32, channels=3)
    train, test = load(config), load(config, "test")
    assert np.array_equal(stack(train), images[:50]) and np.array_equal(stack(test), images[50:])
    assert train.labels[8:13].tolist() == [8, 9, 1, 1, 2] and train.class_names[9] == "class9"
    assert train.fingerprint != test.fingerprint
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    refused("does not hold the whole of CIFAR-10.*cifar-10-batches-py with data_batch_1", config)


def test_cifar10_that_is_not_there(tmp_path):
    missing = str(tmp_path / "missing")
    refused("missing does not hold .*cifar-10-batches-py", DataConfig("cifar10", path=missing, size=32, channels=3))
    refused("data.path is not set", DataConfig("cifar10", size=32, channels=3))


# --- requests


def test_bad_requests():
    refused("unknown data.kind 'digit'.*did you mean 'digits'.*npz, folder, cifar10, synthetic", DataConfig("digit"))
    refused("unknown split of data 'digits' 'test'; choices: train", DataConfig("digits"), "test")
    refused("data.num_classes is 7, but data 'digits' has 10 classes", DataConfig("digits", num_classes=7))
    refused("data.size must be 8 or more for digits, not 7", DataConfig("digits", size=7))
    for kind in ("digits", "npz", "folder", "cifar10", "synthetic"):
        refused("data.channels must be 1 or 3 for images, not 4", DataConfig(kind, channels=4))


def test_ranges_are_inverse():
    every = torch.arange(256, dtype=torch.uint8)
    scaled = to_model_range(every)
    assert scaled.dtype == torch.float32 and (scaled[0], scaled[255]) == (-1, 1)
    assert torch.equal(to_uint8(scaled), every)
    assert to_uint8(torch.tensor([-3.0, 7.0, 0.001, -0.003])).tolist() == [0, 255, 128, 127]
    for value in (torch.nan, torch.inf):
        with pytest.raises(FloatingPointError, match="not finite"):
            to_uint8(torch.tensor([0.0, value]))


# --- training items


@pytest.fixture(scope="module")
def small() -> ImageData:
    return load(DataConfig("synthetic", size=8, channels=1, num_classes=4))


def items(data: ImageData, flip: bool = True, class_dropout: float = 0.25, **options) -> TrainItems:
    return TrainItems(data, **{"seed": 5, "flip": flip, "class_dropout": class_dropout, "null_class": 4, **options})


def test_an_item_is_what_its_generators_say(small):
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
            "t": (torch.int64, ()),
            "noise": (torch.float32, (1, 8, 8)),
        }
    assert 0 < flips < 26 and 0 < drops < 26  # both branches were seen


@pytest.mark.parametrize("start", [0, 300])
def test_workers_and_start_do_not_change_items(small, start):
    stop = 360  # over the end of the first epoch
    whole = [items(small)[i] for i in range(start, stop)]
    for workers in (0, 2):
        loader = DataLoader(items(small), batch_size=20, sampler=range(start, stop), num_workers=workers)
        batches = list(loader)
        assert len(batches) == (stop - start) // 20
        for name in ("x0", "y", "t", "noise"):
            together = torch.cat([batch[name] for batch in batches])
            assert torch.equal(together, torch.stack([item[name] for item in whole]))


def test_options_leave_the_other_draws_alone(small):
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
    images = to_model_range(torch.from_numpy(stack(small))).reshape(320, -1)
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
