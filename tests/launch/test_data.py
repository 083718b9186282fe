"""`lamabench data check`, and damaged files of data before and during a training."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from image_sets import Picture, write_saved, write_shards
from lamabench.launch.cli import main
from PIL import Image

TRAIN = [
    *("train", "model=dit_nano", "model.depth=1", "model.hidden_size=16", "model.num_heads=2", "data=folder"),
    *("data.path=set", "data.size=8", "data.num_classes=2", "train.batch_size=4", "train.precision=float32"),
    *("train.steps=2", "run.device=cpu"),
]


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch) -> Path:
    """Two classes of four images each, in the folder `set` of the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for i in range(8):
        shape = (8 + i, 8, 3) if i % 2 else (8, 12)
        file = tmp_path / "set" / "ab"[i // 4] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(file)
        os.utime(file, (10**9, 10**9))
    return tmp_path / "set"


def run(capsys, *words):
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def check(capsys, *words):
    return run(capsys, "data", "check", *words)


def tear(file: Path) -> bytes:
    """Cut the end of a file. Returns its bytes before."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    return content


def test_a_sound_folder(capsys, root):
    code, out, err = check(capsys, "data=folder", "data.path=set")
    assert code == 0 and err == ""
    lines = out.splitlines()
    assert lines[0].startswith("set: 8 images in 2 classes, fingerprint ")
    assert lines[1:] == [
        *("classes: a 4, b 4", "sizes: 8 x 9 to 8 x 15 pixels, 5 different", "modes: L 4, RGB 4"),
        "training takes data.num_classes=2, or 0 without classes",
    ]
    assert check(capsys, "data=folder", "data.path=set", "data.num_classes=2")[1].splitlines() == lines[:-1]
    other = check(capsys, "data=folder", "data.path=set", "data.num_classes=5")[1].splitlines()
    assert other == [*lines[:-1], f"data.num_classes is 5; {lines[-1]}"]


def test_what_was_not_counted(capsys, root):
    sound = json.loads(check(capsys, "data=folder", "data.path=set", "--json")[1])
    assert sound["sizes"] == {"12x8": 4, "8x9": 1, "8x11": 1, "8x13": 1, "8x15": 1}
    (root / "a" / ".ipynb_checkpoints").mkdir()
    (root / "a" / "up").symlink_to("..")
    (root / "b" / "gone.png").symlink_to("nowhere")
    for i in range(7):
        (root / "b" / f"{i}.tif").write_bytes(b"x")
    (root / "b" / "more").symlink_to(root / "a")
    code, out, err = check(capsys, "data=folder", "data.path=set")
    assert code == 0 and err == ""
    assert out.splitlines()[4:-1] == [
        "links followed: 1",
        "left out, hidden: 2 (a/.ipynb_checkpoints, b/more/.ipynb_checkpoints)",
        "left out, with another suffix: 7 (b/0.tif, b/1.tif, b/2.tif, b/3.tif, b/4.tif and 2 more)",
        "left out, dangling links: 1 (b/gone.png)",
        "left out, links to a folder above: 2 (a/up, b/more/up)",
    ]
    (root / "b" / "more").unlink()
    after = json.loads(check(capsys, "data=folder", "data.path=set", "--json")[1])
    assert len(after["left_out"]["with another suffix"]) == 7
    assert after | {"left_out": {}} == sound


def test_every_unreadable_file_is_named(capsys, root):
    tear(root / "a" / "1.png")
    (root / "b" / "5.png").write_bytes(b"no image")
    (root / "c").mkdir()
    code, out, err = check(capsys, "data=folder", "data.path=set")
    assert code == 2
    assert "unreadable: a/1.png: image file is truncated" in out and "unreadable: b/5.png: cannot identify" in out
    assert "empty classes: c\n" in out and "fingerprint" not in out
    assert out.count("1.png") == 1  # once is enough
    assert err == "lamabench data: error: 2 of 8 images are unreadable; classes without an image: c\n"


def test_the_second_check_and_the_training_decode_nothing(capsys, root, monkeypatch):
    """One pass and one cache."""
    first = check(capsys, "data=folder", "data.path=set")
    monkeypatch.setattr("lamabench.harness.data.files.read_image", lambda file: pytest.fail(f"{file} was read"))
    assert check(capsys, "data=folder", "data.path=set") == first
    from lamabench.harness.data.images import load
    from lamabench.harness.sections import DataConfig

    assert load(DataConfig("folder", path="set", size=8, channels=3, num_classes=2)).fingerprint in first[1]


def test_other_kinds(capsys, tmp_path):
    np.savez("gaps.npz", images=np.zeros((6, 8, 8, 3), np.uint8), labels=np.array([1, 2, 3] * 2))
    np.savez("grey.npz", images=np.zeros((6, 8, 9), np.uint8))
    code, out, err = check(capsys, "data=npz", "data.path=gaps.npz")
    assert code == 2 and "classes: 1 2, 2 2, 3 2\nempty classes: 0\n" in out
    assert err == "lamabench data: error: classes without an image: 0\n"
    code, out, _ = check(capsys, "data=npz", "data.path=grey.npz", "data.channels=1", "data.num_classes=0")
    assert code == 0 and "6 images in 1 class," in out and "sizes: 9 x 8 pixels, 1 different\nmodes: L 6\n" in out
    code, out, _ = check(capsys, "data=digits")
    assert code == 0 and out.startswith("digits: 1,797 images in 10 classes")
    assert check(capsys, "data=synthetic", "data.num_classes=3")[1].startswith("synthetic: 320 images in 3 classes")


@pytest.mark.parametrize("kind", ["webdataset", "hf"])
def test_shards_and_data_sets_of_hugging_face(capsys, root, tmp_path, kind):
    """Their check, and a training that a torn image stops before it writes, and that goes on afterwards."""
    images = [Picture(file.read_bytes(), "png", i // 4) for i, file in enumerate(sorted(root.rglob("*.png")))]

    def write(pictures: list[Picture]) -> Path:
        shutil.rmtree("set")
        return write_shards(root, pictures) if kind == "webdataset" else write_saved(root, train=pictures)

    write(images)
    words = [f"data={kind}", "data.path=set", "data.num_classes=2"]
    code, out, err = check(capsys, *words)
    names = ("0", "1") if kind == "webdataset" else ("class0", "class1")
    assert (code, err) == (0, "") and out.splitlines()[0].startswith("set: 8 images in 2 classes, fingerprint ")
    assert out.splitlines()[1:] == [
        *(f"classes: {names[0]} 4, {names[1]} 4", "sizes: 8 x 9 to 8 x 15 pixels, 5 different", "modes: L 4, RGB 4")
    ]
    assert json.loads(check(capsys, *words, "--json")[1])["sizes"]["12x8"] == 4
    train = [word for word in TRAIN if word != "data=folder"] + words
    torn = [*images[:6], images[6]._replace(content=images[6].content[:80]), images[7]]
    place = "set/train-0002.tar/0006.png" if kind == "webdataset" else "set/train/row 6"
    write(torn)
    code, out, err = run(capsys, *train)
    assert code == 2 and err == f"lamabench train: error: unreadable image {place}: image file is truncated\n"
    assert not (tmp_path / "runs").exists()
    write(images)
    assert run(capsys, *train)[0] == 0
    code, _, err = run(capsys, *train, "train.steps=4")
    assert code == 0 and "continuing at step 2 of 4" in err
    write([images[1], *images[1:]])
    code, _, err = run(capsys, *train, "train.steps=6")
    assert code == 2 and "was trained on other data" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "data check needs data: data=NAME; choices: cifar10, digits, folder"),
        (["set"], "data check takes data=NAME and settings such as data.path=FOLDER, not 'set'"),
        (["data=folder", "train.lr=1"], "not 'train.lr=1'"),
        (["data=folder"], "data.path is not set"),
        (["data=folder", "data.path=nowhere"], "data.path nowhere does not exist"),
        (["data=folder", "data.path=cache"], "too few images: 0, at least 2"),
        (["data=folders", "data.path=set"], "unknown data 'folders'"),
        (["data=npz", "data.path=set/a/1.png"], "is not a readable .npz file"),
        (["data=webdataset", "data.path=set"], "data.path set contains no shard of WebDataset (.tar)"),
        (["data=hf", "data.path=set"], "set is no data set of Hugging Face: expected"),
        (["data=hf", "data.path=set", "data.split=val"], "unknown data.split of 'hf' 'val'"),
        (["data=cifar10", "data.path=set"], "unpack https://www.cs.toronto.edu"),
        (["data=digits", "data.size=100000"], "data.size must be at most 16,384, not 100000"),
        (["data=digits", "data.size=16384"], "GiB of memory, but this machine has"),
    ],
)
def test_requests_that_are_wrong(capsys, tmp_path, words, message, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 2**16)  # 4 GiB, as pages × size
    (tmp_path / "cache").mkdir()
    code, _, err = check(capsys, *words)
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize("damage", ["torn", "none", "text"])
def test_a_damaged_file_stops_a_training_before_it_writes(capsys, root, tmp_path, damage):
    file = root / "b" / "6.png"
    good = tear(file)
    if damage != "torn":
        file.write_bytes(b"" if damage == "none" else b"no image")
    code, out, err = run(capsys, *TRAIN)
    assert code == 2 and out == "" and err.count("\n") == 1 and "unreadable image set/b/6.png: " in err
    assert not (tmp_path / "runs").exists()
    file.write_bytes(good)
    assert run(capsys, *TRAIN)[0] == 0
    tear(file)
    code, _, err = run(capsys, *TRAIN, "train.steps=4")
    assert code == 2 and err.count("\n") == 1 and "unreadable image set/b/6.png: " in err
    file.write_bytes(good)
    code, _, err = run(capsys, *TRAIN, "train.steps=4")
    assert code == 0 and "continuing at step 2 of 4" in err


def test_a_training_says_what_is_left_out(capsys, root):
    (root / "b" / "x.tif").write_bytes(b"x")
    (root / "b" / ".hidden.png").write_bytes(b"x")
    code, _, err = run(capsys, *TRAIN)
    assert code == 0
    assert err.count("set: left out are 1 with another suffix (b/x.tif); lamabench data check says more\n") == 1


def test_images_that_no_memory_takes(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 2**16)  # 4 GiB, as pages × size
    for data in ("digits", "synthetic"):
        words = ["model=dit_nano", "model.depth=1", "run.device=cpu", f"data={data}", "data.size=16384"]
        code, _, err = run(capsys, "train", *words)
        assert code == 2 and "GiB of memory, but this machine has 4.0" in err and err.count("\n") == 1
        assert not (tmp_path / "runs").exists()
