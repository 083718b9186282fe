"""Where a number comes from: the commit of the code, the device and the versions."""

import hashlib
import json
import platform
import subprocess
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .device import device_name

SNAPSHOT = "SNAPSHOT.json"
ROOT = Path(__file__).resolve().parents[1]  # the copy of lamabench that runs
CODE = ("ablations", "baselines", "harness", "kernels", "launch", "models", "reports")
SUFFIXES = (".py", ".cu", ".cuh")
RECORDS = "reports/records"  # committed measurements: data, not code


def _git(*command: str) -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        process = subprocess.run(
            # git trusts no folder of another user, but Python runs its code already.
            ["git", "-c", "safe.directory=*", "-C", folder, *command],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.strip() if process.returncode == 0 else None


def code() -> dict[str, Any]:
    """`commit` and `dirty` of the code that runs, without regard to committed records. Both are None for an installed
    wheel. Jobs import a snapshot of a checkout, and a file in the snapshot names its commit.
    """
    snapshot = Path(__file__).resolve().parents[1] / SNAPSHOT
    if snapshot.is_file():
        origin = json.loads(snapshot.read_text(encoding="utf-8"))
        return {key: origin[key] for key in ("commit", "dirty")}
    # Only if git tracks this file, because an environment inside another repository is not of that commit.
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name) is not None
    changed = ("status", "--porcelain", "--untracked-files=no", "--", ":(top)", f":(top,exclude){RECORDS}")
    return {
        "commit": _git("rev-parse", "HEAD") if tracked else None,
        "dirty": bool(_git(*changed)) if tracked else None,
    }


def code_sha256(folder: Path) -> str:
    """The SHA-256 of the names and contents of all code in a copy of lamabench."""
    files = [file for name in CODE for file in (folder / name).rglob("*") if file.suffix in SUFFIXES]
    sources = sorted((file.relative_to(folder).as_posix(), file) for file in files)
    parts = [f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for name, file in sources]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        process = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return process.stdout.split("\n")[0].strip() or None if process.returncode == 0 else None


@lru_cache(maxsize=4)
def provenance(device: str) -> dict[str, Any]:
    """Commit and dirty flag of the code that runs (None for an installed wheel), device, driver and versions."""
    return {
        **code(),
        "host": platform.node(),
        "device": device_name(device),
        "driver": _driver() if device.startswith("cuda") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "lamabench": metadata.version("lamabench"),
    }
