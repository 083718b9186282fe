"""Stopping on a signal. A signal is only noted when it comes; work stops at the end of its step or batch."""

import signal
from collections.abc import Sequence
from types import FrameType

# The scheduler's warning that time is running out, its order to end, and the end of the terminal.
SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP)
INTERACTIVE = (*SIGNALS, signal.SIGINT)  # and Ctrl-C, for work in a terminal
_noted: list[int] = []


class Stopped(RuntimeError):
    """A signal asked the run to stop. The run continues exactly from what is on disk."""


def listen(numbers: Sequence[int] = SIGNALS) -> None:
    """Note these signals from now on instead of ending the process. A hangup or Ctrl-C that the process was started to
    ignore, as by nohup, stays ignored."""
    for number in numbers:
        if number in (signal.SIGHUP, signal.SIGINT) and signal.getsignal(number) == signal.SIG_IGN:
            continue
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
    """Ignore these signals from now on, and Ctrl-C too.

    A process that loads data ignores them because a signal to the whole process group must not end it while a training
    step needs it. A job ignores them at its end because Python removes its handlers before it exits.
    """
    for number in INTERACTIVE:
        signal.signal(number, signal.SIG_IGN)
