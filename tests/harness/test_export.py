"""Exported samples are read again by numpy, zipfile and Pillow, and never lie in memory as a whole."""

import tracemalloc
import zipfile

import numpy as np
import pytest
from lamabench.harness.export import check_target, export, names
from lamabench.harness.progress import Progress
from lamabench.harness.shards import Shards
from lamabench.kernels.errors import InputError
from PIL import Image


@pytest.fixture(params=[1, 3], ids=["grey", "colours"])
def samples(request, tmp_path):
    """130 images in shards, and their labels."""
    images = np.random.default_rng(0).integers(0, 256, (130, 5, 4, request.param), np.uint8)
    (folder := tmp_path / "k").mkdir()
    for start, stop in ((0, 100), (100, 130)):
        np.save(folder / f"{start:08d}-{stop:08d}.npy", images[start:stop])
    return images, Shards(folder), np.arange(130) % 7


def test_the_npz_of_the_evaluator_of_adm(samples, tmp_path):
    images, shards, labels = samples
    target = tmp_path / "a" / "b.npz"
    export(target, shards, labels, 7, Progress())
    with np.load(target) as file:
        assert file.files == ["arr_0", "arr_1"]
        assert np.array_equal(file["arr_0"], images) and np.array_equal(file["arr_1"], labels)
        assert file["arr_0"].dtype == np.uint8 and file["arr_1"].dtype == np.int64
    with zipfile.ZipFile(target) as archive:
        assert archive.testzip() is None
        # Its reader streams rows after a header of version 1.
        with archive.open("arr_0.npy") as file:
            assert np.lib.format.read_magic(file) == (1, 0)
            assert np.lib.format.read_array_header_1_0(file) == (images.shape, False, np.dtype(np.uint8))
            assert file.read() == images.tobytes()
    before = target.read_bytes()
    export(target, shards, labels, 7, Progress())
    assert target.read_bytes() == before and [one.name for one in target.parent.iterdir()] == ["b.npz"]


def test_png_files(samples, tmp_path):
    images, shards, labels = samples
    target = tmp_path / "pictures"
    export(target, shards, labels, 7, Progress())
    files = sorted(target.iterdir())
    assert [files[0].name, files[-1].name, len(files)] == ["000000-class0.png", "000129-class3.png", 130]
    read = [np.asarray(Image.open(file)) for file in files]
    assert np.array_equal(np.stack(read).reshape(images.shape), images)
    check_target(target, names(labels, 7))  # the same set may be written again
    assert names(labels[:2], 0) == ["000000.png", "000001.png"]


def test_memory_holds_one_batch(tmp_path):
    """24 MB of images are exported in less than 3 MB."""
    (folder := tmp_path / "k").mkdir()
    for start in range(0, 2000, 50):
        np.save(folder / f"{start:08d}-{start + 50:08d}.npy", np.full((50, 64, 64, 3), start % 251, np.uint8))
    tracemalloc.start()
    export(tmp_path / "out.npz", Shards(folder), np.zeros(2000, np.int64), 0, Progress())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "out.npz").stat().st_size > 24e6 and peak < 3e6


def test_a_target_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "000001.png").touch()
    (tmp_path / "full" / "notes.txt").touch()
    for name, words in (
        ("x.zip", "neither a FILE.npz nor a folder"),
        ("x.PNG", "neither a FILE.npz nor a folder"),
        ("file", "is a file, and neither"),
        ("folder.npz", "is a folder"),
        ("full", r"holds notes\.txt, which is not of these samples"),
        ("file/x.npz", "file is a file|Not a directory"),
        ("x" * 300 + ".npz", "File name too long"),
    ):
        with pytest.raises(InputError, match=words):
            check_target(tmp_path / name, ["000001.png"])
    for name in ("new.npz", "new", "a/b/c", "a/b.npz"):
        check_target(tmp_path / name, ["000001.png"])
