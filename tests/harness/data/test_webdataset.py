"""Shards of WebDataset: which files are a set, what a sample is, and what is wrong with a tar file."""

import io
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import image_sets as sets
import numpy as np
import pytest
from lamabench.harness.data.images import load, load_held_out
from lamabench.harness.data.splits import held_out
from lamabench.harness.data.summary import summary
from lamabench.harness.data.webdataset import shards_of
from lamabench.harness.sections import DataConfig
from lamabench.kernels.errors import InputError

PNGS = [sets.picture(i, i % 2) for i in range(4)]
PAIRS = sets.members(PNGS)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def config(path: str = "set", **more) -> DataConfig:
    return DataConfig("webdataset", path=path, **{"size": 8, "channels": 1, "num_classes": 2, **more})


def refused(message: str, settings: DataConfig) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(settings)
    assert "\n" not in str(caught.value)


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def names(path: str, split: str = "train") -> list[str]:
    return [shard.as_posix() for shard in shards_of(config(path, split=split))]


# Which files are a set


def test_shards_are_in_the_order_of_their_numbers(place):
    touch(*(f"set/{i}.tar" for i in (10, 9, 2, 0)), "set/.x.tar", "set/0.txt")
    expected = ["set/0.tar", "set/2.tar", "set/9.tar", "set/10.tar"]
    assert names("set") == names("set/{0,2,9,10}.tar") == names("set/*.tar") == names(str(Path("set"))) == expected
    assert names("set/{9..10}.tar") == expected[2:] and names("set/2.tar") == ["set/2.tar"]


def test_patterns_are_those_of_a_shell(place):
    touch(
        *(f"set/{a}-{i:04d}.tar" for a in "ab" for i in (8, 9, 10, 11)),
        "odd{1,2}.tar",
        "empty/0.txt",
        "above/train/0.tar",
    )
    assert names("set/{a,b}-{0008..0011}.tar") == [f"set/{a}-{i:04d}.tar" for a in "ab" for i in (8, 9, 10, 11)]
    assert names("set/?-000[89].tar") == [f"set/{a}-000{i}.tar" for a in "ab" for i in (8, 9)]
    assert names("odd{1,2}.tar") == ["odd{1,2}.tar"]  # a file of this name
    for path, message in (
        ("set/{a,c}-0008.tar", r"data\.path: set/c-0008\.tar does not exist"),
        ("set/a-{0000..0009}.tar", r"set/a-0004\.tar and 3 more do not exist"),
        ("set/*.zip", r"data\.path set/\*\.zip: no file has such a name"),
        ("set/{0..1000000}.tar", "names more than 1,000,000 shards"),
        ("nowhere", "nowhere does not exist"),
        ("x" * 300, "cannot read data.path|does not exist"),
        ("empty", r"data\.path empty contains no shard of WebDataset \(\.tar\)$"),
        ("above", r"data\.path above contains no shard of WebDataset \(\.tar\): data\.path=above/train$"),
    ):
        refused(message, config(path))


def test_splits_are_words_in_the_names(place):
    touch(*(f"set/in1k-{word}-0.tar" for word in ("train", "validation", "val")), "set/valley-0.tar")
    assert names("set") == names("set/in1k-train-{0..0}.tar") == ["set/in1k-train-0.tar"]
    assert names("set", "test") == names("set/in1k-train-*.tar", "test") == ["set/in1k-val-0.tar"]
    touch("set/in1k-test-0.tar", "set/in1k-test-1.tar", "set/other-test-0.tar")
    assert names("set/in1k-train-0.tar", "test") == ["set/in1k-test-0.tar", "set/in1k-test-1.tar"]
    touch("plain/train/0.tar", "plain/validation/0.tar", "only/test-0.tar", "mixed/a.tar", "mixed/val.tar")
    assert names("plain/train", "test") == ["plain/validation/0.tar"]
    assert names("only") == ["only/test-0.tar"]
    assert (names("mixed"), names("mixed", "test")) == (["mixed/a.tar"], ["mixed/val.tar"])
    for path in ("only", "plain/validation", "plain/train/0.tar", "set/valley-0.tar"):
        with pytest.raises(InputError, match=r"the test split of data 'webdataset' is .* has none"):
            names(path, "test")


