"""LaMamba-Diff (arXiv 2408.02615): a U-Net of blocks that mix a 2-D scan, shifted-window attention and an MLP."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels.errors import InputError, unknown
from .fields import check_blocks, check_dropout
from .layers import LabelEmbedder, ModulatedNorm, TimestepEmbedder, dropout, gate, sincos_positions, xavier_linears
from .mixers import Mixer, stage_mixers
from .registry import Backbone, PaperSum, Preset, load_reference, out_channels, register

SKIPS = ("add", "concat", "none")
LAYOUTS = ("unet", "isotropic")
# The model's values for these settings hold for every mixer that has them, unless an entry of `mixers` sets its own.
SHARED = ("num_heads", "window_size", "d_state", "scan", "shift", "relative_bias", "ssm_ratio", "conv_bias")


@dataclass
class LaMambaConfig:
    """Widths, depths and the ablations of a LaMamba-Diff.

    Stages have widths D, 2D, 4D, … and sides R, R/2, R/4, …; the last two stages share both. A stage of the decoder has
    one block more than its twin in the encoder. `layout="isotropic"` is a stack of sum(depths) blocks of width D at
    side R, which ignores `bottleneck_depth` and `skip`.

    `mixers` is a list of kinds, or of mappings with their own settings ({kind: window, size: 4}). It may also be a list
    of such lists, one for each stage of `depths`: a stage of the decoder has its twin's mixers, and the middle has the
    last stage's. The fields in `SHARED` set that setting of every mixer that has it.
    """

    input_size: int = 32
    in_channels: int = 4
    num_classes: int = 1000
    dim: int = 320
    depths: list[int] = field(default_factory=lambda: [2, 2, 2, 2])
    bottleneck_depth: int = 2
    num_heads: int = 16
    window_size: int = 8
    d_state: int = 16
    scan: str = "continuous"
    patch_size: int = 1
    mixers: list[Any] = field(default_factory=lambda: ["ssm", "window"])  # in order, before the MLP
    parallel: bool = False  # mixers read the same input, and their outputs are added
    shift: bool = True  # odd blocks shift their windows
    relative_bias: bool = True
    skip: str = "add"
    layout: str = "unet"
    ssm_ratio: int = 2
    mlp_ratio: int = 4
    conv_bias: bool = False  # of the depthwise convolution before the scan
    zero_init_head: bool = False  # the released code leaves the last Linear at Xavier; DiT zeroes it
    out_channels: int | None = None  # of the head; null: twice in_channels, DDPM's noise and variance
    # The released code has none. Here it follows every mixer and every Linear of an MLP.
    dropout: float = field(default=0.0, metadata={"since": 0.0})

    def __post_init__(self) -> None:
        if isinstance(self.mixers, str | dict):
            self.mixers = [self.mixers]
        may_be_zero = ("num_classes", "bottleneck_depth")
        for name in ("input_size", "in_channels", "dim", "patch_size", "mlp_ratio", *may_be_zero):
            least = 0 if name in may_be_zero else 1
            if getattr(self, name) < least:
                raise InputError(f"{name} must be {least} or more, not {getattr(self, name)}")
        if not self.depths or min(self.depths) < 1:
            raise InputError(f"depths must be a list of one or more numbers above 0, not {list(self.depths)}")
        check_dropout(self.dropout)
        check_blocks("depths and bottleneck_depth", sum(self.depths) + self.bottleneck_depth)
        for what, name, choices in (("skip", self.skip, SKIPS), ("layout", self.layout, LAYOUTS)):
            if name not in choices:
                raise unknown(what, name, choices)
        if self.out_channels is not None and self.out_channels < 1:
            raise InputError(f"out_channels must be 1 or more, or null, not {self.out_channels}")
        if self.dim % 4:
            raise InputError(f"dim must be a multiple of 4 for the 2-D sine-cosine positions, not {self.dim}")
        cells = self.patch_size * 2**self.merges
        if self.input_size % cells:
            raise InputError(
                f"input_size {self.input_size} is not a multiple of patch_size · 2^merges = {cells} "
                f"(patch_size {self.patch_size}, {self.merges} merges)"
            )
        self._check_mixers()

    def _check_mixers(self) -> None:
        # Shared settings are checked even where no mixer reads them.
        stage_mixers(["ssm", "window"], self._shared(), 1)
        levels = [(stage, self._levels[min(i, len(self._levels) - 1)]) for i, stage in enumerate(self.stages())]
        for mixer in [mixer for stage, _ in levels for mixer in stage]:
            places = [level for stage, level in levels if mixer in stage]
            mixer.check([self.dim * 2**level for level in places], [self.side(level) for level in places])

    def _shared(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SHARED}

    def stages(self) -> list[list[Mixer]]:
        """The mixers of the blocks of each stage, one list for each of `depths`."""
        return stage_mixers(self.mixers, self._shared(), len(self.depths))

    def resolved(self, plain: dict[str, Any]) -> dict[str, Any]:
        """Plain data of this configuration, with the complete settings of every mixer instead of the shared fields.
        `mixers` is one list for each stage where stages differ, else one list."""
        stages = [[mixer.described() for mixer in stage] for stage in self.stages()]
        same = all(stage == stages[0] for stage in stages)
        own = {name: value for name, value in plain.items() if name not in SHARED}
        return own | {"mixers": stages[0] if same else stages}

    @property
    def merges(self) -> int:
        """How often the U-Net halves its side."""
        return max(len(self.depths) - 2, 0) if self.layout == "unet" else 0

    @property
    def sides(self) -> list[int]:
        """Side of the token grid in each encoder stage."""
        return [self.side(level) for level in self._levels]

    def side(self, level: int) -> int:
        """Side of the token grid after `level` halvings."""
        return self.input_size // self.patch_size // 2**level

    @property
    def widths(self) -> list[int]:
        """Width of each encoder stage."""
        return [self.dim * 2**level for level in self._levels]

    @property
    def _levels(self) -> list[int]:
        return [min(stage, self.merges) for stage in range(len(self.depths))] if self.layout == "unet" else [0]


class Conditioning(nn.Sequential):
    """SiLU, then a Linear from the condition to shifts, scales and gates."""

    part = "conditioning"

    def __init__(self, width: int, out: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(width, out))

    def zero_init(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class ConditionProjection(nn.Linear):
    """A Linear from the condition to the width of a block."""

    part = "conditioning"


class MLP(nn.Sequential):
    """Linear, exact GELU, dropout, Linear."""

    part = "mlp"

    def __init__(self, dim: int, hidden: int, probability: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.inner_dropout = dropout(probability)
        self.fc2 = nn.Linear(hidden, dim)


class Block(nn.Module):
    """Mixers, then an MLP, each as `x + gate · f(LN(x) · (1 + scale) + shift)` with vectors from the condition."""

    def __init__(
        self, config: LaMambaConfig, mixers: Sequence[Mixer], dim: int, side: int, shift: bool, project: bool
    ) -> None:
        super().__init__()
        cond = config.widths[-1]
        self.parallel = config.parallel
        self.condition_projection = ConditionProjection(cond, dim) if project or cond != dim else nn.Identity()
        self.adaLN_modulation = Conditioning(dim, 3 * (len(mixers) + 1) * dim)
        self.norms = nn.ModuleList(ModulatedNorm(dim) for _ in range(len(mixers) + 1))
        self.mixers = nn.ModuleList(mixer.build(dim, side, shift) for mixer in mixers)
        self.mlp = MLP(dim, config.mlp_ratio * dim, config.dropout)
        self.dropout = dropout(config.dropout)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        vectors = self.adaLN_modulation(self.condition_projection(c)).chunk(3 * len(self.norms), dim=-1)
        source, branch = x, None  # of the mixer before
        for i, mixer in enumerate([*self.mixers, self.mlp]):
            shift, scale, g = vectors[3 * i : 3 * i + 3]
            if self.parallel and i < len(self.mixers):
                x = x if branch is None else x + gate(*branch)
                _, y = self.norms[i](source, shift, scale)
            else:
                x, y = self.norms[i](x, shift, scale, *(branch or ()))
            branch = self.dropout(mixer(y)), g
        assert branch is not None
        return x + gate(*branch)


class PatchMerging(nn.Module):
    """[B, H, W, C] -> [B, H/2, W/2, 2C]: the four pixels of a cell, LayerNorm, Linear (Swin)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        cells = [x[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
        return self.reduction(self.norm(torch.cat(cells, dim=-1)))


class PatchExpanding(nn.Module):
    """[B, H, W, C] -> [B, pH, pW, out]: Linear to (row, column, out), then LayerNorm."""

    def __init__(self, dim: int, out: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.expand = nn.Linear(dim, patch * patch * out, bias=False)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        x = self.expand(x).view(batch, height, width, self.patch, self.patch, -1).transpose(2, 3)
        return self.norm(x.reshape(batch, height * self.patch, width * self.patch, -1))


class Stage(nn.Module):
    """Blocks of one width, one for each list of mixers. Every second block shifts its windows. The network calls
    `resample` after the blocks in the encoder (merging) and before them in the decoder (expanding); then `fuse` joins a
    concatenated skip."""

    def __init__(
        self,
        config: LaMambaConfig,
        mixers: Sequence[Sequence[Mixer]],
        dim: int,
        side: int,
        resample: nn.Module | None,
        project: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(config, of_block, dim, side, i % 2 == 1, project) for i, of_block in enumerate(mixers)
        )
        self.resample = resample
        self.fuse = nn.Linear(2 * dim, dim) if project and config.skip == "concat" else None

    def forward(self, x: Tensor, c: Tensor, run_block: Callable[..., Tensor]) -> Tensor:
        for block in self.blocks:
            x = run_block(block, x, c)
        return x


class Stem(nn.Module):
    """Convolution p × p with stride p, then LayerNorm: [B, C, S, S] -> [B, S/p, S/p, D]."""

    def __init__(self, in_channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch, stride=patch)
        self.norm = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.proj.weight.view(dim, -1))
        nn.init.zeros_(self.proj.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class LaMamba(Backbone):
    """LaMamba-Diff as in SPEC.md and the released weights, with the ablations of `LaMambaConfig`."""

    paper_sum: ClassVar[PaperSum] = PaperSum(affine_norm=5, plain_norm=4, scan=1)

    def __init__(self, config: LaMambaConfig) -> None:
        super().__init__()
        self.config = config
        dim, sides, widths = config.dim, config.sides, config.widths
        cond, isotropic = widths[-1], config.layout == "isotropic"
        self.t_embedder = TimestepEmbedder(cond)
        self.y_embedder = LabelEmbedder(config.num_classes, cond)
        self.patch_embed = Stem(config.in_channels, dim, config.patch_size)
        self.pos_embed = nn.Parameter(sincos_positions(dim, sides[0])[None])
        stages, depths = config.stages(), config.depths
        blocks = [[stage] * depth for stage, depth in zip(stages, depths, strict=True)]
        if isotropic:
            blocks = [[mixers for stage in blocks for mixers in stage]]
        merging = [PatchMerging(widths[i]) if i < config.merges else None for i in range(len(blocks))]
        self.encoder = nn.ModuleList(
            Stage(config, mixers, widths[i], sides[i], merging[i]) for i, mixers in enumerate(blocks)
        )
        self.middle = nn.ModuleList()
        self.decoder = nn.ModuleList()
        if not isotropic:
            middle = range(config.bottleneck_depth)
            self.middle.extend(Block(config, stages[-1], cond, sides[-1], i % 2 == 1, False) for i in middle)
            for i in reversed(range(len(depths))):
                expanding = PatchExpanding(2 * widths[i], widths[i], 2) if i < config.merges else None
                mixers = [stages[i]] * (depths[i] + 1)
                self.decoder.append(Stage(config, mixers, widths[i], sides[i], expanding, project=True))
        self.final_up = PatchExpanding(dim, dim, config.patch_size)
        self.final_norm = ModulatedNorm(dim, eps=1e-6, affine=False)
        self.final_condition_projection = ConditionProjection(cond, dim)
        self.final_adaLN_modulation = Conditioning(dim, 2 * dim)
        self.final_linear = nn.Linear(dim, out_channels(config))
        self._init_weights()

    def _init_weights(self) -> None:
        embedder = {id(layer) for layer in self.t_embedder.modules()}
        for layer in self.modules():
            if isinstance(layer, nn.Linear) and id(layer) not in embedder:
                xavier_linears(layer)
        for layer in self.modules():
            if isinstance(layer, Conditioning):
                layer.zero_init()
        if self.config.zero_init_head:
            nn.init.zeros_(self.final_linear.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.check_input(x)
        c = self.t_embedder(t) + self.y_embedder(y)
        x = self.patch_embed(x) + self.pos_embed
        skips = []
        for stage in self.encoder:
            assert isinstance(stage, Stage)
            x = stage(x, c, self.run_block)
            skips.append(x)
            if stage.resample is not None:
                x = stage.resample(x)
        if self.config.layout != "isotropic":
            m = x  # 2 x without blocks
            for block in self.middle:
                m = self.run_block(block, m, c)
            x = x + m
        for stage in self.decoder:
            assert isinstance(stage, Stage)
            if stage.resample is not None:
                x = stage.resample(x)
            if self.config.skip == "add":
                x = x + skips.pop()
            elif stage.fuse is not None:
                x = stage.fuse(torch.cat([x, skips.pop()], dim=-1))
            x = stage(x, c, self.run_block)
        shift, scale = self.final_adaLN_modulation(self.final_condition_projection(c)).chunk(2, dim=-1)
        _, y = self.final_norm(self.final_up(x), shift, scale)
        return self.final_linear(y).permute(0, 3, 1, 2)


# Parts of parameter names here, and what the released code has for them, in the order of replacement.
RENAMES = (
    (r"^encoder\.(\d+)\.resample\.", r"layers.\1.downsample."),
    (r"^encoder\.", "layers."),
    (r"^middle\.", "mid_layer.blocks."),
    (r"^decoder\.(\d+)\.resample\.", r"layers_up.\1.upsample."),
    (r"^decoder\.", "layers_up."),
    (r"\.norms\.0\.", ".norm."),
    (r"\.norms\.1\.", ".norm_swin."),
    (r"\.norms\.2\.", ".norm2."),
    (r"\.mixers\.0\.", ".op."),
    (r"\.mixers\.1\.", ".attn."),
)


def reference_name(name: str) -> str:
    """The released code's name of a parameter, for the mixers ssm, then window."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def from_reference(state_dict: dict[str, Tensor], config: LaMambaConfig) -> LaMamba:
    """A LaMamba-Diff with a state dict of the released code.

    Raises InputError where a name is missing, unexpected or of another shape, or where the mixers are not ssm, window.
    """
    if any([mixer.kind for mixer in stage] != ["ssm", "window"] for stage in config.stages()):
        raise InputError(f"weights of the released code need mixers [ssm, window], not {list(config.mixers)}")
    # Index and mask tables are derived, not learned.
    state = {k: v for k, v in state_dict.items() if not k.endswith(("relative_position_index", "attn_mask"))}
    return load_reference(LaMamba(config), state, reference_name)


def _preset(name: str, title: str, dim: int, heads: int, d_state: int, source: str, **more: object) -> Preset:
    return Preset(name, title, LaMambaConfig(dim=dim, num_heads=heads, d_state=d_state, **more), source)  # type: ignore[arg-type]


_NANO = {
    "input_size": 16, "in_channels": 1, "num_classes": 10, "depths": [1, 1, 1], "bottleneck_depth": 1,
    "window_size": 4, "patch_size": 2, "ssm_ratio": 1,
}  # fmt: skip
PRESETS = [
    #        name                 title                        dim  heads  N   source
    _preset("lamamba_t",          "LaMamba-Diff-T",             32,     2, 16, "ours, near DiT-T/2"),
    _preset("lamamba_s",          "LaMamba-Diff-S",             64,     4, 16, "ours, 15 % smaller than DiT-S/2"),
    _preset("lamamba_s68",        "LaMamba-Diff-S (dim 68)",    68,     4, 16, "ours, 4 % smaller than DiT-S/2"),
    _preset("lamamba_b",          "LaMamba-Diff-B",            144,     9, 16, "ours, near DiT-B"),
    _preset("lamamba_l",          "LaMamba-Diff-L",            272,    17, 16, "ours, near DiT-L"),
    _preset("lamamba_xl",         "LaMamba-Diff-XL",           320,    16, 16, "arXiv 2408.02615; d_state inferred"),
    _preset("lamamba_xl_release", "LaMamba-Diff-XL (release)", 320,    16,  1, "the released configuration file"),
    _preset("lamamba_nano",       "LaMamba-Diff-nano",          28,     4,  1, "ours, for the demo", **_NANO),
]  # fmt: skip

register("lamamba", LaMambaConfig, LaMamba, PRESETS)
