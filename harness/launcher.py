"""The place of this process among those that torchrun or SLURM started, as the environment tells it."""

import os
import platform
from contextlib import suppress

from ..kernels.errors import InputError

# The names in the environment when this process began. Every command imports this first, because libraries add names:
# torch._dynamo, which torch imports for much that compiles nothing, adds TORCHINDUCTOR_CACHE_DIR.
# An empty value is none: torch would take it for the working directory.
GIVEN = frozenset(name for name, value in os.environ.items() if value)


def variable(name: str, default: int) -> int:
    """The environment variable `name`, a number."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"the environment variable {name} is a number, not {text!r}")
    return int(text)


def size() -> int:
    """The number of processes of the run."""
    return max(1, variable("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process among all of the run, from 0. A leftover RANK must not make a process that is alone
    one of the others, which write nothing."""
    own, count = variable("RANK", 0), size()
    if own >= count:
        raise InputError(f"the environment variable RANK is {own}, but WORLD_SIZE says {count}: ranks are from 0 on")
    return own


def neighbours() -> int:
    """The number of processes of the run on this machine."""
    return max(1, variable("LOCAL_WORLD_SIZE", 1))


def identity() -> str:
    """This process among all of its run: its machine, with the container that numbers its processes, and its number."""
    space = ""
    with suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return f"{platform.node()} {space} {os.getpid()}"


def gone(process: str) -> bool:
    """Whether a process, by its `identity`, has ended; False if it is of another machine or container."""
    place, number = process.rsplit(" ", 1)
    if place == identity().rsplit(" ", 1)[0]:
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    return False


def check_address() -> None:
    """Raise InputError unless the environment says where the processes of a run meet, as torchrun's does."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {size()}, but the environment has no {', '.join(missing)}: "
            "start the processes with torchrun, or unset WORLD_SIZE for one process"
        )
    if not 0 < (port := variable("MASTER_PORT", 0)) < 2**16:
        raise InputError(f"the environment variable MASTER_PORT must be from 1 to 65535, not {port}")
