"""What one forward pass of one image costs, counted in two ways that must agree (SPEC.md, section 5).

One way asks the modules: a closed form for each kind of layer, and what a module declares. The other watches the
operators that torch dispatches on the meta device. Both must agree for each module. A layer or an operator of unknown
cost is an error, never a zero.

A module declares what it computes itself, outside its child modules, by methods that take the inputs of `forward`:

own_macs(*inputs) -> int             multiply-adds of matrix products, convolutions and the like
own_scan_operations(*inputs) -> int  floating-point operations of a scan, by the papers' rule; default 0
own_normalised(*inputs) -> int       elements of a LayerNorm with parameters that is not a child module; default 0

`own_macs` covers operators of unknown cost that the module calls (a Fourier transform, a custom operator). Its number
counts if it is at least that of the known operators in the module. It covers the module only, not its child modules.
If all operators are known, both counts must be equal.

The attribute `part`, one of `PARTS`, assigns a module and the modules in it to a part.
"""

import io
import pickle
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ...kernels import OPERATORS
from ...kernels.errors import InputError, unknown
from ...models.registry import Backbone, build
from ..sections import MOST_SIDE
from .timing import first_line

PARTS = ("ssm", "scan", "attention", "mlp", "conditioning", "rest")
# Operations per element of a normalisation with and without affine parameters, by fvcore's rule.
AFFINE_OPS, PLAIN_OPS = 5, 4
# Of an RMSNorm with and without a weight, for which fvcore has no rule: square, sum, factor, weight.
AFFINE_RMS_OPS, PLAIN_RMS_OPS = 4, 3
SILENT_MODULES = (
    nn.SiLU, nn.GELU, nn.ReLU, nn.Sigmoid, nn.Tanh, nn.Identity, nn.Embedding, nn.AvgPool2d, nn.Upsample, nn.Dropout,
)  # fmt: skip


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
    `flops` = 2 · macs + operations of normalisations and scans; `paper_gflops` is the number in 1e9 by the rule of the
    family's paper.
    """

    params: int
    macs: int
    flops: int
    paper_gflops: float
    parts: dict[str, Part] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class FvcoreCount:
    """What fvcore counts of one forward pass of one image, and how often it met operators that it skips.

    `total` is what papers print: multiply-adds of the products that fvcore knows, and operations of norms and
    resampling.
    """

    total: int
    skipped: dict[str, int] = field(default_factory=dict)

    def skipped_work(self) -> dict[str, int]:
        """The skipped operators of `skipped` that do more than element-wise work, without their namespaces."""
        names = {name: name.partition("::")[2] for name in self.skipped}
        return {short: self.skipped[name] for name, short in names.items() if short not in SILENT_OPERATORS | COMPOSITE}

    def skips(self) -> str:
        """`skipped_work` in words, such as "10 selective_scan", or "nothing"."""
        return ", ".join(f"{times} {name}" for name, times in self.skipped_work().items()) or "nothing"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# Operators without products, or with element-wise products only.
SILENT_OPERATORS = frozenset(
    """
    _safe_softmax _softmax _to_copy _unsafe_view add addcmul alias arange avg_pool2d cat clone constant_pad_nd copy_
    cos cumsum detach div embedding empty exp expand full gather gelu index masked_fill mul neg ones permute pow relu
    repeat reshape roll rsub select sigmoid silu sin slice softplus split split_with_sizes sqrt squeeze stack sub sum t
    tanh transpose triu unbind unsafe_split unsqueeze upsample_nearest2d view zeros
    """.split()
)
# Of such operators, in a trace by torch.jit.
COMPOSITE = frozenset({"chunk", "expand_as", "flatten", "pad", "repeat_interleave", "unflatten"})
RMS_STEPS = frozenset(f"aten::{name}" for name in ("pow", "mean", "add_", "rsqrt", "mul"))  # of torch's RMSNorm


def cost(config: Any) -> Cost:
    """Count the cost of a backbone from its configuration, on the meta device, for one image.

    Raises InputError, with the name of the module, for a layer or operator of unknown cost and if the counts differ,
    and for a model or an input that is larger than any tensor can be.
    """
    if config.input_size > MOST_SIDE:
        raise InputError(f"model.input_size must be at most {MOST_SIDE:,}, not {config.input_size}")
    try:
        with torch.device("meta"):
            net = build(config).eval().to("meta")
            x = torch.empty(1, config.in_channels, config.input_size, config.input_size)
            label = torch.zeros(1, dtype=torch.int64)
        count = Count(net)
        net.run_block = count.run_block
        with torch.no_grad(), count.watching():
            net(x, label, label)
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise InputError(f"the model is too large to be counted: {first_line(error)}") from None
    totals, parts = count.totals(), count.parts
    _count_params(net, "rest", parts, set())
    rule = net.paper_sum
    paper = (
        totals["macs"]
        + rule.affine_norm * totals["affine_norm"]
        + rule.plain_norm * totals["plain_norm"]
        + rule.scan * totals["scan"]
    )
    return Cost(
        params=sum(part["params"] for part in parts.values()),
        macs=totals["macs"],
        flops=sum(part["flops"] for part in parts.values()),
        paper_gflops=paper / 1e9,
        parts={name: Part(**part) for name, part in parts.items()},
    )


def fvcore_count(config: Any) -> FvcoreCount:
    """What fvcore counts of a backbone. It runs the network on the CPU: the largest models take a minute.

    Raises InputError if fvcore cannot be imported.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit, by which fvcore traces, is deprecated
        try:
            from fvcore.nn import FlopCountAnalysis
        except ImportError as error:
            raise InputError(f"fvcore cannot be imported ({first_line(error)}): pip install fvcore") from None
        net = build(config).eval()
        label = torch.zeros(1, dtype=torch.int64)
        inputs = (torch.zeros(1, config.in_channels, config.input_size, config.input_size), label, label)
        analysis = FlopCountAnalysis(net, inputs)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        return FvcoreCount(int(analysis.total()), dict(sorted(analysis.unsupported_ops().items())))


