"""Windows of a grid: cutting, merging, relative positions, and the mask across the seam of a shift."""

import torch
from torch import Tensor


def partition(qkv: Tensor, heads: int, window: int, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [B, H, W, 3C] -> q, k, v [B, windows, heads, w², C / heads], after a cyclic shift up and left."""
    if shift:
        qkv = qkv.roll((-shift, -shift), dims=(1, 2))
    batch, height, width, channels = qkv.shape
    rows, columns, head_dim = height // window, width // window, channels // (3 * heads)
    qkv = qkv.reshape(batch, rows, window, columns, window, 3, heads, head_dim)
    qkv = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(3, batch, rows * columns, heads, window**2, head_dim)
    q, k, v = qkv.unbind(0)
    return q, k, v


def merge(out: Tensor, height: int, width: int, window: int, shift: int) -> Tensor:
    """[B, windows, heads, w², d] -> [B, H, W, heads · d], with the shift undone."""
    batch, _, heads, _, head_dim = out.shape
    out = out.view(batch, height // window, width // window, heads, window, window, head_dim)
    out = out.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, heads * head_dim)
    return out.roll((shift, shift), dims=(1, 2)) if shift else out


def relative_position_index(window: int) -> Tensor:
    """Row of the bias table for each (query, key) of a window, int64 [w², w²]: row-major
    (Δrow + w - 1)(2w - 1) + (Δcol + w - 1), Δ = query - key (Swin, arXiv 2103.14030, equation 4)."""
    positions = torch.cartesian_prod(torch.arange(window, device="cpu"), torch.arange(window, device="cpu"))
    delta = positions.view(-1, 1, 2) - positions.view(1, -1, 2) + window - 1
    return delta[..., 0] * (2 * window - 1) + delta[..., 1]


def shift_mask(height: int, width: int, window: int, shift: int) -> Tensor:
    """The addend of the scores of a shifted grid, [windows, w², w²]: 0 between tokens on one side of the seam of the
    cyclic shift, -100 across it (Swin, figure 4)."""

    def regions(side: int) -> Tensor:
        """0 before the last window, 1 in it and before the seam, 2 beyond the seam."""
        place = torch.arange(side, device="cpu")
        return (place >= side - window).long() + (place >= side - shift).long()

    region = regions(height)[:, None] * 3 + regions(width)[None]
    region = region.view(height // window, window, width // window, window).transpose(1, 2).reshape(-1, window**2)
    return (region[:, None] != region[:, :, None]).float() * -100.0
