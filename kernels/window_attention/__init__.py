"""Shifted-window attention with a relative position bias (Swin, arXiv 2103.14030)."""

from torch import Tensor

from ..operator import Backend, Operator, Work
from ..triton_support import triton_reasons
from . import backend_sdpa, backend_triton, reference
from .windows import relative_position_index, shift_mask

__all__ = ["OPERATOR", "macs", "relative_position_index", "shift_mask", "window_attention"]


def macs(batch: int, height: int, width: int, channels: int, window: int) -> int:
    """Multiply-adds of both products: every token meets w² keys, then w² values."""
    return 2 * batch * height * width * window**2 * channels


def work(qkv: Tensor, heads: int, window: int, *_: int | Tensor | None) -> Work:
    """The work of one call, from the arguments of a backend: both products, and an exponential for each score."""
    batch, height, width, channels = qkv.shape
    scores = batch * height * width * window**2 * heads
    return Work(macs=macs(batch, height, width, channels // 3, window), exponentials=scores)


def _traced(qkv: Tensor, _table: Tensor | None, heads: int, window: int, *_: int) -> Work:
    return work(qkv, heads, window)


OPERATOR = Operator(
    "window_attention",
    [
        Backend("triton", backend_triton.window_attention, triton_reasons, auto_on=("cuda",)),
        Backend("sdpa", backend_sdpa.window_attention),
        Backend("reference", reference.window_attention),
    ],
    work,
    traced={"lamabench::window_attention_triton": _traced},
)


def window_attention(
    qkv: Tensor,
    heads: int,
    window: int,
    shift: int = 0,
    table: Tensor | None = None,
    index: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention inside windows of `window` × `window` tokens, after a cyclic shift of the grid by `shift`.

    qkv    [B, H, W, 3C], queries, then keys, then values, each `heads` × C / heads; H and W are multiples of `window`
    table  [(2w - 1)², heads] relative position bias, with index = `relative_position_index(w)`; None: no bias
    mask   `shift_mask(H, W, w, shift)` [windows, w², w²], needed with a shift; None: no mask
    returns [B, H, W, C], in the type of qkv

    Backend `triton` computes index and mask itself. It does not read their values.
    """
    return OPERATOR.resolve(backend, qkv.device.type).run(qkv, heads, window, shift, table, index, mask)
