"""Mamba's selective scan over several paths through one image (arXiv 2312.00752, section 3.2; VMamba, 2401.10166)."""

import torch
from torch import Tensor

from ..cross_scan import ScanPaths
from ..errors import InputError
from ..operator import Backend, Operator, Work, Yardstick
from ..triton_support import triton_reasons
from . import backend_cuda, backend_mamba_ssm, backend_torch, backend_triton, reference
from .scan_alone import ScanAlone


def macs(batch: int, length: int, directions: int, channels: int, rank: int) -> int:
    """Multiply-adds of the matrix product inside: the projection of dt to step sizes, r -> E."""
    return batch * length * directions * channels * rank


def operations(batch: int, length: int, directions: int, channels: int, states: int) -> int:
    """Floating-point operations of the scan by the papers' rule: 9·K·E·L·N + K·E·L."""
    return batch * directions * channels * length * (9 * states + 1)


def work(x: Tensor, dt: Tensor, b: Tensor, *_: Tensor) -> Work:
    """The work of one call, from the arguments of a backend or of a custom operator. Each decay and each softplus is
    one exponential."""
    batch, length, channels = x.shape
    directions, rank, states = *dt.shape[2:], b.shape[3]
    return Work(
        macs=macs(batch, length, directions, channels, rank),
        exponentials=(states + 1) * batch * length * directions * channels,
        scan_operations=operations(batch, length, directions, channels, states),
    )


OPERATOR = Operator(
    "selective_scan",
    [
        Backend("cuda", backend_cuda.selective_scan, backend_cuda.reasons, auto_on=("cuda",)),
        Backend("cuda_kept", backend_cuda.kept_selective_scan, backend_cuda.reasons, auto_on=()),
        Backend("triton", backend_triton.selective_scan, triton_reasons, auto_on=("cuda",)),
        Backend("torch", backend_torch.selective_scan),
        Backend("mamba_ssm", backend_mamba_ssm.selective_scan, backend_mamba_ssm.reasons, auto_on=()),
        Backend("reference", reference.selective_scan),
    ],
    work,
    traced=dict.fromkeys(
        ("lamabench::selective_scan", "lamabench::selective_scan_cuda", "lamabench::selective_scan_triton"), work
    ),
    exact="torch",  # the reference loops over tokens
    # It rounds step sizes and outputs to bfloat16, so that it is a yardstick of time, not of accuracy.
    yardsticks=[Yardstick("mamba_ssm (scan alone)", ScanAlone, limit=2e-2, reasons=backend_mamba_ssm.reasons)],
)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    skip: Tensor,
    paths: ScanPaths,
    backend: str = "auto",
) -> Tensor:
    """Scan K paths through every image and add up their outputs.

    x          [B, L, E]     tokens in image order
    dt         [B, L, K, r]  low-rank step sizes; b and c [B, L, K, N] input and output projections; all in image order
    dt_weight  [K, E, r], dt_bias [K, E]
    a          [K, E, N]     negative; skip [K, E]
    paths      `scan_paths(…)`, on the device of x
    returns    [B, L, E], in the type of x

    Along path k: delta = softplus(W_k dt + bias_k), h_l = exp(delta_l A) h_{l-1} + delta_l b_l x_l,
    y_l = c_l · h_l + skip x_l. The recurrence runs in float32, or in float64 where x is.
    Raises InputError for float16.
    """
    if torch.float16 in (x.dtype, dt.dtype, b.dtype, c.dtype):
        raise InputError(
            "selective_scan: float16 is not supported: sums along a path pass its largest number (65504); "
            "use bfloat16 or float32"
        )
    run = OPERATOR.resolve(backend, x.device.type).run
    return run(x, dt, b, c, dt_weight, dt_bias, a, skip, *paths)
