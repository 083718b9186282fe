"""A depthwise convolution as a mixer."""

from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.errors import InputError
from .mixer import Mixer, register_mixer

CONVNEXT = 7  # the kernel of ConvNeXt, and the default here


class ConvMixer(nn.Module):
    """A local control without attention or scan: Linear, depthwise k × k, GELU, Linear.

    The kernel is ConvNeXt's 7 × 7 (arXiv 2201.03545) or a large one: 13 × 13 or 31 × 31 as in RepLKNet (arXiv
    2203.06717), without its batch normalisation and the small kernel in parallel, which end up in one kernel.
    """

    def __init__(self, dim: int, kernel: int = CONVNEXT) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, dim)
        self.conv2d = nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2d(self.in_proj(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.out_proj(F.gelu(x))


@register_mixer("conv")
@dataclass
class ConvolutionMixer(Mixer):
    """A depthwise convolution with a `kernel` × `kernel` window: `ConvMixer`.

    A side of S tokens meets only 2S - 1 rows of a kernel. A larger kernel is cut to them, without a change of the
    function, so that parameters and cost have no dead weights. One of 7 × 7 or less is never cut.
    """

    kernel: int = field(default=CONVNEXT, metadata={"since": CONVNEXT})  # odd

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise InputError(f"kernel must be odd and 1 or more, not {self.kernel}")

    def build(self, dim: int, side: int, shift: bool) -> nn.Module:
        return ConvMixer(dim, min(self.kernel, max(2 * side - 1, CONVNEXT)))
