"""How an operator chooses its implementation: asked for by name, refused in words (DESIGN.md, rule 5)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import InputError, unknown


def always(device_type: str) -> list[str]:
    """The reasons of a backend that runs everywhere: none."""
    return []


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    `reasons(device_type)` returns every reason why it cannot run on that kind of device here ("cuda", "cpu",
    "meta"); an empty list means usable. `auto_on` names the kinds of device on which `auto` may take it (None: all), so
    that no environment variable decides what `auto` means.
    """

    name: str
    run: Callable[..., Any]
    reasons: Callable[[str], list[str]] = always
    auto_on: tuple[str, ...] | None = None


class Operator:
    """An operator and its backends. `auto` takes the first usable one, in the order given."""

    def __init__(self, name: str, backends: list[Backend]) -> None:
        self.name = name
        self.backends = {backend.name: backend for backend in backends}
        self._resolved: dict[tuple[str, str], Backend] = {}

    def resolve(self, request: str, device_type: str) -> Backend:
        """The backend for `request` ("auto" or a name) on a device type.

        Asked once: the answer is kept, so that a call costs nothing and torch.compile finds no question in its graph.
        Raises InputError with every reason when the named backend, or none at all, can run.
        """
        found = self._resolved.get((request, device_type))
        if found is None:
            found = self._resolve(request, device_type)
            self._resolved[request, device_type] = self._resolved[found.name, device_type] = found
        return found

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
        """Every unusable backend with its reasons, in one line; empty when all are usable."""
        refused = {name: backend.reasons(device_type) for name, backend in self.backends.items()}
        return "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in refused.items() if reasons)
