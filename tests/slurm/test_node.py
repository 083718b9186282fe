"""The node of node.py behaves as SLURM does on a cluster: what a sweep relies on, and what happens when parts fail.

The order matters for time only: the job that runs into its limit is queued first and looked at late.
"""

import operator
import os
import subprocess
import time
from pathlib import Path

import pytest
import submitit

pytestmark = pytest.mark.slurm

# A trap runs between two commands of the shell, so the shell waits in short sleeps.
PATIENT = """\
trap 'echo USR1' USR1
trap 'echo TERM' TERM
echo start ${SLURM_RESTART_COUNT:-0}
for step in $(seq 400); do sleep 0.25; done
"""
# Ends when the test makes a file; SLURM's news are seconds old, so a job that just sleeps may be over before they come.
WAITING = "echo start; until [ -e {name}.go ]; do sleep 0.1; done; echo end; exit 4"


def lines(output: Path) -> list[str]:
    return output.read_text().splitlines() if output.exists() else []


@pytest.fixture(scope="module", autouse=True)
def limited(node, tmp_path_factory):
    """A job with a limit of one minute and a signal 20 s before it, to the batch shell (`B:`)."""
    output = tmp_path_factory.mktemp("limited") / "out.txt"
    return node.submit(PATIENT, output, "--time=1", "--signal=B:USR1@20"), output


@pytest.mark.parametrize(("code", "state"), [(0, "COMPLETED"), (3, "FAILED")])
def test_a_job_ends_with_its_exit_code(node, tmp_path, code, state):
    job = node.submit(f"echo $SLURM_JOB_ID; exit {code}", tmp_path / "out.txt")
    assert node.ended(job) == [state]
    assert node.sacct(job, "ExitCode") == [f"{code}:0"] and lines(tmp_path / "out.txt") == [job]


def test_up_again_changes_nothing(node):
    before = node.control("status")
    node.must("up")
    assert before.returncode == 0 and node.control("status").stdout == before.stdout


@pytest.mark.parametrize("action", ["up", "down"])
def test_a_folder_that_is_not_its_own_is_left_alone(node, tmp_path, action):
    (tmp_path / "letter.txt").write_text("dear reader")
    done = node.control("--state", str(tmp_path), action)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["letter.txt"]


def test_an_array_keeps_to_its_limit(node, tmp_path):
    job = node.submit("date +%s.%N; sleep 1.5; date +%s.%N", tmp_path / "out.txt", "--array=0-4%2",
                      f"--output={tmp_path}/%a.txt")  # fmt: skip
    # The rows of tasks that ended soon are one row of a job for some seconds.
    node.wait(lambda: node.sacct(job, "State") == ["COMPLETED"] * 5, "sacct has every task's end")
    spans = [tuple(map(float, lines(tmp_path / f"{task}.txt"))) for task in range(5)]
    assert max(sum(start <= moment < end for start, end in spans) for moment, _ in spans) == 2


def test_scancel_signals_the_batch_shell(node, tmp_path):
    job = node.submit("trap 'echo USR1; exit 5' USR1; echo start; while :; do sleep 0.1; done", tmp_path / "out.txt")
    node.wait(lambda: lines(tmp_path / "out.txt"), "started")
    node.run("scancel", "--signal=USR1", "--batch", job)
    assert node.ended(job) == ["FAILED"]
    assert node.sacct(job, "ExitCode") == ["5:0"] and lines(tmp_path / "out.txt") == ["start", "USR1"]


def test_requeue_starts_the_job_again(node, tmp_path):
    """The first run gets SIGTERM. It stays in sacct as a duplicate (-D); without -D only the last run is shown."""
    script = 'echo start ${SLURM_RESTART_COUNT:-0}; [ -n "$SLURM_RESTART_COUNT" ] || sleep 60'
    job = node.submit(script, tmp_path / "out.txt")
    node.wait(lambda: lines(tmp_path / "out.txt"), "started")
    node.run("scontrol", "requeue", job)
    assert node.ended(job) == ["COMPLETED"]
    assert [line for line in lines(tmp_path / "out.txt") if line.startswith("start")] == ["start 0", "start 1"]
    assert node.sacct(job, "State", "-D") == ["REQUEUED", "COMPLETED"]


