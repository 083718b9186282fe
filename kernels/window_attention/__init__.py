"""Shifted-window attention with a relative position bias (Swin, arXiv 2103.14030)."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..operator import Backend, Operator
from ..triton_support import triton_reasons
from . import backend_triton, reference
from .windows import merge, partition, relative_position_index, shift_mask

__all__ = ["OPERATOR", "TRACED", "macs", "relative_position_index", "shift_mask", "window_attention"]


def _sdpa(
    qkv: Tensor, heads: int, window: int, shift: int, table: Tensor | None, index: Tensor | None, mask: Tensor | None
) -> Tensor:
    q, k, v = partition(qkv, heads, window, shift)
    windows = q.shape[1]
    bias = None
    if table is not None and index is not None:
        bias = table[index].permute(2, 0, 1).to(q.dtype).contiguous()  # dense: torch traces other layouts wrongly
        bias = bias.expand(windows, -1, -1, -1)  # [windows, heads, w², w²]
    if mask is not None:
        mask = mask[:, None].to(q.dtype).expand(-1, heads, -1, -1)
        bias = mask if bias is None else mask + bias
    if bias is not None:
        bias = bias.flatten(0, 1)[None]
    # Windows count as heads: torch's fused kernels want four axes, and the bias is the same for every image.
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=bias).unflatten(1, (windows, heads))
    return merge(out, qkv.shape[1], qkv.shape[2], window, shift)


OPERATOR = Operator(
    "window_attention",
    [
        Backend("triton", backend_triton.window_attention, triton_reasons, auto_on=("cuda",)),
        Backend("sdpa", _sdpa),
        Backend("reference", reference.window_attention),
    ],
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
    """Attention inside windows of `window` × `window` tokens, the grid shifted cyclically by `shift` before.

    qkv    [B, H, W, 3C], queries, then keys, then values, each `heads` × C / heads; H and W divide by `window`
    table  [(2w - 1)², heads] relative position bias, with index = `relative_position_index(w)`; None: no bias
    mask   `shift_mask(H, W, w, shift)` [windows, w², w²], needed with a shift; None: no mask
    returns [B, H, W, C], in the type of qkv

    Backend `triton` computes index and mask itself: other values than these are not read.
    """
    return OPERATOR.resolve(backend, qkv.device.type).run(qkv, heads, window, shift, table, index, mask)


def macs(batch: int, height: int, width: int, channels: int, window: int) -> int:
    """Multiply-adds of both products: every token meets w² keys, then w² values."""
    return 2 * batch * height * width * window**2 * channels


def traced_cost(qkv: Tensor, _table: Tensor | None, _heads: int, window: int, *_: int) -> tuple[int, int]:
    """MACs, and operations of a scan (none), of one call of the custom operator, from its arguments."""
    batch, height, width, channels = qkv.shape
    return macs(batch, height, width, channels // 3, window), 0


# What a traced count needs to know about the operators registered here.
TRACED = {"lamabench::window_attention_triton": traced_cost}
