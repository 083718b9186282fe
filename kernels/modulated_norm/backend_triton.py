"""The gated residual, the norm and the modulation in one Triton kernel each way: `triton_kernels.py`.

The forward pass reads x and branch once and writes x' and y once. The backward pass reads x', branch and the gradients
of x' and y once, computes mean and deviation again, and writes the gradients of x and branch once. The sums over tokens
from which the gradients of shift, scale, gate, weight and bias follow are one partial sum for each program. These are
added in a fixed order, so that results repeat to the bit.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..triton_support import dense_rows, launched_on, power_of_two
from .reference import types

LARGEST = 4096  # channels, because a program holds a row in its registers
NARROWEST = 16  # channels of a tile
# Channels of a tile that a thread has, by the number of tiles of a row: 8 to 14 of a row.
OF_A_THREAD = {1: 8, 2: 4, 3: 4, 5: 2, 7: 2}
# About as many warps as an H100 runs at a time, as registers allow, and the least steps of a program: each program of
# the backward pass writes sums.
FORWARD, BACKWARD = (4096, 1), (2048, 4)
# More warps where programs stay longer than LONG tokens: then the last programs take a small part of the time.
SEVERAL, LONG = 8192, 32


def tiles(channels: int, wide: bool) -> dict[str, int]:
    """The constants of a kernel for rows of `channels`, of which the stream is float32 if it is `wide`.

    A row has 1, 3, 5 or 7 tiles: as wide as possible with as little padding as possible. 16 bytes are the most that a
    thread loads or stores at a time, so that one tile of float32 is cut in two.
    """
    most = power_of_two(channels, NARROWEST)
    sizes = [size for size in (most, most // 2, most // 4, most // 8) if size >= NARROWEST]
    size = min(sizes, key=lambda size: -(-channels // size) * size)
    if size == most and wide:
        size //= 2
    each = OF_A_THREAD[-(-channels // size)]
    threads = size // each  # of a row
    warps = threads // 32 if threads > 32 else 4
    return {"D": channels, "BE": size, "R": 32 * warps // threads, "num_warps": warps}


def tokens_of_a_program(images: int, tokens: int, constants: dict[str, int], direction: tuple[int, int]) -> int:
    """Tokens of an image that a program walks down in a direction, FORWARD or BACKWARD: all, or fewer where the GPU
    would be idle, but not fewer than the least steps."""
    full, least = direction
    span = max(1, tokens)
    while span > least * constants["R"]:
        if images * -(-tokens // span) * constants["num_warps"] >= (SEVERAL if span > LONG else full):
            break
        span = -(-span // 2)
    return span


def _rows(x: Tensor) -> Tensor:
    """x [B, ..., D] as [B, L, D] with dense rows."""
    return dense_rows(x.unsqueeze(1) if x.ndim == 2 else x.flatten(1, -2))


def _dense(v: Tensor | None) -> Tensor | None:
    return None if v is None else dense_rows(v)


def _plan(x: Tensor, stream: torch.dtype, direction: tuple[int, int]) -> tuple[dict[str, int], int, int]:
    """The constants of a kernel, the tokens of a program, and how many programs share an image."""
    images, *grid, channels = (int(n) for n in x.shape)  # ints, even where torch.compile has symbols
    constants = tiles(channels, stream.itemsize > 2)
    span = tokens_of_a_program(images, math.prod(grid), constants, direction)
    return constants, span, max(1, -(-math.prod(grid) // span))


def _strides(axes: int, *tensors: Tensor | None) -> list[int]:
    """The first strides of every tensor, zeros for None."""
    return [stride for v in tensors for stride in ([0] * axes if v is None else v.stride()[:axes])]


@torch.library.custom_op("lamabench::modulated_norm", mutates_args=())
def norm_forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """x' and y, contiguous; x' is empty if there is no branch, because it is x."""
    from . import triton_kernels

    kernel: Any = triton_kernels.forward  # Any, because type checkers take a kernel for a function

    written = types(x, branch, gate, shift)
    kind = written.get("x'", x.dtype)
    stream = torch.empty(x.shape if branch is not None else 0, dtype=kind, device=x.device)
    y = torch.empty(x.shape, dtype=written["y"], device=x.device)
    constants, span, spans = _plan(x, kind, FORWARD)
    x, branch = _rows(x), None if branch is None else _rows(branch)
    gate, shift, scale = _dense(gate), dense_rows(shift), dense_rows(scale)
    with launched_on(x):
        kernel[(len(x), spans)](
            x, branch, gate, shift, scale, _dense(weight), _dense(bias), stream, y,
            *_strides(2, x, branch), *_strides(1, gate, shift, scale), x.shape[1], span, eps,
            **constants, enable_fp_fusion=True,
        )  # fmt: skip
    return stream, y


@torch.library.custom_op("lamabench::modulated_norm_backward", mutates_args=())
def norm_backward(
    g_stream: Tensor | None,
    g_y: Tensor,
    stream: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, in the type of x', and of branch (empty if there is none), contiguous; and float32 parts
    [B, parts, 3 or 2, D] that add up to the sums over tokens of g_y, of g_y times the normalised row and, if there is a
    branch, of the gradient of x times branch."""
    from . import triton_kernels

    kernel: Any = triton_kernels.backward  # Any, because type checkers take a kernel for a function

    constants, span, spans = _plan(stream, stream.dtype, BACKWARD)
    g_x = torch.empty(stream.shape, dtype=stream.dtype, device=stream.device)
    g_branch = torch.empty(
        0 if branch is None else branch.shape, dtype=(branch if branch is not None else g_y).dtype, device=stream.device
    )
    partial = torch.empty(
        (len(stream), spans, 2 if branch is None else 3, stream.shape[-1]), dtype=torch.float32, device=stream.device
    )
    g_y, stream = _rows(g_y), _rows(stream)
    g_stream, branch = (None if v is None else _rows(v) for v in (g_stream, branch))
    gate, scale = _dense(gate), dense_rows(scale)
    with launched_on(stream):
        kernel[(len(stream), spans)](
            g_stream, g_y, stream, branch, gate, scale, _dense(weight), g_x, g_branch, partial,
            *_strides(2, g_stream, g_y, stream, branch), *_strides(1, gate, scale), stream.shape[1], span, eps,
            **constants, enable_fp_fusion=True,
        )  # fmt: skip
    return g_x, g_branch, partial


