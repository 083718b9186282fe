"""Shards of WebDataset and data sets of Hugging Face hold the same images as a folder; `tarfile`, `datasets` and
hashlib are witnesses."""

import hashlib
import io
import json
import pickle
import socket
import tarfile
from dataclasses import replace
from pathlib import Path

import datasets
import image_sets as sets
import numpy as np
import pytest
import torch
from lamabench.harness.config import Config
from lamabench.harness.data import packed as packed_module
from lamabench.harness.data.images import ImageData, glance, load
from lamabench.harness.data.items import TrainItems, whole
from lamabench.harness.data.summary import summary
from lamabench.harness.diffusion.objective import objective
from lamabench.harness.scoring.reference import reference_of
from lamabench.harness.sections import DataConfig, EvaluateConfig, ObjectiveConfig, RunConfig
from lamabench.kernels.errors import InputError
from lamabench.models.registry import presets
from PIL import Image
from torch.utils.data import DataLoader

PACKED = ("webdataset", "hf", "parquet")
IMAGES = sets.pictures()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture(autouse=True)
def no_network(monkeypatch) -> None:
    """Any look-up of a host fails. Sockets between processes have none."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))


def write(root: Path, kind: str, images=IMAGES, **more) -> DataConfig:
    """A set of a kind, `parquet` among them, in a folder of `root`."""
    path = root / kind
    if kind == "folder":
        sets.write_folder(path, images)
    elif kind == "webdataset":
        sets.write_shards(path, images)
    elif kind == "hf":
        sets.write_saved(path, train=images)
    else:
        sets.write_parquet(path, train=images)
    fields = {"size": 8, "channels": 3, "num_classes": 2, **more}
    return DataConfig("hf" if kind == "parquet" else kind, path=str(path), **fields)


def items(data: ImageData) -> TrainItems:
    goal = objective(ObjectiveConfig())
    return TrainItems(data, goal, seed=3, flip=True, class_dropout=0.3, null_class=2)


def batches(data: ImageData, **options) -> list[dict[str, torch.Tensor]]:
    parts = [range(i, i + 5) for i in range(0, 30, 5)]
    return list(DataLoader(items(data), batch_sampler=parts, collate_fn=whole, **options))


def equal(one: list[dict[str, torch.Tensor]], other: list[dict[str, torch.Tensor]]) -> bool:
    pairs = [(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in a]
    return [{*a} for a in one] == [{*b} for b in other] and all(torch.equal(a, b) for a, b in pairs)


def pixels(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_has_the_tensors_labels_and_items_of_the_folder(tmp_path, channels):
    folder = load(write(tmp_path, "folder", channels=channels))
    expected, every = batches(folder), np.arange(len(IMAGES))
    for kind in PACKED:
        data = load(write(tmp_path, kind, channels=channels))
        assert torch.equal(data.images_at(every), folder.images_at(every)) and data[7][1] == folder[7][1] == 1
        assert data.labels.tolist() == folder.labels.tolist() and data.labels.dtype == np.int64
        assert equal(batches(data), expected)


@pytest.mark.parametrize("kind", PACKED)
def test_processes_have_the_items_of_one(tmp_path, kind):
    """Forked processes share the set; a spawned one gets it as a pickle, which holds no image."""
    data = load(write(tmp_path, kind))
    expected = batches(data)
    assert equal(batches(data, num_workers=2, multiprocessing_context="fork"), expected)
    content = pickle.dumps(data)
    assert len(content) < 6000 and equal(batches(pickle.loads(content)), expected)


def test_pixels_are_those_that_the_libraries_decode(tmp_path):
    square = [sets.picture(seed, seed % 2, ("png", "PNG", "RGB", (8, 8))) for seed in range(6)]
    saved, shards = write(tmp_path, "hf", square), write(tmp_path, "webdataset", square)
    rows = datasets.load_from_disk(saved.path)["train"]
    for i, (image, label) in enumerate(load(saved)):
        assert np.array_equal(pixels(image), np.asarray(rows[i]["picture"])) and label == rows[i]["kind"]
    pairs = []
    for shard in sorted(Path(shards.path or "").iterdir()):
        with tarfile.open(shard) as archive:
            files = {member.name: archive.extractfile(member).read() for member in archive}  # pyright: ignore
            pairs += [(files[name], int(files[name.replace("png", "cls")])) for name in files if name.endswith("png")]
    for (image, label), (content, number) in zip(load(shards), pairs, strict=True):
        assert np.array_equal(pixels(image), np.asarray(Image.open(io.BytesIO(content)))) and label == number


def test_the_fingerprint_is_of_the_bytes_and_the_labels(tmp_path):
    """Not of the kind, the number of shards, the names, the size or the number of classes."""
    rows = b"".join(hashlib.sha256(one.content).digest() + one.label.to_bytes(8, "little") for one in IMAGES)
    expected = hashlib.sha256(rows).hexdigest()[:16]
    for kind in PACKED:
        config = write(tmp_path, kind)
        assert load(config).fingerprint == summary(config).fingerprint == expected
        assert load(replace(config, size=4, channels=1, num_classes=0)).fingerprint == expected
    other = sets.write_shards(tmp_path / "other", IMAGES, shards=1)
    assert load(DataConfig("webdataset", path=str(other), num_classes=2)).fingerprint == expected
    changed = {
        "label": [IMAGES[0]._replace(label=1), *IMAGES[1:]],
        "content": [sets.picture(99), *IMAGES[1:]],
        "order": [IMAGES[1], IMAGES[0], *IMAGES[2:]],
    }
    for kind in PACKED[:2]:
        for name, images in changed.items():
            assert load(write(tmp_path / name, kind, images)).fingerprint != expected


def test_scores_see_one_reference_in_shards_and_in_a_data_set(tmp_path):
    """Their contents are the same. Their names are those of the kinds, unless `data.name` gives them one."""
    model = replace(presets()["dit_nano"].config, input_size=8, in_channels=3, num_classes=2)
    configs = [
        Config(model=model, data=write(tmp_path, kind), run=RunConfig(root=str(tmp_path)), evaluate=EvaluateConfig())
        for kind in ("folder", *PACKED)
    ]
    folder, *others = (reference_of(config) for config in configs)
    assert len({one.fingerprint for one in others}) == 1 and folder.fingerprint != others[0].fingerprint
    assert [one.name for one in others] == ["webdataset", "hf", "hf"]


# The cache


@pytest.mark.parametrize("kind", PACKED)
def test_the_second_look_decodes_nothing(tmp_path, kind, monkeypatch):
    config = write(tmp_path, kind)
    before = glance(config)
    assert before == ((None, None) if kind == "webdataset" else (12, None))
    first = load(config)
    monkeypatch.setattr(packed_module, "decode", lambda content: pytest.fail("an image was decoded"))
    monkeypatch.setenv("LAMABENCH_NVRTC_CACHE_DIR", str(tmp_path / "compiled"))  # as a training sets it on a GPU
    assert glance(config) == (12, first.fingerprint) and load(config).fingerprint == first.fingerprint
    assert summary(config).images == 12
    with pytest.raises(InputError, match=r"data.num_classes is 5, but .* has 2 classes; set it to 2"):
        glance(replace(config, num_classes=5))


@pytest.mark.parametrize("kind", ["webdataset", "hf"])
def test_a_changed_file_is_read_again_and_a_fresh_one_is_not_cached(tmp_path, kind):
    config = write(tmp_path, kind)
    first = load(config).fingerprint
    for file in Path(config.path or "").rglob("*"):
        if file.suffix in (".tar", ".arrow"):
            file.touch()
    assert glance(config).fingerprint is None
    assert load(config).fingerprint == first and glance(config).fingerprint is None  # it may change again in this tick


def test_a_killed_reader_keeps_the_shards_that_it_has_read(tmp_path, monkeypatch):
    config = write(tmp_path, "webdataset")
    decode, count = packed_module.decode, iter(range(100))
    monkeypatch.setattr(packed_module, "decode", lambda content: decode(content) if next(count) < 6 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load(config)
    decoded = []
    monkeypatch.setattr(packed_module, "decode", lambda content: decoded.append(content) or decode(content))
    load(config)
    assert len(decoded) == 8  # the first shard had four images


def test_a_cache_that_is_damaged_only_costs_time(tmp_path):
    config = write(tmp_path, "webdataset")
    first = load(config).fingerprint
    for file in (tmp_path / "cache" / "lamabench" / "data").iterdir():
        file.write_bytes(file.read_bytes()[:50])
    assert load(config).fingerprint == first


def test_a_large_set_reports_its_progress(tmp_path, monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(packed_module, "SAY_S", 0.0)
    for kind in ("webdataset", "hf"):
        config = write(tmp_path, kind)
        load(config, lines.append)
    assert f"reading shard 2 of 3 of {tmp_path}/webdataset" in lines
    assert f"reading 12 of 12 images of {tmp_path}/hf/train" in lines


# Damage


@pytest.mark.parametrize("kind", PACKED)
def test_damaged_images_are_named(tmp_path, kind):
    broken = [*IMAGES[:3], IMAGES[3]._replace(content=IMAGES[3].content[:-60]), *IMAGES[4:]]
    name = {
        "webdataset": "webdataset/train-0000.tar/0003.png",
        "hf": "hf/train/row 3",
        "parquet": "parquet/train/row 3",
    }
    config = write(tmp_path, kind, broken)
    with pytest.raises(InputError, match=f"^unreadable image .*{name[kind]}: image file is truncated") as caught:
        load(config)
    assert "\n" not in str(caught.value)
    result = summary(config)
    (place,) = result.unreadable
    assert name[kind].endswith(place) and result.fingerprint is None and result.images == 12
    assert result.problem() == "1 of 12 images are unreadable" and json.dumps(result.as_dict())
    with pytest.raises(InputError, match=r"^2 of 12 images are unreadable \(.*(0003|row 3).*; .*(0005|row 5)"):
        load(write(tmp_path / "two", kind, [*broken[:5], IMAGES[5]._replace(content=b"text"), *IMAGES[6:]]))


def test_sixteen_bits_and_other_formats_are_damage_as_in_a_folder(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(file, "PNG")
    deep = sets.Picture(file.getvalue(), "png", 0)
    for kind in ("folder", *PACKED):
        with pytest.raises(InputError, match=r"unreadable image .*: mode I;16, expected 8 bits per channel"):
            load(write(tmp_path, kind, [deep, *IMAGES[1:]]))
    gif = io.BytesIO()
    Image.new("L", (8, 8)).save(gif, "GIF")
    for kind in PACKED:
        with pytest.raises(InputError, match="cannot identify image file"):
            load(write(tmp_path / "gif", kind, [sets.Picture(gif.getvalue(), "png", 0), *IMAGES[1:]]))
