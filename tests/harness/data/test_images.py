"""Loaders of images against the images that they were given."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lamabench.harness.data.images import ImageData, glance, load
from lamabench.harness.sections import DataConfig
from lamabench.kernels.errors import InputError
from PIL import Image
from sklearn.datasets import load_digits


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def stack(data: ImageData) -> np.ndarray:
    return np.stack([data[i][0].numpy() for i in range(len(data))])


def noise_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=shape, dtype=np.uint8)


def refused(message: str, config: DataConfig) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(config)
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
    spectra = np.abs(np.fft.fft2(images)).mean(axis=1).reshape(320, -1)  # a class has one spectrum, whatever the phases
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


def test_npz_of_the_evaluator_of_adm(tmp_path):
    """A set that `lamabench sample --to` wrote is data too, the same as under our names."""
    images, labels = noise_images(6, 8, 8, 1), np.arange(6) % 3
    config = DataConfig("npz", path=write_npz(tmp_path, arr_0=images, arr_1=labels), size=8, num_classes=3)
    data = load(config)
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert all(np.array_equal(data[i][0].numpy(), images[i].transpose(2, 0, 1)) for i in range(6))
    write_npz(tmp_path, images=images, labels=labels)
    assert load(config).fingerprint == data.fingerprint
    write_npz(tmp_path, arr_0=images.astype(np.float32))
    refused(r"arr_0 is float32 \[6, 8, 8, 1\], not uint8", config)


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
        (
            {"images": noise_images(4, 8, 8), "labels": np.array([0, 1, 1, 9])},
            "has classes without an image: 2, 3, 4, 5, 6 and 2 more; number the labels from 0",
        ),
        ({"images": noise_images(4, 8, 8), "labels": np.array([1, 2, 3, 1])}, "classes without an image: 0; number"),
        ({"images": noise_images(4, 8, 8), "labels": np.array([0, 1, 5, 1])}, "classes without an image: 2, 3, 4; "),
        (
            {"images": noise_images(4, 8, 8), "labels": np.array([0, 1, 10**12, 1])},
            "without an image: 2, 3, 4, 5, 6 and 999,999,999,993 more",
        ),
        (
            {"images": noise_images(4, 8, 8), "labels": np.array([0, 1, 2**63 + 5, 1], dtype=np.uint64)},
            "integers of 0 or more",
        ),
    ],
)
def test_bad_npz_files(tmp_path, arrays, message):
    refused(message, DataConfig("npz", path=write_npz(tmp_path, **arrays), size=8))


@pytest.mark.parametrize("num_classes", [3, 4, 6, 10])
def test_labels_with_gaps_train_no_classes(tmp_path, num_classes):
    """Whatever the number of classes, a class without an image would be sampled too. Without classes, all is well."""
    for labels in ([1, 2, 3, 1], [0, 1, 5, 1]):
        path = write_npz(tmp_path, images=noise_images(4, 8, 8), labels=np.array(labels))
        refused("has classes without an image", DataConfig("npz", path=path, size=8, num_classes=num_classes))
        assert not load(DataConfig("npz", path=path, size=8, num_classes=0)).labels.any()
    path = write_npz(tmp_path, images=noise_images(4, 8, 8), labels=np.array([2, 1, 0, 1]))
    assert load(DataConfig("npz", path=path, size=8, num_classes=3)).class_names == ["0", "1", "2"]


def test_files_that_are_not_npz(tmp_path):
    whole = Path(write_npz(tmp_path, images=noise_images(4, 8, 8))).read_bytes()
    (tmp_path / "torn.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "one.npy", noise_images(4, 8, 8))
    for name in ("torn.npz", "text.npz", "empty.npz", "one.npy", "."):
        refused("is not a readable .npz file", DataConfig("npz", path=str(tmp_path / name), size=8))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    refused(
        r"it is a single array \(\.npy\); write it with numpy\.savez", DataConfig("npz", path=str(tmp_path / "one.npz"))
    )
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
    (root / "a" / "._x.png").write_text("metadata of a file system")
    (root / ".hidden").mkdir()
    return DataConfig("folder", path=str(root), size=8, channels=3, num_classes=3)


def test_class_folders_sorted_by_name(tmp_path):
    data = load(class_folders(tmp_path))
    assert data.class_names == ["a", "b", "c"] and data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    values = stack(data).mean(axis=(1, 2, 3))
    assert np.abs(values - [80, 40, 0, 120, 160, 200]).max() < 2  # a/deeper/y, a/x, b/1, b/2, c/3, c/4; jpeg is lossy


def test_the_fingerprint_of_a_folder_is_of_names_and_bytes(tmp_path):
    config = class_folders(tmp_path / "one")
    first = load(config).fingerprint
    names = ["a/deeper/y.bmp", "a/x.PNG", "b/1.png", "b/2.webp", "c/3.jpeg", "c/4.jpg"]
    parts = [name.encode() + b"\0" + hashlib.sha256((tmp_path / "one" / name).read_bytes()).digest() for name in names]
    assert first == hashlib.sha256(b"".join(parts)).hexdigest()[:16]
    assert load(class_folders(tmp_path / "two")).fingerprint == first  # the place of the folder does not matter
    assert load(replace(config, size=4, num_classes=0)).fingerprint == first  # the fingerprint is of the files
    (tmp_path / "one" / "b" / "1.png").rename(tmp_path / "one" / "b" / "1b.png")
    renamed = load(config).fingerprint
    write_image(tmp_path / "one" / "b" / "1b.png", noise_images(8, 8, 3))
    assert len({first, renamed, load(config).fingerprint}) == 3


def test_a_glance_at_a_folder_reads_no_image(tmp_path):
    """The fingerprint is that of `load` once all files were read. What is wrong with the classes is told before."""
    folder = class_folders(tmp_path / "set")
    for file in Path(tmp_path / "set").rglob("*.*"):
        os.utime(file, (10**9, 10**9))
    assert glance(folder) == (6, None)
    whole = load(folder).fingerprint
    assert glance(folder) == (6, whole)
    (tmp_path / "set" / "b" / "1.png").write_bytes(b"no image")
    assert glance(folder) == (6, None)
    for classes in (1, 2, 1000):
        with pytest.raises(InputError, match=f"data.num_classes is {classes}, but .* has 3 classes; set it to 3"):
            glance(replace(folder, num_classes=classes))
    assert glance(replace(folder, num_classes=0)) == (6, None)
    for path, message in ((None, "data.path is not set"), (str(tmp_path / "missing"), "does not exist")):
        with pytest.raises(InputError, match=message):
            glance(DataConfig("folder", path=path))
    (tmp_path / "set" / "empty").mkdir()
    with pytest.raises(InputError, match="set/empty contains no image"):
        glance(folder)


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


def test_files_are_read_on_demand_and_named_if_broken(tmp_path):
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


def test_a_file_that_changes_while_it_is_in_use(tmp_path):
    """Other pixels are an error that names the file. The same bytes are the same image, whatever their time."""
    data = load(class_folders(tmp_path))
    file = tmp_path / "a" / "deeper" / "y.bmp"
    first, content = data[0][0], bytearray(file.read_bytes())
    os.utime(file, (10**9, 10**9))
    assert np.array_equal(data[0][0], first)
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"a/deeper/y\.bmp was changed while it was in use"):
        data[0]
    content[-1] ^= 1
    file.write_bytes(content)
    assert np.array_equal(data[0][0], first)


def test_folders_that_cannot_be_read(tmp_path):
    config = class_folders(tmp_path / "set")
    refused(
        "data.num_classes is 2, but .*set has 3 classes", DataConfig("folder", path=config.path, size=8, num_classes=2)
    )
    (tmp_path / "set" / "empty").mkdir()
    refused("set/empty contains no image", config)
    write_image(tmp_path / "set" / "flat.png", noise_images(8, 8))
    refused(r"images \(flat.png\) and folders \(a\)", config)
    (tmp_path / "none").mkdir()
    refused("none contains no image; supported are .jpg", DataConfig("folder", path=str(tmp_path / "none")))
    refused("missing does not exist", DataConfig("folder", path=str(tmp_path / "missing")))
    refused("data.path is not set; data 'folder'", DataConfig("folder"))
    refused("flat.png is not a folder", DataConfig("folder", path=str(tmp_path / "set" / "flat.png")))


def test_an_unreadable_image_is_an_error_at_the_start(tmp_path):
    config = class_folders(tmp_path)
    bad = tmp_path / "c" / "5.png"
    for content in (b"", b"no image at all"):
        bad.write_bytes(content)
        refused("unreadable image .*c/5.png", config)
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(bad)
    refused("unreadable image .*c/5.png: mode I;16, expected 8 bits per channel", config)


# --- CIFAR-10 (more in test_cifar10.py)


def test_missing_cifar10(tmp_path):
    missing = str(tmp_path / "missing")
    refused("missing does not contain .*cifar-10-batches-py", DataConfig("cifar10", path=missing, size=32, channels=3))
    refused("data.path is not set", DataConfig("cifar10", size=32, channels=3))


# --- requests


def test_bad_requests():
    refused("unknown data.kind 'digit'.*did you mean 'digits'.*npz, folder, cifar10, synthetic", DataConfig("digit"))
    refused("unknown data.split of 'digits' 'val'; choices: train, most, test$", DataConfig("digits", split="val"))
    refused("unknown data.split of 'cifar10' 'val'; choices: train, test", DataConfig("cifar10", split="val"))
    refused("data.num_classes is 7, but data 'digits' has 10 classes", DataConfig("digits", num_classes=7))
    refused("data.size must be 8 or more for digits, not 7", DataConfig("digits", size=7))
    for kind in ("digits", "npz", "folder", "cifar10", "synthetic"):
        refused("data.channels must be 1 or 3 for images, not 4", DataConfig(kind, channels=4))
