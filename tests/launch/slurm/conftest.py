"""A cluster without SLURM: its commands are scripts, and its queue is a file."""

import os
from pathlib import Path

import pytest
import yaml
from lamabench.harness.tasks import Task
from lamabench.launch.cli import main
from lamabench.launch.slurm import manifest

BASE = {"model": "dit_nano", "model.depth": 1, "model.hidden_size": 16, "model.num_heads": 2, "data": "digits",
        "data.size": 8, "train.batch_size": 4, "train.precision": "float32", "run.device": "cpu"}  # fmt: skip
# The state of the queue is a file: a line `JOB_TASK|PENDING|NAME|Priority` for each task.
SBATCH = """
for word; do
  case $word in
    --array=*) last=${word##*-}; last=${last%%%*} ;;
    --job-name=*) name=${word#*=} ;;
  esac
done
room=$(( $(cat room) - $(wc -l < queue) ))
echo "$((last + 1)) of $room" >> calls
echo "$@" >> words
if [ -s refusal ]; then cat refusal >&2; exit 1; fi
if [ $((last + 1)) -gt $room ]; then
  echo "sbatch: error: QOSMaxSubmitJobPerUserLimit" >&2
  echo "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit)" >&2
  exit 1
fi
id=$(( $(cat id) + 1 )); echo $id > id
for task in $(seq 0 $last); do echo "${id}_$task|PENDING|$name|Priority" >> queue; done
echo $id
"""
SQUEUE = """
for word; do case $word in --name=*) names=,${word#*=}, ;; --user=*) cut -d'|' -f1 queue; exit ;; esac; done
while IFS='|' read -r key state name reason; do
  case $names in *,$name,*) echo "$key|$state|$name|$reason" ;; esac
done < queue
"""


class Cluster:
    """A cluster that takes `room` tasks (a file in `tools`). Studies are called s."""

    def __init__(self, tools):
        self.tools, self.home = tools, Path("runs/s/.sweep")
        scripts = {"sbatch": SBATCH, "squeue": SQUEUE, "scontrol": "cat config", "sacct": "true"}
        scripts["scancel"] = 'echo "$@" >> ended'
        for name, text in scripts.items():
            (tools / name).write_text(f"#!/bin/bash\ncd {tools} || exit 1\n{text}\n")
            (tools / name).chmod(0o755)
        files = {
            "room": "100",
            "queue": "",
            "id": "0",
            "config": "MaxArraySize = 1001",
            "calls": "",
            "ended": "",
            "words": "",
        }
        for name, text in files.items():
            self.set(name, text)

    def set(self, name, text):
        (self.tools / name).write_text(str(text))

    def lines(self, name):
        return (self.tools / name).read_text().splitlines()

    def queued(self):
        """The tasks in the queue, as JOB_TASK."""
        return [line.split("|")[0] for line in self.lines("queue")]

    def leave(self, count):
        """The first tasks of the queue end."""
        self.set("queue", "".join(f"{line}\n" for line in self.lines("queue")[count:]))

    def study(self, count, stages=("train",), **more):
        """A study file of `count` trainings."""
        rates = [(1 + place) * 1e-4 for place in range(count)]
        data = {"question": "?", "base": BASE, "axes": {"train.lr": rates}, **more}
        Path("s.yaml").write_text(yaml.safe_dump({**data, "stages": list(stages)}))
        return "s.yaml"

    def submit(self, path, *words):
        """The exit code of a submit."""
        return main(["sweep", "submit", path, "cluster=slurm", "--dirty", *words])

    def arrays(self):
        """Every array on disk. No manifest is damaged."""
        arrays, damaged = manifest.arrays(self.home)
        assert damaged == []
        return arrays

    def tasks(self):
        """Every task that was submitted."""
        return [Task.from_dict(one["task"]) for array in self.arrays() for one in array.tasks]


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The cluster; the command starts in an empty folder."""
    (tools := tmp_path / "tools").mkdir()
    (work := tmp_path / "work").mkdir()
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.chdir(work)
    return Cluster(tools)
