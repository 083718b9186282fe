"""Stopping on a signal: noted when it comes, acted on where the work is whole, at the end of a step or of a batch."""

import signal
from types import FrameType

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)  # the scheduler's notice that time is running out, and its order to end
_noted: list[int] = []


class Stopped(RuntimeError):
    """A signal asked the run to stop; what is on disk continues it exactly."""


def listen() -> None:
    """Note `SIGNALS` from now on instead of dying of them."""
    for number in SIGNALS:
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    _noted.append(number)


def asked() -> signal.Signals | None:
    """The first signal that came; None where none did."""
    return signal.Signals(_noted[0]) if _noted else None


def check() -> None:
    """Raise Stopped where a signal came."""
    if (number := asked()) is not None:
        raise Stopped(f"stopped by {number.name}")


def ignore(worker: int = 0) -> None:
    """Ignore `SIGNALS` from now on: in a process that loads data, as one to the whole group must not take it away from
    the step that needs it; and at the end of a job, as Python lets go of its handlers before it exits."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
