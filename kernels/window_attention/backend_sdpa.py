"""Window attention by torch's fused attention, between a partition into windows and its inverse."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .windows import merge, partition


def window_attention(
    qkv: Tensor, heads: int, window: int, shift: int, table: Tensor | None, index: Tensor | None, mask: Tensor | None
) -> Tensor:
    """See `lamabench.kernels.window_attention.window_attention`."""
    q, k, v = partition(qkv, heads, window, shift)
    windows = q.shape[1]
    bias = None
    if table is not None and index is not None:
        # The table is dense, because torch traces other layouts wrongly.
        bias = table[index].permute(2, 0, 1).to(q.dtype).contiguous()
        bias = bias.expand(windows, -1, -1, -1)  # [windows, heads, w², w²]
    if mask is not None:
        mask = mask[:, None].to(q.dtype).expand(-1, heads, -1, -1)
        bias = mask if bias is None else mask + bias
    if bias is not None:
        bias = bias.flatten(0, 1)[None]
    # Windows become heads, because torch's fused kernels take four axes. The bias is the same for every image.
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=bias).unflatten(1, (windows, heads))
    return merge(out, qkv.shape[1], qkv.shape[2], window, shift)
