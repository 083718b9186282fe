"""Token mixers: [B, H, W, C] -> the same shape. A block has a list of them, so that an ablation is data.

An entry of a model's `mixers` is a kind (`window`) or a mapping with its own settings ({kind: window, size: 4}). It
becomes a `Mixer`, a small dataclass that builds the module.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import attention, depthwise_conv, gated_norm, selective_scan, window_attention
from ..kernels.cross_scan import DIRECTIONS, ScanPaths, scan_paths
from ..kernels.errors import InputError, unknown
from .fields import declared, typed


class SS2D(nn.Module):
    """The 2-D selective scan (VMamba, arXiv 2401.10166; LaMamba-Diff, arXiv 2408.02615).

    Linear -> x, z; depthwise 3 × 3 and SiLU on x; K scans; LayerNorm; times SiLU(z); Linear. Inner width
    E = `ratio` · C, rank r = ceil(C / 16). Every direction has its own parameters.
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
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=conv_bias)  # parameters, never called
        self.x_proj_weight = nn.Parameter(torch.empty(directions, self.rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(directions, inner, self.rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(directions, inner))
        self.A_logs = nn.Parameter(torch.arange(1, d_state + 1).float().log().repeat(directions * inner, 1))
        self.Ds = nn.Parameter(torch.ones(directions * inner))
        self.out_norm = nn.LayerNorm(inner)  # parameters, never called
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
            self.dt_projs_bias.copy_(step + torch.log(-torch.expm1(-step)))  # its softplus is the step

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
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
    """Shifted-window attention (Swin, arXiv 2103.14030). A grid with `side` <= `window` has one window and no shift."""

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
    """A local control without attention or scan: Linear, depthwise 7 × 7, GELU, Linear (cf. ConvNeXt, 2201.03545)."""

    kernel = 7

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, dim)
        self.conv2d = nn.Conv2d(dim, dim, self.kernel, padding=self.kernel // 2, groups=dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2d(self.in_proj(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.out_proj(F.gelu(x))


@dataclass
class Mixer:
    """A kind of mixer with its settings.

    A setting takes the model's value, unless an entry sets it, if the model shares a field of the same name with its
    mixers. The metadata `model` of a setting names a shared field of another name.
    """

    kind: ClassVar[str]

    def check(self, dims: Sequence[int], sides: Sequence[int]) -> None:
        """Raise InputError where the settings do not fit the widths and sides of the stages that have the mixer."""

    def build(self, dim: int, side: int, shift: bool) -> nn.Module:
        """The module for `dim` channels on a `side` × `side` grid; `shift` is True in every second block.

        The module's attribute `part` is the part of a cost that it belongs to ("rest" if there is none). Its
        `own_macs(x)` are the multiply-adds outside of its child modules.
        """
        raise NotImplementedError

    def described(self) -> dict[str, Any]:
        """The kind and every setting as plain data: an entry that makes the same mixer."""
        return {"kind": self.kind, **declared(self)}


def _check_positive(mixer: Mixer, *names: str) -> None:
    for name in names:
        if getattr(mixer, name) < 1:
            raise InputError(f"{name} must be 1 or more, not {getattr(mixer, name)}")


def _check_heads(heads: int, dims: Sequence[int]) -> None:
    for dim in dims:
        if dim % heads:
            choices = [n for n in range(1, dim + 1) if all(other % n == 0 for other in dims)]
            raise InputError(f"num_heads {heads} does not divide dim {dim}; choices: {choices}")


MixerType = TypeVar("MixerType", bound=type[Mixer])
MIXERS: dict[str, type[Mixer]] = {}
EMPTY = "none"  # an entry without a mixer


def register_mixer(kind: str) -> Callable[[MixerType], MixerType]:
    """Decorate a dataclass derived from `Mixer`, which entries of `mixers` then name as `kind`.

    Raises InputError where another class has the kind, or where the class is not such a dataclass.
    """

    def add(mixer_type: MixerType) -> MixerType:
        place = f"{mixer_type.__module__}.{mixer_type.__qualname__}"
        if not issubclass(mixer_type, Mixer) or not is_dataclass(mixer_type):
            raise InputError(f"mixer {kind!r}: {place} must be a dataclass derived from lamabench.models.mixers.Mixer")
        if "kind" in [f.name for f in fields(mixer_type)]:
            raise InputError(f"mixer {kind!r}: {place} has a setting named kind, the word for the mixer in an entry")
        other = MIXERS.get(kind, mixer_type)
        owner = f"{other.__module__}.{other.__qualname__}"
        if kind == EMPTY or owner != place:  # the same class again is a notebook cell that ran twice
            raise InputError(f"mixer {kind!r} is registered already" + (f", by {owner}" if kind != EMPTY else ""))
        mixer_type.kind = kind
        MIXERS[kind] = mixer_type
        return mixer_type

    return add


@register_mixer("ssm")
@dataclass
class SSMMixer(Mixer):
    """The 2-D selective scan: `SS2D`."""

    d_state: int
    scan: str
    ssm_ratio: int
    conv_bias: bool  # of the depthwise convolution before the scan

    def __post_init__(self) -> None:
        _check_positive(self, "d_state", "ssm_ratio")
        if self.scan not in DIRECTIONS:
            raise unknown("scan", self.scan, DIRECTIONS)

    def build(self, dim: int, side: int, shift: bool) -> nn.Module:
        return SS2D(dim, side, self.d_state, self.scan, self.ssm_ratio, self.conv_bias)


@register_mixer("window")
@dataclass
class WindowMixer(Mixer):
    """Attention within windows of `size` × `size` tokens, which odd blocks shift: `WindowAttention`."""

    size: int = field(metadata={"model": "window_size"})
    num_heads: int
    shift: bool
    relative_bias: bool

    def __post_init__(self) -> None:
        _check_positive(self, "num_heads")
        if self.size < 1:
            raise InputError(f"window_size must be 1 or more, not {self.size}")

    def check(self, dims: Sequence[int], sides: Sequence[int]) -> None:
        _check_heads(self.num_heads, dims)
        for side in sides:
            if side > self.size and side % self.size:
                choices = [w for w in range(1, side + 1) if all(s <= w or s % w == 0 for s in sides)]
                raise InputError(
                    f"window_size {self.size} does not divide the {side} × {side} grid of a stage; choices: {choices}"
                )

    def build(self, dim: int, side: int, shift: bool) -> nn.Module:
        return WindowAttention(dim, side, self.num_heads, self.size, shift and self.shift, self.relative_bias)


@register_mixer("global")
@dataclass
class GlobalMixer(Mixer):
    """Attention over all tokens: `GlobalAttention`."""

    num_heads: int

    def __post_init__(self) -> None:
        _check_positive(self, "num_heads")

    def check(self, dims: Sequence[int], sides: Sequence[int]) -> None:
        _check_heads(self.num_heads, dims)

    def build(self, dim: int, side: int, shift: bool) -> nn.Module:
        return GlobalAttention(dim, self.num_heads)


@register_mixer("conv")
@dataclass
class ConvolutionMixer(Mixer):
    """The local control: `ConvMixer`."""

    def build(self, dim: int, side: int, shift: bool) -> nn.Module:
        return ConvMixer(dim)


def stage_mixers(entries: Any, shared: Mapping[str, Any], stages: int) -> list[list[Mixer]]:
    """The mixers of each stage, from a list of entries or from a list of such lists, one for each stage.

    `shared` has the fields that the model shares with its mixers. Raises InputError for a mixture of entries and lists,
    for a wrong number of lists, for an unknown kind or setting, and for a value of a wrong type.
    """
    lists = [isinstance(entry, list | tuple) for entry in entries]
    if any(lists) and not all(lists):
        raise InputError(f"mixers must be a list of mixers, or a list for each stage, not {entries}")
    if any(lists) and len(lists) != stages:
        raise InputError(f"mixers has {len(lists)} lists for {stages} stages: give one for each stage, or one for all")
    by_stage = entries if any(lists) else [entries] * stages
    resolved = [[_resolve(entry, shared) for entry in stage] for stage in by_stage]
    return [[mixer for mixer in stage if mixer is not None] for stage in resolved]


def _resolve(entry: Any, shared: Mapping[str, Any]) -> Mixer | None:
    """The mixer of an entry, or None for an entry without a mixer."""
    settings = {"kind": entry} if isinstance(entry, str) else entry
    choices = [*MIXERS, EMPTY]
    if not isinstance(settings, Mapping) or "kind" not in settings:
        raise InputError(f"a mixer must be a kind or a mapping with a kind, not {entry!r}; kinds: {', '.join(choices)}")
    kind = settings["kind"]
    if kind not in choices:
        raise unknown("mixer", kind, choices)
    own = {name: value for name, value in settings.items() if name != "kind"}
    settable = {f.name: f for f in fields(MIXERS[kind])} if kind != EMPTY else {}
    for name in own:
        if name not in settable:
            raise unknown(f"setting of mixer {kind}", name, settable)
    if kind == EMPTY:
        return None
    values = typed(f"mixer {kind}", MIXERS[kind], own)
    for name, f in settable.items():
        model_field = f.metadata.get("model", name)
        if name not in values and model_field in shared:
            values[name] = shared[model_field]
        elif name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise InputError(f"mixer {kind} needs {name}: write {{kind: {kind}, {name}: …}}")
    return MIXERS[kind](**values)
