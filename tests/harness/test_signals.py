"""Signals are noted and end nothing in the middle; those that a process was started to ignore stay ignored."""

import os
import signal
import subprocess
import sys

import pytest
from lamabench.harness import signals
from lamabench.kernels.errors import InputError

CODE = """
import os, signal, sys
from lamabench.harness import signals
signal.signal(int(sys.argv[1]), signal.SIG_IGN if sys.argv[2] == "ignored" else signal.SIG_DFL)
signals.listen()
os.kill(os.getpid(), int(sys.argv[1]))
print(getattr(signals.asked(), "name", None))
signals.ignore()
os.kill(os.getpid(), int(sys.argv[1]))
"""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize("before", ["default", "ignored"])
def test_a_signal_is_noted(number, before):
    words = [sys.executable, "-c", CODE, str(int(number)), before]
    process = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "error"})
    nohup = before == "ignored" and number in (signal.SIGHUP, signal.SIGINT)
    assert (process.returncode, process.stdout, process.stderr) == (0, f"{None if nohup else number.name}\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("other", [AttributeError, OSError, InputError])
def test_an_interrupt_that_a_library_hides_is_one(number, other):
    """As OmegaConf's cleanup fails while KeyboardInterrupt passes it, and a caller words that error anew."""
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), signals.interrupting():
            try:
                try:
                    os.kill(os.getpid(), number)
                    signal.pause()
                finally:
                    raise_(AttributeError("half way"))
            except AttributeError as error:
                raise other(str(error)) from None
    finally:
        for one, handler in zip((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), before, strict=True):
            signal.signal(one, handler)


def test_other_errors_stay():
    with pytest.raises(OSError, match="own"), signals.interrupting():
        try:
            raise_(ValueError("first"))
        except ValueError as error:
            raise OSError("own") from error


def raise_(error):
    raise error
