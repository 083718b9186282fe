"""How long calls take."""

import fcntl
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .. import signals

LEAST = 5  # calls of a measurement, however long they take
BUSY = 0.25  # more of the host's cores than this at work for others, and a measurement says so
COUNTED_S = 0.3  # in less, the kernel's count of processor time (in hundredths of a second) says little
CPU_TIMES = Path("/proc/stat")
LOCKS = Path("/tmp")  # not TMPDIR, which may be a job's own: other jobs on the same GPU have to find the lock
WAIT_S = 0.5  # between looks at it


def quantiles(times: list[float]) -> dict[str, float]:
    """Median, quartiles, and the 20th and 80th percentile of milliseconds, as fields of a record."""
    cuts = statistics.quantiles(times, n=20, method="inclusive") if len(times) > 1 else times * 19
    return {f"p{percent}_ms": cuts[percent // 5 - 1] for percent in (20, 25, 50, 75, 80)}


def synchronize(device: str) -> None:
    """Wait for a GPU; nothing to wait for on a CPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def others_busy() -> Callable[[], str | None]:
    """Start to watch the host. The call returned says, by then, "other processes kept 12.3 of 16 cores busy"; None
    where they kept a quarter or less, after less than 0.3 s, and where Linux's /proc/stat is missing."""

    def busy() -> float | None:
        try:
            user, nice, system, _, _, *interrupts = CPU_TIMES.read_text().splitlines()[0].split()[1:9]
        except (OSError, IndexError, ValueError):
            return None
        ticks = sum(map(int, (user, nice, system, *interrupts)))
        return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()

    before, started = busy(), time.perf_counter()

    def said() -> str | None:
        after, seconds, cores = busy(), time.perf_counter() - started, os.cpu_count() or 1
        if before is None or after is None or seconds < COUNTED_S or after - before <= BUSY * cores * seconds:
            return None
        return f"other processes kept {(after - before) / seconds:.1f} of {cores} cores busy"

    return said


@contextmanager
def one_at_a_time(device: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a GPU against other measurements: those of all processes on this host take turns. Of programs that do not
    ask, training among them, it knows nothing. The lock goes with the process, however that ends; on a CPU there is
    none (see `others_busy`). Raises Stopped where a signal asks for it while this waits."""
    if not device.startswith("cuda"):
        yield
        return
    lock = LOCKS / f"lamabench-{torch.cuda.get_device_properties(device).uuid}.lock"
    try:  # another user's may be read alone, which is enough to hold it
        file = os.open(lock, os.O_RDONLY if lock.exists() else os.O_RDONLY | os.O_CREAT, 0o644)
    except OSError as error:
        say(f"other measurements on this GPU will not wait for this one: {error}")
        yield
        return
    try:
        if not _taken(file):
            say(f"another process measures on this {torch.cuda.get_device_name(device)}: waiting until it has ended")
            while not _taken(file):
                signals.check()
                time.sleep(WAIT_S)
        yield
    finally:
        os.close(file)


def _taken(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def time_calls(step: Callable[[], Any], device: str, warmup: int, repeats: int, seconds: float) -> dict[str, Any]:
    """Call `step` until the time is up and say how long a call takes, as fields of a record.

    The clock is the host's, read when the device has finished. One call and then others, `warmup` in all, but only
    within `seconds`, go by unmeasured; then at most `repeats` calls, `LEAST` of them (or all, if fewer) whatever they
    take, the others within `seconds`. On a GPU `peak_memory_gib` is the most that torch's allocator held in the
    measured calls, else null. `disturbed` says that others worked on the host meanwhile (`others_busy`), else null.
    """

    def call() -> float:
        synchronize(device)
        started = time.perf_counter()
        step()
        synchronize(device)
        return 1e3 * (time.perf_counter() - started)

    disturbed, started = others_busy(), time.perf_counter()
    for place in range(warmup):
        if place == 0 or time.perf_counter() - started < seconds:
            call()
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    times, started = [], time.perf_counter()
    while len(times) < repeats and (len(times) < LEAST or time.perf_counter() - started < seconds):
        times.append(call())
    return {
        **quantiles(times),
        "repeats": len(times),
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None,
        "disturbed": disturbed(),
    }


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, whichever library found it."""
    kinds = (torch.cuda.OutOfMemoryError, MemoryError)
    # The last is torch's on a CPU, which has no exception of its own for it.
    words = ("out of memory", "cublas_status_alloc", "can't allocate memory")
    return isinstance(error, kinds) or any(text in str(error).lower() for text in words)


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says, with the next one where that only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[: 2 if lines and lines[0].endswith(":") else 1]
    return " ".join([f"{type(error).__name__}:", *told])[:400]
