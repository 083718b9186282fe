"""Timing of calls."""

import fcntl
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .. import launcher, signals
from .clocks import conditions, reader

LEAST = 5  # the least calls of a measurement, however long they take
BUSY = 0.25  # a measurement is disturbed if other processes use more than this share of the host's cores
COUNTED_S = 0.3  # the kernel counts processor time in hundredths of a second, which is too coarse for less
CPU_TIMES = Path("/proc/stat")
LOCKS = Path("/tmp")  # not TMPDIR, which may be private to a job: other jobs on the same GPU must find the lock
WAIT_S = 0.5  # seconds between attempts to get the lock


@cache
def began() -> str:
    """When this process first measured, as a field of its rows: measurements of one call can be compared best."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def quantiles(times: list[float]) -> dict[str, float]:
    """Median, quartiles, and the 20th and 80th percentile of milliseconds, as fields of a record."""
    cuts = statistics.quantiles(times, n=20, method="inclusive") if len(times) > 1 else times * 19
    return {f"p{percent}_ms": cuts[percent // 5 - 1] for percent in (20, 25, 50, 75, 80)}


def synchronize(device: str) -> None:
    """Wait until a GPU has finished its work. Does nothing on a CPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def release(device: str) -> None:
    """Return unused GPU memory to the device, so that each measurement starts with the same memory."""
    if device.startswith("cuda"):
        gc.collect()
        torch.cuda.empty_cache()


def others_busy() -> Callable[[], str | None]:
    """Start to watch the host. The returned function says, for the time until its call, "other processes kept 12.3 of
    16 cores busy". It returns None if they used at most a quarter of the cores, after less than 0.3 s, and without
    Linux's /proc/stat."""

    def busy() -> float | None:
        try:
            user, nice, system, _, _, *interrupts = CPU_TIMES.read_text(encoding="utf-8").splitlines()[0].split()[1:9]
        except (OSError, IndexError, ValueError):
            return None
        ticks = sum(map(int, (user, nice, system, *interrupts)))
        own = time.process_time() * launcher.neighbours()  # the other processes of the run do as much
        return ticks / os.sysconf("SC_CLK_TCK") - own

    before, started = busy(), time.perf_counter()

    def summary() -> str | None:
        after, seconds, cores = busy(), time.perf_counter() - started, os.cpu_count() or 1
        if before is None or after is None or seconds < COUNTED_S or after - before <= BUSY * cores * seconds:
            return None
        return f"other processes kept {(after - before) / seconds:.1f} of {cores} cores busy"

    return summary


@contextmanager
def one_at_a_time(device: str, say: Callable[[str], None], ahead: bool = False) -> Iterator[None]:
    """Hold the lock of a GPU, so that the measurements of all processes on this host take turns. Those who compile
    `ahead` share it.

    Programs that do not ask for the lock, such as training, are not held off. The lock ends with the process, however
    the process ends. On a CPU there is no lock (see `others_busy`). Raises Stopped if a signal comes while this waits.
    """
    if not device.startswith("cuda"):
        yield
        return
    lock = LOCKS / f"lamabench-{torch.cuda.get_device_properties(device).uuid}.lock"
    try:  # the lock of another user can only be opened for reading, which is enough to hold it
        file = os.open(lock, os.O_RDONLY if lock.exists() else os.O_RDONLY | os.O_CREAT, 0o644)
    except OSError as error:
        say(f"other measurements on this GPU will not wait for this one: {error}")
        with torch.cuda.device(device):
            yield
        return
    try:
        how = fcntl.LOCK_SH if ahead else fcntl.LOCK_EX
        if not _acquire(file, how):
            say(f"another process measures on this {torch.cuda.get_device_name(device)}: waiting until it has ended")
            while not _acquire(file, how):
                signals.check()
                time.sleep(WAIT_S)
        with torch.cuda.device(device):  # events and queries of a multiprocessor's kind mean the current one
            yield
    finally:
        os.close(file)


def _acquire(file: int, how: int) -> bool:
    try:
        fcntl.flock(file, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def keeping(step: Callable[[], Any]) -> tuple[Callable[[], None], list[Any]]:
    """`step`, and a list with what its last call returned. The list is empty during a call, so that no two results are
    in memory."""
    last: list[Any] = []

    def call() -> None:
        last.clear()
        last.append(step())

    return call, last


def time_calls(
    step: Callable[[], Any],
    device: str,
    warmup: int,
    repeats: int,
    seconds: float,
    most: Callable[[int], int] = int,
) -> dict[str, Any]:
    """Measure how long a call of `step` takes, as fields of a record.

    The clock is the host's, read when the device has finished. The first call is a warm-up, followed by more, up to
    `warmup` in all, while they start within `seconds`. Then at most `repeats` calls are measured: at least `LEAST` (or
    `repeats`, if that is less), and more while they start within `seconds`. On a GPU, `peak_memory_gib` is the most
    that torch's allocator held in the measured calls, else null. `disturbed` says that other processes kept the host
    busy (`others_busy`), else null. The GPU's clock and power are read after each measured call (`clocks.conditions`).
    `most` is the largest number of all processes that call this together, so that they make as many calls.
    """
    read = reader(device)

    def call() -> float:
        synchronize(device)
        started = time.perf_counter()
        step()
        synchronize(device)
        return 1e3 * (time.perf_counter() - started)

    def going() -> bool:
        return bool(most(time.perf_counter() - started < seconds))

    disturbed, started = others_busy(), time.perf_counter()
    for place in range(warmup):
        if place and not going():
            break
        call()
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    times, readings, started = [], [], time.perf_counter()
    while len(times) < repeats and (len(times) < LEAST or going()):
        times.append(call())
        readings.append(read())
    return {
        **quantiles(times),
        **conditions(readings),
        "repeats": len(times),
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None,
        "disturbed": disturbed(),
    }


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, whichever library raised it."""
    kinds = (torch.cuda.OutOfMemoryError, MemoryError)
    # The last is torch's on a CPU, where torch has no special exception.
    words = ("out of memory", "cublas_status_alloc", "can't allocate memory")
    return isinstance(error, kinds) or any(text in str(error).lower() for text in words)


def first_line(error: BaseException) -> str:
    """The class of an error and the first line of its message, and the second line if the first ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    head = lines[: 2 if lines and lines[0].endswith(":") else 1]
    return " ".join([f"{type(error).__name__}:", *head])[:400]
