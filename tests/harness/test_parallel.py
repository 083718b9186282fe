"""What a process of several knows before and beside the others; one process is as if there were no others."""

import json
import os
import subprocess
import sys
import threading
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from lamabench.harness import device, launcher, parallel, signals
from lamabench.harness.checks import check_batch
from lamabench.harness.training.averaging import averaging
from lamabench.harness.training.folder import process_seconds
from lamabench.kernels.errors import InputError
from lamabench.launch.cli import main
from torch import nn

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def place(monkeypatch):
    """Sets rank, number of processes and local rank."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def put(*values):
        for name, value in zip(VARIABLES, values, strict=False):
            monkeypatch.setenv(name, str(value))

    return put


def test_one_process_is_left_alone(place):
    net, tensor, error = nn.Linear(2, 2), torch.tensor([1.0, 3.0]), ValueError("own")
    assert (parallel.rank(), parallel.size()) == (0, 1)
    assert averaging(net, net, 3) is net
    parallel.mean_(tensor)
    assert tensor.tolist() == [1.0, 3.0] and parallel.most(7) == 7 and parallel.gather("a") == ["a"]
    assert parallel.everywhere(lambda: 5) == 5 and not torch.distributed.is_initialized()
    parallel.call("train", step=1)
    parallel.end(0)
    for block in (parallel.agreeing(), parallel.attending("train")):
        with pytest.raises(ValueError, match="own") as caught, block:
            raise error
        assert caught.value is error
    assert device.own_device("cuda:3") == "cuda:3" and not parallel.stopping()


def test_a_batch_has_equal_parts():
    check_batch(256, 8)
    with pytest.raises(InputError, match=r"train\.batch_size 256 is no multiple of the 6 processes"):
        check_batch(256, 6)


@pytest.mark.parametrize(("gpus", "local", "current"), [(4, 2, 2), (4, 0, 0), (1, 3, 0)])
def test_a_process_takes_the_gpu_of_its_local_rank(place, monkeypatch, gpus, local, current):
    """Where each task sees one GPU only, that is GPU 0 for all of them."""
    place(local, 4, local)
    taken = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    assert device.own_device("cuda") == "cuda" and taken == [current]
    assert device.own_device("cpu") == "cpu" and len(taken) == 1


@pytest.mark.parametrize(("name", "message"), [("cuda:1", "is one GPU, but the run has 4"), ("cuda", "has 2 GPUs")])
def test_no_gpu_for_a_process_is_one_line(place, monkeypatch, name, message):
    place(3, 4, 3)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(InputError, match=message):
        device.own_device(name)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"gpu": "y", "host": "b", "torch": "3"}, "process 1 on b has another torch than the first on a: 3, not 2"),
        ({}, "process 1 on a has the GPU of another process"),
        ({"gpu": "y", "device": "another GPU"}, ""),
    ],
)
def test_processes_that_differ_are_one_line(place, monkeypatch, other, message):
    first = {"host": "a", "device": "GPU", "gpu": "x", "torch": "2"}
    monkeypatch.setattr(parallel, "gather", lambda value: [first, {**first, **other}])
    place(0, 2)
    if not message:
        assert [one["device"] for one in parallel.facts("cpu", torch="2")] == ["GPU", "another GPU"]
        return
    with pytest.raises(InputError, match=message):
        parallel.facts("cpu", torch="2")


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_variable_that_is_no_number_is_one_line(place, monkeypatch, name):
    monkeypatch.setenv(name, "-1")
    with pytest.raises(InputError, match=f"variable {name} is a number, not '-1'"):
        assert parallel.rank() + parallel.size()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "3"}, "RANK is 3, but WORLD_SIZE says 1"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}, "RANK is 2, but WORLD_SIZE says 2"),
        ({"WORLD_SIZE": "2"}, "no RANK, MASTER_ADDR, MASTER_PORT: start the processes with torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": ""}, "no MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "x"}, "MASTER_PORT is a number, not 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "70000"}, "from 1 to 65535, not 70000"),
    ],
)
def test_half_an_environment_of_torchrun_is_one_line(place, monkeypatch, capsys, values, message):
    """A leftover RANK alone made a training that wrote nothing."""
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert main(["models"]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("lamabench: error: ") and err.count("\n") == 1 and not out


def test_a_signal_to_another_process_is_noted_here(place, monkeypatch):
    monkeypatch.setattr(parallel, "most", lambda number: 15)
    monkeypatch.setattr(signals, "_noted", [])
    assert parallel.stopping() and signals.asked() == 15
    assert parallel.stopping() and signals._noted == [15]


def test_what_ended_on_this_machine_is_gone():
    here, number = launcher.identity().rsplit(" ", 1)
    assert not launcher.gone(f"{here} {number}") and not launcher.gone(f"{here} 1")
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert launcher.gone(f"{here} {child.pid}")
    assert not launcher.gone(f"elsewhere{here} {child.pid}")


def test_the_first_process_tells_its_end_to_those_that_run(place, monkeypatch):
    """It waits for them, but not for one that ended."""
    place(0, 3)
    store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    store.set_timeout(timedelta(seconds=1))
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    here = launcher.identity().rsplit(" ", 1)[0]
    store.set("process/1", f"{here} {child.pid}")
    store.set("process/2", launcher.identity())
    monkeypatch.setattr(parallel, "_store", store)
    monkeypatch.setattr(parallel, "_sent", 0)
    naps: list[float] = []
    monkeypatch.setattr(parallel, "time", SimpleNamespace(sleep=naps.append, monotonic=lambda: sum(naps)))
    monkeypatch.setattr(parallel, "_ending", threading.Lock())
    parallel.end(3)
    assert sum(naps) == pytest.approx(2 * parallel.LEAVE_S, abs=parallel.LOOK_S)
    naps.clear()
    store.set("heard/2", "")
    monkeypatch.setattr(parallel, "_ending", threading.Lock())
    parallel.end(3)
    assert naps == [parallel.LOOK_S]
    assert json.loads(store.get("message/0")) == {"end": 3}


HANGS = """
import sys, threading, time
import torch.distributed
from lamabench.harness import parallel
parallel.LOOK_S, parallel.LEAVE_S, parallel.WORDS_S = 0.02, 0.2, 0.1
parallel._store = store = torch.distributed.HashStore()
store.set("process/0", sys.argv[1])
store.set("process/1", parallel.identity())
store.set("process/2", sys.argv[2])
with parallel.attending(sys.argv[3]):
    time.sleep(float(sys.argv[4]))
