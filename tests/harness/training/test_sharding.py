"""The shards of a training, without other processes: who has which rows, and files that survive a kill."""

import os
import shutil

import pytest
import torch
from lamabench.harness import parallel
from lamabench.harness.config import check_fit
from lamabench.harness.training import checkpoint, sharding, storage
from lamabench.harness.training.ema import EMA
from lamabench.kernels.errors import InputError
from lamabench.models.registry import build
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from trainings import EVERY, FAMILIES, make


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("dit", ["blocks.0"]),
        ("modern", ["blocks.0"]),
        ("lamamba", ["encoder.0.blocks.0", "encoder.1.blocks.0", "encoder.2.blocks.0", "middle.0",
                     "decoder.0.blocks.0", "decoder.0.blocks.1", "decoder.1.blocks.0", "decoder.1.blocks.1",
                     "decoder.2.blocks.0", "decoder.2.blocks.1"]),
        ("uvit", ["in_blocks.0", "mid_block", "out_blocks.0"]),
        ("adm", [*(f"input_blocks.{i}" for i in range(4)), "middle_block", *(f"output_blocks.{i}" for i in range(4))]),
    ],
)  # fmt: skip
def test_groups_are_the_blocks_that_a_network_runs(family, names):
    net = build(EVERY[family])
    modules = dict(net.named_modules())
    assert sharding.blocks(net) == [modules[name] for name in names]
    assert "run_block" not in vars(net)


@pytest.fixture
def alone():
    """A process group of this process."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_copies_of_a_network_have_its_shards(alone):
    """Copies hold other memory than the network. One with whole weights runs, and computes the same."""
    torch.manual_seed(0)
    net = build(FAMILIES["lamamba"])
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 500.0]), torch.tensor([1, 9])
    with torch.no_grad():
        expected = net(*inputs)
        weights = {name: value.clone() for name, value in net.state_dict().items()}
        assert sharding.assembled(net, "cpu") is net
        sharding.shard(net, "cpu", "eager")
        ema = EMA(net, 0.9, [0.5])
        for parameter in net.parameters():
            parameter.mul_(3)
        ema.update(0)
        for share, average in zip((0.1, 0.5), ema.nets.values(), strict=True):
            assert sharding.own_rows(average.state_dict()).keys() == weights.keys()
            for name, value in average.state_dict().items():
                torch.testing.assert_close(sharding.whole(value), (1 + 2 * share) * weights[name])
            average.load_state_dict({name: value / (1 + 2 * share) for name, value in average.state_dict().items()})
            whole = sharding.assembled(average, "cpu")
            assert whole is not None and not sharding.own_rows(whole.state_dict())
            torch.testing.assert_close(whole(*inputs), expected)


def sharded(rows):
    """A tensor that claims to be the rows of this process."""
    tensor = torch.arange(2.0 * rows).view(rows, 2)
    tensor.to_local = lambda: tensor
    return tensor


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_rows_are_those_of_torch(monkeypatch, count):
    monkeypatch.setattr(parallel, "size", lambda: count)
    for rows in range(1, 12):
        chunks = torch.arange(rows).chunk(count)
        for rank in range(count):
            monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
            own = sharding.own_rows({"a": sharded(rows), "b": torch.zeros(3)})
            assert own.keys() == {"a"}
            assert list(own["a"]) == (chunks[rank].tolist() if rank < len(chunks) else [])


def test_modes_of_a_training_in_shards():
    assert [sharding.sharded_mode("auto", device) for device in ("cpu", "cuda", "cuda:1")] == [
        "eager", "compile", "compile",
    ]  # fmt: skip
    assert sharding.sharded_mode("eager", "cuda") == "eager"
    config = make()
    config.run.parallel = "fsdp"
    for mode in ("reduce-overhead", "max-autotune", "whole-step"):
        config.train.compile = mode
        with pytest.raises(InputError, match=f"train.compile={mode} needs whole weights .*auto, compile or eager"):
            check_fit(config)
    config.run.parallel = "ddp"
    check_fit(config)


def saved(step):
    tensors = {"model/x": sharded(3) + step, "window": torch.tensor([1.0 * step])}
    tensors["model/x"].to_local = lambda: tensors["model/x"]
    return checkpoint.Checkpoint(step, 1.0, {}, "", tensors)


def test_a_kill_at_any_moment_leaves_a_checkpoint(tmp_path, monkeypatch):
    """A process ends, without a word, before or in the midst of each change of the disk of one save, which replaces a
    damaged checkpoint of the same step and removes one of an earlier step."""
    first = tmp_path / "first"
    for step in (10, 20, 30):
        checkpoint.save(first, saved(step))
    (first / "step-00000030" / "shard-1-of-1.safetensors").write_bytes(b"damaged")
    shutil.copytree(first / "step-00000020", first / "step-00000015")
    moments = 0
    ends = set()
    while True:
        folder = shutil.copytree(first, tmp_path / str(moments))
        if not (pid := os.fork()):
            _save_and_end_at(moments, folder)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found = next(one for one in checkpoint.newest(folder) if not isinstance(one, InputError))
        ends.add(found.step)
        assert found.tensors["window"].tolist() == [found.step]
        assert found.tensors["model/x"].equal(torch.arange(6.0).view(3, 2) + found.step)
        checkpoint.save(folder, saved(40))
        assert len(list(folder.iterdir())) == 2 and storage.step_of(storage.files(folder)[0]) == 40
        if code == 0:
            break
        assert code == 9
        moments += 1
    assert ends == {20, 30} and moments >= 7


def _save_and_end_at(moment, folder):
    """Save step 30 and end before the change of the disk number `moment`; removing a folder and writing a file have a
    first half."""
    changes = iter(range(100))

    def ending(act, half):
        def changed(*arguments, **more):
            if next(changes) == moment:
                os._exit(9)
            half(*arguments)
            if next(changes) == moment:
                os._exit(9)
            return act(*arguments, **more)

        return changed

    def begin(path, *arguments):
        path.write_bytes(b"half")

    def remove_one(path, *arguments):
        for one in list(path.iterdir())[:1] if path.is_dir() else []:
            one.unlink()

    try:
        os.replace = ending(os.replace, lambda *paths: None)
        shutil.rmtree = ending(shutil.rmtree, remove_one)
        storage._write_file = ending(storage._write_file, begin)
        checkpoint.save(folder, saved(30))
        os._exit(0)
    finally:
        os._exit(1)
