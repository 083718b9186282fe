"""Files of a training are complete or missing, readable by others, and belong to one model and one set of data."""

import errno
import json
import os
import resource
import stat
from dataclasses import field, make_dataclass, replace

import numpy as np
import pytest
import torch
from lamabench.harness.training import checkpoint, storage
from lamabench.kernels.errors import InputError
from lamabench.models import registry
from lamabench.models.registry import build
from safetensors.torch import save_file
from trainings import DIT, LAMAMBA, longer, make, metrics, tensors, trained


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_checkpoint_falls_back_and_says_so(tmp_path, capsys, damage):
    folder, config = trained(tmp_path / "a", make()), make(steps=8)
    expected = tensors(trained(tmp_path / "whole", config))
    newest, before = checkpoint.files(folder / "checkpoints")
    with open(newest, "r+b") as file:
        if damage == "flip":  # one bit of a tensor
            file.seek(-9, 2)
            (byte,) = file.read(1)
            file.seek(-9, 2)
            file.write(bytes([byte ^ 4]))
        else:
            file.truncate(newest.stat().st_size // 2 if damage == "cut" else 0)
    with pytest.raises(InputError, match=f"{newest.name} is truncated or damaged"):
        checkpoint.load(newest)
    trained(folder, config)
    words = capsys.readouterr().err
    assert "falling back to the one before" in words and f"continuing at step {int(before.stem[5:])} of 8" in words
    assert all(torch.equal(v, expected[k]) for k, v in tensors(folder).items())


def test_damaged_checkpoints_do_not_replace_complete_ones(tmp_path, capsys):
    """If only damaged files exist, training starts again with a message and keeps its own last two checkpoints."""
    config = make()
    expected = tensors(trained(tmp_path / "whole", config))
    folder = tmp_path / "a"
    (folder / "checkpoints").mkdir(parents=True)
    for step in (4, 6):
        (folder / "checkpoints" / checkpoint.file_name(step)).write_bytes(b"")
    trained(folder, longer(config, 2))
    assert "training starts again at step 0 of 2" in capsys.readouterr().err
    assert [path.name for path in checkpoint.files(folder / "checkpoints")] == ["step-00000002.safetensors"]
    trained(folder, config)
    assert "continuing at step 2 of 6" in capsys.readouterr().err and len(checkpoint.files(folder / "checkpoints")) == 2
    assert all(torch.equal(v, expected[k]) for k, v in tensors(folder).items())


def test_other_files_are_not_checkpoints(tmp_path):
    path = tmp_path / "step-00000001.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="not a lamabench checkpoint"):
        checkpoint.load(path)
    with pytest.raises(InputError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "nothing.safetensors")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    folder = trained(tmp_path, make())
    with pytest.raises(InputError, match="of another model: depth 1 there, 2 here"):
        trained(folder, make(replace(DIT, depth=2), steps=8))
    with pytest.raises(InputError, match="of another model: depth 1 there, 2 here"):
        trained(folder, make(replace(DIT, depth=2)))  # even if nothing is left to do
    with pytest.raises(InputError, match="family dit there, lamamba here"):
        checkpoint.load_weights(folder, 6, model=LAMAMBA)


def test_other_data_behind_the_same_name_are_refused(tmp_path):
    folder, config = trained(tmp_path, make()), make(steps=8)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=r"trained on other data.*data\.name"):
        trained(folder, replace(config, data=replace(config.data, kind="synthetic")))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("kind", ["checkpoint", "weights"])
def test_no_incomplete_file_remains(tmp_path, monkeypatch, kind):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        if kind == "checkpoint":
            checkpoint.save(tmp_path, checkpoint.Checkpoint(1, 0.0, {}, "", {"x": torch.zeros(1)}))
        else:
            checkpoint.keep(tmp_path, checkpoint.Weights(1, 0.0, {}, "", {"x": torch.zeros(1)}))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("kind", ["checkpoint", "weights"])
@pytest.mark.parametrize("room", [0, 100, 40_000])
def test_a_full_disk_is_an_error_of_the_system(tmp_path, kind, room):
    """Commands and jobs tell it by its number. A limit of the size of files stands for the disk."""
    files = {"x": torch.zeros(10_001)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError) as caught:
            if kind == "checkpoint":
                checkpoint.save(tmp_path, checkpoint.Checkpoint(1, 0.0, {}, "", files))
            else:
                checkpoint.keep(tmp_path, checkpoint.Weights(1, 0.0, {}, "", files))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG and caught.value.filename is None
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_files_contain_no_pickle(tmp_path):
    folder = trained(tmp_path, make(steps=2))
    for path in (*checkpoint.files(folder / "checkpoints"), *checkpoint.files(folder / "weights")):
        head = path.read_bytes()
        length = int.from_bytes(head[:8], "little")
        assert "lamabench" in json.loads(head[8 : 8 + length])["__metadata__"]
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} == {".jsonl", ".npz", ".safetensors"}
    with np.load(folder / "real.npz", allow_pickle=False) as few:
        assert few["images"].dtype == np.uint8 and few["labels"].dtype == np.int64


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_of_files_follow_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        folder = trained(tmp_path, make(steps=2))
    finally:
        os.umask(before)
    for path in folder.rglob("step-*"):
        assert stat.S_IMODE(path.stat().st_mode) == mode, path