"""


@pytest.mark.parametrize(
    ("work", "seconds", "code"), [("train", 30, 1), ("bench", 30, 1), ("train", 0.1, 0), ("sample", 2, 0)]
)
def test_the_first_process_ends_in_a_call_that_another_one_never_answers(work, seconds, code):
    """NCCL's calls do not return if a process is gone, and their processes hear no signal. Samples need no other."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    here = launcher.identity().rsplit(" ", 1)[0]
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "3"}
    arguments = [launcher.identity(), f"{here} {child.pid}", work, str(seconds)]
    run = subprocess.run(
        [sys.executable, "-c", HANGS, *arguments], env=environment, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == code
    words = "lamabench: one of the 3 processes of the run is gone without a word (killed, perhaps for its memory)\n"
    assert run.stderr == (words if code else "")


def test_seconds_count_once_for_each_process():
    assert process_seconds([], 7.0) == 7.0
    assert process_seconds([{"from_step": 0}, {"from_step": 5}], 7.0) == 7.0  # of one process, as all were before
    stretches = [{}, {"from_seconds": 2.0, "processes": 4}, {"from_seconds": 5.0}]
    assert process_seconds(stretches, 6.0) == 2 + 4 * 3 + 1


def test_processes_that_never_meet_leave_no_port_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    monkeypatch.setattr(parallel, "START_S", 0.5)
    monkeypatch.setattr(parallel, "_store", None)
    with pytest.raises(parallel.Lost, match="for all 2 processes"):
        parallel.everywhere(lambda: None, tmp_path / "7_0.0.port")
    assert not list(tmp_path.iterdir())


def test_a_signal_that_comes_while_a_process_looks_for_others_stops_them_too(place, monkeypatch):
    """It comes when the process has looked for its own signals, and asks the store for those of the others."""
    store, numbers = {}, []

    def check(names):
        numbers[:] = [15]
        return False

    monkeypatch.setattr(parallel, "_store", SimpleNamespace(check=check, set=store.__setitem__))
    monkeypatch.setattr(signals, "_noted", numbers)
    place(1, 2)
    with pytest.raises(signals.Stopped, match="SIGTERM"), parallel.attending("sample"):
        parallel.heed()
    assert store == {"stop": "15"}
