"""U-ViT: a vision transformer with time and class as tokens and with long skips (Bao et al., arXiv 2209.12152).

Parameters have the names of the released code, so that its checkpoints load as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..kernels.errors import InputError
from ..models.fields import check_blocks, check_dropout
from ..models.layers import timestep_features
from ..models.registry import Backbone, PaperSum, Preset, load_reference, out_channels, register
from .adm import ConditioningTable
from .dit import Attention, Mlp, PatchEmbed


@dataclass
class UViTConfig:
    """A U-ViT. `input_size` is the side of the input, `patch_size` the side of a token, `hidden_size` a token's width.

    `depth` counts the blocks: as many before the middle one as after it. Raises InputError where the sizes do not fit
    together.
    """

    input_size: int = 32
    in_channels: int = 4
    num_classes: int = 1000  # 0: unconditional, without a token for the class
    patch_size: int = 2
    hidden_size: int = 512
    depth: int = 13
    num_heads: int = 8
    final_conv: bool = True  # the 3 x 3 convolution on the output; the released H models have none
    out_channels: int | None = None  # of the head; null: twice in_channels, DDPM's noise and variance
    # The released code has none. Here it follows every Linear of attention and of the MLP but qkv, as in DiT.
    dropout: float = field(default=0.0, metadata={"since": 0.0})

    def __post_init__(self) -> None:
        for name in ("input_size", "in_channels", "patch_size", "hidden_size", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name} must be 1 or more, not {getattr(self, name)}")
        check_blocks("model.depth", self.depth)
        check_dropout(self.dropout)
        if self.depth % 2 == 0:
            raise InputError(f"model.depth must be odd, because one block is the middle of a U-ViT, not {self.depth}")
        if self.num_classes < 0:
            raise InputError(f"model.num_classes must be 0 (unconditional) or more, not {self.num_classes}")
        if self.input_size % self.patch_size:
            raise InputError(f"model.patch_size {self.patch_size} does not divide model.input_size {self.input_size}")
        if self.hidden_size % self.num_heads:
            raise InputError(f"model.num_heads {self.num_heads} does not divide model.hidden_size {self.hidden_size}")
        if self.out_channels is not None and self.out_channels < 1:
            raise InputError(f"model.out_channels must be 1 or more, or null, not {self.out_channels}")

    @property
    def extra_tokens(self) -> int:
        """Tokens before those of the image: the class, if the model knows one, and the time."""
        return 2 if self.num_classes else 1


class Block(nn.Module):
    """A pre-norm transformer block: x [B, L, C] -> [B, L, C].

    With `skip`, it takes a second branch of that shape, and begins with a Linear of both concatenated (figure 1 of the
    paper, and the best of the combinations in figure 2a).
    """

    def __init__(self, config: UViTConfig, skip: bool = False) -> None:
        super().__init__()
        width = config.hidden_size
        self.skip_linear = nn.Linear(2 * width, width) if skip else None
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, config.num_heads, config.dropout, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, config.dropout, approximate="none")

    def forward(self, x: Tensor, *skip: Tensor) -> Tensor:
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, *skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(Backbone):
    """`net(x, t, y) -> out` with the shapes of `Backbone`. An unconditional net does not read `y`."""

    paper_sum = PaperSum(affine_norm=0, plain_norm=0, scan=0)

    def __init__(self, config: UViTConfig) -> None:
        super().__init__()
        self.config = config
        width, side, half = config.hidden_size, config.input_size // config.patch_size, config.depth // 2
        self.patch_embed = PatchEmbed(config.in_channels, config.patch_size, width)
        self.label_emb = ConditioningTable(config.num_classes + 1, width) if config.num_classes else None
        self.pos_embed = nn.Parameter(torch.zeros(1, config.extra_tokens + side**2, width))
        self.in_blocks = nn.ModuleList([Block(config) for _ in range(half)])
        self.mid_block = Block(config)
        self.out_blocks = nn.ModuleList([Block(config, skip=True) for _ in range(half)])
        self.norm = nn.LayerNorm(width)
        channels = out_channels(config)
        self.decoder_pred = nn.Linear(width, config.patch_size**2 * channels)
        self.final_layer = nn.Conv2d(channels, channels, 3, padding=1) if config.final_conv else nn.Identity()
        self._initialise()

    def _initialise(self) -> None:
        """As released: truncated normal 0.02 for positions and every Linear, whose bias is zero; convolutions and the
        table of classes as torch has them. Nothing starts as zero: the net predicts noise from its first step."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    @property
    def null_class(self) -> int | None:
        return self.config.num_classes or None

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.check_input(x)
        config = self.config
        extra = [timestep_features(t, config.hidden_size).to(self.pos_embed.dtype)]
        if self.label_emb is not None:
            extra.insert(0, self.label_emb(y))
        tokens = torch.cat([*(token[:, None] for token in extra), self.patch_embed(x)], dim=1) + self.pos_embed
        skips = []
        for block in self.in_blocks:
            tokens = self.run_block(block, tokens)
            skips.append(tokens)
        tokens = self.run_block(self.mid_block, tokens)
        for block in self.out_blocks:
            tokens = self.run_block(block, tokens, skips.pop())
        pixels = self.decoder_pred(self.norm(tokens))[:, config.extra_tokens :]
        patch, side = config.patch_size, config.input_size // config.patch_size
        out = pixels.reshape(x.shape[0], side, side, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
        return self.final_layer(out.reshape(x.shape[0], -1, side * patch, side * patch))


def from_reference(state_dict: Mapping[str, Tensor], config: UViTConfig) -> UViT:
    """A U-ViT with weights of the released code, whose parameter names it shares. Its models for latents have 1,001
    classes, of which the last is the null class, and `out_channels` equal to `in_channels`.

    Raises InputError where a name is missing, unexpected or of another shape.
    """
    return load_reference(UViT(config), state_dict)


PAPER = "arXiv 2209.12152, table of configurations; released code"


def _preset(name: str, title: str, width: int, depth: int, heads: int, final_conv: bool = True) -> Preset:
    """A row of the paper, on latents of 256 x 256 ImageNet."""
    return Preset(name, title, UViTConfig(32, 4, 1000, 2, width, depth, heads, final_conv), PAPER)


NANO = UViTConfig(16, 1, 10, 2, 104, 5, 4)

# fmt: off
PRESETS = [
    #        name             title             width depth heads
    _preset("uvit_s_2",      "U-ViT-S/2",         512,  13,   8),
    _preset("uvit_s_2_deep", "U-ViT-S/2 (Deep)",  512,  17,   8),
    _preset("uvit_m_2",      "U-ViT-M/2",         768,  17,  12),
    _preset("uvit_l_2",      "U-ViT-L/2",        1024,  21,  16),
    _preset("uvit_h_2",      "U-ViT-H/2",        1152,  29,  16, final_conv=False),
    Preset("uvit_nano", "U-ViT-nano/2", NANO, "ours: 16 x 16 digits on a CPU"),
]
# fmt: on

register("uvit", UViTConfig, UViT, PRESETS)
