"""run.workers=auto by hand, and its processes."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from lamabench.harness.config import Config
from lamabench.harness.data import workers as module
from lamabench.harness.data.workers import cores, workers
from lamabench.harness.sections import DataConfig, RunConfig, TrainConfig


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many cores, free bytes of shared memory, and variables of the environment."""

    def become(count=16, free=2**36, **variables):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK", "SLURM_NTASKS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr("os.sched_getaffinity", lambda _: range(count))
        monkeypatch.setattr(module, "SHARED", "/")
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))

    return become


def config(workers: object = "auto", size: int = 32, batch_size: int = 256, **settings: str) -> Config:
    data = DataConfig("npz", size=size, channels=3)
    return Config(None, data, train=TrainConfig(batch_size=batch_size, **settings), run=RunConfig(workers=workers))


def test_cores(machine):
    for (count, variables), expected in {
        (16, ()): 16,
        (1, ()): 1,
        (16, (("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 4))): 4,  # torchrun
        (16, (("WORLD_SIZE", 8), ("LOCAL_WORLD_SIZE", 4))): 4,
        (2, (("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 4))): 1,
        (8, (("SLURM_CPUS_PER_TASK", 8), ("SLURM_NTASKS", 1))): 8,
        (64, (("SLURM_CPUS_PER_TASK", 8), ("SLURM_NTASKS", 1))): 8,  # a node that does not confine its tasks
        # A task of SLURM for each GPU, and torchrun in one task.
        (8, (("SLURM_CPUS_PER_TASK", 8), ("SLURM_NTASKS", 4), ("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 4))): 8,
        (32, (("SLURM_CPUS_PER_TASK", 32), ("SLURM_NTASKS", 1), ("WORLD_SIZE", 4), ("LOCAL_WORLD_SIZE", 4))): 8,
    }.items():
        machine(count, **dict(variables))
        assert cores() == expected, (count, variables)


def test_auto(machine):
    machine()
    assert workers(config(), 1000, "cuda") == 15
    assert workers(config(), 1000, "cpu") == 0
    assert workers(config(), 100, "cuda") == 0  # 79 million values
    assert workers(config(3), 1000, "cpu") == workers(config(3), 1, "cuda") == 3
    assert workers(config(0), 1000, "cuda") == 0
    machine(128)
    assert workers(config(), 1000, "cuda:1") == 16
    machine(1)
    assert workers(config(), 1000, "cuda") == 0
    machine(16, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2)
    assert workers(config(), 1000, "cuda") == 7


def test_auto_leaves_room_in_shared_memory(machine):
    """A batch of 256 images of 256 px and their noise has 403 MB, and each process has two of them."""
    machine()
    assert workers(config(size=256), 1000, "cuda") == 5  # of 4 GiB
    assert workers(config(size=256, noise="gpu"), 1000, "cuda") == 10
    machine(free=2**32)
    assert workers(config(size=256), 1000, "cuda") == 2
    machine(free=2**26)  # what Docker gives: half of it is for batches of 6.3 MB
    assert workers(config(), 1000, "cuda") == 2 and workers(config(size=256), 1000, "cuda") == 0
    machine(free=2**32, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2)
    assert workers(config(size=256), 1000, "cuda") == 2  # half as many images, and half of the memory
    assert workers(config(size=256, batch_size=64), 1000, "cuda") == 7


KILLED = """
import os, signal
from torch.utils.data import DataLoader
from lamabench.harness.data.workers import start

loader = iter(DataLoader(range(1000), num_workers=2, worker_init_fn=start))
next(loader)
print(*(worker.pid for worker in loader._workers), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_they_end_at_once_with_a_killed_training():
    done = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert done.returncode == -signal.SIGKILL
    workers, end = [Path("/proc", pid, "stat") for pid in done.stdout.split()], time.monotonic() + 2
    assert len(workers) == 2
    while any(map(alive, workers)):
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(stat: Path) -> bool:
    try:
        return stat.read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
