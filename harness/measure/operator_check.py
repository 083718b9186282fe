"""What has to hold of every operator alone: its output and each of its gradients agree with the reference.

Among all gradients of a model a small one is lost: where that of the queries is garbage, they move by 1 % (DESIGN.md,
rule 4).
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import OPERATORS
from ...kernels.operator import Operator
from ...models.registry import Backbone
from ..device import autocast
from .check import FLOOR, WrongOutput, relative_rms, with_backends
from .mamba_scan import output_weights

SMALL = 2**20  # bytes: up to here torch's allocator takes a tensor from blocks of their own


class Call(NamedTuple):
    """One call of an operator's backend: its arguments, and which of them have a gradient."""

    operator: str
    args: tuple[Any, ...]
    wanted: tuple[bool, ...]

    @property
    def signature(self) -> tuple[Any, ...]:
        """What tells calls apart: the shape and type of every tensor, and every number."""
        return tuple((tuple(arg.shape), arg.dtype) if isinstance(arg, Tensor) else arg for arg in self.args)

    @property
    def names(self) -> list[str]:
        """What `results` returns: the output, and the arguments whose gradients follow."""
        named = zip(argument_names(self.operator), self.wanted, strict=True)
        return ["output", *(name for name, wanted in named if wanted)]

    def shape(self, batch: int) -> str:
        """For people: the tensors that grow with the batch and have a gradient, and the numbers."""
        words = []
        for name, arg, wanted in zip(argument_names(self.operator), self.args, self.wanted, strict=True):
            if isinstance(arg, Tensor) and wanted and arg.shape[0] == batch:
                words.append(f"{name} {'×'.join(map(str, arg.shape))}")
            elif isinstance(arg, int):
                words.append(f"{name} {arg}")
        return ", ".join(words)


def argument_names(operator: str) -> list[str]:
    """The names of the arguments that an operator's backends take."""
    return list(inspect.signature(OPERATORS[operator].backends["reference"].run).parameters)


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """The calls that backends get while this lasts; those like an earlier one have lost their arguments."""
    calls: list[Call] = []
    seen: set[Any] = set()
    resolve = Operator.resolve

    def watched(self: Operator, request: str, device_type: str) -> Any:
        backend = resolve(self, request, device_type)

        def run(*args: Any) -> Tensor:
            wanted = tuple(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
            call = Call(self.name, tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args), wanted)
            key = (self.name, call.signature)
            calls.append(call._replace(args=()) if key in seen else call)
            seen.add(key)
            return backend.run(*args)

        return replace(backend, run=run)

    Operator.resolve = watched  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        Operator.resolve = resolve  # type: ignore[method-assign]


def calls_of(net: Backbone, batch: int, precision: str, device: str) -> list[Call]:
    """Every call in a forward pass of `batch` random images, in order; see `recorded`."""
    config = net.config
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, device=device)
    t = torch.randint(0, 1000, (batch,), device=device)
    with autocast(device, precision), recorded() as calls:
        net(x, t, torch.zeros_like(t))
    return calls


def fresh(call: Call, dtype: torch.dtype | None = None) -> tuple[list[Any], list[Tensor]]:
    """The arguments of a call, and those among them that have a gradient; `dtype` for all float tensors."""
    args, leaves = list(call.args), []
    for place, (arg, wanted) in enumerate(zip(call.args, call.wanted, strict=True)):
        if isinstance(arg, Tensor) and arg.is_floating_point():
            args[place] = arg.to(dtype or arg.dtype).detach().requires_grad_(wanted)
            leaves += [args[place]] if wanted else []
    return args, leaves


def results(
    run: Callable[..., Tensor], call: Call, dtype: torch.dtype | None = None, spoil: Callable[[], None] = lambda: None
) -> list[Tensor]:
    """The output and every wanted gradient, of the output times fixed random weights; `dtype` for all float tensors.
    `spoil` is called before each of the two passes.

    The output's gradient lies in memory as the output does, like the one that attention gets in our models: of cuDNN's
    attention, that layout must not change within a process (see `kernels/attention/README.md`).
    """
    args, leaves = fresh(call, dtype)
    spoil()
    out = run(*args)
    weights = torch.empty_like(out).copy_(output_weights(out.shape))
    spoil()
    return [out.detach(), *torch.autograd.grad(out, leaves, weights)]


