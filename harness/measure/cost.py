"""What one forward pass of one image costs, counted in two ways that must agree (SPEC.md, section 5).

One way asks the modules: a closed form for each kind of layer, and `own_macs` of a module that multiplies by itself.
The other watches the operators that torch dispatches on the meta device. A layer or an operator that a count does not
know is an error, never a zero.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle

from ...kernels import attention, depthwise_conv, gated_norm, selective_scan, window_attention
from ...models.mixers import SS2D
from ...models.registry import Backbone, build

PARTS = ("ssm", "scan", "attention", "mlp", "conditioning", "rest")
# fvcore's rule for a normalisation: operations per element, with affine parameters and without.
AFFINE_OPS, PLAIN_OPS = 5, 4
SILENT_MODULES = (nn.SiLU, nn.GELU, nn.Identity, nn.Embedding, nn.AvgPool2d, nn.Upsample, nn.Dropout)


@dataclass
class Part:
    """Parameters, multiply-adds and floating-point operations of one part of a backbone."""

    params: int = 0
    macs: int = 0
    flops: int = 0


@dataclass
class Cost:
    """The cost of one forward pass of one image.

    `params` counts every parameter, trained or fixed; `macs` the multiply-adds of matrix products and convolutions;
    `flops` = 2 · macs + operations of normalisations and scans; `paper_gflops` is the sum that the family's paper
    prints, in 1e9.
    """

    params: int
    macs: int
    flops: int
    paper_gflops: float
    parts: dict[str, Part] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def cost(config: Any) -> Cost:
    """Count a backbone from its configuration, on the meta device, for one image.

    Raises RuntimeError naming the layer or operator that a count does not know, or both counts where they differ.
    """
    with torch.device("meta"):
        net = build(config).eval().to("meta")
        x = torch.empty(1, config.in_channels, config.input_size, config.input_size)
        label = torch.zeros(1, dtype=torch.int64)
    parts, asked = {name: Part() for name in PARTS}, Counter()
    handles = _ask_modules(net, parts, asked)
    with torch.no_grad(), _Watch() as watch:
        net(x, label, label)
    for handle in handles:
        handle.remove()
    _count_params(net, "rest", parts, set())
    watched = watch.totals
    if asked != watched:
        raise RuntimeError(
            f"two counts of {type(net).__name__} differ: modules {dict(asked)}, operators {dict(watched)}"
        )
    rule = net.paper_sum
    paper = (
        asked["macs"]
        + rule.affine_norm * asked["affine_norm"]
        + rule.plain_norm * asked["plain_norm"]
        + rule.scan * asked["scan"]
    )
    return Cost(
        params=sum(p.params for p in parts.values()),
        macs=asked["macs"],
        flops=sum(p.flops for p in parts.values()),
        paper_gflops=paper / 1e9,
        parts=parts,
    )


def _ask_modules(net: Backbone, parts: dict[str, Part], totals: Counter) -> list[RemovableHandle]:
    """Hooks that add every module's share to its part, and macs, normalised elements and scan operations to totals."""
    path = ["rest"]

    def enter(module: nn.Module, _: Any) -> None:
        path.append(getattr(module, "part", path[-1]))

    def leave(module: nn.Module, inputs: tuple, output: Any) -> None:
        part = parts[path.pop()]
        macs = _module_macs(module, inputs, output)
        totals["macs"] += macs
        part.macs += macs
        part.flops += 2 * macs
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            affine = module.weight is not None
            name = ("affine_" if affine else "plain_") + ("norm" if isinstance(module, nn.LayerNorm) else "group_norm")
            totals[name] += output.numel()
            part.flops += output.numel() * (AFFINE_OPS if affine else PLAIN_OPS)
        if isinstance(module, SS2D):
            operations = module.scan_operations(*inputs)
            totals["scan"] += operations
            parts["scan"].flops += operations
            elements = module.normalised(*inputs)  # by its LayerNorm, which it does not call as a module
            totals["affine_norm"] += elements
            part.flops += elements * AFFINE_OPS

    hooks = [(m.register_forward_pre_hook(enter), m.register_forward_hook(leave)) for m in net.modules()]
    return [handle for pair in hooks for handle in pair]


def _module_macs(module: nn.Module, inputs: tuple, output: Any) -> int:
    own_macs = getattr(module, "own_macs", None)
    if callable(own_macs):
        return cast(int, own_macs(*inputs))
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return output.numel() * module.weight[0].numel()
    known = isinstance(module, (nn.LayerNorm, nn.GroupNorm, Backbone, *SILENT_MODULES))
    if not known and (any(True for _ in module.parameters(recurse=False)) or not any(True for _ in module.children())):
        raise RuntimeError(f"the cost count does not know {type(module).__name__}: give it own_macs(…) or add it here")
    return 0


def _count_params(module: nn.Module, part: str, parts: dict[str, Part], seen: set[int]) -> None:
    part = getattr(module, "part", part)
    for parameter in module.parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            parts[part].params += parameter.numel()
    for child in module.children():
        _count_params(child, part, parts, seen)


# Operators that multiply nothing together, or only element by element.
SILENT_OPERATORS = frozenset(
    """
    _safe_softmax _softmax _to_copy _unsafe_view add addcmul alias arange avg_pool2d cat clone constant_pad_nd copy_
    cos detach div embedding empty exp expand full gelu index mul neg permute pow repeat reshape roll rsub select
    sigmoid silu sin slice split split_with_sizes sqrt squeeze stack sub sum t tanh transpose unbind unsafe_split
    unsqueeze upsample_nearest2d view zeros
    """.split()
)


TRACED = {**attention.TRACED, **depthwise_conv.TRACED, **selective_scan.TRACED, **window_attention.TRACED}


class _Watch(TorchDispatchMode):
    """Adds up what every dispatched operator costs."""

    def __init__(self) -> None:
        super().__init__()
        self.totals: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet, name = func._overloadpacket, func._schema.name
        if packet in flop_registry:
            self.totals["macs"] += flop_registry[packet](*args, **(kwargs or {}), out_val=out) // 2
        elif name in TRACED:
            macs, operations = TRACED[name](*args)
            self.totals["macs"] += macs
            self.totals["scan"] += operations
        elif name in gated_norm.NORMALISED:
            self.totals["affine_norm"] += gated_norm.NORMALISED[name](*args)
        elif name == "aten::native_layer_norm":
            self.totals["plain_norm" if args[2] is None else "affine_norm"] += args[0].numel()
        elif name == "aten::native_group_norm":
            self.totals["plain_group_norm" if args[1] is None else "affine_group_norm"] += args[0].numel()
        elif not name.startswith("aten::") or name.removeprefix("aten::") not in SILENT_OPERATORS:
            raise RuntimeError(f"the cost count does not know the operator {name}: say what it costs")
        return out
