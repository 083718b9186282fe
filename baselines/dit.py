"""DiT: a plain transformer on patches, conditioned through adaLN-Zero (Peebles and Xie, arXiv 2212.09748).

Four options give the block that transformers of 2025 have: QK-norm, rotary positions, SwiGLU and RMSNorm, as in
LightningDiT (Yao et al., arXiv 2501.01423). Without them it is the DiT of its paper. Parameters have the names of the
released code of both, so that their checkpoints load as they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.attention import attention, macs
from ..kernels.errors import InputError
from ..models.fields import check_blocks, check_dropout
from ..models.layers import (
    LabelEmbedder,
    ModulatedNorm,
    TimestepEmbedder,
    dropout,
    gate,
    modulate,
    sincos_positions,
    xavier_linears,
)
from ..models.registry import Backbone, PaperSum, Preset, load_reference, out_channels, register


@dataclass
class DiTConfig:
    """A DiT. `input_size` is the side of the input, `patch_size` the side of a token, `hidden_size` a token's width.

    Raises InputError where the sizes do not fit together.
    """

    input_size: int = 32
    in_channels: int = 4
    num_classes: int = 1000  # 0: unconditional
    patch_size: int = 2
    hidden_size: int = 384
    depth: int = 12
    num_heads: int = 6
    out_channels: int | None = None  # of the head; null: twice in_channels, DDPM's noise and variance
    # The released code has none. Here it follows every Linear of a block but qkv, as in ViT (2010.11929, appendix B.1).
    dropout: float = field(default=0.0, metadata={"since": 0.0})
    # Queries and keys are normalised in each head before their product (ViT-22B, 2302.05442, section 2).
    qk_norm: bool = field(default=False, metadata={"since": False})
    # Queries and keys are rotated by their row and column (RoFormer, 2104.09864). The fixed positions stay.
    rope: bool = field(default=False, metadata={"since": False})
    # The MLP is gated by SiLU (2002.05202), with two thirds of the hidden channels, so that it is of the same size.
    swiglu: bool = field(default=False, metadata={"since": False})
    # RMSNorm with a weight (1910.07467) instead of each LayerNorm without one.
    rms_norm: bool = field(default=False, metadata={"since": False})

    def __post_init__(self) -> None:
        for name in ("input_size", "in_channels", "patch_size", "hidden_size", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name} must be 1 or more, not {getattr(self, name)}")
        check_blocks("model.depth", self.depth)
        check_dropout(self.dropout)
        if self.num_classes < 0:
            raise InputError(f"model.num_classes must be 0 (unconditional) or more, not {self.num_classes}")
        if self.input_size % self.patch_size:
            raise InputError(f"model.patch_size {self.patch_size} does not divide model.input_size {self.input_size}")
        if self.hidden_size % self.num_heads:
            raise InputError(f"model.num_heads {self.num_heads} does not divide model.hidden_size {self.hidden_size}")
        if self.hidden_size % 4:
            raise InputError(f"model.hidden_size must be a multiple of 4 for its positions, not {self.hidden_size}")
        if self.out_channels is not None and self.out_channels < 1:
            raise InputError(f"model.out_channels must be 1 or more, or null, not {self.out_channels}")
        if self.rope and self.head_width % 4:
            raise InputError(
                f"model.rope needs heads of a multiple of 4 channels, not {self.head_width}: change model.num_heads"
            )

    @property
    def head_width(self) -> int:
        """Channels of an attention head."""
        return self.hidden_size // self.num_heads


class RMSNorm(nn.RMSNorm):
    """`x / sqrt(mean(x²) + 1e-6) · weight` over the last axis, in float32, or float64 where x is: x [..., width] -> the
    same shape, of the type of the weight."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.dtype == torch.float64 else x.float()
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)


