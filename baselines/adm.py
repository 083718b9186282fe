"""ADM's U-Net: ResBlocks with scale-shift conditioning, attention at low resolutions (Dhariwal and Nichol, 2105.05233).

Parameters have the names of guided-diffusion's `UNetModel`, so that its checkpoints load as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.attention import attention, macs
from ..kernels.errors import InputError
from ..models.fields import check_blocks, check_dropout
from ..models.layers import dropout, timestep_features
from ..models.registry import Backbone, PaperSum, Preset, load_reference, out_channels, register

Conv = TypeVar("Conv", nn.Conv1d, nn.Conv2d)

GROUPS = 32  # groups of every GroupNorm


@dataclass
class ADMConfig:
    """An ADM U-Net. Level i has `int(channel_mult[i] * model_channels)` channels at side `input_size / 2^i`.

    `attention_ds` lists the downsampling factors of the levels with attention (the middle always has it).
    `num_head_channels` above 0 is the width of a head and overrides `num_heads`.
    Raises InputError where the sizes do not fit together.
    """

    input_size: int = 32
    in_channels: int = 4
    num_classes: int = 1000  # 0: unconditional
    model_channels: int = 128
    num_res_blocks: int = 2
    channel_mult: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0])
    attention_ds: list[int] = field(default_factory=lambda: [2, 4])
    num_heads: int = 1
    num_head_channels: int = 64
    resblock_updown: bool = True
    new_attention_order: bool = False
    null_class: bool = False  # one more label, for class dropout; ADM itself has none
    out_channels: int | None = None  # of the head; null: twice in_channels, DDPM's noise and variance
    # Before the last convolution of a ResBlock, as in the paper, whose 64-pixel model is trained with 0.1.
    dropout: float = field(default=0.0, metadata={"since": 0.0})

    def __post_init__(self) -> None:
        # A key hashes the text of a configuration, in which 1 and 1.0 differ.
        self.channel_mult = [float(mult) for mult in self.channel_mult]
        for name in ("input_size", "in_channels", "model_channels", "num_res_blocks", "num_heads"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name} must be 1 or more, not {getattr(self, name)}")
        if self.num_classes < 0:
            raise InputError(f"model.num_classes must be 0 (unconditional) or more, not {self.num_classes}")
        if self.out_channels is not None and self.out_channels < 1:
            raise InputError(f"model.out_channels must be 1 or more, or null, not {self.out_channels}")
        check_dropout(self.dropout)
        check_blocks("model.num_res_blocks", self.num_res_blocks * len(self.channel_mult))
        if not self.channel_mult:
            raise InputError("model.channel_mult is empty: it needs a number for every level")
        for mult, width in zip(self.channel_mult, self.widths, strict=True):
            if width < 1 or width % GROUPS:
                raise InputError(
                    f"model.channel_mult {mult:g} times model.model_channels {self.model_channels} gives {width} "
                    f"channels, which is not a positive multiple of {GROUPS}, the number of groups of a GroupNorm"
                )
        factors = [2**level for level in range(len(self.channel_mult))]
        if self.input_size % factors[-1]:
            raise InputError(
                f"model.input_size {self.input_size} is not a multiple of {factors[-1]}, "
                f"the downsampling of {len(factors)} levels"
            )
        for ds in self.attention_ds:
            if ds not in factors:
                choices = ", ".join(map(str, factors))
                raise InputError(f"model.attention_ds {ds} is not the factor of a level; choices: {choices}")
        name = "num_head_channels" if self.num_head_channels > 0 else "num_heads"
        attended = [width for ds, width in zip(factors, self.widths, strict=True) if ds in self.attention_ds]
        for width in (*attended, self.widths[-1]):
            if width % getattr(self, name):
                raise InputError(f"model.{name} {getattr(self, name)} does not divide the {width} channels of a level")

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [int(mult * self.model_channels) for mult in self.channel_mult]

    def heads(self, width: int) -> int:
        """Attention heads at a width."""
        return width // self.num_head_channels if self.num_head_channels > 0 else self.num_heads


def _zero(layer: Conv) -> Conv:
    """The layer, set to zero: one that ends a residual path or the network."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ConditioningMlp(nn.Sequential):
    """A Sequential whose cost is counted as conditioning."""

    part = "conditioning"


class ConditioningTable(nn.Embedding):
    """An Embedding whose cost is counted as conditioning."""

    part = "conditioning"


