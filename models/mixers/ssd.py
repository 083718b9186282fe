"""Mamba-2's scan (SSD) over the paths of an image as a mixer."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...kernels import depthwise_conv, ssd
from ...kernels.cross_scan import DIRECTIONS, ScanPaths
from ...kernels.errors import unknown
from .mixer import Mixer, check_positive, register_mixer
from .scan import PathScan


class SSD2D(PathScan):
    """Mamba-2's block (arXiv 2405.21060, section 7) over the paths of `SS2D`.

    Linear -> z, x, B, C, dt; depthwise 3 × 3 and SiLU on x, B and C; K scans; LayerNorm; times SiLU(z); Linear. Inner
    width E = `ratio` · C in H heads of width P = E / H. Every direction has its own B, C, dt, A and skip; B and C are
    shared by the heads. Mamba-2 has a causal convolution of width 4 instead, and RMSNorm of the gated output; these
    are `SS2D`'s, so that the two differ in the scan and its projections.
    """

    def __init__(
        self, dim: int, side: int, d_state: int, head_dim: int, scan: str, ratio: int, conv_bias: bool
    ) -> None:
        super().__init__()
        self.operators = {"depthwise_conv": "auto", "ssd": "auto", "gated_norm": "auto"}
        inner, directions = ratio * dim, DIRECTIONS[scan]
        heads = inner // head_width(inner, head_dim)
        # Widths of z, of what is convolved (x, B, C), and of dt.
        self.widths = [inner, inner + 2 * directions * d_state, directions * heads]
        self.d_state = d_state
        self.in_proj = nn.Linear(dim, sum(self.widths), bias=False)
        convolved = self.widths[1]
        self.conv2d = nn.Conv2d(convolved, convolved, 3, padding=1, groups=convolved, bias=conv_bias)  # never called
        self.dt_bias = nn.Parameter(torch.empty(directions, heads))
        self.A_logs = nn.Parameter(torch.empty(directions, heads))
        self.Ds = nn.Parameter(torch.ones(directions, heads))
        self.out_norm = nn.LayerNorm(inner)  # parameters, never called
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.keep_paths(scan, side)
        self._init_scan()

    def _init_scan(self) -> None:
        """Mamba-2's: step sizes log-uniform in [1e-3, 1e-1], -A uniform in [1, 16]."""
        self.start_steps(self.dt_bias)
        with torch.no_grad():
            self.A_logs.uniform_(1, 16).log_()

    def forward(self, x: Tensor) -> Tensor:
        directions, heads = self.dt_bias.shape
        z, convolved, dt = self.in_proj(x).split(self.widths, dim=-1)
        convolved = depthwise_conv.depthwise_conv_silu(
            convolved, self.conv2d.weight, self.conv2d.bias, self.operators["depthwise_conv"]
        ).flatten(1, 2)  # [B, L, E + 2 K N]
        states = directions * self.d_state
        x, b, c = convolved.split([self.widths[0], states, states], dim=-1)
        rates = self.A_logs if self.A_logs.dtype == torch.float64 else self.A_logs.float()
        y = ssd.ssd(
            x,
            dt.flatten(1, 2).unflatten(-1, (directions, heads)),
            b.unflatten(-1, (directions, self.d_state)),
            c.unflatten(-1, (directions, self.d_state)),
            self.dt_bias,
            -torch.exp(rates),
            self.Ds,
            ScanPaths(self.order, self.inverse),
            self.operators["ssd"],
        )
        return self.finish(y, z)

    def own_macs(self, x: Tensor) -> int:
        """Multiply-adds outside the child modules: the convolution, and the scan's products over chunks."""
        batch, height, width, _ = x.shape
        directions, heads = self.dt_bias.shape
        return depthwise_conv.macs(batch, height, width, self.widths[1], self.conv2d.kernel_size[0]) + ssd.macs(
            batch, height * width, directions, heads, self.widths[0] // heads, self.d_state
        )


def head_width(inner: int, most: int) -> int:
    """The largest divisor of `inner` that is at most `most`."""
    return next(width for width in range(min(inner, most), 0, -1) if inner % width == 0)


@register_mixer("ssd")
@dataclass
class SSDMixer(Mixer):
    """Mamba-2's scan over the paths of an image: `SSD2D`.

    Heads are `head_dim` wide; where that does not divide E, they have the largest width below that does. `d_state` is
    not the model's, which is the selective scan's: SSD affords 64 or 128 states (arXiv 2405.21060, section 8).
    """

    d_state: int = field(default=64, metadata={"model": None})
    head_dim: int = 64
    scan: str = "continuous"
    ssm_ratio: int = 2
    conv_bias: bool = False  # of the depthwise convolution before the scan

    def __post_init__(self) -> None:
        check_positive(self, "d_state", "head_dim", "ssm_ratio")
        if self.scan not in DIRECTIONS:
            raise unknown("scan", self.scan, DIRECTIONS)

    def build(self, dim: int, side: int, shift: bool) -> nn.Module:
        return SSD2D(dim, side, self.d_state, self.head_dim, self.scan, self.ssm_ratio, self.conv_bias)
