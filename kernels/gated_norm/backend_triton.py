"""The gated norm in one Triton kernel each way: `triton_kernels.py`.

The forward pass reads y and z once and writes the output once. The backward pass reads y, z and the gradient once,
computes mean and deviation again, and writes the gradients of y and z once. The gradients of weight and bias are one
partial sum for each program. These are added in a fixed order, so that results repeat to the bit. Only the inputs are
saved between the two passes.
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..triton_support import dense_rows, launched_on, power_of_two

LARGEST = 8192  # channels, because a program holds a row in its registers
# The most tiles of a row. A tile has 32 channels or more. Wide rows have more than half as many tiles: little padding.
TILES = 8
FORWARD, BACKWARD = 32, 20  # warps that a multiprocessor of an H100 runs at a time, as their registers allow
INTERPRETED = 3  # programs where Triton is interpreted


def _rows(x: Tensor) -> Tensor:
    return dense_rows(x.reshape(-1, x.shape[-1]))


def _tiles(y: Tensor, warps_at_a_time: int) -> tuple[dict[str, int], int]:
    """The constants of a kernel for y [rows, E], and how many programs share the rows."""
    channels = int(y.shape[1])  # an int, even where torch.compile has a symbol
    size = max(32, power_of_two(channels) // TILES)
    warps = max(1, size // 64)  # a thread has two channels of every tile
    programs = INTERPRETED
    if y.is_cuda:
        processors = torch.cuda.get_device_properties(y.device).multi_processor_count
        programs = processors * max(1, warps_at_a_time // warps)
    return {"E": channels, "BE": size, "num_warps": warps}, max(1, min(programs, int(y.shape[0])))


@torch.library.custom_op("lamabench::gated_norm", mutates_args=())
def norm_forward(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The output [..., E], in the type of y."""
    from . import triton_kernels

    kernel: Any = triton_kernels.forward  # Any, because type checkers take a kernel for a function

    out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    y, z = _rows(y), _rows(z)
    constants, programs = _tiles(y, FORWARD)
    with launched_on(y):
        kernel[(programs,)](
            y, z, weight.contiguous(), bias.contiguous(), out, y.stride(0), z.stride(0), len(y), eps,
            **constants, enable_fp_fusion=True,
        )  # fmt: skip
    return out


@torch.library.custom_op("lamabench::gated_norm_backward", mutates_args=())
def norm_backward(
    grad: Tensor, y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of y and z, contiguous, in the types of y and z; and float32 parts [programs, 2, E] that add up to
    the gradients of weight and bias."""
    from . import triton_kernels

    kernel: Any = triton_kernels.backward  # Any, because type checkers take a kernel for a function

    g_y = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    g_z = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    grad, y, z = _rows(grad), _rows(y), _rows(z)
    constants, programs = _tiles(y, BACKWARD)
    partial = torch.empty((programs, 2, y.shape[1]), dtype=torch.float32, device=y.device)
    with launched_on(y):
        kernel[(programs,)](
            grad, y, z, weight.contiguous(), bias.contiguous(), g_y, g_z, partial,
            grad.stride(0), y.stride(0), z.stride(0), len(y), eps, **constants, enable_fp_fusion=True,
        )  # fmt: skip
    return g_y, g_z, partial


@norm_forward.register_fake
def _(y, z, weight, bias, eps):
    return y.new_empty(y.shape)


@norm_backward.register_fake
def _(grad, y, z, weight, bias, eps):
    programs = _tiles(_rows(y), BACKWARD)[1]
    return y.new_empty(y.shape), z.new_empty(z.shape), y.new_empty(programs, 2, y.shape[-1], dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    y, z, weight, bias = ctx.saved_tensors
    g_y, g_z, partial = norm_backward(grad, y, z, weight, bias, ctx.eps)
    # Added here, not in the operator, so that torch.compile fuses the sum with what follows.
    g_weight, g_bias = partial.sum(0).unbind()
    return g_y, g_z, g_weight.to(weight.dtype), g_bias.to(bias.dtype), None


norm_forward.register_autograd(_backward, setup_context=_setup_context)


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See `lamabench.kernels.gated_norm.gated_norm`.

    Raises InputError for float64, because the kernel computes in float32, and for rows that registers do not hold.
    """
    if torch.float64 in (y.dtype, z.dtype, weight.dtype, bias.dtype):
        raise InputError("gated_norm: backend 'triton' computes in float32, not in float64; use 'torch' or 'reference'")
    if y.shape[-1] > LARGEST:
        raise InputError(
            f"gated_norm: backend 'triton' holds at most {LARGEST} channels, not {y.shape[-1]}; "
            "use 'torch' or 'reference'"
        )
    return norm_forward(y, z, weight, bias, eps)
