"""The processes that load the data of a training: how many there are (`run.workers`), and how they start."""

import os
import shutil
import signal

from .. import launcher, parallel, signals
from ..config import Config
from ..device import is_cuda
from .encoder import encoder

# Of run.workers=auto.
FEW = 2**27  # values of images that one process prepares in seconds, so that starting others gains nothing
MOST = 16  # processes
READY = 2**32  # bytes of batches that wait in memory
SHARED = "/dev/shm"  # where the processes leave them
PREFETCH = 2  # batches that each process has ready


def cores() -> int:
    """The number of cores of this process: an equal share of those that the run's processes on this machine may use.
    SLURM gives each of its tasks its own."""
    allowed = len(os.sched_getaffinity(0))
    allowed = min(allowed, launcher.variable("SLURM_CPUS_PER_TASK", allowed))
    if parallel.size() > 1 and os.environ.get("SLURM_NTASKS") != str(parallel.size()):
        allowed //= launcher.neighbours()
    return max(1, allowed)


def workers(config: Config, steps: int, device: str) -> int:
    """The number of processes that load the data of so many steps for this process of the run; 0: it loads them itself.

    `auto` is 0 on a CPU, which has no core to spare, and for few images. Otherwise each core but one has a process,
    `MOST` at most, as far as their batches fit in memory.
    """
    if isinstance(config.run.workers, int):
        return config.run.workers
    channels, side = encoder(config.encoder).shape(config.data)
    values = config.train.batch_size // parallel.size() * channels * side**2
    if not is_cuda(device) or steps * values < FEW:
        return 0
    here = launcher.neighbours()
    free = shutil.disk_usage(SHARED).free // (2 * here) if os.path.isdir(SHARED) else 0
    batch = 4 * values * (2 if config.train.noise == "cpu" else 1)  # float32 images, and their noise
    return min(cores() - 1, MOST, min(free, READY) // (PREFETCH * batch))


def start(worker: int) -> None:
    """What such a process does first. It ignores signals (`signals.ignore`), and ends at once if its training is
    killed, because it holds the GPU's memory and the connections to other processes open until then."""
    signals.ignore()
    signals.end_with_parent(signal.SIGKILL)
