"""What every operator with a Triton kernel asks: whether Triton runs here, and on which GPU to launch."""

import importlib.util
import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

INSTALLED = importlib.util.find_spec("triton") is not None


def triton_reasons(device_type: str) -> list[str]:
    """Why a Triton kernel cannot run on that kind of device here; empty when it can."""
    found = []
    if not INSTALLED:
        found.append("the package triton is not installed")
    if device_type == "cuda" and torch.version.hip:
        found.append("not tried on AMD GPUs")
    elif device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        found.append("Triton needs a GPU (TRITON_INTERPRET=1 interprets it on the CPU, for tests)")
    elif device_type not in ("cpu", "cuda"):
        found.append(f"no Triton on device type {device_type!r}")
    return found


def launched_on(x: Tensor) -> Any:
    """A context in which a kernel is launched on the GPU of `x`; nothing where Triton is interpreted on the CPU."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
