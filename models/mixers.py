"""Token mixers: [B, H, W, C] -> the same. A block is a list of them, so an ablation is data."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import attention, depthwise_conv, gated_norm, selective_scan, window_attention
from ..kernels.cross_scan import DIRECTIONS, ScanPaths, scan_paths


class SS2D(nn.Module):
    """The 2-D selective scan (VMamba, arXiv 2401.10166; LaMamba-Diff, arXiv 2408.02615).

    Linear -> x, z; depthwise 3 × 3 and SiLU on x; K scans; LayerNorm; times SiLU(z); Linear. Inner width
    E = `ratio` · C, rank r = ceil(C / 16). Every direction has parameters of its own.
    """

    part = "ssm"
    order: Tensor
    inverse: Tensor

    def __init__(self, dim: int, side: int, d_state: int, scan: str, ratio: int, conv_bias: bool) -> None:
        super().__init__()
        self.operators = {"depthwise_conv": "auto", "selective_scan": "auto", "gated_norm": "auto"}
        inner, self.rank, self.d_state = ratio * dim, math.ceil(dim / 16), d_state
        directions = DIRECTIONS[scan]
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias)  # parameters; not called
        self.x_proj_weight = nn.Parameter(torch.empty(directions, self.rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(directions, inner, self.rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(directions, inner))
        self.A_logs = nn.Parameter(torch.arange(1, d_state + 1).float().log().repeat(directions * inner, 1))
        self.Ds = nn.Parameter(torch.ones(directions * inner))
        self.out_norm = nn.LayerNorm(inner)  # parameters; not called
        self.out_proj = nn.Linear(inner, dim, bias=False)
        paths = scan_paths(scan, side, side)
        self.register_buffer("order", paths.order, persistent=False)
        self.register_buffer("inverse", paths.inverse, persistent=False)
        self._init_scan()

    def _init_scan(self) -> None:
        for weight, width in ((self.x_proj_weight, self.x_proj_weight.shape[-1]), (self.dt_projs_weight, self.rank)):
            nn.init.uniform_(weight, -(width**-0.5), width**-0.5)
        step = torch.exp(torch.empty_like(self.dt_projs_bias).uniform_(math.log(1e-3), math.log(1e-1)))
        with torch.no_grad():
            self.dt_projs_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = depthwise_conv.depthwise_conv_silu(
            x, self.conv2d.weight, self.conv2d.bias, self.operators["depthwise_conv"]
        ).flatten(1, 2)  # [B, L, E]
        directions, _, inner = self.x_proj_weight.shape
        # Projected in image order: a token's projection does not depend on the path.
        projected = F.linear(x, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (directions, -1))
        dt, b, c = projected.split([self.rank, self.d_state, self.d_state], dim=-1)
        y = selective_scan.selective_scan(
            x,
            dt,
            b,
            c,
            self.dt_projs_weight,
            self.dt_projs_bias,
            -torch.exp(self.A_logs.float()).view(directions, inner, -1),
            self.Ds.view(directions, inner),
            ScanPaths(self.order, self.inverse),
            self.operators["selective_scan"],
        )
        y = gated_norm.gated_norm(
            y.unflatten(1, (height, width)),
            z,
            self.out_norm.weight,
            self.out_norm.bias,
            self.out_norm.eps,
            self.operators["gated_norm"],
        )
        return self.out_proj(y)

    def own_macs(self, x: Tensor) -> int:
        """Multiply-adds outside the child modules: the convolution, the projections to dt, B, C and the step sizes."""
        batch, height, width, _ = x.shape
        directions, _, inner = self.x_proj_weight.shape
        return (
            depthwise_conv.macs(batch, height, width, inner, self.conv2d.kernel_size[0])
            + batch * height * width * self.x_proj_weight.numel()
            + selective_scan.macs(batch, height * width, directions, inner, self.rank)
        )

    def own_normalised(self, x: Tensor) -> int:
        """Elements that the LayerNorm after the scan normalises."""
        return x[..., 0].numel() * self.out_norm.normalized_shape[0]

    def own_scan_operations(self, x: Tensor) -> int:
        """Floating-point operations of the scan, by the papers' rule."""
        directions, _, inner = self.x_proj_weight.shape
        return selective_scan.operations(x.shape[0], x.shape[1] * x.shape[2], directions, inner, self.d_state)


class WindowAttention(nn.Module):
    """Shifted-window attention (Swin, arXiv 2103.14030). Where `side` <= `window`, one window and no shift."""

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


class ConvMixer(nn.Module):
    """The local control without attention or scan: Linear, depthwise 7 × 7, GELU, Linear (cf. ConvNeXt, 2201.03545)."""

    kernel = 7

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, dim)
        self.conv2d = nn.Conv2d(dim, dim, self.kernel, padding=self.kernel // 2, groups=dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2d(self.in_proj(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.out_proj(F.gelu(x))


# Every mixer by its name in a configuration. `none` is a place left empty.
MIXERS = ("ssm", "window", "global", "conv", "none")


def make_mixer(name: str, config: Any, dim: int, side: int, shift: bool) -> nn.Module:
    """The mixer of that name for `dim` channels on a `side` × `side` grid; `config` is a LaMambaConfig."""
    if name == "ssm":
        return SS2D(dim, side, config.d_state, config.scan, config.ssm_ratio, config.conv_bias)
    if name == "window":
        return WindowAttention(
            dim, side, config.num_heads, config.window_size, shift and config.shift, config.relative_bias
        )
    if name == "global":
        return GlobalAttention(dim, config.num_heads)
    return ConvMixer(dim)
