"""Shifted-window attention as its equations say it, in float32 or float64."""

import torch
from torch import Tensor

from .windows import merge, partition


def window_attention(
    qkv: Tensor, heads: int, window: int, shift: int, table: Tensor | None, index: Tensor | None, mask: Tensor | None
) -> Tensor:
    """See `lamabench.kernels.window_attention.window_attention`."""
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = partition(qkv.to(dtype), heads, window, shift)  # [B, windows, heads, w², d]
    # Autocast would lower the products to bfloat16. It does not know the device "meta".
    with torch.autocast("cpu" if qkv.is_meta else qkv.device.type, enabled=False):
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if table is not None and index is not None:
            scores = scores + table.to(dtype)[index].permute(2, 0, 1)
        if mask is not None:
            scores = scores + mask.to(dtype)[:, None]
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        out = weights / weights.sum(-1, keepdim=True) @ v
    return merge(out, qkv.shape[1], qkv.shape[2], window, shift).to(qkv.dtype)