def rotation(head_width: int, side: int) -> Tensor:
    """Cosines, then sines, of the angles by which `rotate` turns the channels of a head: [2, side², head_width / 2].

    The first half of the pairs turns by the row, the second by the column of a token, times 10000^(-4i / head_width)
    for the i-th pair of a half. `head_width` must be a multiple of 4.
    """
    quarter = head_width // 4
    omega = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    line = torch.arange(side, dtype=torch.float64)[:, None] * omega[None]
    angles = torch.cat([line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)], dim=-1).flatten(0, 1)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels (RoFormer, equation 34): x [B, heads, L, d], turns of `rotation` -> the
    shape of x, in the wider of both types."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)


class Attention(nn.Module):
    """Multi-head self-attention: x [B, L, C] -> [B, L, C].

    `norm` makes the norm of queries and of keys from the width of a head; none if it is None. `turns` is a table of
    `rotation`. After norm and rotation, queries and keys have the type of the values again.
    """

    part = "attention"

    def __init__(
        self,
        width: int,
        num_heads: int,
        probability: float = 0.0,
        bias: bool = True,
        norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.operators = {"attention": "auto"}
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.q_norm = nn.Identity() if norm is None else norm(width // num_heads)
        self.k_norm = nn.Identity() if norm is None else norm(width // num_heads)
        self.proj = nn.Linear(width, width)
        self.dropout = dropout(probability)

    def forward(self, x: Tensor, turns: Tensor | None = None) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if turns is not None:
            q, k = rotate(q, turns), rotate(k, turns)
        q, k = q.to(v.dtype), k.to(v.dtype)
        out = attention(q, k, v, backend=self.operators["attention"])
        return self.dropout(self.proj(out.transpose(1, 2).reshape(batch, tokens, width)))

    def own_macs(self, x: Tensor, turns: Tensor | None = None) -> int:
        batch, tokens, width = x.shape
        return macs(batch, self.num_heads, tokens, tokens, width // self.num_heads)


class Mlp(nn.Module):
    """Linear -> GELU (by default its tanh approximation) -> Linear, four times as wide inside."""

    part = "mlp"

    def __init__(self, width: int, probability: float = 0.0, approximate: str = "tanh") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU(approximate=approximate)
        self.fc2 = nn.Linear(4 * width, width)
        self.dropout = dropout(probability)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(self.act(self.fc1(x)))))


class SwiGLU(nn.Module):
    """`w3(SiLU(a) · b)` with `a, b = w12(x)` (Shazeer, 2002.05202): x [B, L, C] -> [B, L, C].

    It has 8 C / 3 channels inside, rounded up to a multiple of 8 for the matrix units: as many parameters as `Mlp`.
    LightningDiT rounds down, which gives another number for L alone (2,730 and not 2,736).
    """

    part = "mlp"

    def __init__(self, width: int, probability: float = 0.0) -> None:
        super().__init__()
        hidden = 8 * -(-width // 3)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.act = nn.SiLU()
        self.w3 = nn.Linear(hidden, width)
        self.dropout = dropout(probability)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.dropout(self.w3(self.dropout(self.act(a) * b)))


class AdaLN(nn.Sequential):
    """SiLU -> Linear: c [B, C] -> [B, vectors · C]. `DiT` sets it to zero, so that a block starts as the identity."""

    part = "conditioning"

    def __init__(self, width: int, vectors: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, vectors * width))


def _norm(config: DiTConfig) -> nn.Module:
    """The norm before attention, before the MLP and before the head."""
    if config.rms_norm:
        return RMSNorm(config.hidden_size)
    return ModulatedNorm(config.hidden_size, eps=1e-6, affine=False)


def _modulated(
    norm: nn.Module, x: Tensor, shift: Tensor, scale: Tensor, branch: Tensor | None = None, g: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`ModulatedNorm` with any norm: RMSNorm has no such operator."""
    if isinstance(norm, ModulatedNorm):
        return norm(x, shift, scale, branch, g)
    x = x if branch is None or g is None else x + gate(branch, g)
    return x, modulate(norm(x), shift, scale)


class Block(nn.Module):
    """A transformer block with adaLN-Zero (figure 3 of the paper): x [B, L, C], c [B, C] -> [B, L, C]. With `rope`, it
    also takes a table of `rotation`."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, heads, probability = config.hidden_size, config.num_heads, config.dropout
        qk_norm = (RMSNorm if config.rms_norm else nn.LayerNorm) if config.qk_norm else None
        self.norm1 = _norm(config)
        self.attn = Attention(width, heads, probability, norm=qk_norm)
        self.norm2 = _norm(config)
        self.mlp = SwiGLU(width, probability) if config.swiglu else Mlp(width, probability)
        self.adaLN_modulation = AdaLN(width, 6)

    def forward(self, x: Tensor, c: Tensor, *turns: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x, y = _modulated(self.norm1, x, shift1, scale1)
        x, y = _modulated(self.norm2, x, shift2, scale2, self.attn(y, *turns), gate1)
        return x + gate(self.mlp(y), gate2)


class FinalLayer(nn.Module):
    """Norm, shift and scale, then a Linear to the pixels of a patch: x [B, L, C], c [B, C] -> [B, L, patch² · out]."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm_final = _norm(config)
        self.linear = nn.Linear(config.hidden_size, config.patch_size**2 * out_channels(config))
        self.adaLN_modulation = AdaLN(config.hidden_size, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        _, y = _modulated(self.norm_final, x, shift, scale)
        return self.linear(y)


class PatchEmbed(nn.Module):
    """The stem: x [B, C, S, S] -> [B, (S / patch)², width], row by row."""

    def __init__(self, in_channels: int, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class DiT(Backbone):
    """`net(x, t, y) -> out` with the shapes of `Backbone`."""

    paper_sum = PaperSum(affine_norm=0, plain_norm=1, scan=0)

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        width, side = config.hidden_size, config.input_size // config.patch_size
        self.x_embedder = PatchEmbed(config.in_channels, config.patch_size, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(config.num_classes, width)
        self.pos_embed = nn.Parameter(sincos_positions(width, side).view(1, side**2, width), requires_grad=False)
        self.turns: Tensor | None
        self.register_buffer("turns", rotation(config.head_width, side) if config.rope else None, persistent=False)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.final_layer = FinalLayer(config)
        self._initialise()

    def _initialise(self) -> None:
        """As in the paper: Xavier for the stem, the blocks and the head, zero for the last Linear and every `AdaLN`."""
        xavier_linears(self.blocks)
        xavier_linears(self.final_layer)
        stem = self.x_embedder.proj
        nn.init.xavier_uniform_(stem.weight.view(stem.out_channels, -1))
        if stem.bias is not None:
            nn.init.zeros_(stem.bias)
        for module in (self.final_layer.linear, *(m for m in self.modules() if isinstance(m, AdaLN))):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.check_input(x)
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        inputs = (c,) if self.turns is None else (c, self.turns)
        for block in self.blocks:
            tokens = self.run_block(block, tokens, *inputs)
        pixels = self.final_layer(tokens, c)
        patch, side = self.config.patch_size, self.config.input_size // self.config.patch_size
        out = pixels.view(x.shape[0], side, side, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(x.shape[0], -1, side * patch, side * patch)


def from_reference(state_dict: Mapping[str, Tensor], config: DiTConfig) -> DiT:
    """A DiT with weights of the released code, or of LightningDiT's, whose parameter names it shares. The tables of
    cosines and sines of LightningDiT follow from the configuration and are not read.

    Raises InputError where a name is missing, unexpected or of another shape.
    """
    tables = ("feat_rope.freqs_cos", "feat_rope.freqs_sin") if config.rope else ()
    return load_reference(DiT(config), {name: value for name, value in state_dict.items() if name not in tables})


PAPER = "arXiv 2212.09748, table 1 and section 4"
LIGHTNING = "arXiv 2501.01423, released configurations (no QK-norm; latents of VA-VAE f16d32)"
MODERN = "ours: sizes of arXiv 2212.09748, block of 2501.01423 with QK-norm"


def _preset(name: str, title: str, patch: int, width: int, depth: int, heads: int) -> Preset:
    """A row of the paper: latents of 256 x 256 ImageNet."""
    return Preset(name, title, DiTConfig(32, 4, 1000, patch, width, depth, heads), PAPER)


def _modern(name: str, title: str, width: int, depth: int, heads: int) -> Preset:
    """A size of DiT on its latents, with all four options."""
    config = DiTConfig(32, 4, 1000, 2, width, depth, heads, qk_norm=True, rope=True, swiglu=True, rms_norm=True)
    return Preset(name, title, config, MODERN)


def _lightning(name: str, title: str, width: int, depth: int, heads: int) -> Preset:
    """A model of LightningDiT's paper: latents of 256 x 256 ImageNet, 16 x 16 with 32 channels."""
    config = DiTConfig(16, 32, 1000, 1, width, depth, heads, rope=True, swiglu=True, rms_norm=True)
    return Preset(name, title, config, LIGHTNING)


_NANO = DiTConfig(16, 1, 10, 2, 96, 4, 3)
_MODERN_NANO = replace(_NANO, qk_norm=True, rope=True, swiglu=True, rms_norm=True)

# fmt: off
PRESETS = [
    #        name        title       patch width depth heads
    # Half of S, and 11 blocks, so that it is 1 % larger than LaMamba-Diff-T (12 blocks: 10 %).
    Preset("dit_t_2",   "DiT-T/2", DiTConfig(32, 4, 1000, 2, 192, 11, 3), "ours, near LaMamba-Diff-T"),
    _preset("dit_s_2",  "DiT-S/2",       2,  384,  12,   6),
    _preset("dit_s_4",  "DiT-S/4",       4,  384,  12,   6),
    _preset("dit_s_8",  "DiT-S/8",       8,  384,  12,   6),
    _preset("dit_b_2",  "DiT-B/2",       2,  768,  12,  12),
    _preset("dit_b_4",  "DiT-B/4",       4,  768,  12,  12),
    _preset("dit_b_8",  "DiT-B/8",       8,  768,  12,  12),
    _preset("dit_l_2",  "DiT-L/2",       2, 1024,  24,  16),
    _preset("dit_l_4",  "DiT-L/4",       4, 1024,  24,  16),
    _preset("dit_l_8",  "DiT-L/8",       8, 1024,  24,  16),
    _preset("dit_xl_2", "DiT-XL/2",      2, 1152,  28,  16),
    _preset("dit_xl_4", "DiT-XL/4",      4, 1152,  28,  16),
    _preset("dit_xl_8", "DiT-XL/8",      8, 1152,  28,  16),
    Preset("dit_nano",  "DiT-nano/2", _NANO, "ours: 16 x 16 digits on a CPU"),
    #        name               title              width depth heads
    _modern("dit_modern_s_2",  "Modern DiT-S/2",    384,  12,   6),
    _modern("dit_modern_b_2",  "Modern DiT-B/2",    768,  12,  12),
    _modern("dit_modern_l_2",  "Modern DiT-L/2",   1024,  24,  16),
    _modern("dit_modern_xl_2", "Modern DiT-XL/2",  1152,  28,  16),
    Preset("dit_modern_nano",  "Modern DiT-nano/2", _MODERN_NANO, "ours: 16 x 16 digits on a CPU"),
    _lightning("lightning_dit_b_1",  "LightningDiT-B/1",   768, 12, 12),
    _lightning("lightning_dit_xl_1", "LightningDiT-XL/1", 1152, 28, 16),
]
# fmt: on

register("dit", DiTConfig, DiT, PRESETS)
