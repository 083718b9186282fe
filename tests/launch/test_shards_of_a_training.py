"""A training in shards (FSDP2, with gloo on the CPU): the numbers of whole weights, and checkpoints in shards."""

import random
import re
import shutil
import signal
import time

import pytest
from lamabench.harness.run import read_run
from lamabench.harness.training import checkpoint, storage
from lamabench.kernels.errors import InputError
from lamabench.launch import prune
from processes import losses, same, saved, training
from safetensors.torch import load_file

STEPS = 40
END = f"train.steps={STEPS}"
FSDP = ("run.parallel=fsdp", END)
# Rows that two or four processes cannot share evenly, several passes a step, clipping, and a second average.
OPTIONS = ["train.clip=0.5", "train.ema_decays=[0.5]", "run.micro_batch=2", "run.checkpoint_every=10"]
LAMAMBA = [
    "model=lamamba_nano", "model.dim=8", "model.num_heads=2", "model.d_state=2", "model.window_size=2",
    "model.depths=[1,1]",
]  # fmt: skip


def close(folder, other, step):
    """Losses and averaged weights are the same except for rounding."""
    assert losses(folder) == pytest.approx(losses(other), rel=1e-4)
    ours, theirs = (load_file(one / "weights" / storage.file_name(step)) for one in (folder, other))
    assert ours.keys() == theirs.keys()
    # Not each by itself: the gradient of the keys' bias is rounding alone, and Adam makes steps of it.
    differences = sum((ours[name] - value).square().sum() for name, value in theirs.items())
    assert differences < 1e-6 * sum(value.square().sum() for value in theirs.values())


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The training of one process."""
    run = start(tmp_path_factory.mktemp("one"), *OPTIONS, END)
    assert run.codes == [0], run.text("err")
    return training(run.folder)


@pytest.fixture(scope="module")
def sharded(start, tmp_path_factory):
    """The same training of two processes, in shards."""
    run = start(tmp_path_factory.mktemp("two"), *OPTIONS, *FSDP, count=2)
    assert run.codes == [0, 0], [run.text("err", rank) for rank in (0, 1)]
    return training(run.folder)


def test_shards_learn_what_whole_weights_do(whole, sharded):
    assert sharded.name == whole.name  # in no key
    close(sharded, whole, STEPS)
    (stretch,) = read_run(sharded).last("train").stretches
    assert (stretch["parallel"], stretch["processes"], stretch["compile"]) == ("fsdp", 2, "eager")


@pytest.mark.parametrize(
    ("count", "model", "options"),
    [
        (2, LAMAMBA, ["model.dropout=0.1", "train.checkpointing=true"]),
        (2, ["model=unet_nano"], ["model.dropout=0.1"]),
    ],
)
def test_every_family_learns_the_same_in_shards(start, tmp_path, count, model, options):
    """Dropout is that of DDP, because both depend on the number of processes alike."""
    words = [*options, "train.steps=8"]
    runs = [
        start(tmp_path / kind, f"run.parallel={kind}", *words, model=model, count=count) for kind in ("ddp", "fsdp")
    ]
    for run in runs:
        assert run.codes == [0] * count, [run.text("err", rank) for rank in range(count)]
        assert run.text("out", 1) == run.text("err", 1) == ""
    close(training(tmp_path / "fsdp"), training(tmp_path / "ddp"), 8)


def test_a_killed_process_ends_the_others_and_the_run_goes_on_bit_for_bit(start, sharded, tmp_path):
    run = start(tmp_path, *OPTIONS, *FSDP, count=2)
    run.until(lambda: saved(tmp_path))
    run.kill(signal.SIGKILL, 1)
    started = time.monotonic()
    assert run.codes == [1, -9] and time.monotonic() - started < 15
    line = run.text("err").splitlines()[-1]
    assert line.startswith("lamabench train: one of the 2 processes of the run is gone"), run.text("err")
    folder = storage.files(training(tmp_path) / "checkpoints")[0]
    leftover = folder.with_name(f".{folder.name[:-2]}30.tmp")  # of a kill while a checkpoint is written
    shutil.copytree(folder, leftover)
    run = start(tmp_path, *OPTIONS, *FSDP, count=2)
    assert run.codes == [0, 0] and f"continuing at step {storage.step_of(folder)} of" in run.text("err")
    same(training(tmp_path), sharded, STEPS)
    assert not leftover.exists() and saved(tmp_path) == [30, 40]


@pytest.mark.soak
def test_kills_at_any_moment_move_no_bit(start, tmp_path):
    """A checkpoint after every step, so that most kills come while one is written."""
    words = ["run.parallel=fsdp", END, "run.checkpoint_every=1"]
    folder = tmp_path / "killed"
    assert start(tmp_path / "whole", *words, count=2).codes == [0, 0]
    draw = random.Random(0)
    for _ in range(12):
        run, before = start(folder, *words, count=2), saved(folder)
        run.until(lambda before=before: saved(folder) != before)
        time.sleep(draw.uniform(0, 0.1))
        run.kill(signal.SIGKILL, *draw.choice([(0,), (1,), (0, 1)]))
        assert -9 in run.codes and "falling back" not in run.text("err")
    assert start(folder, *words, count=2).codes == [0, 0]
    same(training(folder), training(tmp_path / "whole"), STEPS)


def test_checkpoints_go_on_at_another_number_of_processes(start, whole, tmp_path):
    """Two in shards, then one, then two in shards, then DDP. One of the shards is lost, another damaged."""

    def until(steps, count, *words):
        run = start(tmp_path, *OPTIONS, f"train.steps={steps}", *words, count=count)
        assert run.codes == [0] * count, [run.text("err", rank) for rank in range(count)]
        return run.text("err")

    until(20, 2, "run.parallel=fsdp")
    checkpoints = training(tmp_path) / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000010", "step-00000020"]
    (checkpoints / "step-00000020" / "shard-2-of-2.safetensors").unlink()
    err = until(30, 1, "run.parallel=fsdp")
    assert re.search(r"step-00000020 is damaged: shard-2-of-2.safetensors is missing; falling back to the one", err)
    assert "continuing at step 10 of 30" in err
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "step-00000020.safetensors",
        "step-00000030.safetensors",
    ]
    assert "continuing at step 30 of 35" in until(35, 2, "run.parallel=fsdp")
    shard = checkpoints / "step-00000035" / "shard-1-of-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
    err = until(STEPS, 2)
    assert "step-00000035/shard-1-of-2.safetensors is truncated or damaged: its bytes have changed; falling" in err
    assert "continuing at step 30 of" in err
    close(training(tmp_path), whole, STEPS)
    stretches = read_run(training(tmp_path)).last("train").stretches
    assert [(one.get("processes", 1), one.get("parallel")) for one in stretches] == [
        (2, "fsdp"), (1, None), (2, "ddp"),
    ]  # fmt: skip


def test_a_checkpoint_in_shards_has_whole_tensors(sharded, whole):
    for step in (30, STEPS):
        ours, theirs = (checkpoint.of_step(folder / "checkpoints", step) for folder in (sharded, whole))
        saved, expected = checkpoint.load(ours), checkpoint.load(theirs)
        assert {name: v.shape for name, v in saved.tensors.items()} == {n: v.shape for n, v in expected.tensors.items()}
        shapes = checkpoint.load(ours, tensors=False).tensors
        assert {name: v.shape for name, v in shapes.items()} == {name: v.shape for name, v in saved.tensors.items()}
        name = next(one for one in saved.tensors if one.startswith("model/y_embedder"))
        rows = storage.read_rows(ours, {name: range(4, 8)})
        assert rows.keys() == saved.tensors.keys() and rows[name].equal(saved.tensors[name][4:8])
        assert storage.read_rows(theirs, {name: range(4, 8)})[name].equal(expected.tensors[name][4:8])
        assert name not in storage.read_rows(ours, {name: range(4, 4)})
    live, average = (checkpoint.load_weights(sharded, STEPS, kind) for kind in ("live", "ema@0.5"))
    assert live.tensors.keys() == average.tensors.keys() and live.stretches == average.stretches
    assert checkpoint.trained_on(sharded) == checkpoint.trained_on(whole)
    modes = {path.stat().st_mode for path in sharded.glob("checkpoints/*/*")}
    assert modes == {path.stat().st_mode for path in whole.glob("checkpoints/*.safetensors")}


def test_a_folder_of_shards_is_one_checkpoint(sharded, tmp_path):
    folder = shutil.copytree(sharded, tmp_path / "a") / "checkpoints"
    newest, before = storage.files(folder)
    assert [storage.step_of(path) for path in (newest, before)] == [STEPS, 30]
    assert storage.size(newest) == sum(path.stat().st_size for path in newest.iterdir())
    storage.link(newest, tmp_path)
    storage.link(newest, tmp_path)
    second = tmp_path / newest.name
    assert [path.stat().st_ino for path in second.iterdir()] == [path.stat().st_ino for path in newest.iterdir()]
    assert checkpoint.load(second).step == STEPS
    newest.rename(other := folder / "step-00000061")
    with pytest.raises(InputError, match=rf"{other} was renamed: it is of step {STEPS}"):
        checkpoint.load(other)
    shutil.rmtree(other)
    saved = checkpoint.load(before)
    saved.step = 50
    checkpoint.save(folder, saved)  # of one process
    assert [path.name for path in storage.files(folder)] == ["step-00000050.safetensors", "step-00000030"]
    prune.Leftover(folder, (before,), 0.0, 0.0).delete()
    assert [path.name for path in folder.iterdir()] == ["step-00000050.safetensors"]