def test_the_test_split_has_the_classes_of_the_training(place):
    sets.write_shards(place / "set", sets.pictures())
    sets.write_shards(place / "set", sets.pictures(first=50), shards=1, name="val")
    train, test = load(config()), load_held_out(config(), ["0", "1"])
    assert len(test) == 12 and {t.numpy().tobytes() for t, _ in train}.isdisjoint(t.numpy().tobytes() for t, _ in test)
    with pytest.raises(InputError, match="has other classes than the training data: 0"):
        load_held_out(config(), ["class0", "class1"])
    sets.write_shards(place / "set", sets.pictures(classes=3), shards=1, name="val")
    refused(r"data\.num_classes is 2, but .* has 3 classes", held_out(config()))


# What a sample is


def test_labels_of_cls_and_json(place):
    members = [
        ("./a/1.png", PNGS[0].content),
        ("./a/1.json", b'{"cls": 7, "label": 1}'),  # `label` comes first
        ("./a/1.txt", b"a caption"),
        ("b/2.seg.png", b"a mask"),
        ("b/2.PNG", PNGS[1].content),
        ("b/2.cls", b" 0\n"),
        ("b/2.json", b'{"label": 1}'),  # `.cls` counts
        ("3.x.json", b"no json"),
        ("3.cls", b"01"),
        ("3.png", PNGS[2].content),
    ]
    sets.write_tar(place / "set" / "0.tar", members)
    data = load(config())
    assert data.labels.tolist() == [1, 0, 1] and data.class_names == ["0", "1"] and data.omissions == ""
    sets.write_tar(
        place / "set" / "0.tar",
        [(name, b'{"class": "owl"}' if "json" in name else content) for name, content in members],
    )
    refused(r"data 'webdataset' at set has 3 classes", config())
    assert load(config(num_classes=3)).class_names == ["0", "01", "owl"]  # numbers among names are names


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_formats_of_tar(place, form):
    """Long names take headers of their own, so that the places of members differ. Links are left out."""
    with tarfile.open(place / "x.tar", "w", format=form) as archive:
        for name, content in PAIRS:
            info = tarfile.TarInfo(f"{'long' * 20}/{'name' * 15}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("9.png")
        link.type, link.linkname = tarfile.SYMTYPE, "8.png"
        archive.addfile(link)
    data = load(config("x.tar"))
    whole = load(config(str(sets.write_tar(place / "y.tar", PAIRS))))
    assert data.fingerprint == whole.fingerprint and np.array_equal(data[3][0], whole[3][0])
    assert summary(config("x.tar")).left_out == {"neither files nor folders": ["x.tar/9.png"]}


def test_names_are_classes_in_their_order(place):
    texts = [b"owl", b"bee", "ötzi".encode(), b"bee"]
    pairs = [(name, texts[int(name[3])] if name.endswith("cls") else content) for name, content in PAIRS]
    sets.write_tar(place / "set" / "0.tar", pairs)
    data = load(config(num_classes=3))
    assert data.class_names == ["bee", "owl", "ötzi"] and data.labels.tolist() == [1, 0, 2, 0]
    assert load(config(num_classes=0)).labels.tolist() == [0] * 4


def test_sets_without_labels(place):
    sets.write_tar(place / "set" / "0.tar", [member for member in PAIRS if member[0].endswith("png")])
    assert load(config(num_classes=0)).class_names == [] and load(config(num_classes=1)).class_names == ["0"]
    refused(r"data 'webdataset' at set: no image has a label; a label is KEY\.cls or .*num_classes=0", config())
    assert summary(config()).problem() == ""
    sets.write_tar(place / "set" / "0.tar", [m for m in PAIRS if m[0] != "0002.cls"])
    assert not load(config(num_classes=0)).labels.any()
    refused(r"1 of 4 images \(set/0\.tar/0002\.png\) have no label; a label is", config())
    assert summary(config()).problem() == "1 of 4 images have no label (set/0.tar/0002.png)"


@pytest.mark.parametrize("label", [b"-1", b"", b" \n", b"\xff\xfe"])
def test_what_is_no_label(place, label):
    sets.write_tar(place / "set" / "0.tar", [(name, label if name == "0001.cls" else c) for name, c in PAIRS])
    refused("1 of 4 images .*0001.png", config())


@pytest.mark.parametrize("text", [b"{", b"[1]", b'{"label": [1]}', b'{"label": true}', b"[" * 9999, b'{"text": "x"}'])
def test_json_without_a_label(place, text):
    members = [(name.replace("cls", "json") if name == "0001.cls" else name, c) for name, c in PAIRS]
    sets.write_tar(place / "set" / "0.tar", [(name, text if "json" in name else c) for name, c in members])
    refused("1 of 4 images .*0001.png", config())


def test_numbers_with_gaps(place):
    sets.write_tar(place / "set" / "0.tar", [(name, b"999999999999" if name == "0001.cls" else c) for name, c in PAIRS])
    refused("has classes without an image: 2, 3, 4, 5, 6 and 999,999,999,99. more; number the labels", config())


def test_what_is_left_out_is_listed(place):
    more = [("._0000.png", b"x"), ("8.json", b"{}"), ("README", b"x"), ("d/__meta__.tif", b"x")]
    sets.write_tar(place / "set" / "0.tar", [*PAIRS, *more])
    expected = {
        "hidden": ["0.tar/._0000.png"],
        "samples without an image": ["0.tar/README", "0.tar/8", "0.tar/d/__meta__"],
    }
    assert summary(config()).left_out == expected
    assert load(config()).omissions.startswith("set: left out are 1 hidden (0.tar/._0000.png); 3 samples without")
    assert load(config()).omissions == load(config()).omissions  # from the cache too


# What is wrong with a tar file


def header_at(content: bytes, name: bytes) -> int:
    return next(i for i in range(0, len(content), 512) if content[i : i + len(name)] == name)


def damaged(kind: str) -> bytes:
    content = sets.write_tar(Path("whole.tar"), PAIRS).read_bytes()
    last, middle = header_at(content, b"0003.cls"), header_at(content, b"0002.png")
    if kind == "flipped":
        changed = bytearray(content)
        changed[middle] ^= 1
        return bytes(changed)
    pieces = {
        "in data": content[: middle + 600],
        "in a header": content[: middle + 100],
        "between members": content[:middle],
        "in the last": content[: last + 512],
        "before its end": content[: last + 1024],
        "twice": content + content,
        "text": b"hello" * 1000,
        "nothing": b"",
        "gzip": b"\x1f\x8b" + content,
    }
    return pieces[kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("in data", "unexpected end of data"),
        ("in a header", "there is no header of a member at byte [0-9,]+, and no end"),
        ("between members", "it has no end: it was cut at byte [0-9,]+"),
        ("in the last", "unexpected end of data"),
        ("before its end", "it has no end: it was cut at byte"),
        ("flipped", "there is no header of a member at byte"),
        ("twice", "there is no header of a member at byte"),
        ("text", "invalid header"),
        ("nothing", "empty file"),
        ("gzip", r"it is compressed \(gzip\)"),
    ],
)
def test_a_file_that_is_not_a_whole_tar(place, kind, message):
    sets.write_tar(place / "set" / "0.tar", PAIRS)
    (place / "set" / "1.tar").write_bytes(damaged(kind))
    refused(rf"^set/1\.tar is not a whole tar file: {message}", config())
    (place / "set" / "2.tar").write_bytes(damaged(kind))
    refused(r"^set/1\.tar .*; set/2\.tar is not a whole tar", config())


