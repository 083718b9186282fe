"""Timing of calls, and other processes that disturb it."""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from functools import partial

import numpy as np
import pytest
import torch
from lamabench.harness import signals
from lamabench.harness.measure import timing


def test_quantiles_against_numpy():
    times = list(np.random.default_rng(0).exponential(size=23))
    for name, value in timing.quantiles(times).items():
        assert value == pytest.approx(np.quantile(times, int(name[1:3]) / 100))
    assert set(timing.quantiles([3.0]).values()) == {3.0}


def test_calls_are_bounded_by_number_and_time():
    calls = []

    def timed(seconds, repeats):
        calls.clear()
        row = timing.time_calls(lambda: calls.append(0), "cpu", 3, repeats, seconds)
        return len(calls) - row["repeats"], row["repeats"], row["peak_memory_gib"]

    assert timed(10.0, 20) == (3, 20, None)
    assert timed(1e-9, 20) == (1, 5, None)  # one call for warm-up and five measured calls, however long they take
    assert timed(1e-9, 2) == (1, 2, None)


@pytest.mark.skipif(not timing.CPU_TIMES.exists(), reason="needs Linux's /proc/stat")
def test_a_busy_host_is_reported():
    cores = os.cpu_count() or 1
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores // 2 + 1)]
    try:
        row = timing.time_calls(lambda: time.sleep(0.1), "cpu", 1, 10, 10.0)
    finally:
        for other in others:
            other.kill()
            other.wait()
    match = re.fullmatch(rf"other processes kept ([0-9.]+) of {cores} cores busy", row["disturbed"] or "")
    assert match and cores / 4 < float(match[1]) <= cores + 0.1


@pytest.mark.parametrize(
    ("others", "seconds", "words"),
    [(2.0, 1.0, "2.0 of 4"), (1.1, 1.0, "1.1 of 4"), (0.9, 1.0, None), (2.0, 0.2, None), (None, 1.0, None)],
)
def test_the_work_of_other_processes_is_neither_idle_time_nor_our_own(others, seconds, words, tmp_path, monkeypatch):
    """The columns are user, nice, system, idle, wait, two kinds of interrupts, steal and guests, in 1/100 s."""
    monkeypatch.setattr(timing, "CPU_TIMES", tmp_path / "stat")
    monkeypatch.setattr(timing, "os", types.SimpleNamespace(cpu_count=lambda: 4, sysconf=lambda name: 100))
    clocks = {"perf_counter": 0.0, "process_time": 0.0}
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(**{name: partial(clocks.get, name) for name in clocks}))

    def written(user, nice, system, steal):
        if others is not None:
            (tmp_path / "stat").write_text(f"cpu  {user} {nice} {system} 999 888 0 0 {steal} 77 66\ncpu0 1 2 3\n")

    written(100, 0, 50, 0)
    summary = timing.others_busy()
    clocks.update(perf_counter=seconds, process_time=1.5 * seconds)
    work = round(100 * ((others or 0) + 1.5) * seconds)  # of this process and of others
    written(100 + work - 60, 20, 50 + 30, 10)
    text = summary()
    assert text is None if words is None else text == f"other processes kept {words} cores busy"


def test_processes_of_the_same_run_are_no_others(tmp_path, monkeypatch):
    """Four cores are busy for a second, three of them with ranks of one run: others keep a quarter of the cores."""
    monkeypatch.setattr(timing, "CPU_TIMES", tmp_path / "stat")
    monkeypatch.setattr(timing, "os", types.SimpleNamespace(cpu_count=lambda: 4, sysconf=lambda name: 100))
    clocks = {"perf_counter": 0.0, "process_time": 0.0}
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(**{name: partial(clocks.get, name) for name in clocks}))
    texts = []
    for ranks in ("1", "3"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        clocks.update(perf_counter=0.0, process_time=0.0)
        (tmp_path / "stat").write_text("cpu  0 0 0 0 0 0 0 0 0 0\n")
        summary = timing.others_busy()
        clocks.update(perf_counter=1.0, process_time=1.0)
        (tmp_path / "stat").write_text("cpu  400 0 0 0 0 0 0 0 0 0\n")
        texts.append(summary())
    assert texts == ["other processes kept 3.0 of 4 cores busy", None]


def test_measurements_on_a_gpu_take_turns(tmp_path, monkeypatch):
    """Another process holds the lock until it is killed. A signal ends the wait for the lock."""
    monkeypatch.setattr(timing, "LOCKS", tmp_path)
    gpu = types.SimpleNamespace(
        get_device_properties=lambda device: types.SimpleNamespace(uuid=f"GPU-{device[-1]}"),
        get_device_name=lambda device: "H100",
        device=lambda device: contextlib.nullcontext(current.append(device)),
    )
    monkeypatch.setattr(timing.torch, "cuda", gpu)
    lines, order, current = [], [], []

    def measure(device):
        with timing.one_at_a_time(device, lines.append):
            order.append(device)

    measure("cuda:0")
    (lock,) = tmp_path.iterdir()
    ahead = [timing.one_at_a_time("cuda:0", lines.append, ahead=True) for _ in range(2)]
    with ahead[0], ahead[1], open(lock) as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert current == ["cuda:0"] * 3 and not lines
    current.clear()
    lock.chmod(0o444)  # like the lock of another user
    hold = "import fcntl, sys, time; file = open(sys.argv[1]); fcntl.flock(file, 2); print(); time.sleep(600)"
    other = subprocess.Popen([sys.executable, "-c", hold, str(lock)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline()
        with monkeypatch.context() as noted, pytest.raises(signals.Stopped, match="SIGUSR2"):
            noted.setattr(signals, "_noted", [signal.SIGUSR2])
            measure("cuda:0")
        waiting = threading.Thread(target=measure, args=["cuda:0"])
        waiting.start()
        measure("cuda:1")
        measure("cpu")
        waiting.join(0.5)
        assert waiting.is_alive() and order == ["cuda:0", "cuda:1", "cpu"]
    finally:
        other.kill()
        other.wait()
    waiting.join(30)
    assert order == ["cuda:0", "cuda:1", "cpu", "cuda:0"]
    assert current == ["cuda:1", "cuda:0"]
    assert lines == ["another process measures on this H100: waiting until it has ended"] * 2


def test_a_measurement_without_a_lock_file_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "LOCKS", tmp_path / "nowhere")
    monkeypatch.setattr(timing.torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="GPU-0"))
    lines, current = [], []
    monkeypatch.setattr(timing.torch.cuda, "device", lambda device: contextlib.nullcontext(current.append(device)))
    with timing.one_at_a_time("cuda", lines.append):
        assert current == ["cuda"]
        assert len(lines) == 1 and "will not wait" in lines[0] and "nowhere" in lines[0]


@pytest.mark.parametrize(
    ("error", "oom"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_out_of_memory(error, oom):
    assert timing.out_of_memory(error) is oom
