"""Which files of a folder are images of which class, and what is left out."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from lamabench.harness.data.folder import listing
from lamabench.harness.data.images import glance, load
from lamabench.harness.sections import DataConfig
from lamabench.kernels.errors import InputError
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of three images each."""
    for i, name in enumerate(("a/0", "a/1", "a/inner/2", "b/0", "b/1", "b/2")):
        file = tmp_path / "set" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), 40 * i, dtype=np.uint8)).save(file)
    return tmp_path / "set"


def config(root: Path, num_classes: int = 2) -> DataConfig:
    return DataConfig("folder", path=str(root), size=8, channels=3, num_classes=num_classes)


def hidden_folder(root: Path) -> None:
    """A file browser's or a notebook's copies."""
    shutil.copytree(root / "b", root / "a" / ".ipynb_checkpoints")
    shutil.copytree(root / "b", root / "a" / "inner" / ".thumbs" / "deep")


def hidden_files(root: Path) -> None:
    shutil.copy(root / "a" / "0.png", root / "a" / "._0.png")
    shutil.copy(root / "a" / "0.png", root / ".0.png")


def links_up(root: Path) -> None:
    (root / "a" / "self").symlink_to(".")
    (root / "a" / "inner" / "up").symlink_to("..")
    (root / "b" / "root").symlink_to(root)
    (root / "b" / "above").symlink_to(root.parent)
    (root / "c").symlink_to(".")


def suffixes(root: Path) -> None:
    for suffix in ("tif", "gif", "ppm", "txt"):
        (root / "a" / f"x.{suffix}").write_bytes(b"x")
    (root / "labels.csv").write_text("a, b")


def dangling(root: Path) -> None:
    (root / "b" / "gone.png").symlink_to("nowhere.png")
    (root / "b" / "round.png").symlink_to("round.png")
    (root / "class").symlink_to("/no/such/disk")


def pipe(root: Path) -> None:
    os.mkfifo(root / "b" / "pipe.png")


LEFT_OUT = {
    hidden_folder: ("hidden", ["a/.ipynb_checkpoints", "a/inner/.thumbs"]),
    hidden_files: ("hidden", [".0.png", "a/._0.png"]),
    links_up: ("links to a folder above", ["a/inner/up", "a/self", "b/above", "b/root", "c"]),
    suffixes: ("with another suffix", ["a/x.gif", "a/x.ppm", "a/x.tif", "a/x.txt", "labels.csv"]),
    dangling: ("dangling links", ["b/gone.png", "b/round.png", "class"]),
    pipe: ("neither files nor folders", ["b/pipe.png"]),
}


@pytest.mark.parametrize("change", LEFT_OUT, ids=lambda change: change.__name__)
def test_what_is_no_image_of_the_set(root, change):
    """It changes neither the images nor the fingerprint, and is named by its reason."""
    before = load(config(root))
    change(root)
    reason, names = LEFT_OUT[change]
    content, after = listing(root), load(config(root))
    assert [str(file.relative_to(root)) for file in content.files] == [
        *("a/0.png", "a/1.png", "a/inner/2.png", "b/0.png", "b/1.png", "b/2.png")
    ]
    assert after.labels.tolist() == [0, 0, 0, 1, 1, 1] and after.fingerprint == before.fingerprint
    assert list(content.left_out) == [reason]
    assert sorted(str(path.relative_to(root)) for path in content.left_out[reason]) == names
    text = f"{len(names)} {reason} ({', '.join(names)})"
    assert content.omissions(root) == text
    line = "" if reason == "hidden" else f"{root}: left out are {text}; lamabench data check says more"
    assert before.omissions == "" and after.omissions == line


def test_links_to_other_folders_are_followed(root, tmp_path):
    """Large sets lie on another disk; a link within a class is followed too."""
    shutil.copytree(root / "b", tmp_path / "disk" / "b")
    (root / "c").symlink_to(tmp_path / "disk" / "b")
    (root / "a" / "more").symlink_to(tmp_path / "disk")
    (root / "b" / "3.png").symlink_to(root / "a" / "0.png")
    content = listing(root)
    assert [len(group) for group in content.classes.values()] == [6, 4, 3] and content.links == 3
    assert content.left_out == {}
    assert len(load(config(root, 3))) == 13


def test_two_links_that_lead_to_each_other(root):
    (root / "a" / "b").symlink_to("../b")
    (root / "b" / "a").symlink_to("../a")
    content = listing(root)
    assert [len(group) for group in content.classes.values()] == [6, 6]
    assert sorted(str(path.relative_to(root)) for path in content.left_out["links to a folder above"]) == [
        *("a/b/a", "b/a/b")
    ]


def test_empty_classes_are_named(root):
    for name in "cdefghi":
        (root / name).mkdir()
    (root / "c" / "x.tif").write_bytes(b"x")
    for read in (load, glance):
        with pytest.raises(
            InputError, match=r"set/c, .*set/g and 2 more contain no image; supported are \.jpg"
        ) as error:
            read(config(root))
        assert "\n" not in str(error.value)


def test_folders_that_may_not_be_read(root, monkeypatch):
    """A test may run as root, which may read everything; so the refusal is played."""
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "inner":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for read in (load, glance):
        with pytest.raises(InputError, match=r"^cannot read .*set/a/inner: Permission denied$"):
            read(config(root))


def test_paths_that_cannot_be_asked_for(tmp_path):
    (tmp_path / "round").symlink_to("round")
    for path, words in (
        (tmp_path / "round", "cannot read data.path .*round: Too many levels of symbolic links"),
        (tmp_path / ("x" * 300), "cannot read data.path .*xx: File name too long"),
        (Path("a\0b"), "cannot read data.path a.b: embedded null byte"),
        (tmp_path / "no" / "such", "data.path .*such does not exist"),
    ):
        with pytest.raises(InputError, match=words):
            load(config(path))


def test_names_of_any_bytes_are_one_line(root):
    odd = root / "a" / os.fsdecode(b"x\n\xff.png")
    odd.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"unreadable image .*set/a/x\\n\\xff\.png: cannot identify") as error:
        load(config(root))
    str(error.value).encode()  # any UTF-8 output takes it
    assert "\n" not in str(error.value)


def test_splits_are_no_classes(root):
    """Two folders that are splits would be two classes, and the test images would be trained on."""
    (root / "a").rename(root / "train")
    (root / "b").rename(root / "val")
    for read in (load, glance):
        with pytest.raises(
            InputError, match=r"set contains splits \(train, val\) and no classes: data\.path=.*set/train$"
        ):
            read(config(root))
    (root / "val").rename(root / "bus")  # beside other classes, `train` may be one
    assert [folder.name for folder in listing(root).classes] == ["bus", "train"]
