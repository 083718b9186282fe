"""The tests with the marker `interpreted`, which run kernels in Triton on the CPU.

Triton decides at import whether it interprets, so that they have a process of their own, one for all.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_a_process_of_its_own():
    files = {path for path in TESTS.rglob("test_*.py") if "mark.interpreted" in path.read_text(encoding="utf-8")}
    files -= {Path(__file__)}
    command = [sys.executable, "-m", "pytest", "-m", "interpreted", "-p", "no:cacheprovider", "-v", *map(str, files)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    outcomes = re.findall(r"^tests/(\S+?)::.* ([A-Z]+)(?: +\[.*)?$", done.stdout, re.MULTILINE)
    assert {outcome for _, outcome in outcomes} == {"PASSED"}
    assert {TESTS / name for name, _ in outcomes} == files and len(files) == 7
