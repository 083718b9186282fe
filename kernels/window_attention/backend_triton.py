"""Window attention in one Triton kernel each way: `triton_kernels.py`.

Windows, a shifted grid, a bias or mask for each window, and scores never reach memory. A window that fits one block is
computed whole, and its backward pass needs only the input. A larger one goes block by block, and its backward pass also
needs the output and the log-sum-exp. Sums have a fixed order, so that results repeat to the bit.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import InputError
from ..triton_support import dense_rows, launched_on, power_of_two

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDEST = 256  # the largest head width that tests cover
PROGRAMS, PROGRAMS_BACKWARD = 1056, 528  # that share the work where the batch allows: 8 and 4 a multiprocessor (H100)
REGISTERS = 168  # of a thread in the backward pass, so that a multiprocessor runs 3 programs at a time


def _side(n: int) -> int:
    """The side of a tile that holds n: a power of two, and at least 16 for matrix products."""
    return power_of_two(n, 16)


def _block(dtype: torch.dtype, head_dim: int, window: int) -> int:
    """Tokens of a window that a program holds at a time."""
    # float32 has a quarter of the elements, because it does without tensor cores, whose operands skip the registers.
    most, widest = (32, 64) if dtype == torch.float32 else (64, 128)
    return max(16, min(most, most * widest // _side(head_dim), _side(window**2)))


def _plan(
    qkv: Tensor, table: Tensor | None, heads: int, window: int, shift: int, masked: bool, programs: int
) -> tuple[int, int, dict[str, Any]]:
    """The images that a program takes in turn, the parts of the batch that follow, and the constants of the kernels."""
    batch, height, width, channels = map(int, qkv.shape)  # ints, even where torch.compile has symbols
    at_once = heads * (height // window) * (width // window)
    each = max(1, -(-batch // -(-programs // at_once)))
    head_dim = channels // (3 * heads)
    block = _block(qkv.dtype, head_dim, window)
    constants = {
        "HEADS": heads, "D": head_dim, "DP": _side(head_dim), "HEIGHT": height, "WIDTH": width, "WINDOW": window,
        "SHIFT": shift, "MASKED": masked and shift > 0, "BIAS": table is not None, "BLOCK": block,
        "num_warps": 4 if qkv.dtype == torch.float32 else block // 16,
        # Two stages load the next image meanwhile. Wide heads have one, or shared memory would hold too few programs.
        "num_stages": 2 if qkv.element_size() * _side(head_dim) <= 128 else 1,
    }  # fmt: skip
    return each, -(-batch // each), constants


def _by_head(table: Tensor | None, otherwise: Tensor) -> Tensor:
    """[(2w - 1)², heads] -> float32 [heads, (2w - 1)²]. Without a table, `otherwise`: a pointer that nothing reads."""
    return otherwise if table is None else table.t().contiguous().float()


def _lse_shape(qkv: Tensor, heads: int, window: int) -> tuple[int, ...]:
    batch, height, width, channels = qkv.shape
    one = window**2 <= _block(qkv.dtype, int(channels) // (3 * heads), window)
    return (batch, (height // window) * (width // window), heads, 0 if one else window**2)


@torch.library.custom_op("lamabench::window_attention_triton", mutates_args=())
def attention_forward(
    qkv: Tensor, table: Tensor | None, heads: int, window: int, shift: int, masked: bool
) -> tuple[Tensor, Tensor]:
    """The output [B, H, W, C], and log2 of the sums of 2^score, [B, windows, heads, w²], or [B, windows, heads, 0] for
    windows of one block."""
    from . import triton_kernels

    kernel: Any = triton_kernels.attend  # Any, because type checkers take a kernel for a function

    out = torch.empty((*qkv.shape[:3], qkv.shape[3] // 3), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(_lse_shape(qkv, heads, window), dtype=torch.float32, device=qkv.device)
    each, parts, constants = _plan(qkv, table, heads, window, shift, masked, PROGRAMS)
    grid = (heads * lse.shape[1] * parts, -(-(window**2) // constants["BLOCK"]))
    qkv = dense_rows(qkv)
    with launched_on(qkv):
        kernel[grid](qkv, _by_head(table, lse), out, lse, *qkv.stride()[:3], len(qkv), each, **constants)
    return out, lse


@torch.library.custom_op("lamabench::window_attention_triton_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor | None,
    out: Tensor,
    lse: Tensor,
    heads: int,
    window: int,
    shift: int,
    masked: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of qkv, and float32 parts [parts, heads, w², w²] that add up to the gradient of each pair's bias (no
    heads without a table)."""
    from . import triton_kernels

    one_block: Any = triton_kernels.attend_backward
    blocks: Any = triton_kernels.attend_backward_blocks

    batch, windows, tokens = len(qkv), lse.shape[1], window**2
    each, parts, constants = _plan(qkv, table, heads, window, shift, masked, PROGRAMS_BACKWARD)
    g_qkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    biases = 0 if table is None else heads
    g_bias = torch.empty((parts * windows, biases, tokens, tokens), dtype=torch.float32, device=qkv.device)
    qkv, grad, table = dense_rows(qkv), grad.contiguous(), _by_head(table, lse)
    rest = (g_qkv, g_bias, *qkv.stride()[:3], batch, each)
    grid = (heads * windows * parts,)
    with launched_on(qkv):
        if tokens <= constants["BLOCK"]:
            registers = {} if qkv.dtype == torch.float32 else {"maxnreg": REGISTERS}
            one_block[grid](grad, qkv, table, *rest, **constants, **registers)
        else:
            blocks[grid](grad, qkv, table, out, lse, *rest, **constants)
    return g_qkv, g_bias


