"""DiT: a plain transformer on patches, conditioned through adaLN-Zero (Peebles and Xie, arXiv 2212.09748).

Parameters have the names of the released code, so that its checkpoints load as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..kernels.attention import attention, macs
from ..kernels.errors import InputError
from ..models.fields import check_blocks, check_dropout
from ..models.layers import LabelEmbedder, TimestepEmbedder, dropout, gate, modulate, sincos_positions, xavier_linears
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


class Attention(nn.Module):
    """Multi-head self-attention: x [B, L, C] -> [B, L, C]."""

    part = "attention"

    def __init__(self, width: int, num_heads: int, probability: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.operators = {"attention": "auto"}
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.dropout = dropout(probability)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = attention(q, k, v, backend=self.operators["attention"])
        return self.dropout(self.proj(out.transpose(1, 2).reshape(batch, tokens, width)))

    def own_macs(self, x: Tensor) -> int:
        batch, tokens, width = x.shape
        return macs(batch, self.num_heads, tokens, tokens, width // self.num_heads)


class Mlp(nn.Module):
    """Linear -> GELU (tanh approximation) -> Linear, four times as wide inside."""

    part = "mlp"

    def __init__(self, width: int, probability: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(4 * width, width)
        self.dropout = dropout(probability)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(self.act(self.fc1(x)))))


class AdaLN(nn.Sequential):
    """SiLU -> Linear: c [B, C] -> [B, vectors · C]. `DiT` sets it to zero, so that a block starts as the identity."""

    part = "conditioning"

    def __init__(self, width: int, vectors: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, vectors * width))


class Block(nn.Module):
    """A transformer block with adaLN-Zero (figure 3 of the paper): x [B, L, C], c [B, C] -> [B, L, C]."""

    def __init__(self, width: int, num_heads: int, probability: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads, probability)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, probability)
        self.adaLN_modulation = AdaLN(width, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate(self.attn(modulate(self.norm1(x), shift1, scale1)), gate1)
        return x + gate(self.mlp(modulate(self.norm2(x), shift2, scale2)), gate2)


class FinalLayer(nn.Module):
    """Norm, shift and scale, then a Linear to the pixels of a patch: x [B, L, C], c [B, C] -> [B, L, patch² · out]."""

    def __init__(self, width: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch_size**2 * out_channels)
        self.adaLN_modulation = AdaLN(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


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
        self.blocks = nn.ModuleList([Block(width, config.num_heads, config.dropout) for _ in range(config.depth)])
        self.final_layer = FinalLayer(width, config.patch_size, out_channels(config))
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
        tokens = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = self.run_block(block, tokens, c)
        pixels = self.final_layer(tokens, c)
        patch, side = self.config.patch_size, self.config.input_size // self.config.patch_size
        out = pixels.view(x.shape[0], side, side, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(x.shape[0], -1, side * patch, side * patch)


def from_reference(state_dict: Mapping[str, Tensor], config: DiTConfig) -> DiT:
    """A DiT with weights of the released code, whose parameter names it shares.

    Raises InputError where a name is missing, unexpected or of another shape.
    """
    return load_reference(DiT(config), state_dict)


PAPER = "arXiv 2212.09748, table 1 and section 4"


def _preset(name: str, title: str, patch: int, width: int, depth: int, heads: int) -> Preset:
    """A row of the paper: latents of 256 x 256 ImageNet."""
    return Preset(name, title, DiTConfig(32, 4, 1000, patch, width, depth, heads), PAPER)


# fmt: off
PRESETS = [
    #        name        title       patch width depth heads
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
    Preset("dit_nano",  "DiT-nano/2", DiTConfig(16, 1, 10, 2, 96, 4, 3), "ours: 16 x 16 digits on a CPU"),
]
# fmt: on

register("dit", DiTConfig, DiT, PRESETS)
