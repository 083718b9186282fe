"""Depthwise convolution and SiLU in one Triton kernel each way: `triton_kernels.py`.

The forward pass reads x once and writes the output once. The backward pass reads x and the gradient once, computes the
convolution again, and writes the gradient of x once. The gradients of the weights are one partial sum for each image
and group of columns. These are added in a fixed order, so that results repeat to the bit. Only the inputs are saved
between the two passes.
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..triton_support import dense_rows, launched_on, power_of_two

CHANNELS, CHANNELS_BACKWARD = 64, 32  # of a program: a thread has two channels forward, one backward
COLUMNS = 8  # of a thread
COLUMNS_BACKWARD = {1: 8, 3: 8, 5: 4, 7: 2}  # of a thread, by the kernel's side, as registers allow
REGISTERS_BACKWARD = {3: 128}  # the most of a thread: without spills, a scheduler then has 4 warps instead of 3
INTERPRETED = {"T": 2, "BE": 16}  # small tiles where Triton is interpreted, because every element costs time there
GROUPS = 4  # of columns that share a program, each with its own warp
WARPS = 2048  # about as many as an H100 runs at a time; programs are shorter where there would be fewer


def _tiles(x: Tensor, channels: int, columns: int) -> tuple[dict[str, int], int, int]:
    """The constants of a kernel, and how many programs share the channels and the columns of an image."""
    tile = {"T": columns, "BE": channels} if x.is_cuda else INTERPRETED
    threads = -(-int(x.shape[2]) // tile["T"])  # an int, even where torch.compile has a symbol
    groups = min(GROUPS, power_of_two(threads))
    constants = {"E": x.shape[3], "XW": x.stride(2), **tile, "G": groups, "num_warps": groups}
    return constants, -(-x.shape[3] // tile["BE"]), -(-threads // groups)


@torch.library.custom_op("lamabench::depthwise_conv_silu", mutates_args=())
def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The output [B, H, W, E], in the type of x."""
    from . import triton_kernels

    kernel: Any = triton_kernels.forward  # Any, because type checkers take a kernel for a function

    batch, height, width, _ = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = dense_rows(x)
    constants, blocks, spans = _tiles(x, CHANNELS, COLUMNS)
    rows = rows_of_a_program(height, batch * blocks * spans * constants["G"])
    with launched_on(x):
        kernel[(blocks, spans * -(-height // rows), batch)](
            x, weight.contiguous(), bias, out, *x.stride()[:2], height, width, rows,
            K=weight.shape[-1], SPANS=spans, **constants, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def rows_of_a_program(height: int, warps: int) -> int:
    """Rows of an image that a program walks down: all, or fewer where `warps` a share would leave the GPU idle."""
    rows = height
    while rows > 8 and warps * -(-height // rows) < WARPS:
        rows = -(-rows // 2)
    return rows


@torch.library.custom_op("lamabench::depthwise_conv_silu_backward", mutates_args=())
def conv_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradient of x, and float32 parts [parts, k² + 1, E] that add up to the gradients of weight and of a bias (of
    which the part is there without a bias too)."""
    from . import triton_kernels

    kernel: Any = triton_kernels.backward  # Any, because type checkers take a kernel for a function

    batch, height, width, channels = x.shape
    k = weight.shape[-1]
    g_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = dense_rows(x)
    constants, blocks, spans = _tiles(x, CHANNELS_BACKWARD, COLUMNS_BACKWARD[k])
    partial = torch.empty((batch * spans, k * k + 1, channels), dtype=torch.float32, device=x.device)
    with launched_on(x):
        kernel[(blocks, spans, batch)](
            grad.contiguous(), x, weight.contiguous(), bias, g_x, partial, *x.stride()[:2], height, width,
            K=k, **constants, maxnreg=REGISTERS_BACKWARD.get(k), enable_fp_fusion=True,
        )  # fmt: skip
    return g_x, partial


@conv_forward.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape)


@conv_backward.register_fake
def _(grad, x, weight, bias):
    k = int(weight.shape[-1])
    _, _, spans = _tiles(dense_rows(x), CHANNELS_BACKWARD, COLUMNS_BACKWARD[k])
    return x.new_empty(x.shape), x.new_empty(x.shape[0] * spans, k * k + 1, x.shape[-1], dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, weight, bias = ctx.saved_tensors
    g_x, partial = conv_backward(grad, x, weight, bias)
    # Added here, not in the operator, so that torch.compile fuses the sum with what follows.
    sums = partial.sum(0)
    g_weight = sums[:-1].t().reshape(weight.shape).to(weight.dtype)
    return g_x, g_weight, None if bias is None else sums[-1].to(bias.dtype)


conv_forward.register_autograd(_backward, setup_context=_setup_context)


def depthwise_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `lamabench.kernels.depthwise_conv.depthwise_conv_silu`.

    Raises InputError for float64, because the Triton kernel computes in float32, and for a side k that has no kernel.
    """
    if torch.float64 in (x.dtype, weight.dtype):
        raise InputError(
            "depthwise_conv: backend 'triton' computes in float32, not in float64; use 'torch' or 'reference'"
        )
    if weight.shape[-1] not in COLUMNS_BACKWARD:
        sides = ", ".join(map(str, COLUMNS_BACKWARD))
        raise InputError(
            f"depthwise_conv: backend 'triton' has no {weight.shape[-1]} × {weight.shape[-1]} kernel; sides: {sides}"
        )
    return conv_forward(x, weight, bias)
