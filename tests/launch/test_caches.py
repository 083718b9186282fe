"""Code compiled for a GPU that one training left below the root of the runs: the next finds it, however it starts."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import yaml
from lamabench.harness import launcher
from lamabench.harness.caches import VARIABLES, forget_choices
from lamabench.harness.provenance import CODE, ROOT
from lamabench.launch import local
from lamabench.launch.slurm import client

SMALL = {
    "model": "dit_nano", "model.depth": 1, "model.hidden_size": 16, "model.num_heads": 2, "data": "digits",
    "data.size": 8, "train.batch_size": 4, "train.precision": "float32", "train.steps": 2, "train.compile": "compile",
    "run.device": "cpu",
}  # fmt: skip
COMMAND = "import sys; from lamabench.launch.cli import main; sys.exit(main())"
# Takes the CPU for a GPU where compiled code is kept, and notes what the compilers found. In a process that only starts
# jobs, it imports what makes torch choose a folder, as many packages do.
PLUGIN = """
import atexit, json, os, sys
from pathlib import Path
from unittest.mock import patch
from lamabench.harness import caches, device

keep = caches.keep_compiled

def keep_compiled(root, where):
    with patch.object(device, "is_cuda", lambda where: True), patch.object(device, "device_name", lambda where: "GPU"):
        keep(root, where)

def note():
    from torch._dynamo.utils import counters
    found = {**counters["inductor"], **counters["aot_autograd"]}
    Path(f"{os.getpid()}.found").write_text(json.dumps({"code": str(caches.__file__), "found": found}))

caches.keep_compiled = keep_compiled
if "sweep" in sys.argv:
    import torch._dynamo
else:
    atexit.register(note)
"""


def start(folder, *words, **environment):
    """Run a command in a new folder, as on a machine of its own. Returns what the compilers of each training counted,
    and the code that ran."""
    (folder / "temporary").mkdir(parents=True)
    (folder / "spy.py").write_text(PLUGIN)
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment = {**kept, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "temporary"), **environment}
    done = subprocess.run([sys.executable, "-c", COMMAND, *words], cwd=folder, env=environment, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    notes = [json.loads(path.read_text()) for path in folder.glob("*.found")]
    return [Counter(one["found"]) for one in notes], {one["code"] for one in notes}


def test_choices_of_this_command_are_forgotten(tmp_path, monkeypatch):
    (tmp_path / "ab").mkdir()
    for name, at in (("old.best_config", 1.0), ("new.best_config", 3.0), ("new.py", 3.0)):
        (tmp_path / "ab" / name).touch()
        os.utime(tmp_path / "ab" / name, (at, at))
    monkeypatch.setenv(VARIABLES[0], str(tmp_path))
    forget_choices(2.0)
    assert {path.name for path in tmp_path.glob("ab/*")} == {"old.best_config", "new.py"}
    monkeypatch.delenv(VARIABLES[0])
    forget_choices(0.0)


@pytest.mark.soak  # it generates code twice, for a minute and more
def test_a_job_finds_what_a_command_compiled_elsewhere(tmp_path):
    """The graphs of `train`, forward and backward, serve a job of a study: in another working directory, of another
    copy of the code, on another seed, and on a machine with other temporary files."""
    root = f"run.root={tmp_path / 'runs'}"
    (first,), _ = start(tmp_path / "a", "train", *(f"{key}={value}" for key, value in SMALL.items()), root,
                        "plugins=[spy.py]")  # fmt: skip
    graphs = ("fxgraph_cache_miss", "fxgraph_cache_hit", "fxgraph_cache_bypass")
    passes = ("autograd_cache_miss", "autograd_cache_hit", "autograd_cache_bypass")
    assert [first[name] for name in (*graphs, *passes)] == [2, 0, 0, 1, 0, 0]

    copy = tmp_path / "code" / "lamabench"
    for name in CODE:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    study = {"question": "?", "base": SMALL, "axes": {"train.lr": [1e-3]}, "seeds": [1], "stages": ["train"]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({**study, "plugins": ["b/spy.py"]}))
    alone = str(len(os.sched_getaffinity(0)))  # so that a job has one core, as the command above
    (second,), code = start(tmp_path / "b", "sweep", "run", "../s.yaml", root, "--parallel", alone,
                            PYTHONPATH=str(copy.parent))  # fmt: skip
    assert code == {str(copy / "harness" / "caches.py")}
    assert [second[name] for name in (*graphs, *passes)] == [0, 2, 0, 0, 1, 0]


def test_jobs_do_not_inherit_the_folders_of_the_process_that_starts_them(monkeypatch):
    """They would take them for the user's. What the user named reaches them."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "folder")
    monkeypatch.setattr(launcher, "GIVEN", frozenset({VARIABLES[1]}))
    assert {*VARIABLES} & client._environment().keys() == {VARIABLES[1]}
    with local._job_environment(1):
        assert {*VARIABLES} & os.environ.keys() == {VARIABLES[1]}
    assert {*VARIABLES} <= os.environ.keys()
