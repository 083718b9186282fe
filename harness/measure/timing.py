"""How long calls take, and how close that is to what the machine can do."""

import fcntl
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import signals

LEAST = 5  # calls of a measurement, however long they take
BUSY = 0.25  # more of the host's cores than this at work for others, and a measurement says so
COUNTED_S = 0.3  # in less, the kernel's count of processor time (in hundredths of a second) says little
CPU_TIMES = Path("/proc/stat")
LOCKS = Path("/tmp")  # not TMPDIR, which may be a job's own: other jobs on the same GPU have to find the lock
WAIT_S = 0.5  # between looks at it


class GPU(NamedTuple):
    """Dense peaks of matrix products, 1e12 operations a second, and the clock in GHz, null where it is not known."""

    name: str  # a pattern of torch's name of the device
    bfloat16: float
    float32: float
    clock: float | None


# Source: NVIDIA's data sheets, halved where they count sparsity; boost clocks, of the H100 SXM and H200 under load.
GPUS = (
    #   name                                             bf16   fp32   GHz
    GPU(r"A100(-SXM4-..GB|-PCIE-40GB| 80GB PCIe)$",     312.0,  19.5, 1.410),
    GPU(r"H100 PCIe$",                                  756.0,  51.0, 1.755),
    GPU(r"H100 NVL$",                                   835.0,  60.0, 1.785),
    GPU(r"H100 80GB HBM3$",                             989.0,  67.0, 1.755),
    GPU(r"H200 NVL$",                                   835.0,  60.0, 1.785),
    GPU(r"H200$",                                       989.0,  67.0, 1.755),
    GPU(r"B200$",                                      2250.0,  75.0, None),
    GPU(r"L40S$",                                       362.0,  91.6, 2.520),
    GPU(r"NVIDIA L4$",                                  121.0,  30.3, 2.040),
    GPU(r"RTX 4090$",                                   165.2,  82.6, 2.520),
)  # fmt: skip


def gpu(name: str) -> GPU | None:
    """The row of a device by torch's name of it; None where its peaks are not known (a slice of a GPU among them)."""
    return next((row for row in GPUS if re.search(row.name, name)), None)


def peak_flops(device_name: str, precision: str) -> float | None:
    """The dense peak of matrix products, FLOP/s; None where it is not known."""
    row = gpu(device_name)
    return None if row is None else 1e12 * getattr(row, precision)


def mfu(macs: int, mode: str, images_per_s: float, device_name: str, precision: str) -> float | None:
    """Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B): two FLOPs a multiply-add of one image's forward
    pass, three times that in training, a second, over the device's peak. None where the peak is not known."""
    peak = peak_flops(device_name, precision)
    return None if peak is None else 2 * macs * {"forward": 1, "train": 3}[mode] * images_per_s / peak


def exponentials_per_s(device_name: str) -> float | None:
    """What the special-function units give: 16 a clock and multiprocessor. None where the clock is not known."""
    row = gpu(device_name)
    if row is None or row.clock is None:
        return None
    return 16e9 * row.clock * torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


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
