"""Signals are noted and end nothing in the middle; those that a process was started to ignore stay ignored."""

import os
import signal
import subprocess
import sys

import pytest

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
