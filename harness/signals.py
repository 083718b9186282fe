"""Stopping on a signal. A signal is only noted when it comes; work stops at the end of its step or batch."""

import signal
from types import FrameType

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)  # the scheduler's warning that time is running out, and its order to end
_noted: list[int] = []


class Stopped(RuntimeError):
    """A signal asked the run to stop. The run continues exactly from what is on disk."""


def listen() -> None:
    """Note `SIGNALS` from now on instead of ending the process."""
    for number in SIGNALS:
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    _noted.append(number)


def asked() -> signal.Signals | None:
    """The first signal that came, None if none came."""
    return signal.Signals(_noted[0]) if _noted else None


def check() -> None:
    """Raise Stopped if a signal came."""
    if (number := asked()) is not None:
        raise Stopped(f"stopped by {number.name}")


def ignore(worker: int = 0) -> None:
    """Ignore `SIGNALS` from now on.

    A process that loads data ignores them because a signal to the whole process group must not end it while a training
    step needs it. A job ignores them at its end because Python removes its handlers before it exits.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
