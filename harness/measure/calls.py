"""The calls of operators in a model: recorded while the model runs, and repeated in isolation."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels import OPERATORS
from ...kernels.operator import output_weights
from ...models.registry import Backbone
from ..device import autocast


class Call(NamedTuple):
    """One call of an operator's backend: its arguments, and which of them need a gradient (`wanted`)."""

    operator: str
    args: tuple[Any, ...]
    wanted: tuple[bool, ...]

    @property
    def signature(self) -> tuple[Any, ...]:
        """What distinguishes calls: the shape and type of every tensor, and every number."""
        return tuple((tuple(arg.shape), arg.dtype) if isinstance(arg, Tensor) else arg for arg in self.args)

    @property
    def names(self) -> list[str]:
        """The names of what `results` returns: the outputs, then the arguments with a gradient."""
        named = zip(OPERATORS[self.operator].arguments, self.wanted, strict=True)
        return [*self.outputs, *(name for name, wanted in named if wanted)]

    @property
    def outputs(self) -> dict[str, torch.dtype]:
        """The names of the outputs, with their types (see `Operator`)."""
        return OPERATORS[self.operator].outputs(*self.args)

    def shape(self, few: "Call") -> str:
        """The call in words: the shapes of tensors that grow with the batch and need a gradient, the types of those
        that are wider than another one, and the numbers. `few` is the same call with another batch or, if there is
        none, this one: then the first axis says what grows."""
        named = zip(OPERATORS[self.operator].arguments, self.args, self.wanted, few.args, strict=True)
        batch, told = len(self.args[0]), []
        for name, arg, wanted, other in named:
            grows = isinstance(arg, Tensor) and (arg.shape[0] == batch if few is self else arg.shape != other.shape)
            if (grows and wanted) or isinstance(arg, int):
                told.append((name, arg))
        least = min((arg.element_size() for _, arg in told if isinstance(arg, Tensor)), default=0)
        words = []
        for name, arg in told:
            text = "×".join(map(str, arg.shape)) if isinstance(arg, Tensor) else str(arg)
            wide = isinstance(arg, Tensor) and arg.element_size() > least
            words.append(f"{name} {text} {str(arg.dtype).removeprefix('torch.')}" if wide else f"{name} {text}")
        return ", ".join(words)

    @property
    def missing(self) -> list[str]:
        """The names of the arguments that are None."""
        return [name for name, arg in zip(OPERATORS[self.operator].arguments, self.args, strict=True) if arg is None]


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Record the calls of backends within the context. A call with an earlier signature is kept without arguments."""
    calls: list[Call] = []
    seen: set[Any] = set()

    def note(operator: str, *args: Any) -> None:
        wanted = tuple(isinstance(arg, Tensor) and arg.requires_grad for arg in args)
        call = Call(operator, tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in args), wanted)
        key = (operator, call.signature)
        calls.append(call._replace(args=()) if key in seen else call)
        seen.add(key)

    with ExitStack() as stack:
        for name, operator in OPERATORS.items():
            stack.enter_context(operator.watched(partial(note, name)))
        yield calls


def calls_of(net: Backbone, batch: int, precision: str, device: str) -> list[Call]:
    """Every call in a forward pass of `batch` random images, in order (see `recorded`)."""
    config = net.config
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size, device=device)
    t = torch.randint(0, 1000, (batch,), device=device)
    with autocast(device, precision), recorded() as calls:
        net(x, t, torch.zeros_like(t))
    return calls


def fresh(call: Call, dtype: torch.dtype | None = None) -> tuple[list[Any], list[Tensor]]:
    """Copies of the arguments of a call, and those among them that need a gradient. Float tensors get `dtype`."""
    args, leaves = list(call.args), []
    for place, (arg, wanted) in enumerate(zip(call.args, call.wanted, strict=True)):
        if isinstance(arg, Tensor) and arg.is_floating_point():
            args[place] = arg.to(dtype or arg.dtype).detach().requires_grad_(wanted)
            leaves += [args[place]] if wanted else []
    return args, leaves


def results(
    run: Callable[..., Any], call: Call, dtype: torch.dtype | None = None, spoil: Callable[[], None] = lambda: None
) -> list[Tensor]:
    """The outputs, then every wanted gradient, for the loss that is the sum of the outputs times fixed random weights.

    Float tensors get `dtype`. `spoil` is called before each of the two passes. The gradient of the output has the
    memory layout of the output, as attention gets it in our models, because that layout must not change within a
    process for cuDNN's attention (see `kernels/attention/README.md`).
    """
    args, leaves = fresh(call, dtype)
    spoil()
    out = listed(run(*args))
    weights = [torch.empty_like(v).copy_(output_weights(v.shape)) for v in out]
    spoil()
    return [*(v.detach() for v in out), *torch.autograd.grad(out, leaves, weights)]


def listed(out: Any) -> list[Tensor]:
    """The outputs of a backend, which returns a tensor or a tuple of tensors."""
    return list(out) if isinstance(out, tuple) else [out]


def as_in_the_model(run: Callable[..., Any], precision: str, device: str) -> Callable[..., Any]:
    """A backend under the same autocast as in a model."""

    def wrapped(*args: Any) -> Any:
        with autocast(device, precision):
            return run(*args)

    return wrapped
