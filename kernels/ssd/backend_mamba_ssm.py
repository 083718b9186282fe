"""The Triton kernels of the package mamba-ssm as a backend (`mamba_chunk_scan_combined`, Mamba-2's own).

They take tokens along each path, [B, L, K·H, P], with a group of heads for each path. So x and the paths' outputs go
through memory: gather, scan, scatter, sum. In bfloat16 every path's output is rounded before the sum.
"""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .backend_torch import CHUNK, along

MODULE = "mamba_ssm.ops.triton.ssd_combined"
# Looked up once, at import, because torch.compile traces through `reasons`.
INSTALLED = importlib.util.find_spec("mamba_ssm") is not None


def reasons(device_type: str) -> list[str]:
    """Every reason why the kernels cannot run on a kind of device here; empty where they can."""
    refusals = [] if INSTALLED else ["mamba-ssm is not installed: pip install 'mamba-ssm>=2.2'"]
    return refusals + ([] if device_type == "cuda" else [f"it runs on CUDA GPUs only, not on {device_type!r}"])


def kernels() -> Any:
    """The module with the kernels of both passes. Raises InputError where the package cannot be imported."""
    try:
        return importlib.import_module(MODULE)
    except ImportError as error:
        raise InputError(f"ssd: backend 'mamba_ssm' cannot import {MODULE}: {str(error).splitlines()[0]}") from None


@torch.library.custom_op("lamabench::ssd_mamba_ssm", mutates_args=())
def scan_forward(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, bias: Tensor) -> Tensor:
    """x [B, L, K·H, P], dt [B, L, K·H], b and c [B, L, K, N], a, skip and bias [K·H] -> the output, shaped as x."""
    return kernels().mamba_chunk_scan_combined(x, dt, a, b, c, CHUNK, D=skip, dt_bias=bias, dt_softplus=True)


@torch.library.custom_op("lamabench::ssd_mamba_ssm_backward", mutates_args=())
def scan_backward(
    grad: Tensor, out: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, a, b, c, skip and bias."""
    backward = kernels()._mamba_chunk_scan_combined_bwd
    grads = backward(grad, x, dt, a, b, c, out, CHUNK, D=skip, dt_bias=bias, dt_softplus=True)
    g_x, g_dt, g_a, g_b, g_c, g_skip, _, g_bias = grads[:8]
    return g_x, g_dt, g_a, g_b, g_c, g_skip, g_bias


@scan_forward.register_fake
def _(x, dt, a, b, c, skip, bias):
    return x.new_empty(x.shape)


@scan_backward.register_fake
def _(grad, out, x, dt, a, b, c, skip, bias):
    return tuple(v.new_empty(v.shape) for v in (x, dt, a, b, c, skip, bias))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output, *inputs)


def _backward(ctx, grad):
    return scan_backward(grad.contiguous(), *ctx.saved_tensors)


scan_forward.register_autograd(_backward, setup_context=_setup_context)


def ssd(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    skip: Tensor,
    order: Tensor,
    inverse: Tensor,
) -> Tensor:
    """See `lamabench.kernels.ssd.ssd`.

    Raises InputError for float64 and for more than 256 states, which the kernels do not take.
    """
    if torch.float64 in [v.dtype for v in (x, dt, b, c, dt_bias, a, skip)]:
        raise InputError("ssd: backend 'mamba_ssm' computes in float32, not in float64; use 'torch' or 'reference'")
    if b.shape[-1] > 256:
        raise InputError(f"ssd: backend 'mamba_ssm' takes at most 256 states, not {b.shape[-1]}")
    paths, heads = a.shape
    u = along(x[:, None].expand(-1, paths, -1, -1), order).unflatten(-1, (heads, -1))  # [B, K, L, H, P]
    steps = along(dt.to(x.dtype).transpose(1, 2), order)  # [B, K, L, H]
    b, c = (along(v.to(x.dtype).transpose(1, 2), order).transpose(1, 2).contiguous() for v in (b, c))
    y = scan_forward(
        u.transpose(1, 2).flatten(2, 3).contiguous(),
        steps.transpose(1, 2).flatten(2).contiguous(),
        a.float().flatten().contiguous(),
        b,
        c,
        skip.float().flatten().contiguous(),
        dt_bias.float().flatten().contiguous(),
    )
    y = y.unflatten(2, (paths, heads)).flatten(3).transpose(1, 2)  # [B, K, L, E]
    return along(y, inverse).sum(1)