class Downsample(nn.Module):
    """Strided convolution: [B, C, S, S] -> [B, C, S/2, S/2]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling, then convolution: [B, C, S, S] -> [B, C, 2S, 2S]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    """Two convolutions with scale-shift conditioning between them: x [B, C, S, S], emb [B, E] -> [B, out, S', S'].

    `scale` 0.5 or 2 resamples, on both paths, between the first activation and the first convolution.
    """

    def __init__(
        self, channels: int, out_channels: int, emb_width: int, probability: float = 0.0, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.scale = scale
        self.in_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = ConditioningMlp(nn.SiLU(), nn.Linear(emb_width, 2 * out_channels))
        last = _zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.out_layers = nn.Sequential(nn.GroupNorm(GROUPS, out_channels), nn.SiLU(), dropout(probability), last)
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, activation, convolution = self.in_layers
        h = convolution(self._resample(activation(norm(x))))
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        norm, activation, drop, convolution = self.out_layers
        h = convolution(drop(activation(norm(h) * (1 + scale) + shift)))
        return self.skip_connection(self._resample(x)) + h

    def _resample(self, x: Tensor) -> Tensor:
        if self.scale < 1:
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.scale > 1 else x


class AttentionBlock(nn.Module):
    """Residual self-attention over pixels: x [B, C, S, S] -> the same.

    The channels of q, k and v lie in the order (q k v, head, channel) in the new layout and in the order
    (head, q k v, channel) in the old one.
    """

    part = "attention"

    def __init__(self, channels: int, num_heads: int, new_order: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.new_order = new_order
        self.operators = {"attention": "auto"}
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        flat = x.flatten(2)
        lead = (3, self.num_heads) if self.new_order else (self.num_heads, 3)
        # Convolutions of width 1 are matrix products. These leave channels last, as attention wants them.
        qkv = F.linear(self.norm(flat).transpose(1, 2), self.qkv.weight.squeeze(-1), self.qkv.bias)
        parts = qkv.view(batch, -1, *lead, channels // self.num_heads).unbind(2 if self.new_order else 3)
        q, k, v = (part.transpose(1, 2) for part in parts)
        out = attention(q, k, v, backend=self.operators["attention"]).transpose(1, 2).flatten(2)
        out = F.linear(out, self.proj_out.weight.squeeze(-1), self.proj_out.bias)
        return (flat + out.transpose(1, 2)).view(x.shape)

    def own_macs(self, x: Tensor) -> int:
        batch, channels, height, width = x.shape
        tokens = height * width
        projections = batch * tokens * (self.qkv.weight.numel() + self.proj_out.weight.numel())
        return projections + macs(batch, self.num_heads, tokens, tokens, channels // self.num_heads)


class Layers(nn.ModuleList):
    """The layers of a block in turn: x [B, C, S, S], emb [B, E]. Only a ResBlock reads the conditioning."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class ADM(Backbone):
    """`net(x, t, y) -> out` with the shapes of `Backbone`. Without a label table, `y` is not read."""

    paper_sum = PaperSum(affine_norm=0, plain_norm=0, scan=0)

    def __init__(self, config: ADMConfig) -> None:
        super().__init__()
        self.config = config
        base, emb, drop = config.model_channels, 4 * config.model_channels, config.dropout
        self.time_embed = ConditioningMlp(nn.Linear(base, emb), nn.SiLU(), nn.Linear(emb, emb))
        labels = config.num_classes + int(config.null_class)
        self.label_emb = ConditioningTable(labels, emb) if labels else None

        widths = config.widths
        channels = widths[0]
        skips = [channels]
        encoder: list[list[nn.Module]] = [[nn.Conv2d(config.in_channels, channels, 3, padding=1)]]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                encoder.append([ResBlock(channels, width, emb, drop), *self._attention(level)])
                skips.append(channels := width)
            if level < len(widths) - 1:
                updown = config.resblock_updown
                encoder.append([ResBlock(width, width, emb, drop, scale=0.5) if updown else Downsample(width)])
                skips.append(width)
        self.input_blocks = nn.ModuleList(Layers(block) for block in encoder)

        attention_block = AttentionBlock(channels, config.heads(channels), config.new_attention_order)
        self.middle_block = Layers(
            [ResBlock(channels, channels, emb, drop), attention_block, ResBlock(channels, channels, emb, drop)]
        )

        decoder: list[list[nn.Module]] = []
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(config.num_res_blocks + 1):
                decoder.append([ResBlock(channels + skips.pop(), width, emb, drop), *self._attention(level)])
                channels = width
            if level > 0:
                updown = config.resblock_updown
                decoder[-1].append(ResBlock(width, width, emb, drop, scale=2.0) if updown else Upsample(width))
        self.output_blocks = nn.ModuleList(Layers(block) for block in decoder)

        last = _zero(nn.Conv2d(channels, out_channels(config), 3, padding=1))
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, channels), nn.SiLU(), last)

    def _attention(self, level: int) -> list[AttentionBlock]:
        """The attention after each ResBlock of a level, if the level has any."""
        config, width = self.config, self.config.widths[level]
        if 2**level not in config.attention_ds:
            return []
        return [AttentionBlock(width, config.heads(width), config.new_attention_order)]

    @property
    def null_class(self) -> int | None:
        return self.config.num_classes if self.config.null_class else None

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        emb = self.time_embed(timestep_features(t, self.config.model_channels).to(x.dtype))
        if self.label_emb is not None:
            emb = emb + self.label_emb(y)
        skips = []
        for block in self.input_blocks:
            x = self.run_block(block, x, emb)
            skips.append(x)
        x = self.run_block(self.middle_block, x, emb)
        for block in self.output_blocks:
            x = self.run_block(block, torch.cat([x, skips.pop()], dim=1), emb)
        return self.out(x)


