"""The fixtures `node`, one real SLURM node for the whole test session, and `sweep`, the command in a folder."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from studies import Sweep


class Node:
    """What tests do to the node, and what they ask of it. Commands are SLURM's own, with SLURM_CONF set for them."""

    def control(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run node.py: `up`, `down`, `status`, `crash`, `start`, `stop` or `kill` and a daemon."""
        script = [sys.executable, str(Path(__file__).with_name("node.py"))]
        return subprocess.run([*script, *words], capture_output=True, text=True)

    def must(self, *words: str) -> None:
        """`control` that fails the test where node.py fails."""
        done = self.control(*words)
        if done.returncode:
            pytest.fail(done.stderr.strip(), pytrace=False)

    def run(self, *words: str) -> str:
        """Standard output of a command that has to succeed."""
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout.strip()

    def submit(self, script: str, output: Path, *options: str) -> str:
        """Queue a bash script; its output is appended to `output`, also when it is queued again. Returns the job id."""
        options = ("--parsable", "--open-mode=append", f"--output={output}", f"--chdir={output.parent}", *options)
        # As a file: `--wrap` runs the script below a second shell, which signals to the batch shell do not reach.
        file = output.with_suffix(".sh")
        file.write_text("#!/bin/bash\n" + script)
        return self.run("sbatch", *options, str(file))

    def sacct(self, job: str, field: str, *options: str) -> list[str]:
        """One field of sacct, a row a job (an array has several): `State`, `ExitCode`, `ElapsedRaw` …"""
        return self.run("sacct", "-X", "-n", "-P", "-j", job, f"--format={field}", *options).splitlines()

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 60) -> None:
        """Fail after so many seconds, which only bound a hang: generous, for a busy machine."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"after {seconds:g} s still not: {what}\n{self.account()}"
            time.sleep(0.2)

    def account(self) -> str:
        """What SLURM knows of jobs and nodes, and the ends of its logs: why something did not happen."""
        texts = [
            subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
            for words in (["squeue", "--format=%i %T %r %S"], ["sinfo", "-N", "--format=%N %T %E"])
        ]
        logs = Path(os.environ["SLURM_CONF"]).parent / "log"
        for name in ("slurmctld", "slurmd"):
            texts += [f"{name}:\n", *(logs / f"{name}.log").read_text(errors="replace").splitlines(keepends=True)[-25:]]
        return "".join(texts)

    def ended(self, job: str, seconds: float = 60, tasks: int = 1) -> list[str]:
        """The states that sacct gives the finished job, a row an array task, once all are finished. It has the rows of
        at least so many `tasks`: the accounting may lack one that ended at once."""
        busy = {"PENDING", "RUNNING", "REQUEUED", "SUSPENDED"}
        self.wait(
            lambda: (
                len(states := self.sacct(job, "State")) >= tasks and not busy & set(states) and not self.queued(job)
            ),
            f"job {job} ended",
            seconds,
        )
        return self.sacct(job, "State")

    def queued(self, job: str) -> bool:
        """Is it pending, running or completing?"""
        done = subprocess.run(["squeue", "--noheader", "-j", job], capture_output=True, text=True, timeout=60)
        return bool(done.stdout.strip())  # an id that slurmctld has forgotten is an error of squeue's, and not queued


@pytest.fixture(scope="session")
def node() -> Iterator[Node]:
    """The node, idle; a node that was up before the session stays up after it."""
    node = Node()
    was_up = node.control("status").returncode == 0
    node.must("up")
    folder = node.control("env").stdout.strip().removeprefix("export SLURM_CONF=")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", folder)
        yield node
    if not was_up:
        node.must("down")


@pytest.fixture
def sweep(tmp_path, capsys):
    return Sweep(tmp_path, capsys)
