"""An operator: its backends, the work of a call, and what its results and times are compared with.

Backends are chosen by name, and one that cannot run says why (DESIGN.md, rule 5). Everything about an operator lives in
its folder. The only other place that names it is `kernels.NAMES`.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .errors import InputError, unknown


def always(device_type: str) -> list[str]:
    """The reasons of a backend that runs everywhere: none."""
    return []


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    `reasons(device_type)` returns every reason why it cannot run on a kind of device here ("cuda", "cpu", "meta"); an
    empty list means usable. `auto_on` names the kinds of device on which `auto` may take it (None: all), so that no
    environment variable decides what `auto` means.
    """

    name: str
    run: Callable[..., Any]
    reasons: Callable[[str], list[str]] = always
    auto_on: tuple[str, ...] | None = None


class Work(NamedTuple):
    """The work of one call's forward pass, whatever the backend.

    macs             multiply-adds of matrix products and convolutions
    exponentials     one for each score, decay, softplus and SiLU
    scan_operations  floating-point operations of a scan, by the papers' rule
    normalised       elements of a LayerNorm with parameters
    plain_normalised elements of a LayerNorm without parameters
    """

    macs: int = 0
    exponentials: int = 0
    scan_operations: int = 0
    normalised: int = 0
    plain_normalised: int = 0


class Timed(Protocol):
    """A call that a yardstick has prepared: both passes, ready to be timed."""

    def forward(self) -> Any: ...

    def both(self) -> Any: ...

    def results(self, returned: Any) -> list[Tensor]:
        """What a pass returned as the operator's: the output and, after `both`, the gradient of the first argument."""
        ...


@dataclass(frozen=True)
class Yardstick:
    """Something other than a backend that a call is timed beside: a rival's kernel without the steps around it.

    `prepare` takes the weights of the output in the backward pass and the arguments of a backend. `limit` is the
    largest relative RMS error of its output and the gradient of the first argument. `reasons` is as in `Backend`.
    """

    name: str
    prepare: Callable[..., Timed]
    limit: float
    reasons: Callable[[str], list[str]] = always


def output_weights(shape: torch.Size) -> Tensor:
    """Random weights for an output before the backward pass, bfloat16: the same numbers in every precision."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


class Operator:
    """An operator and its backends. `auto` takes the first usable one, in the order given.

    Every backend takes the arguments of the backend `reference`, by position.

    work        the work of a call, from its arguments
    traced      {name of a torch operator that a backend registers: the work of a call, from the arguments of that torch
                operator}. A cost count that watches torch's dispatcher reads it
    exact       the backend that whole models are compared with in float32 where there are many tokens, because a
                reference may loop over the tokens or store every score
    rival       plain torch in the precision of a model, whose error sets the limit of a backend's error; None: the
                backend that `auto` takes on a CPU. In float64 it is exact, and it replaces the reference where `exact`
                is another backend
    yardsticks  what is timed beside the backends
    outputs     {name: type} of the outputs of a call, from its arguments; a backend returns a tuple of them if there
                are several. By default there is one, in the type of the first argument
    since       the backend that computes what models computed before they called this operator; None: they always did.
                Records and checkpoints of then do not name the operator
    """

    def __init__(
        self,
        name: str,
        backends: Sequence[Backend],
        work: Callable[..., Work],
        *,
        traced: Mapping[str, Callable[..., Work]] | None = None,
        exact: str = "reference",
        rival: Callable[..., Any] | None = None,
        yardsticks: Sequence[Yardstick] = (),
        outputs: Callable[..., dict[str, torch.dtype]] = lambda first, *_: {"output": first.dtype},
        since: str | None = None,
    ) -> None:
        self.name = name
        self.backends = {backend.name: backend for backend in backends}
        self.work = work
        self.traced = dict(traced or {})
        self.exact = exact
        self.yardsticks = tuple(yardsticks)
        self.outputs = outputs
        self.since = since
        self._rival = rival
        self._resolved: dict[tuple[str, str], Backend] = {}
        self._watcher: Callable[..., None] | None = None

    @property
    def arguments(self) -> list[str]:
        """The names of the backends' arguments."""
        return list(inspect.signature(self.backends["reference"].run).parameters)

    @property
    def rival(self) -> Callable[..., Any]:
        """Plain torch whose rounding a backend is allowed too."""
        return self._rival or self.resolve("auto", "cpu").run

    def exact_alone(self, backend: str) -> Callable[..., Any]:
        """What a single call is compared with in float64, where the whole model is compared with `backend`."""
        return self.backends["reference"].run if backend == "reference" else self.rival

    @contextmanager
    def watched(self, watcher: Callable[..., None]) -> Iterator[None]:
        """Call `watcher` with the arguments of every backend call inside this context, before the backend runs.

        Only backends that are resolved inside the context are watched, so that other calls cost nothing.
        """
        before = self._resolved, self._watcher
        self._resolved, self._watcher = {}, watcher
        try:
            yield
        finally:
            self._resolved, self._watcher = before

    def resolve(self, request: str, device_type: str) -> Backend:
        """The backend for `request` ("auto" or a name) on a device type.

        The first answer is cached, so that later calls cost nothing and torch.compile traces no look-up. Raises
        InputError with every reason where the named backend cannot run, or where `auto` finds none.
        """
        backend = self._resolved.get((request, device_type))
        if backend is None:
            backend = self._resolve(request, device_type)
            if self._watcher is not None:
                backend = _watched(backend, self._watcher)
            self._resolved[request, device_type] = self._resolved[backend.name, device_type] = backend
        return backend

    def _resolve(self, request: str, device_type: str) -> Backend:
        if request == "auto":
            for backend in self.backends.values():
                if (backend.auto_on is None or device_type in backend.auto_on) and not backend.reasons(device_type):
                    return backend
            raise InputError(f"{self.name}: no backend runs on {device_type}: {self.why_not(device_type)}")
        if request not in self.backends:
            raise unknown(f"{self.name} backend", request, ["auto", *self.backends])
        backend = self.backends[request]
        reasons = backend.reasons(device_type)
        if reasons:
            usable = [name for name, other in self.backends.items() if not other.reasons(device_type)]
            raise InputError(
                f"{self.name}: backend {request!r} cannot run on {device_type}: {'; '.join(reasons)}. "
                f"Usable here: {', '.join(usable) or 'none'}"
            )
        return backend

    def why_not(self, device_type: str) -> str:
        """Every unusable backend with its reasons, in one line; empty where all are usable."""
        by_name = {name: backend.reasons(device_type) for name, backend in self.backends.items()}
        return "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in by_name.items() if reasons)


def _watched(backend: Backend, watcher: Callable[..., None]) -> Backend:
    def run(*args: Any) -> Any:
        watcher(*args)
        return backend.run(*args)

    return replace(backend, run=run)
