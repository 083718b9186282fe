"""The line that says what the time to the first step went into."""

import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from lamabench.harness.progress import Progress
from lamabench.harness.training.start import Start
from trainings import make, trained

CODE = "import time; from lamabench.harness.training.start import age; time.sleep(0.5); print(age())"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says when a process began")
def test_the_age_of_a_process_is_what_its_parent_measures():
    begun = time.monotonic()
    answer = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    whole = time.monotonic() - begun
    assert 0.5 < float(answer.stdout) < whole + 0.02  # the system counts in hundredths of a second


def parts(text):
    """The sum and the parts of a line."""
    whole, words = re.fullmatch(r"first step after ([\d.]+) s: (.+)", text).groups()
    return float(whole), {name: float(seconds) for name, seconds in (word.split() for word in words.split(", "))}


def test_parts_follow_one_another_and_only_the_first_training_has_a_start(monkeypatch):
    monkeypatch.setattr("lamabench.harness.training.start._waiting", True)
    monkeypatch.setattr("lamabench.harness.training.start.age", lambda: 5.0)
    assert list(Start().parts) == ["start"]  # of a training that had nothing to do
    clock = SimpleNamespace(perf_counter=iter([10.0, 12.5, 20.0, 30.0]).__next__)
    monkeypatch.setattr("lamabench.harness.training.start.time", clock)
    first = Start()
    first.part("data")
    first.part("step")
    assert first.text() == "first step after 15.0 s: start 5.0, data 2.5, step 7.5"
    assert list(Start().parts) == []


@pytest.mark.parametrize("steps", [1, 2])
def test_a_training_says_it_once_after_its_first_step(tmp_path, monkeypatch, steps):
    said = []
    monkeypatch.setattr(Progress, "say", lambda self, text: said.append(text))
    begun = time.monotonic()
    trained(tmp_path, make(steps=steps))
    (place,) = (index for index, text in enumerate(said) if text.startswith("first step"))
    whole, seconds = parts(said[place])
    assert {*seconds} - {"start"} == {"cost", "data", "network", "step"}
    assert whole - seconds.get("start", 0) < time.monotonic() - begun + 0.1
    assert said[place - 1].startswith("train 0/")