def test_samples_that_are_ambiguous(place):
    sets.write_tar(place / "set" / "0.tar", [*PAIRS, ("0001.jpg", b"x")])
    refused(r"set/0\.tar: sample 0001 has 2 images \(0001\.jpg, …\), not one", config())
    sets.write_tar(place / "set" / "0.tar", [*PAIRS, PAIRS[2]])
    refused(r"set/0\.tar has two members 0001\.png", config())


def test_sets_without_images(place):
    for members in ([], [("1.txt", b"x"), ("1.cls", b"0")]):
        sets.write_tar(place / "set" / "0.tar", members)
        refused("data 'webdataset' at set contains no image", config(num_classes=0))
        assert "too few images: 0" in summary(config()).problem()
    sets.write_tar(place / "set" / "0.tar", PAIRS[:2])
    refused("too few images: 1, at least 2", config(num_classes=0))
    refused(r"data\.path is not set", replace(config(), path=None))


def test_a_shard_that_changes_while_it_is_in_use(place):
    """Other bytes are an error that names the member. The same bytes are the same image, whatever the time."""
    shard = sets.write_tar(place / "set" / "0.tar", PAIRS)
    data = load(config())
    first = data[1][0]
    os.utime(shard, (10, 10))
    assert np.array_equal(data[1][0], first)
    other = PNGS[2].content if len(PNGS[2].content) == len(PNGS[1].content) else sets.picture(1, 1).content
    sets.write_tar(shard, [*sets.members([PNGS[0], PNGS[1]._replace(content=other[::-1]), *PNGS[2:]])])
    with pytest.raises(InputError, match=r"set/0\.tar/0001\.png"):
        data[1]
    shard.unlink()
    with pytest.raises(InputError, match=r"unreadable image set/0\.tar/0001\.png: No such file"):
        data[1]
