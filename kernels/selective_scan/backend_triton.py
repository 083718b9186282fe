"""The selective scan in one Triton kernel for all paths: `triton_forward.py`, `triton_backward.py`.

The step sizes, x along a path and a path's output never reach memory. They live in the registers of the program that
owns the image and the channels. Sums have a fixed order, so that results repeat to the bit.
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..triton_support import LOG2E, dense_rows, launched_on, power_of_two

CHANNELS, WARPS = 32, 1  # of a program of the forward pass
CHANNELS_BACKWARD = 128  # one for each thread; half as many where the rank is above 64, as registers allow
INTERPRETED = 16  # channels of a program where Triton is interpreted, because every element costs time there
STEPS = 16  # of a chunk
GROUPS, GROUPS_BACKWARD = 1, 2  # programs that share the paths of an image and block; each has its own sum
UNROLL, UNROLL_BACKWARD = 16, 1  # the most states for which the loop over them is unrolled


def _prepare(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor, groups: int
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """x and dt in the layout of the kernels, and the constants of both kernels."""
    directions, _, states = a.shape
    rank = dt.shape[-1]
    constants = {
        "K": directions, "G": groups if directions % groups == 0 else 1, "N": states, "NP": power_of_two(states),
        "R": rank, "RP": power_of_two(rank, 16), "T": STEPS,
        "EXACT": not x.is_cuda or torch.float32 in (x.dtype, dt.dtype, b.dtype, c.dtype),
    }  # fmt: skip
    return x.contiguous(), dense_rows(dt), constants


def _along_paths(v: Tensor, order: Tensor) -> Tensor:
    """[B, L, K, N] in image order -> float32 [B, K, N, whole chunks] along the paths, so that a chunk is one load."""
    batch, length, directions, states = v.shape
    out = v.new_zeros(batch, directions, states, -(-length // STEPS) * STEPS, dtype=torch.float32)
    index = order[None, :, None].expand(batch, -1, states, -1)
    out[..., :length] = v.permute(0, 2, 3, 1).gather(3, index)
    return out


def _decay(a: Tensor) -> Tensor:
    """[K, E, N] -> [K, N, E], times log2 e, because the kernels compute powers of 2."""
    return (a.float() * LOG2E).transpose(1, 2).contiguous()


@torch.library.custom_op("lamabench::selective_scan_triton", mutates_args=())
def scan_forward(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    skip: Tensor,
    order: Tensor,
) -> Tensor:
    """The output [B, L, E]."""
    from . import triton_forward

    kernel: Any = triton_forward.scan_forward  # Any, because type checkers take a kernel for a function

    batch, length, channels = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, dt, constants = _prepare(x, dt, b, c, a, GROUPS)
    b, c = dense_rows(b), dense_rows(c)
    if b.stride() != c.stride():
        b, c = b.contiguous(), c.contiguous()
    groups = constants["G"]
    narrow = groups > 1 or (out.dtype != torch.float32 and constants["K"] > 1)
    partial = torch.empty((groups, *x.shape), dtype=torch.float32, device=x.device) if narrow else out
    weights = (dt_weight.contiguous(), dt_bias.contiguous(), _decay(a), skip.contiguous())
    block = CHANNELS if x.is_cuda else INTERPRETED
    grid = (-(-channels // block), batch, groups)
    with launched_on(x):
        kernel[grid](
            x, dt, b, c, *weights, order.contiguous(), partial, out, *dt.stride()[:3], *b.stride()[:3],
            length, channels, **constants, UNROLL=UNROLL, BE=block, num_warps=WARPS,
        )  # fmt: skip
    return torch.add(partial[0], partial[1], out=out) if groups == 2 else out


@torch.library.custom_op("lamabench::selective_scan_triton_backward", mutates_args=())
def scan_backward(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    skip: Tensor,
    order: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, b, c, dt_weight, dt_bias, a and skip."""
    from . import triton_backward

    kernel: Any = triton_backward.scan_backward  # Any, because type checkers take a kernel for a function

    inputs = (x, dt, b, c, dt_weight, dt_bias, a, skip)
    batch, length, channels = x.shape
    x, dt, constants = _prepare(x, dt, b, c, a, GROUPS_BACKWARD)
    b, c = _along_paths(b, order), _along_paths(c, order)
    k, n, r = constants["K"], constants["N"], constants["R"]
    block = CHANNELS_BACKWARD if r <= 64 else CHANNELS_BACKWARD // 2
    block = block if x.is_cuda else INTERPRETED
    blocks = -(-channels // block)
    images = images_of_a_program(batch, blocks)
    parts = -(-batch // images)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    groups = constants["G"]
    g_x, g_tokens = empty(groups, *x.shape), empty(blocks, batch, length, k, r + 2 * n)
    g_channels, g_weight = empty(parts, k, 2 + n, channels), empty(parts, k, r, channels)
    starts = empty(groups, parts, -(-length // STEPS), n, channels)
    weights = (dt_weight.contiguous(), dt_bias.contiguous(), _decay(a), skip.contiguous())
    with launched_on(x):
        kernel[(blocks, parts, groups)](
            grad.contiguous(), x, dt, b, c, *weights, order.contiguous(), starts, g_x, g_tokens, g_channels, g_weight,
            *dt.stride()[:3], b.shape[-1], batch, length, channels, images,
            **constants, NB=power_of_two(n, 16), BE=block, UNROLL=UNROLL_BACKWARD, num_warps=max(1, block // 32),
        )  # fmt: skip
    g_dt, g_b, g_c = g_tokens.sum(0).split([r, n, n], dim=-1)
    g_bias, g_skip, g_a = g_channels.sum(0).split([1, 1, n], dim=1)
    grads = (
        g_x.sum(0), g_dt, g_b, g_c, g_weight.sum(0).transpose(1, 2), g_bias[:, 0], g_a.transpose(1, 2), g_skip[:, 0]
    )  # fmt: skip
    return tuple(
        torch.empty(i.shape, dtype=i.dtype, device=i.device).copy_(v) for v, i in zip(grads, inputs, strict=True)
    )  # type: ignore[return-value]


def images_of_a_program(batch: int, blocks: int) -> int:
    """Images that a program of the backward pass takes in turn: as many as leave enough programs for the GPU."""
    return max(1, batch * blocks // 528)


@scan_forward.register_fake
def _(x, dt, b, c, dt_weight, dt_bias, a, skip, order):
    return x.new_empty(x.shape)


@scan_backward.register_fake
def _(grad, x, dt, b, c, dt_weight, dt_bias, a, skip, order):
    return tuple(v.new_empty(v.shape) for v in (x, dt, b, c, dt_weight, dt_bias, a, skip))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return *scan_backward(grad, *ctx.saved_tensors), None


scan_forward.register_autograd(_backward, setup_context=_setup_context)


def selective_scan(*inputs: Any) -> Tensor:
    """See `lamabench.kernels.selective_scan.selective_scan`. The inverse of the paths and their pairs are not read.

    Raises InputError for float64, because the kernel computes in float32.
    """
    if torch.float64 in [v.dtype for v in inputs[:8]]:
        raise InputError(
            "selective_scan: backend 'triton' computes in float32, not in float64; use 'torch' or 'reference'"
        )
    return scan_forward(*inputs[:9])
