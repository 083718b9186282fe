"""Helpers of the Triton backends: whether Triton runs here, on which GPU to launch, sizes and layouts."""

import importlib.util
import os
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

INSTALLED = importlib.util.find_spec("triton") is not None
LOG2E = 1.4426950408889634  # log2(e): the kernels compute powers of 2


def triton_reasons(device_type: str) -> list[str]:
    """Every reason why a Triton kernel cannot run on a kind of device here; empty where it can."""
    refusals = []
    if not INSTALLED:
        refusals.append("the package triton is not installed")
    if device_type == "cuda" and torch.version.hip:
        refusals.append("untested on AMD GPUs")
    elif device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        refusals.append("Triton needs a GPU (TRITON_INTERPRET=1 interprets it on the CPU, for tests)")
    elif device_type not in ("cpu", "cuda"):
        refusals.append(f"no Triton on device type {device_type!r}")
    return refusals


def launched_on(x: Tensor) -> Any:
    """A context that launches kernels on the GPU of `x`. It does nothing where Triton is interpreted on the CPU."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def power_of_two(n: int, least: int = 1) -> int:
    """Side of a tile that holds n: the next power of two, but no less than `least`."""
    return max(least, 1 << (n - 1).bit_length())


def dense_rows(x: Tensor) -> Tensor:
    """`x` if its last axis is dense, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
