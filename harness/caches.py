"""The caches of compiled code, below the root of the runs: what one job of a study compiled, the next one finds."""

import hashlib
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from . import launcher

VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "LAMABENCH_NVRTC_CACHE_DIR")


def keep_compiled(root: str | Path, device: str) -> None:
    """Let torch.compile, Triton and NVRTC keep what they compile for a GPU in ROOT/.cache/compiled/MACHINE, which any
    number of processes share. On a CPU, and if the environment named another folder when this process began, nothing
    changes.

    The compilers find code by hashes of what they compile. MACHINE stands for what else the code depends on: the
    versions of torch and Python, the GPU, and the CPU, for which small parts of it are built.
    """
    import torch

    from .device import device_name, is_cuda

    if not is_cuda(device):
        return
    machine = (torch.__version__, platform.python_version(), device_name(device), device_name("cpu"))
    key = hashlib.sha256(repr(machine).encode()).hexdigest()[:8]
    folder = Path(root).absolute() / ".cache" / "compiled" / f"torch-{torch.__version__}-{key}"
    share({name: str(folder / part) for name, part in zip(VARIABLES, ("inductor", "triton", "nvrtc"), strict=True)})


def folders() -> dict[str, str]:
    """The folders in which this process keeps compiled code, by their variables of the environment."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def share(others: Mapping[str, str]) -> None:
    """Keep compiled code in the `folders` of another process, unless the environment named one when this process began.
    A folder that torch has chosen since then is no reason to stay there."""
    os.environ.update({name: folder for name, folder in others.items() if name not in launcher.GIVEN})


def forget_choices(since: float) -> None:
    """Remove what torch.compile noted `since` that time (time.time()) as the fastest variant of each kernel, so that
    the next process that loads a kernel times its variants again: where several programs had the GPU, chance chose."""
    folder = os.environ.get(VARIABLES[0])
    for file in sorted(Path(folder).rglob("*.best_config")) if folder else ():
        with suppress(FileNotFoundError):  # another process that ends removes it
            if file.stat().st_mtime >= since:
                file.unlink()


def own() -> set[str]:
    """The variables of folders that torch or `keep_compiled` chose for this process. A process that it starts must not
    inherit them, because it would take them for the user's choice."""
    return {name for name in VARIABLES if name in os.environ} - launcher.GIVEN