@norm_forward.register_fake
def _(x, branch, gate, shift, scale, weight, bias, eps):
    written = types(x, branch, gate, shift)
    stream = x.new_empty(x.shape if branch is not None else 0, dtype=written.get("x'"))
    return stream, x.new_empty(x.shape, dtype=written["y"])


@norm_backward.register_fake
def _(g_stream, g_y, stream, branch, gate, scale, weight, eps):
    spans = _plan(stream, stream.dtype, BACKWARD)[2]
    sums = stream.new_empty(stream.shape[0], spans, 2 if branch is None else 3, stream.shape[-1], dtype=torch.float32)
    return stream.new_empty(stream.shape), g_y.new_empty(0) if branch is None else branch.new_empty(branch.shape), sums


def _setup_context(ctx, inputs, output) -> None:
    x, branch, gate, shift, scale, weight, bias, ctx.eps = inputs
    ctx.x_type, ctx.shift_type = x.dtype, shift.dtype
    ctx.save_for_backward(x if branch is None else output[0], branch, gate, scale, weight, bias)


def _backward(ctx, g_stream, g_y):
    stream, branch, gate, scale, weight, bias = ctx.saved_tensors
    passed = None if branch is None else g_stream
    g_x, g_branch, partial = norm_backward(passed, g_y, stream, branch, gate, scale, weight, ctx.eps)
    # Added here, not in the operator, so that torch.compile fuses the sums with what follows.
    of_y, of_normed, *of_branch = partial.sum(1).unbind(1)
    g_scale, g_weight, g_bias, g_gate = of_normed, None, None, None
    if weight is not None:
        factor = 1 + scale.float()
        g_scale = of_normed * weight.float() + of_y * bias.float()
        g_weight, g_bias = ((factor * v).sum(0).to(weight.dtype) for v in (of_normed, of_y))
    if branch is None:
        g_branch = None
    else:
        g_gate = of_branch[0].to(gate.dtype)
    return (
        g_x.to(ctx.x_type), g_branch, g_gate, of_y.to(ctx.shift_type), g_scale.to(scale.dtype), g_weight, g_bias, None,
    )  # fmt: skip


norm_forward.register_autograd(_backward, setup_context=_setup_context)


def modulated_norm(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `lamabench.kernels.modulated_norm.modulated_norm`: y alone without a branch, else x' and y.

    Raises InputError for float64, because the kernel computes in float32, and for rows that registers do not hold.
    """
    given = [v for v in (x, branch, gate, shift, scale, weight, bias) if v is not None]
    if any(v.dtype == torch.float64 for v in given):
        raise InputError(
            "modulated_norm: backend 'triton' computes in float32, not in float64; use 'torch' or 'reference'"
        )
    if x.shape[-1] > LARGEST:
        raise InputError(
            f"modulated_norm: backend 'triton' holds at most {LARGEST} channels, not {x.shape[-1]}; "
            "use 'torch' or 'reference'"
        )
    stream, y = norm_forward(x, branch, gate, shift, scale, weight, bias, eps)
    return y if branch is None else (stream, y)