class Count(TorchDispatchMode):
    """Both counts of what a net computes within `watching`, by module: macs, normalised elements and operations of
    scans. `asked` are the numbers from the modules, `watched` those from the operators."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.names = {module: name for name, module in net.named_modules()}
        self.parts: dict[str, Counter] = {name: Counter() for name in PARTS}  # by the names of a Part's fields
        self.asked: dict[nn.Module, Counter] = {module: Counter() for module in self.names}
        self.watched: dict[nn.Module, Counter] = {module: Counter() for module in self.names}
        self.unknown: set[nn.Module] = set()  # modules that call an operator of unknown cost
        self.traced = {name: work for op in OPERATORS.values() for name, work in op.traced.items()}
        self._inside: list[tuple[nn.Module, str]] = []  # the modules that are running, with their parts
        self._alike: dict[bytes, tuple[list[Counter], set[int], Tensor]] = {}  # what the first of such blocks counted

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what runs within the context."""
        hooks = [(m.register_forward_pre_hook(self._enter), m.register_forward_hook(self._leave)) for m in self.names]
        try:
            with self:
                yield
        finally:
            for handle in (handle for pair in hooks for handle in pair):
                handle.remove()

    def run_block(self, block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`block(*inputs)` (`Backbone.run_block`). Of blocks that are alike, the first runs and counts for the others.

        Blocks are alike if pickle writes the same bytes for them and their inputs. On the meta device no tensor has
        values.
        """
        key = _pickled(block, inputs, [part for _, part in self._inside[-1:]])
        if key is None:
            return block(*inputs)
        modules = list(cast(nn.Module, block).modules())
        counters = [*self.parts.values(), *(each[module] for each in (self.asked, self.watched) for module in modules)]
        if key not in self._alike:
            before = [Counter(counter) for counter in counters]
            out = block(*inputs)
            sums = [counter - start for counter, start in zip(counters, before, strict=True)]
            self._alike[key] = sums, {place for place, module in enumerate(modules) if module in self.unknown}, out
            return out
        sums, unknown_places, out = self._alike[key]
        for counter, more in zip(counters, sums, strict=True):
            counter.update(more)
        self.unknown.update(modules[place] for place in unknown_places)
        return out

    def totals(self) -> Counter:
        """The sums over all modules. Raises InputError for the first module whose counts differ."""
        totals: Counter = Counter()
        for module, asked in self.asked.items():
            watched = self.watched[module]
            expected = Counter(watched)
            if module in self.unknown:
                expected["macs"] = max(watched["macs"], asked["macs"])
            if asked != expected:
                raise InputError(
                    f"two counts of {self._title(module)} differ: by its type or its own methods (own_macs, "
                    f"own_scan_operations, own_normalised) {_listed(asked)}, by the operators in it {_listed(watched)}"
                )
            totals.update(asked)
        return totals

    def _title(self, module: nn.Module) -> str:
        name = self.names[module]
        return f"{type(module).__name__} ({name})" if name else type(module).__name__

    def _enter(self, module: nn.Module, _: Any) -> None:
        part = getattr(module, "part", self._inside[-1][1] if self._inside else "rest")
        if part not in self.parts:
            raise unknown(f"part of {self._title(module)}", part, PARTS)
        self._inside.append((module, part))

    def _leave(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        part, asked = self.parts[self._inside[-1][1]], self.asked[module]
        macs = self._macs(module, inputs, output)
        asked["macs"] += macs
        part["macs"] += macs
        part["flops"] += 2 * macs
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            affine = module.weight is not None
            name = ("affine_" if affine else "plain_") + ("norm" if isinstance(module, nn.LayerNorm) else "group_norm")
            asked[name] += inputs[0].numel()
            part["flops"] += inputs[0].numel() * (AFFINE_OPS if affine else PLAIN_OPS)
        if isinstance(module, nn.RMSNorm):
            asked["rms_norm"] += output.numel() // output.shape[-1]
            part["flops"] += output.numel() * (PLAIN_RMS_OPS if module.weight is None else AFFINE_RMS_OPS)
        operations, elements = _own(module, "own_scan_operations", inputs), _own(module, "own_normalised", inputs)
        asked["scan"] += operations or 0
        self.parts["scan"]["flops"] += operations or 0
        asked["affine_norm"] += elements or 0
        part["flops"] += (elements or 0) * AFFINE_OPS
        self._inside.pop()

    def _macs(self, module: nn.Module, inputs: tuple, output: Any) -> int:
        macs = _own(module, "own_macs", inputs)
        if macs is not None:
            return macs
        if isinstance(module, nn.Linear):
            return output.numel() * module.in_features
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            return output.numel() * module.weight[0].numel()
        silent = isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, Backbone, *SILENT_MODULES))
        parameters, children = module.parameters(recurse=False), module.children()
        if not silent and (any(True for _ in parameters) or not any(True for _ in children)):
            raise InputError(
                f"the cost of {self._title(module)} is not known: give {type(module).__name__} own_macs(*inputs), "
                "the multiply-adds of a call outside its child modules"
            )
        return 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet, name = func._overloadpacket, func._schema.name
        module = self._inside[-1][0] if self._inside else self.net
        watched = self.watched[module]
        if packet in flop_registry:
            watched["macs"] += flop_registry[packet](*args, **(kwargs or {}), out_val=out) // 2
        elif name in self.traced:
            work = self.traced[name](*args, **(kwargs or {}))
            watched.update({"macs": work.macs, "scan": work.scan_operations})
            watched.update({"affine_norm": work.normalised, "plain_norm": work.plain_normalised})
        elif name == "aten::native_layer_norm":
            watched["plain_norm" if args[2] is None else "affine_norm"] += args[0].numel()
        elif name == "aten::native_group_norm":
            watched["plain_group_norm" if args[1] is None else "affine_group_norm"] += args[0].numel()
        elif isinstance(module, nn.RMSNorm) and name in RMS_STEPS:
            watched["rms_norm"] += args[0].numel() if name == "aten::rsqrt" else 0  # a root for each normalised vector
        elif not name.startswith("aten::") or name.removeprefix("aten::") not in SILENT_OPERATORS:
            if not callable(getattr(module, "own_macs", None)):
                raise InputError(
                    f"{self._title(module)} calls {name}, whose cost is not known: give {type(module).__name__} "
                    "own_macs(*inputs), the multiply-adds of a call outside its child modules"
                )
            self.unknown.add(module)
        return out


class _Pickler(pickle.Pickler):
    """Writes modules without the hooks of `Count.watching`. Raises PicklingError for one that has others."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, nn.Module):
            return NotImplemented
        state = dict(obj.__dict__)
        if max(len(state.pop(name)) for name in ("_forward_hooks", "_forward_pre_hooks")) > 1:
            raise pickle.PicklingError
        return object.__new__, (type(obj),), state


def _pickled(block: Callable[..., Tensor], *context: Any) -> bytes | None:
    """What pickle writes of a block and its context; None if the block is no module or pickle cannot write it."""
    file = io.BytesIO()
    with suppress(pickle.PicklingError, AttributeError, TypeError):  # of functions within functions, and the like
        if isinstance(block, nn.Module):
            _Pickler(file).dump((block, context))
            return file.getvalue()
    return None


def _own(module: nn.Module, method: str, inputs: tuple) -> int | None:
    """What a module declares by a method; None if it has no such method."""
    own = getattr(module, method, None)
    return cast(int, own(*inputs)) if callable(own) else None


def _listed(counts: Counter) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()) if count) or "nothing"


def _count_params(module: nn.Module, part: str, parts: dict[str, Counter], seen: set[int]) -> None:
    part = getattr(module, "part", part)
    for parameter in module.parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            parts[part]["params"] += parameter.numel()
    for child in module.children():
        _count_params(child, part, parts, seen)