def test_submitit(node, tmp_path):
    executor = submitit.SlurmExecutor(tmp_path)
    executor.update_parameters(partition="test", time=2)
    job = executor.submit(os.getenv, "SLURM_JOB_ID")
    assert job.result() == job.job_id
    with executor.batch():
        jobs = [executor.submit(operator.mul, 6, factor) for factor in (7, 8)]
    assert [one.result() for one in jobs] == [42, 48]
    assert {one.job_id for one in jobs} == {f"{jobs[0].job_id.split('_')[0]}_{task}" for task in range(2)}


@pytest.mark.soak  # a minute of waiting; test_sweep.py trains a minute at a time
def test_the_time_limit(node, limited):
    """The signal may come up to a minute early, the end up to 30 s late: slurmctld looks at limits now and then.

    It ends before any test stops a daemon: SLURM sends again what a stopped slurmd missed, in any order.
    """
    job, output = limited
    assert node.ended(job, seconds=150) == ["TIMEOUT"]
    events = [line for line in lines(output) if line in ("start 0", "USR1", "TERM")]
    assert events == ["start 0", "USR1", "TERM"]
    assert 60 <= int(node.sacct(job, "ElapsedRaw")[0]) < 120


def test_jobs_outlive_slurmd(node, tmp_path):
    """A job has a process of its own beside slurmd, which keeps the end of one that slurmd missed."""
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    jobs = [node.submit(WAITING.format(name=output.stem), output) for output in (first, second)]
    node.wait(lambda: lines(first) and lines(second), "started")
    node.must("kill", "slurmd")
    assert node.control("status").returncode == 1
    (tmp_path / "first.go").touch()
    node.wait(lambda: lines(first) == ["start", "end"], "one job ended without slurmd")
    node.must("start", "slurmd")
    (tmp_path / "second.go").touch()
    for job, output in zip(jobs, (first, second), strict=True):
        assert node.ended(job) == ["FAILED"]
        assert node.sacct(job, "ExitCode") == ["4:0"] and lines(output) == ["start", "end"]
    assert node.sacct(jobs[0], "State", "-D") == ["FAILED"]  # one run, not two


def test_without_slurmctld_jobs_run_and_nothing_is_queued(node, tmp_path):
    """sbatch and squeue try for MessageTimeout and fail; sacct, which asks slurmdbd, still answers, with old news."""
    job = node.submit(WAITING.format(name="out"), tmp_path / "out.txt")
    node.wait(lambda: node.sacct(job, "State") == ["RUNNING"], "running")
    node.must("stop", "slurmctld")
    (tmp_path / "out.go").touch()
    stopped = time.monotonic()
    for command, message in (
        ("sbatch --wrap true", "sbatch: error: Batch job submission failed: "),
        ("squeue", "slurm_load_jobs error: "),
    ):
        done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True, timeout=30)
        assert done.returncode == 1 and not done.stdout
        assert done.stderr == f"{message}Unable to contact slurm controller (connect failure)\n"
    node.wait(lambda: lines(tmp_path / "out.txt") == ["start", "end"], "the job ended without slurmctld")
    time.sleep(max(0, stopped + 10 - time.monotonic()))
    assert node.sacct(job, "State") == ["RUNNING"]
    node.must("start", "slurmctld")
    assert node.ended(job) == ["FAILED"]  # the job reports its end again every 15 s
    assert node.ended(node.submit("true", tmp_path / "later.txt")) == ["COMPLETED"]


def test_a_crashed_node_queues_its_job_again(node, tmp_path):
    """A returning slurmd does not know the job; slurmctld believes so of jobs older than BatchStartTimeout + 5 s."""
    script = 'echo start ${SLURM_RESTART_COUNT:-0}; [ -n "$SLURM_RESTART_COUNT" ] || sleep 60'
    job = node.submit(script, tmp_path / "out.txt")
    node.wait(lambda: lines(tmp_path / "out.txt"), "started")
    node.must("crash")
    time.sleep(8)
    node.must("start", "slurmd")
    assert node.ended(job) == ["COMPLETED"]
    assert lines(tmp_path / "out.txt") == ["start 0", "start 1"]
    assert node.sacct(job, "State", "-D") == ["NODE_FAIL", "COMPLETED"]
