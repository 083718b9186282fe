"""Layers that several backbones share."""

import math

import torch
from torch import Tensor, nn

from ..kernels.modulated_norm import modulated_norm
from ..kernels.modulated_norm.backend_torch import gate as gate
from ..kernels.modulated_norm.backend_torch import modulate as modulate


def timestep_features(t: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal features of timesteps: cosines, then sines (DiT; ADM).

    t [B] -> [B, width], float32; an odd width ends in a zero.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies[None]
    features = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return nn.functional.pad(features, (0, width % 2))


class TimestepEmbedder(nn.Module):
    """256 sinusoidal features -> Linear -> SiLU -> Linear: t [B] -> [B, width]."""

    part = "conditioning"
    features = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        first, last = nn.Linear(self.features, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)
        for layer in (first, last):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_features(t, self.features).to(next(self.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """A table of `num_classes` rows, then one for the null class: y [B] -> [B, width]."""

    part = "conditioning"

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


def sincos_positions(width: int, side: int) -> Tensor:
    """The 2-D sine-cosine table of MAE, [side, side, width]. The first half of the channels encodes the column, the
    second half the row; each half has sines, then cosines. `width` must be a multiple of 4."""
    quarter = width // 4
    omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega[None]
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    table = torch.cat([line[None].expand(side, -1, -1), line[:, None].expand(-1, side, -1)], dim=-1)
    return table.float()


def dropout(probability: float) -> nn.Module:
    """Dropout in training, or nothing where the probability is 0."""
    return nn.Dropout(probability) if probability else nn.Identity()


class ModulatedNorm(nn.LayerNorm):
    """What stands between the mixers of a block: a gated residual, LayerNorm, shift and scale, by the operator
    `modulated_norm`."""

    def __init__(self, width: int, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(width, eps, affine)
        self.operators = {"modulated_norm": "auto"}

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, shift: Tensor, scale: Tensor, branch: Tensor | None = None, g: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`x + g · branch`, or x without a branch, and its norm with shift and scale: x and branch [B, …, C], shift,
        scale and g [B, C] -> two of the shape of x."""
        backend = self.operators["modulated_norm"]
        return modulated_norm(x, shift, scale, self.weight, self.bias, self.eps, branch, g, backend)


def xavier_linears(module: nn.Module) -> None:
    """Xavier-uniform weight and zero bias for every Linear below `module` (DiT; LaMamba-Diff)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