def from_reference(state_dict: Mapping[str, Tensor], config: ADMConfig) -> ADM:
    """An ADM U-Net with weights of guided-diffusion, whose parameter names it shares.

    Raises InputError where a name is missing, unexpected or of another shape.
    """
    return load_reference(ADM(config), state_dict)


PAPER = "arXiv 2105.05233, hyperparameter tables; guided-diffusion's released models"
OURS = "ours: DiT's parameters within 5 %, its multiply-adds within 15 %"


def _paper(
    name: str,
    title: str,
    size: int,
    width: int,
    depth: int,
    mult: list[float],
    ds: list[int],
    new: bool,
    schedule: str | None = None,
) -> Preset:
    """A row of the paper: class-conditional ImageNet in pixels."""
    return Preset(name, title, ADMConfig(size, 3, 1000, width, depth, mult, ds, 1, 64, True, new), PAPER, schedule)


def _latent(name: str, title: str, width: int, source: str = OURS) -> Preset:
    """A U-Net on latents of 256 x 256 images, with a null class as in DiT. All sizes have the same shape."""
    config = ADMConfig(32, 4, 1000, width, 1, [1, 2, 2, 2], [2, 4, 8], 1, 64, True, False, null_class=True)
    return Preset(name, title, config, source)


NANO = ADMConfig(16, 1, 10, 32, 1, [1, 2], [2], 1, 32, resblock_updown=False, null_class=True)

# The paper's only model with a number of heads instead of a width.
ADM_128 = ADMConfig(128, 3, 1000, 256, 2, [1, 1, 2, 3, 4], [4, 8, 16], 4, -1)

# fmt: off
PRESETS = [
    #       name       title    size width depth mult                     attention    new layout, schedule
    _paper("adm_64",  "ADM-64",   64, 192, 3, [1, 2, 3, 4],            [2, 4, 8],    True, "cosine"),
    Preset("adm_128", "ADM-128", ADM_128, PAPER),
    _paper("adm_256", "ADM-256", 256, 256, 2, [1, 1, 2, 2, 4, 4],      [8, 16, 32],  False),
    _paper("adm_512", "ADM-512", 512, 256, 2, [0.5, 1, 1, 2, 2, 4, 4], [16, 32, 64], False),
    #        name       title      width
    _latent("unet_t",  "U-Net-T",   64, "ours, 8 % larger than LaMamba-Diff-T"),
    _latent("unet_s",  "U-Net-S",  128),
    _latent("unet_b",  "U-Net-B",  256),
    _latent("unet_l",  "U-Net-L",  480),
    _latent("unet_xl", "U-Net-XL", 576),
    Preset("unet_nano", "U-Net-nano", NANO, "ours: 16 x 16 digits on a CPU"),
]
# fmt: on

register("adm", ADMConfig, ADM, PRESETS)
