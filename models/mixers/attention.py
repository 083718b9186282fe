"""Attention as a mixer: within shifted windows, and over all tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...kernels import attention, window_attention
from ...kernels.errors import InputError
from .mixer import Mixer, check_heads, check_positive, register_mixer


class WindowAttention(nn.Module):
    """Shifted-window attention (Swin, arXiv 2103.14030). A grid with `side` <= `window` has one window and no shift."""

    part = "attention"
    relative_position_index: Tensor | None
    attn_mask: Tensor | None

    def __init__(self, dim: int, side: int, heads: int, window: int, shift: bool, bias: bool) -> None:
        super().__init__()
        self.operators = {"window_attention": "auto"}
        self.heads, self.window = heads, min(window, side)
        self.shift = window // 2 if shift and side > window else 0
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        table = index = mask = None
        if bias:
            table = nn.Parameter(nn.init.trunc_normal_(torch.empty((2 * self.window - 1) ** 2, heads), std=0.02))
            index = window_attention.relative_position_index(self.window)
        if self.shift:
            mask = window_attention.shift_mask(side, side, self.window, self.shift)
        self.relative_position_bias_table = table
        self.register_buffer("relative_position_index", index, persistent=False)
        self.register_buffer("attn_mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out = window_attention.window_attention(
            self.qkv(x),
            self.heads,
            self.window,
            self.shift,
            self.relative_position_bias_table,
            self.relative_position_index,
            self.attn_mask,
            self.operators["window_attention"],
        )
        return self.proj(out)

    def own_macs(self, x: Tensor) -> int:
        """Multiply-adds outside the child modules: scores and weighted values."""
        batch, height, width, dim = x.shape
        return window_attention.macs(batch, height, width, dim, self.window)


class GlobalAttention(nn.Module):
    """Multi-head attention over all tokens (arXiv 1706.03762), as in DiT's blocks."""

    part = "attention"

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.operators = {"attention": "auto"}
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        qkv = self.qkv(x).view(batch, height * width, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        out = attention.attention(*qkv.unbind(0), backend=self.operators["attention"])
        return self.proj(out.transpose(1, 2).reshape(batch, height, width, dim))

    def own_macs(self, x: Tensor) -> int:
        """Multiply-adds outside the child modules: scores and weighted values."""
        batch, height, width, dim = x.shape
        return attention.macs(batch, self.heads, height * width, height * width, dim // self.heads)


@register_mixer("window")
@dataclass
class WindowMixer(Mixer):
    """Attention within windows of `size` × `size` tokens, which odd blocks shift: `WindowAttention`."""

    size: int = field(metadata={"model": "window_size"})
    num_heads: int
    shift: bool
    relative_bias: bool

    def __post_init__(self) -> None:
        check_positive(self, "num_heads")
        if self.size < 1:
            raise InputError(f"window_size must be 1 or more, not {self.size}")

    def check(self, dims: Sequence[int], sides: Sequence[int]) -> None:
        check_heads(self.num_heads, dims)
        for side in sides:
            if side > self.size and side % self.size:
                choices = [w for w in range(1, side + 1) if all(s <= w or s % w == 0 for s in sides)]
                raise InputError(
                    f"window_size {self.size} does not divide the {side} × {side} grid of a stage; choices: {choices}"
                )

    def build(self, dim: int, side: int, shift: bool) -> nn.Module:
        return WindowAttention(dim, side, self.num_heads, self.size, shift and self.shift, self.relative_bias)


@register_mixer("global")
@dataclass
class GlobalMixer(Mixer):
    """Attention over all tokens: `GlobalAttention`."""

    num_heads: int

    def __post_init__(self) -> None:
        check_positive(self, "num_heads")

    def check(self, dims: Sequence[int], sides: Sequence[int]) -> None:
        check_heads(self.num_heads, dims)

    def build(self, dim: int, side: int, shift: bool) -> nn.Module:
        return GlobalAttention(dim, self.num_heads)
