"""Stopping on a signal. A signal is only noted when it comes; work stops at the end of its step or batch."""

import ctypes
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

# The scheduler's warning that time is running out, its order to end, a closed terminal, and Ctrl-C.
SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl
_noted: list[int] = []


class Stopped(RuntimeError):
    """A signal asked the run to stop. The run continues exactly from what is on disk."""


def listen() -> None:
    """Note `SIGNALS` from now on instead of ending the process. A Ctrl-C after another signal raises
    KeyboardInterrupt. A hangup or Ctrl-C that the process was started to ignore, as by nohup, stays ignored."""
    for number in SIGNALS:
        if number in (signal.SIGHUP, signal.SIGINT) and signal.getsignal(number) == signal.SIG_IGN:
            continue
        signal.signal(number, _note)


def _note(number: int, frame: FrameType | None) -> None:
    _noted.append(number)
    if number == signal.SIGINT and len(_noted) > 1:
        raise KeyboardInterrupt(number)


def asked() -> signal.Signals | None:
    """The first signal that came, None if none came."""
    return signal.Signals(_noted[0]) if _noted else None


def take(number: int) -> None:
    """Note a signal that came to another process of the run."""
    _noted.append(number)


def check() -> None:
    """Raise Stopped if a signal came."""
    if (number := asked()) is not None:
        raise Stopped(f"stopped by {number.name}")


def end_with_parent(number: int) -> None:
    """Have the system send this process a signal when its parent is gone, even by SIGKILL. Only Linux does that."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, int(number))


def ignore() -> None:
    """Ignore `SIGNALS` from now on.

    A process that loads data ignores them because a signal to the whole process group must not end it while a training
    step needs it. A job ignores them at its end because Python removes its handlers before it exits.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def noted() -> Iterator[None]:
    """Note `SIGNALS` inside the block, for work of a command that saves when it is stopped (`check`). Where that ends
    the block, raises KeyboardInterrupt with the number of the signal."""
    with _handlers(SIGNALS, _note):
        try:
            yield
        except Stopped:
            raise KeyboardInterrupt(_noted[0]) from None
        finally:
            _noted.clear()


@contextmanager
def interrupting() -> Iterator[None]:
    """Inside the block, SIGTERM and SIGHUP raise KeyboardInterrupt with their number, as Ctrl-C does. KeyboardInterrupt
    is raised even if a library turns it into another error."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(number)

    with _handlers((signal.SIGTERM, signal.SIGHUP), interrupt):
        try:
            yield
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, KeyboardInterrupt):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise cause from None


@contextmanager
def _handlers(numbers: tuple[signal.Signals, ...], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle signals inside the block, except those that are ignored (nohup). Only a process's main thread can."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers if main}
    for number, earlier in before.items():
        if earlier is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
