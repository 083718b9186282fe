"""Progress as other processes read it, and a stderr that nobody reads."""

import json
import subprocess
import sys

import pytest
from lamabench.harness import progress

STATE = {"stage": "train", "done": 4, "total": 8, "rate": 2.0, "left_s": 2.0, "loss": "0.5"}


def test_progress_is_read_as_written(tmp_path):
    assert progress.read(tmp_path) is None
    progress.Progress(tmp_path).update("train", 8, 8, loss="0.5")
    assert progress.describe(progress.read(tmp_path) or {}) == "train 8/8  loss 0.5"
    (tmp_path / "progress.json").write_text(json.dumps(STATE))
    assert progress.read(tmp_path) == STATE


def test_a_stage_that_begins_anew_has_a_rate_of_its_own(tmp_path):
    """Samples are scored against one split, then against another of fewer images."""
    line = progress.Progress(tmp_path)
    for done, total in ((64, 225), (225, 225), (50, 50)):
        line.update("evaluate", done, total)
    assert (progress.read(tmp_path) or {})["rate"] == 0


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "3", '{"a": 1}', json.dumps({**STATE, "rate": "x"}), json.dumps(STATE)[:-9]]
)
def test_another_file_is_no_progress(tmp_path, content):
    (tmp_path / "progress.json").write_text(content)
    assert progress.read(tmp_path) is None


@pytest.mark.parametrize("end", ["os.dup2(os.open('/dev/full', os.O_WRONLY), 2)", "os.close(2)", "sys.stderr.close()"])
def test_work_goes_on_when_nobody_reads_its_lines(end):
    code = (
        "import os, sys; from lamabench.harness.progress import Progress\n"
        f"{end}\nfor _ in range(3): Progress(every=0).update('train', 1, 2)\nprint('done')"
    )
    process = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert (process.returncode, process.stdout) == (0, "done\n")


def test_work_goes_on_when_its_reader_is_gone():
    code = (
        "import sys; from lamabench.harness.progress import Progress\n"
        "sys.stdin.read()\nfor _ in range(3): Progress(every=0).update('train', 1, 2)\nprint('done')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    process.stderr.close()
    out, _ = process.communicate(b"")
    assert (process.returncode, out) == (0, b"done\n")
