"""SLURM's own commands: queue a job array, ask what became of it, and retry while slurmctld does not answer."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path

from ...harness import caches
from ...kernels.errors import InputError

# Errors that pass by themselves: slurmctld restarts, or is too busy to answer.
PASSING = (
    "Unable to contact slurm controller",
    "Socket timed out",
    "Connection refused",
    "Resource temporarily",
    "Zero Bytes were transmitted",
)
# Limits of an association or a QOS on submitted jobs: QOSMaxSubmitJobPerUserLimit, AssocGrpSubmitJobsLimit …
FULL = re.compile(r"\b(QOS|Assoc)\w*Submit\w*Limit\b")
ANSWER_S = 120.0  # how long a command may take
DELAYS_S = (2.0, 4.0, 8.0, 16.0, 30.0)  # about two minutes, including the time that the commands themselves wait
LIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "STOPPED")
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
REACH = ("SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS")  # how commands find slurmctld


class SlurmError(RuntimeError):
    """The error message of a SLURM command, in one line."""


class Passing(SlurmError):
    """An error that may soon be over."""


class Full(SlurmError):
    """The cluster takes no more jobs of this user, or not so many at once. The message is the name of the limit."""


def call(*words: str) -> str:
    """The standard output of a command. Raises Passing if slurmctld does not answer, Full at a limit of submitted jobs,
    SlurmError for other errors."""
    try:
        done = subprocess.run(
            words, env=_environment(), capture_output=True, encoding="utf-8", errors="replace", timeout=ANSWER_S
        )
    except FileNotFoundError:
        raise SlurmError(f"{words[0]} is not installed on this machine: use a login node of the cluster") from None
    except subprocess.TimeoutExpired as error:
        # If the cluster has no room for more jobs, sbatch waits and says so.
        answer = " ".join((error.stderr or b"").decode(errors="replace").split())
        raise Passing(f"{words[0]} gave no answer within {ANSWER_S:g} s{answer and f' ({answer})'}") from None
    if done.returncode:
        answer = " ".join((done.stderr or done.stdout).split()) or f"{words[0]} exited with {done.returncode}"
        if (limit := FULL.search(answer)) is not None:
            raise Full(limit[0])
        raise (Passing if any(text in answer for text in PASSING) else SlurmError)(answer)
    return done.stdout


def _environment() -> dict[str, str]:
    """The environment of this process, without variables that change the answer of a command (SQUEUE_STATES …), and
    without the folders for compiled code that this process chose, which jobs would inherit.

    In an interactive job, the variables of that job are left out too (SLURM_MEM_PER_CPU …): a batch job would inherit
    them, and its srun would obey them.
    """
    left = ("SQUEUE_", "SCANCEL_", "SLURM_TIME_FORMAT", *(("SLURM_",) if "SLURM_JOB_ID" in os.environ else ()))
    kept = {key: value for key, value in os.environ.items() if not key.startswith(left) or key in REACH}
    for name in caches.own():
        del kept[name]
    return {**kept, "SLURM_BITSTR_LEN": "0"}  # so that sacct lists every task that did not start


def check_here() -> None:
    """Raise SlurmError if this machine has no SLURM to submit to."""
    if shutil.which("sbatch") is None:
        raise SlurmError("sbatch is not installed on this machine: use a login node of the cluster")


def patiently(*words: str) -> str:
    """`call`, repeated for about two minutes while slurmctld does not answer."""
    for delay in DELAYS_S:
        try:
            return call(*words)
        except Passing as error:
            wait(error, delay)
    return call(*words)


def wait(error: Exception, delay: float) -> None:
    print(f"{error}; trying again in {delay:g} s", file=sys.stderr, flush=True)
    time.sleep(delay)


def sbatch(script: Path, name: str, after: Sequence[str] = (), pair: str | None = None) -> str:
    """Queue an array and return its job id. `name` is unique to the array. It starts after the jobs `after` have ended.
    Each task starts after the task of its number in the array `pair` is done. If that one fails, SLURM cancels it,
    because it would wait for ever.

    A lost answer does not queue it twice, because the queue is searched for the name before another try.
    """
    first = [f"afterany:{':'.join(after)}"] if after else []
    first += [f"aftercorr:{pair}"] if pair else []
    order = [f"--dependency={','.join(first)}", *(["--kill-on-invalid-dep=yes"] if pair else [])] if first else []
    words = ["sbatch", "--parsable", *_options(script), *order, str(script)]
    for delay in DELAYS_S:
        try:
            return _job(call(*words))
        except Passing as error:
            wait(error, delay)
        if (job := find(name)) is not None:
            return job
    return _job(call(*words))


def _job(output: str) -> str:
    """The job id in the output of sbatch, `7` or `7;CLUSTER`. Some sites print lines of their own before it."""
    if (ids := re.findall(r"^(\d+)(?:;.*)?$", output, re.MULTILINE)) == []:
        raise SlurmError(f"sbatch gave no job id: {' '.join(output.split())!r}")
    return ids[-1]


def _options(script: Path) -> list[str]:
    """The options in the #SBATCH lines, for the command line: SBATCH_PARTITION and the like override the lines. As for
    sbatch, these lines end where bash begins."""
    head = takewhile(lambda line: not line or line.startswith("#"), script.read_text(encoding="utf-8").splitlines())
    lines = [line for line in head if line.startswith("#SBATCH ")]
    return [word for line in lines for word in shlex.split(line.removeprefix("#SBATCH "), comments=True)]


def find(name: str) -> str | None:
    """The job id of the array of that name that is pending or running."""
    listed = patiently("squeue", "--noheader", f"--name={name}", "--format=%A|%F").split()
    return listed[0].split("|")[1] if listed else None


def live(names: Iterable[str], ask: Callable[..., str] = patiently) -> dict[str, tuple[str, str, str]]:
    """State, reason and array name of every pending or running task of the named arrays, by `JOB_TASK`."""
    wanted = ",".join(names)
    if not wanted:
        return {}
    states = {}
    for line in ask("squeue", "--noheader", "--array", f"--name={wanted}", "--format=%i|%T|%j|%r").splitlines():
        key, state, name, reason = line.strip().split("|", 3)
        states[key] = (state, reason, name)
    return states


def accounted(jobs: Mapping[str, int], since: str) -> dict[str, list[tuple[str, str]]]:
    """Every state that sacct has of every task, oldest first, with its exit code (`CODE:SIGNAL`), by `JOB_TASK`.

    One call serves all `jobs`, {job id of an array: number of its tasks}. A requeued task has a row for each start
    (-D). `since`, in local time, leaves out earlier jobs with the same ids, because SLURM reuses ids.
    """
    if not jobs:
        return {}
    # The end is in the future, because by default sacct leaves out jobs that began within this second.
    window = (f"--starttime={since}", "--endtime=now+1days")
    options = ("--allocations", "--duplicates", "--noheader", "--parsable2", *window)
    states: dict[str, list[tuple[str, str]]] = {}
    output = call("sacct", *options, f"--jobs={','.join(jobs)}", "--format=JobID,State,ExitCode")
    rows = [line.split("|") for line in output.splitlines()]
    # The row of tasks that did not start, `7_[2-9]`, may still include some that did.
    for job, state, code in sorted(rows, key=lambda row: "[" in row[0]):
        for key in tasks_of(job, jobs.get(job, 0)):
            if "[" not in job or key not in states:
                states.setdefault(key, []).append((state.split()[0], code))
    return states


def tasks_of(job: str, count: int) -> list[str]:
    """`7_[1,3-5%2]` as `7_1`, `7_3`, `7_4`, `7_5`; `7_[0-4:2]` as `7_0`, `7_2`, `7_4`.

    If tasks end quickly, sacct lists them for some seconds as one job `7`. In an array of `count` 1 that is `7_0`; in
    a larger array it could be any task.
    """
    array, _, listed = job.partition("_")
    if not listed:
        return [f"{array}_0"] if count == 1 else []
    if not listed.startswith("["):
        return [job]
    keys = []
    for part in listed.strip("[]").split("%")[0].split(","):
        tasks, _, step = part.partition(":")
        first, _, last = tasks.partition("-")
        keys += [f"{array}_{task}" for task in range(int(first), int(last or first) + 1, int(step or 1))]
    return keys


def largest_array() -> int:
    """How many tasks an array may have (MaxArraySize). Raises InputError if the cluster takes no arrays."""
    limit = re.search(r"^MaxArraySize\s*=\s*(\d+)", patiently("scontrol", "show", "config"), re.MULTILINE)
    if limit and int(limit[1]) == 0:
        raise InputError("this cluster takes no job arrays (MaxArraySize is 0), and a study is queued as arrays")
    return int(limit[1]) if limit else 1000


def mine() -> int:
    """How many jobs of this user the cluster has, pending or running. A task of an array is a job."""
    return len(patiently("squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i").split())