def fill_free_memory(device: str, size: int) -> None:
    """Set every bit of the GPU memory that torch's allocator hands out next: NaN in every float type.

    What a kernel reads though nobody wrote it then shows in what it returns, whatever lay there by chance. That is
    every gap in the blocks that torch holds, and `size` bytes (at most half of what is free) of new ones. Nothing on a
    CPU.
    """
    if not device.startswith("cuda"):
        return
    torch.cuda.empty_cache()  # only gaps are left
    sizes = [SMALL] * 8  # four blocks for small tensors
    for segment in torch.cuda.memory_snapshot():
        most = SMALL if segment["segment_type"] == "small" else segment["total_size"]
        for gap in (block["size"] for block in segment["blocks"] if block["state"] == "inactive"):
            sizes += [min(most, gap - start) for start in range(0, gap, most)]
    sizes.append(min(max(size, 32 * SMALL), torch.cuda.mem_get_info(device)[0] // 2))
    # All at once, so that each lies somewhere else; what fits a gap exactly goes there.
    _ = [torch.full((size,), 255, dtype=torch.uint8, device=device) for size in sizes]


def as_in_the_model(run: Callable[..., Tensor], precision: str, device: str) -> Callable[..., Tensor]:
    """A backend under the autocast that it has in a model."""

    def wrapped(*args: Any) -> Tensor:
        with autocast(device, precision):
            return run(*args)

    return wrapped


def or_null(error: float) -> float | None:
    """What a record can hold."""
    return error if math.isfinite(error) else None


class PlainAttention(torch.autograd.Function):
    """Global attention as FlashAttention rounds it (Dao, 2023, arXiv 2307.08691, algorithms 1 and 2), in plain torch.

    Its backward pass takes the sum over a row of the scores' gradients from the output, rounded to q's type: in
    bfloat16 the gradient of q is then 3 % off where keys have much in common, which every kernel of that kind has to be
    allowed. q, k, v and the output [B, heads, tokens, d]. Scores are kept of one head at a time; exact in float64.
    """

    @staticmethod
    def _probabilities(q: Tensor, k: Tensor) -> Tensor:
        scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
        return scores.softmax(-1)

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True)
        out = torch.stack([PlainAttention._probabilities(q, k).to(v.dtype) @ v for q, k, v in heads], dim=1)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        found = []
        for q, k, v, out, grad in zip(*(t.unbind(1) for t in (*ctx.saved_tensors, *grads)), strict=True):
            p = PlainAttention._probabilities(q, k)
            row_sums = (grad.to(p.dtype) * out).sum(-1, keepdim=True)
            by_scores = (p * ((grad @ v.mT) - row_sums) * q.shape[-1] ** -0.5).to(q.dtype)
            found.append((by_scores @ k, by_scores.mT @ q, p.to(q.dtype).mT @ grad))
        return tuple(torch.stack(parts, dim=1) for parts in zip(*found, strict=True))


class Held:
    """What backends are held against at one call: `exact`, by the backend `reference` in float64 if no other is named,
    and `plain`, what plain torch gives in the model's precision: the backend that `auto` takes on a CPU, for attention
    `PlainAttention`, which is nobody's backend; see `results`."""

    def __init__(self, call: Call, precision: str, device: str, backend: str = "reference") -> None:
        self.call, self.precision, self.device = call, precision, device
        operator = OPERATORS[call.operator]
        exact, plain = operator.backends[backend].run, operator.resolve("auto", "cpu").run
        if call.operator == "attention":
            plain = PlainAttention.apply
            exact = plain if backend == "sdpa" else exact  # SDPA keeps every score in float64
        self.exact = results(exact, call, torch.float64)
        self.plain = results(as_in_the_model(plain, precision, device), call)

    def compare(self, run: Callable[..., Tensor], floor: float) -> dict[str, Any]:
        """Relative RMS errors of a backend as fields of a row: `relative_error` the largest (null where that is not
        finite), `error_of` what has it.

        `state` is "wrong" where one is more than twice that of plain torch plus `floor`, and `error` says which. On a
        GPU the backend gets memory full of NaN.
        """
        size = 8 * sum(arg.nbytes for arg in self.call.args if isinstance(arg, Tensor))
        found = results(run, self.call, spoil=lambda: fill_free_memory(self.device, size))
        errors = [relative_rms([a.double()], [b]) for a, b in zip(found, self.exact, strict=True)]
        rivals = [relative_rms([a.double()], [b]) for a, b in zip(self.plain, self.exact, strict=True)]
        names = self.call.names
        worst = max(range(len(errors)), key=lambda place: math.inf if math.isnan(errors[place]) else errors[place])
        row = {"state": "done", "relative_error": or_null(errors[worst]), "error_of": names[worst]}
        for name, error, rival in zip(names, errors, rivals, strict=True):
            if not error <= 2 * rival + floor:
                return row | {"state": "wrong", "error": f"{name} off by {error:.1e}, plain torch by {rival:.1e}"}
        return row


def check_operators(
    net: Backbone, backends: dict[str, str], exact: dict[str, str], precision: str, device: str
) -> float | None:
    """Hold every different call that `net` makes of an operator for one image, by `backends`, against those of `exact`.

    Both are {operator: backend}. Returns the largest relative RMS error of any output or gradient, None where the net
    calls no operator. Raises WrongOutput for the first call with one that is too large (see `Held.compare`): beyond the
    floor for whole models, so that an adapter that rounds inside, as mamba-ssm's does, can be measured in one.
    """
    with with_backends(net, backends):
        calls = [call for call in calls_of(net, 1, precision, device) if call.args]
    errors = []
    for call in calls:
        name = backends[call.operator]
        run = as_in_the_model(OPERATORS[call.operator].backends[name].run, precision, device)
        row = Held(call, precision, device, exact[call.operator]).compare(run, FLOOR[precision])
        if row["state"] != "done":
            raise WrongOutput(f"{call.operator}={name}: {row['error']}: not measured")
        errors.append(row["relative_error"])
    return max(errors, default=None)