@attention_forward.register_fake
def _(qkv, table, heads, window, shift, masked):
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
    return out, qkv.new_empty(_lse_shape(qkv, heads, window), dtype=torch.float32)


@attention_backward.register_fake
def _(grad, qkv, table, out, lse, heads, window, shift, masked):
    biases = 0 if table is None else heads
    parts = _plan(qkv, table, heads, window, shift, masked, PROGRAMS_BACKWARD)[1] * lse.shape[1]
    return qkv.new_empty(qkv.shape), qkv.new_empty(parts, biases, window**2, window**2, dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    qkv, table, *ctx.numbers = inputs
    ctx.save_for_backward(qkv, table, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    qkv, table, out, lse = ctx.saved_tensors
    g_qkv, g_bias = attention_backward(grad, qkv, table, out, lse, *ctx.numbers)
    # Added here, not in the operator, so that torch.compile fuses the sum with what follows.
    g_table = None if table is None else table_gradient(g_bias.sum(0), ctx.numbers[1]).to(table.dtype)
    return g_qkv, g_table, None, None, None, None


attention_forward.register_autograd(_backward, setup_context=_setup_context)


def table_gradient(pairs: Tensor, window: int) -> Tensor:
    """[heads, w², w²] -> [(2w - 1)², heads]: sums over the pairs of each relative position, in the order of
    `relative_position_index`. The sums repeat to the bit, where adding by index would sort or use atomics."""
    pairs = pairs.view(-1, window, window, window, window).transpose(2, 3)  # [heads, rows q, k, columns q, k]
    columns = _by_difference(pairs).movedim(-1, 1)
    return _by_difference(columns).permute(2, 1, 0).reshape((2 * window - 1) ** 2, -1)


def _by_difference(pairs: Tensor) -> Tensor:
    """[…, query, key] -> […, 2w - 1]: sums over the pairs of each difference query - key, from 1 - w on."""
    window = pairs.shape[-1]
    # Reverse the keys, then read rows of 2w as rows of 2w - 1: row q moves right by q, to column q - k + w - 1.
    skewed = pad(pairs.flip(-1), (0, window)).flatten(-2)[..., : window * (2 * window - 1)]
    return skewed.unflatten(-1, (window, 2 * window - 1)).sum(-2)


def window_attention(
    qkv: Tensor, heads: int, window: int, shift: int, table: Tensor | None, index: Tensor | None, mask: Tensor | None
) -> Tensor:
    """See `lamabench.kernels.window_attention.window_attention`. Without index there is no bias, and without mask no
    mask. Their values are not read, because the kernel computes them.

    Raises InputError for types other than bfloat16, float16 and float32, and for shapes that do not fit.
    """
    table = None if index is None else table
    for name, value in (("qkv", qkv), ("table", table)):
        if value is not None and value.dtype not in DTYPES:
            raise InputError(
                f"window_attention: backend 'triton' computes in float32, not on a {name} of {value.dtype}; "
                "use 'sdpa' or 'reference'"
            )
    height, width, channels = qkv.shape[1:]
    if height % window or width % window or channels % (3 * heads) or not 0 <= shift < window:
        raise InputError(
            f"window_attention: qkv {list(qkv.shape)} does not fit {heads} heads, window {window} and shift {shift}: "
            "sides must be multiples of the window, channels of 3 · heads, and the shift less than the window"
        )
    if channels > 3 * heads * WIDEST:
        raise InputError(
            f"window_attention: backend 'triton' takes heads of width 1 to {WIDEST}, not {channels // (3 * heads)}; "
            "use 'sdpa' or 'reference'"
        )
    if table is not None and table.shape != ((2 * window - 1) ** 2, heads):
        raise InputError(
            f"window_attention: a table for window {window} and {heads} heads must be "
            f"[{(2 * window - 1) ** 2}, {heads}], not {list(table.shape)}"
        )
    return attention_forward(qkv, table, heads, window, shift, mask is not None)[0]
