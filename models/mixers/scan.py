"""The 2-D selective scan as a mixer."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels import depthwise_conv, gated_norm, selective_scan
from ...kernels.cross_scan import DIRECTIONS, ScanPaths, scan_paths
from ...kernels.errors import unknown
from .mixer import Mixer, check_positive, register_mixer


class PathScan(nn.Module):
    """What the scans over the paths of an image share: the paths (`keep_paths`), how step sizes start (`start_steps`),
    and what follows the scan (`finish`), for which a class has `operators`, `out_norm` and `out_proj`."""

    part = "ssm"
    operators: dict[str, str]
    out_norm: nn.LayerNorm  # parameters, never called
    out_proj: nn.Linear
    order: Tensor
    inverse: Tensor
    pairs: tuple[int, ...] = ()  # see `ScanPaths`: right for a class with other paths in `order` and `inverse` too

    def keep_paths(self, scan: str, side: int) -> None:
        """Keep the paths of `scan` over side × side tokens."""
        paths = scan_paths(scan, side, side)
        self.pairs = paths.pairs
        self.register_buffer("order", paths.order, persistent=False)
        self.register_buffer("inverse", paths.inverse, persistent=False)

    @torch.no_grad()
    def start_steps(self, bias: Tensor) -> None:
        """Give a bias values whose softplus, a step size, is log-uniform in [1e-3, 1e-1]."""
        step = torch.exp(torch.empty_like(bias).uniform_(math.log(1e-3), math.log(1e-1)))
        bias.copy_(step + torch.log(-torch.expm1(-step)))

    def finish(self, y: Tensor, z: Tensor) -> Tensor:
        """LayerNorm, times SiLU(z), Linear: y [B, H · W, E] and z [B, H, W, E] -> [B, H, W, C]."""
        y = gated_norm.gated_norm(
            y.unflatten(1, z.shape[1:3]),
            z,
            self.out_norm.weight,
            self.out_norm.bias,
            self.out_norm.eps,
            self.operators["gated_norm"],
        )
        return self.out_proj(y)

    def own_normalised(self, x: Tensor) -> int:
        """Elements that the LayerNorm after the scan normalises."""
        return x[..., 0].numel() * self.out_norm.normalized_shape[0]


class SS2D(PathScan):
    """The 2-D selective scan (VMamba, arXiv 2401.10166; LaMamba-Diff, arXiv 2408.02615).

    Linear -> x, z; depthwise 3 × 3 and SiLU on x; K scans; LayerNorm; times SiLU(z); Linear. Inner width
    E = `ratio` · C, rank r = ceil(C / 16). Every direction has its own parameters.
    """

    def __init__(self, dim: int, side: int, d_state: int, scan: str, ratio: int, conv_bias: bool) -> None:
        super().__init__()
        self.operators = {"depthwise_conv": "auto", "selective_scan": "auto", "gated_norm": "auto"}
        inner, self.rank, self.d_state = ratio * dim, math.ceil(dim / 16), d_state
        directions = DIRECTIONS[scan]
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias)  # parameters, never called
        self.x_proj_weight = nn.Parameter(torch.empty(directions, self.rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(directions, inner, self.rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(directions, inner))
        self.A_logs = nn.Parameter(torch.arange(1, d_state + 1).float().log().repeat(directions * inner, 1))
        self.Ds = nn.Parameter(torch.ones(directions * inner))
        self.out_norm = nn.LayerNorm(inner)  # parameters, never called
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.keep_paths(scan, side)
        self._init_scan()

    def _init_scan(self) -> None:
        for weight, width in ((self.x_proj_weight, self.x_proj_weight.shape[-1]), (self.dt_projs_weight, self.rank)):
            nn.init.uniform_(weight, -(width**-0.5), width**-0.5)
        self.start_steps(self.dt_projs_bias)

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = depthwise_conv.depthwise_conv_silu(
            x, self.conv2d.weight, self.conv2d.bias, self.operators["depthwise_conv"]
        ).flatten(1, 2)  # [B, L, E]
        directions, _, inner = self.x_proj_weight.shape
        rates = self.A_logs if self.A_logs.dtype == torch.float64 else self.A_logs.float()
        # Project in image order, because a token's projection does not depend on the path.
        projected = F.linear(x, self.x_proj_weight.flatten(0, 1)).unflatten(-1, (directions, -1))
        dt, b, c = projected.split([self.rank, self.d_state, self.d_state], dim=-1)
        y = selective_scan.selective_scan(
            x,
            dt,
            b,
            c,
            self.dt_projs_weight,
            self.dt_projs_bias,
            -torch.exp(rates).view(directions, inner, -1),
            self.Ds.view(directions, inner),
            ScanPaths(self.order, self.inverse, self.pairs),
            self.operators["selective_scan"],
        )
        return self.finish(y, z)

    def own_macs(self, x: Tensor) -> int:
        """Multiply-adds outside the child modules: the convolution, the projections to dt, B, C and the step sizes."""
        batch, height, width, _ = x.shape
        directions, _, inner = self.x_proj_weight.shape
        return (
            depthwise_conv.macs(batch, height, width, inner, self.conv2d.kernel_size[0])
            + batch * height * width * self.x_proj_weight.numel()
            + selective_scan.macs(batch, height * width, directions, inner, self.rank)
        )

    def own_scan_operations(self, x: Tensor) -> int:
        """Floating-point operations of the scan, by the papers' rule."""
        directions, _, inner = self.x_proj_weight.shape
        return selective_scan.operations(x.shape[0], x.shape[1] * x.shape[2], directions, inner, self.d_state)


@register_mixer("ssm")
@dataclass
class SSMMixer(Mixer):
    """The 2-D selective scan: `SS2D`."""

    d_state: int
    scan: str
    ssm_ratio: int
    conv_bias: bool  # of the depthwise convolution before the scan

    def __post_init__(self) -> None:
        check_positive(self, "d_state", "ssm_ratio")
        if self.scan not in DIRECTIONS:
            raise unknown("scan", self.scan, DIRECTIONS)

    def build(self, dim: int, side: int, shift: bool) -> nn.Module:
        return SS2D(dim, side, self.d_state, self.scan, self.ssm_ratio, self.conv_bias)
