"""Data sets of Hugging Face: where a split lies, which columns count, and what cannot be used."""

import json
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import image_sets as sets
import pytest
from lamabench.harness.data.images import glance, load, load_held_out
from lamabench.harness.data.splits import held_out
from lamabench.harness.data.summary import summary
from lamabench.harness.sections import DataConfig
from lamabench.kernels.errors import InputError
from pyarrow import parquet

PNGS = [sets.picture(i, i % 2) for i in range(4)]
OTHERS = [sets.picture(i, i % 2) for i in range(10, 16)]
TYPES = {"kind": datasets.ClassLabel(names=["class0", "class1"]), "picture": datasets.Image()}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    """The current folder. Any look-up of a host fails."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    return tmp_path


def config(path: str = "set", **more) -> DataConfig:
    return DataConfig("hf", path=path, **{"size": 8, "channels": 1, "num_classes": 2, **more})


def refused(message: str, settings: DataConfig) -> None:
    for look in (load, glance):
        with pytest.raises(InputError, match=message) as caught:
            look(settings)
        assert "\n" not in str(caught.value)


def save(columns: dict[str, list], types: dict[str, object], path: str = "set") -> None:
    shutil.rmtree(path, ignore_errors=True)
    datasets.Dataset.from_dict(columns, features=datasets.Features(types)).save_to_disk(path)


def cells(images=PNGS) -> list[dict[str, object]]:
    return [{"bytes": one.content, "path": None} for one in images]


def contents(data) -> list[bytes]:
    return [image.numpy().tobytes() for image, _ in data]


# Where a split lies


def test_splits_of_a_dictionary(place):
    sets.write_saved(place / "set", train=PNGS, validation=OTHERS, extra=PNGS)
    train, test = load(config()), load_held_out(config(), ["class0", "class1"])
    assert len(train) == 4 and len(test) == 6 and train.class_names == ["class0", "class1"]
    assert contents(test) == contents(load(config("set/validation")))
    assert contents(load(held_out(config("set/train")))) == contents(test)  # the folder beside it
    sets.write_saved(place / "two", validation=PNGS, other=OTHERS)
    refused(r"two has no split 'train', only (validation, other|other, validation)", config("two"))
    sets.write_saved(place / "one", train=PNGS)
    refused(r"one has no split 'test', only train", config("one", split="test"))


def test_splits_of_parquet_files(place):
    sets.write_parquet(place / "set" / "data", train=PNGS, test=OTHERS)
    train, test = load(config()), load(held_out(config()))
    assert (len(train), len(test)) == (4, 6) and glance(config()) == (4, train.fingerprint)
    sets.write_parquet(place / "many", **{"train-1": PNGS[2:], "train-0": PNGS[:2], "val": OTHERS})
    assert contents(load(config("many"))) == contents(train)  # in the order of their names
    assert load(held_out(config("many"))).fingerprint == test.fingerprint
    sets.write_parquet(place / "odd [a]*" / ".cache" / "x" / "train", part=PNGS)
    sets.write_parquet(place / "odd [a]*" / ".cache" / "x" / "test", part=OTHERS)
    odd = config("odd [a]*/.cache/x")
    assert load(odd).fingerprint == train.fingerprint and load(held_out(odd)).fingerprint == test.fingerprint
    assert load(held_out(config("odd [a]*/.cache/x/train"))).fingerprint == test.fingerprint
    for name in ("one", "two"):
        sets.write_parquet(place / "several" / name / "train", part=PNGS)
    refused(r"parquet files of one split are in several/one/train, several/two/train: data\.path", config("several"))
    sets.write_parquet(place / "bare", part=PNGS)
    refused(
        r"the test split of data 'hf' is files with test or val or validation in their names",
        config("bare", split="test"),
    )


def test_a_test_split_without_labels_is_not_the_one(place):
    """Labels of ImageNet's test split are -1."""
    hidden = [one._replace(label=-1) for one in PNGS]
    for name, write in (("saved", sets.write_saved), ("tables", sets.write_parquet)):
        write(place / name, train=PNGS, test=hidden, validation=OTHERS)
        assert len(load(held_out(config(name)))) == 6
        write(place / name / "alone", train=PNGS, test=hidden)
        refused(
            r"alone: no image has a label; labels are a column of type ClassLabel", held_out(config(f"{name}/alone"))
        )
        assert len(load(held_out(config(f"{name}/alone", num_classes=0)))) == 4


def test_folders_that_are_no_data_set(place):
    (place / "set").mkdir()
    (place / "file").touch()
    refused("set is no data set of Hugging Face: expected a folder that save_to_disk wrote", config())
    refused(r"data\.path nowhere does not exist", config("nowhere"))
    refused(r"data\.path file is not a folder", config("file"))
    refused(r"data\.path hf://datasets/mnist does not exist", replace(config(), path="hf://datasets/mnist"))
    refused(r"data\.path is not set", replace(config(), path=None))