def test_weights_of_a_moment(tmp_path):
    """Averaged weights exist for every kept moment, live ones for complete checkpoints. A network can load them."""
    config = make(snapshots=[1, 3])
    folder = trained(tmp_path / "a", config)
    assert checkpoint.moments(folder) == [1, 3, 6]
    for step in (1, 3, 6):
        alone = tensors(trained(tmp_path / str(step), longer(config, step, snapshots=[])))
        weights = checkpoint.load_weights(folder, step, model=DIT)
        build(DIT).load_state_dict(weights.tensors)
        assert weights.step == step and weights.seconds > 0 and weights.fingerprint and weights.stretches
        assert all(torch.equal(v, alone[f"ema/{name}"]) for name, v in weights.tensors.items())
    live = checkpoint.load_weights(folder, 6, "live").tensors
    assert all(torch.equal(v, tensors(folder)[f"model/{name}"]) for name, v in live.items())
    assert any(not torch.equal(v, weights.tensors[name]) for name, v in live.items())
    assert weights.loss == metrics(folder)[-1]["loss"]


def test_several_averages_of_a_moment(tmp_path):
    """Each is that of a training whose `ema_decay` it is, in a file of weights and in a checkpoint, and stays after the
    file of weights was lost."""
    folder = trained(tmp_path / "a", make(snapshots=[3], ema_decays=[0.5, 0.99]))
    for decay in (0.5, 0.99):
        alone = trained(tmp_path / str(decay), make(snapshots=[3], ema_decay=decay))
        for step in (3, 6):
            weights = checkpoint.load_weights(folder, step, f"ema@{decay}", DIT).tensors
            expected = checkpoint.load_weights(alone, step, "ema", DIT).tensors
            assert weights.keys() == expected.keys()
            assert all(torch.equal(v, expected[name]) for name, v in weights.items())
    whole = checkpoint.load_weights(folder, 6, "ema@0.50").tensors
    (folder / "weights" / checkpoint.file_name(6)).unlink()
    assert checkpoint.load_weights(folder, 6, "ema@0.5").tensors.keys() == whole.keys()
    trained(folder, make(snapshots=[3], ema_decays=[0.5, 0.99]))  # the moment is kept again
    again = checkpoint.load_weights(folder, 6, "ema@0.5", DIT).tensors
    assert all(torch.equal(v, again[name]) for name, v in whole.items())
    for step in (3, 6):
        with pytest.raises(InputError, match=r"step-0000000\d.* has no weights ema@0.9; train.ema_decays lists"):
            checkpoint.load_weights(folder, step, "ema@0.9")


@pytest.mark.parametrize(
    ("step", "kind", "message"),
    [
        (2, "ema", "no averaged weights of step 2; the nearest kept: 1 and 3"),
        (9, "ema", "no averaged weights of step 9; the nearest kept: 6"),
        (3, "live", r"no live weights of step 3 .*last 2 checkpoints have them\); the nearest kept: 6"),
        (3, "lively", "unknown sample.weights 'lively' .*choices: ema, live"),
    ],
)
def test_missing_weights_are_one_line(tmp_path, step, kind, message):
    folder = trained(tmp_path, make(checkpoint_every=6, snapshots=[1, 3]))
    with pytest.raises(InputError, match=message) as caught:
        checkpoint.load_weights(folder, step, kind)
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_not_read(tmp_path):
    folder = trained(tmp_path, make())
    (path,) = checkpoint.files(folder / "weights")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="truncated or damaged"):
        checkpoint.load_weights(folder, 6)


JOINED = field(default="new", metadata={"since": "old"})
Later = make_dataclass("Later", [("size", int, 3), ("out_channels", int, 2), ("wide", str, JOINED)])


@pytest.mark.parametrize(
    ("there", "here", "differ"),
    [
        ({"size": 3}, Later(wide="old"), None),
        ({"size": 3, "wide": "old"}, Later(wide="old"), None),
        ({"size": 3}, Later(), "wide None there, new here"),
        ({"size": 3, "wide": "new"}, Later(wide="old"), "wide new there, None here"),
        ({"size": 4}, Later(wide="old"), "size 4 there, 3 here"),
    ],
)
def test_a_field_that_was_added_later_means_as_before(monkeypatch, tmp_path, there, here, differ):
    family = registry.Family("custom", Later, registry.Backbone, {})
    monkeypatch.setattr(registry, "_FAMILIES", {**registry.families(), "custom": family})
    saved = checkpoint.Checkpoint(1, 0.0, {"family": "custom", "out_channels": 2, **there}, "", {})
    if differ is None:
        checkpoint.check_model(saved, registry.describe(here), tmp_path)
    else:
        with pytest.raises(InputError, match=differ):
            checkpoint.check_model(saved, registry.describe(here), tmp_path)
