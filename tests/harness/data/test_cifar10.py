"""CIFAR-10 from pickles of any numpy, and pickles that are something else."""

import io
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from lamabench.harness.data import cifar10
from lamabench.harness.data.images import load
from lamabench.harness.sections import DataConfig
from lamabench.kernels.errors import InputError
from torchvision.datasets import CIFAR10

TRAIN = [f"data_batch_{i}" for i in range(1, 6)]
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, size=(60, 3, 32, 32), dtype=np.uint8)
LABELS = RNG.integers(0, 10, size=(6, 10))
LABELS[0], LABELS[5] = range(10), range(10)


@pytest.fixture(autouse=True)
def ten_images(monkeypatch):
    monkeypatch.setattr(cifar10, "IMAGES", 10)


def python2(content: dict) -> bytes:
    """A pickle as Python 2 writes it: bytes are short strings, and arrays are of numpy.core."""

    def string(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value

    def item(value) -> bytes:
        if isinstance(value, np.ndarray):
            kind = b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87RK\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xff"
            kind = kind.replace(b"K\x03", b"(K\x03", 1) + b"J\xff\xff\xff\xffK\x00tb"
            shape = b"".join(b"J" + number.to_bytes(4, "little") for number in value.shape)
            state = b"(K\x01(" + shape + b"t" + kind + b"\x89" + string(value.tobytes()) + b"tb"
            return b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + string(b"b") + b"tR" + state
        if isinstance(value, list):
            return b"(" + b"".join(item(one) for one in value) + b"l"
        return string(value.encode()) if isinstance(value, str) else b"K" + bytes([value])

    return b"\x80\x02}(" + b"".join(string(name.encode()) + item(value) for name, value in content.items()) + b"u."


def write(root: Path, dump=pickle.dumps, labels=lambda row: row.tolist(), names=str) -> DataConfig:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for i, name in enumerate([*TRAIN, "test_batch"]):
        data = IMAGES[10 * i : 10 * i + 10].reshape(10, -1)
        (folder / name).write_bytes(dump({names("data"): data, names("labels"): labels(LABELS[i])}))
    (folder / "batches.meta").write_bytes(dump({names("label_names"): [f"class{i}" for i in range(10)]}))
    return DataConfig("cifar10", path=str(root), size=32, channels=3)


WRITERS = {f"protocol {number}": {"dump": lambda value, n=number: pickle.dumps(value, n)} for number in range(6)} | {
    "python 2": {"dump": python2},
    "columns first": {"dump": lambda value: pickle.dumps({k: _columns_first(v) for k, v in value.items()})},
    "labels int64": {"labels": lambda row: row},
    "labels int32": {"labels": lambda row: row.astype(np.int32)},
    "labels scalars": {"labels": lambda row: list(row.astype(np.uint8))},
    "names are bytes": {"names": str.encode},
}


def _columns_first(value):
    return np.asfortranarray(value) if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("writer", WRITERS)
def test_a_set_that_was_packed_again(tmp_path, writer):
    config = write(tmp_path, **WRITERS[writer])
    for split, part, rows in (("train", slice(0, 50), slice(0, 5)), ("test", slice(50, 60), slice(5, 6))):
        data = load(replace(config, split=split))
        assert np.array_equal(np.stack([image.numpy() for image, _ in data]), IMAGES[part])
        assert data.labels.tolist() == LABELS[rows].ravel().tolist() and data.class_names[9] == "class9"


@pytest.mark.parametrize("writer", ["protocol 2", "python 2"])
def test_torchvision_reads_the_same(tmp_path, monkeypatch, writer):
    config = write(tmp_path, **WRITERS[writer])
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    reference, data = CIFAR10(str(tmp_path), train=True), load(config)
    assert np.array_equal(np.stack([image.numpy() for image, _ in data]), reference.data.transpose(0, 3, 1, 2))
    assert data.labels.tolist() == reference.targets and data.class_names == reference.classes


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, function, *words) -> None:
        self.function, self.words = function, words

    def __reduce__(self):
        return self.function, self.words


@pytest.mark.parametrize("function", [os.mkdir, exec, getattr, open, np.load, io.FileIO], ids=lambda f: f.__name__)
def test_no_code_of_a_pickle_runs(tmp_path, function):
    config = write(tmp_path / "set")
    for dump in (pickle.dumps, lambda value: pickle.dumps(value, 0)):
        evil = dump({"data": Code(function, str(tmp_path / "evil"), "w"), "labels": []})
        (tmp_path / "set" / "cifar-10-batches-py" / "data_batch_2").write_bytes(evil)
        with pytest.raises(InputError, match=r"data_batch_2 is not a readable file of CIFAR-10: it contains \w+\."):
            load(config)
        assert not (tmp_path / "evil").exists()


GOOD = {"data": IMAGES[:10].reshape(10, -1), "labels": [*range(10)]}
BAD = {
    "a batch of other images": (GOOD | {"data": IMAGES[:10].reshape(10, 3, -1)}, r"data is uint8 \[10, 3, 1024\], not"),
    "too few images": (
        GOOD | {"data": IMAGES[:9].reshape(9, -1)},
        r"data is uint8 \[9, 3072\], not uint8 \[10, 3072\]",
    ),
    "floats": (GOOD | {"data": IMAGES[:10].reshape(10, -1) / 255}, "data cannot be read: an array of f8"),
    "objects": (GOOD | {"data": np.array([None] * 10)}, "data cannot be read: an array of O8"),
    "text": (GOOD | {"data": "x"}, r"data is <U1 \[\]"),
    "fewer labels": (GOOD | {"labels": [*range(9)]}, r"labels is int64 \[9\], not \[10\] integers from 0 to 9"),
    "high labels": (GOOD | {"labels": [*range(1, 11)]}, "not .* integers from 0 to 9"),
    "uneven labels": (GOOD | {"labels": [[0], [1, 2]]}, "labels cannot be read"),
    "no labels": ({"data": GOOD["data"]}, "has no 'labels'"),
    "CIFAR-100": ({"data": GOOD["data"], "fine_labels": [0] * 10}, "has no 'labels'"),
    "a list": ([1], "a list, not a dict"),
}


@pytest.mark.parametrize("name", BAD)
def test_other_arrays(tmp_path, name):
    content, words = BAD[name]
    config = write(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=f"data_batch_4.*{words}") as error:
        load(config)
    assert "\n" not in str(error.value)


def test_damaged_files_and_files_that_are_missing(tmp_path):
    config = write(tmp_path)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    whole = file.read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], whole[:-1], b"\x80\x04" + b"(" * 9999 + b"."):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"data_batch_3 is not a readable file of CIFAR-10: .") as error:
            load(config)
        assert "\n" not in str(error.value)
    file.unlink()
    with pytest.raises(InputError, match=r"\(data_batch_3 is missing\).*cifar-10-python.tar.gz.*download=True"):
        load(config)
    assert len(load(replace(config, split="test"))) == 10, "the other split needs no file of this one"