def test_files_that_are_damaged(place):
    sets.write_saved(place / "whole", train=PNGS)
    sets.write_parquet(place / "tables", train=PNGS)
    for name in ("dataset_dict.json", "train/state.json", "train/dataset_info.json", "train/data-00000-of-00001.arrow"):
        for content in (b"", b"{", b"[]", (whole := (place / "whole" / name).read_bytes())[: len(whole) // 2]):
            shutil.copytree("whole", "set", dirs_exist_ok=True)
            (place / "set" / name).write_bytes(content)
            refused(r"^set(/train)? (cannot be read by datasets: |has no split)", config())
    (table,) = (place / "tables").iterdir()
    table.write_bytes(table.read_bytes()[:-100])
    refused(r"^tables/train-00000-of-00001\.parquet cannot be read by datasets: ", config("tables"))


# Columns


def test_columns_are_those_of_the_right_types(place):
    save({"id": [1, 2, 3, 4], "kind": [1, 0, 0, 1], "picture": cells()}, {"id": datasets.Value("int64"), **TYPES})
    assert load(config()).labels.tolist() == [1, 0, 0, 1]
    save({"picture": cells(), "kind": [0, 1, 0, 1]}, {**TYPES, "kind": datasets.Value("int64")})
    refused(r"no image has a label; labels are a column of type ClassLabel: cast one .*num_classes=0", config())
    assert load(config(num_classes=0)).class_names == [] and load(config(num_classes=1)).class_names == ["0"]
    save({"picture": ["a"] * 4}, {"picture": datasets.Value("string")})
    refused(r"set has no column of type Image \(its columns: picture string\)", config())
    save({"a": cells(), "b": cells()}, {"a": datasets.Image(), "b": datasets.Image()})
    refused(r"set has 2 columns of type Image \(its columns: a Image, b Image\)", config())


def test_the_number_of_classes_chooses_a_column_of_labels(place):
    types = {"fine": datasets.ClassLabel(4), "coarse": datasets.ClassLabel(2), "picture": datasets.Image()}
    save({"fine": [3, 2, 1, 0], "coarse": [1, 1, 0, 0], "picture": cells()}, types)
    assert load(config(num_classes=4)).labels.tolist() == [3, 2, 1, 0]
    assert load(config(num_classes=2)).labels.tolist() == [1, 1, 0, 0]
    assert load(config(num_classes=0)).fingerprint == load(config(num_classes=4)).fingerprint
    refused(
        r"2 columns of labels: fine with 4 classes, coarse with 2 classes; data\.num_classes chooses",
        config(num_classes=3),
    )


def test_labels_that_do_not_fit(place):
    save({"kind": [0, 0, 0, 0], "picture": cells()}, TYPES)
    refused("has classes without an image: class1", config())
    save({"kind": [0, 1, 0, 1], "picture": cells()}, TYPES)
    refused(r"data\.num_classes is 7, but data 'hf' at set has 2 classes; set it to 2", config(num_classes=7))
    save({"kind": [0, None, -1, 1], "picture": cells()}, TYPES)
    refused(r"2 of 4 images \(set/row 1, set/row 2\) have no label", config())
    assert summary(config()).problem() == "2 of 4 images have no label (set/row 1, set/row 2)"
    assert summary(config()).classes == {"class0": 1, "class1": 1}
    info = json.loads((place / "set" / "dataset_info.json").read_text(encoding="utf-8"))
    info["features"]["kind"]["names"] = ["class0"]
    (place / "set" / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    refused("set: column kind has label 1, but only 1 classes|cannot be read", config(num_classes=1))


def test_images_that_are_not_in_the_data_set_are_not_fetched(place):
    """A file or an address in place of the bytes is an error, and not followed."""
    (place / "0.png").write_bytes(PNGS[0].content)
    for path in (str(place / "0.png"), "https://example.org/0.png", None):
        row = {"bytes": None, "path": path} if path else None
        table = datasets.Dataset.from_dict(
            {"kind": [0, 1, 0, 1], "picture": [row, *cells()[1:]]}, features=datasets.Features(TYPES)
        ).data.table
        shutil.rmtree("set", ignore_errors=True)
        (place / "set").mkdir()
        parquet.write_table(table, "set/train.parquet")
        with pytest.raises(InputError, match=r"unreadable image set/train.*row 0: the data set has no bytes of it"):
            load(config())


def test_sets_without_rows(place):
    sets.write_parquet(place / "none", train=[])
    refused("data 'hf' at none contains no image", config("none", num_classes=0))
    save({"kind": [0], "picture": cells()[:1]}, TYPES)
    refused("too few images: 1, at least 2", config(num_classes=0))


def test_the_library_is_optional(place, monkeypatch):
    sets.write_saved(place / "set", train=PNGS)
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(r"data 'hf' needs the library datasets, .*: pip install 'lamabench\[hf\]'", config())


def test_no_code_of_a_data_set_runs(place):
    sets.write_parquet(place / "set", train=PNGS)
    for name in ("set.py", "conftest.py", "dataset.py"):
        (place / "set" / name).write_text("raise SystemExit('it ran')", encoding="utf-8")
    assert len(load(config())) == 4
