"""The tests with the marker `interpreted`, which run kernels in Triton on the CPU.

Triton decides at import whether it interprets, so that they have a process of their own, one for all.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
COUNTS = {
    "harness/data/test_noise.py": 4,
    "harness/training/test_noise.py": 1,
    "kernels/test_depthwise_triton.py": 9,
    "kernels/test_gated_norm_triton.py": 15,
    "kernels/test_modulated_norm_triton.py": 77,
    "kernels/test_scan_kernels.py": 6,
    "kernels/test_window_triton.py": 24,
}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_in_a_process_of_its_own():
    sources = {path: path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py") if path != Path(__file__)}
    files = [str(path) for path, source in sources.items() if "mark.interpreted" in source]
    command = [sys.executable, "-m", "pytest", "-m", "interpreted", "-p", "interpreter", "-p", "no:cacheprovider", "-v"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment["PYTHONPATH"] = str(Path(__file__).parent)  # of the plug-in
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run([*command, *files], env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    outcomes = re.findall(r"^tests/(\S+?)::.* ([A-Z]+)(?: +\[.*)?$", done.stdout, re.MULTILINE)
    assert {outcome for _, outcome in outcomes} == {"PASSED"}
    assert Counter(name for name, _ in outcomes) == COUNTS
