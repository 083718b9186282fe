"""`sweep run`: do what is missing of a study as jobs on this machine, each with a GPU or its share of the cores."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any

import submitit
import torch
from submitit.local.local import LocalJob, start_controller

from ..harness import caches
from ..harness.device import pick_device
from ..harness.disk import write_atomically
from ..harness.progress import clock, describe
from ..harness.run import is_locked
from ..harness.stages import problem
from ..kernels.errors import InputError
from .plan import Piece
from .slurm.cluster import ClusterConfig
from .slurm.jobs import entry
from .worker import prepare, read_attempts, work

DAYS_MIN = 60 * 24 * 30  # submitit ends a job after this many minutes
SIGNAL_S = 20  # a job that cannot stop half way is ended after half of this time
END_S = 30.0  # how long to wait for jobs that were told to end
# A job with a GPU leaves the other cores to what else runs on the machine, such as a command with another of its GPUs:
# four jobs of four commands, each with as many threads as the 32 cores, took minutes for a score that takes seconds.
THREADS_BESIDE_A_GPU = 8


class LocalExecutor(submitit.LocalExecutor):
    """submitit's executor, except for the GPUs that a job sees: submitit takes only numbers, no UUIDs, and hides every
    GPU from a job that asks for none. `visible` is the job's CUDA_VISIBLE_DEVICES."""

    def __init__(self, folder: Path, visible: str) -> None:
        super().__init__(folder)
        self.visible = visible

    def _submit_command(self, command: str) -> LocalJob[Any]:
        process = start_controller(
            self.folder, command, cuda_devices=self.visible, timeout_min=DAYS_MIN, stderr_to_stdout=True
        )
        return LocalJob(self.folder, str(process.pid), process=process)


def names(visible: str | None, count: int) -> list[str]:
    """The GPUs to share out, as CUDA_VISIBLE_DEVICES names them. `visible` is that variable of this process, `count` is
    how many GPUs torch sees. CUDA reads the variable up to the first name that it does not know."""
    if visible is None:
        return [str(number) for number in range(count)]
    listed = [name.strip() for name in visible.split(",")]
    if count and listed[0].startswith("MIG-"):  # a process sees only one of these, however many there are
        return [name for name in listed if name.startswith("MIG-")]
    return listed[:count]


def gpus() -> list[str]:
    """The GPUs of this machine that this process may share out."""
    return names(os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count())


def device_of(run: Piece) -> str:
    """The device that a run asks for: `auto`, `cpu`, `cuda`, `cuda:1` …"""
    return run.task.config["run"]["device"]


def visible_to(device: str, available: Sequence[str], busy: Iterable[str]) -> str:
    """CUDA_VISIBLE_DEVICES of a job on `device`: the GPU that the fewest running jobs have. `busy` holds the variables
    of those jobs. `cuda:1` names the GPU that it takes, so that it sees all of them."""
    if device.startswith("cuda:"):
        return ",".join(available)
    if not available or device not in ("auto", "cuda"):
        return ""
    taken = list(busy)
    return min(available, key=taken.count)


def check_devices(runs: Iterable[Piece], available: Sequence[str]) -> None:
    """Raise InputError for a run that asks for a GPU that does not exist."""
    for run in runs:
        device, _, number = device_of(run).partition(":")
        if device == "cuda" and (not available or (number.isdigit() and int(number) >= len(available))):
            seen = f"GPUs 0 to {len(available) - 1}" if available else "none"
            raise InputError(
                f"{run.name}: run.device={device_of(run)} asks for a GPU, and torch sees {seen} on this machine "
                "(lamabench doctor says more); choices: auto, cpu"
            )
        if device != "cuda":
            pick_device(device_of(run))


def parallelism(runs: Sequence[Piece], available: Sequence[str]) -> int:
    """The number of runs at a time: one per GPU, or one per core if there is no GPU or no run wants one."""
    wanted = any(device_of(run) != "cpu" for run in runs)
    places = len(available) if available and wanted else len(os.sched_getaffinity(0))
    return max(1, min(len(runs), places))


@contextmanager
def _job_environment(threads: int) -> Iterator[None]:
    """What a job inherits: no imports from the folder where it starts, its share of the cores, no folder for compiled
    code that this process chose, and blocked SIGINT and SIGHUP. The terminal sends these to every process, but
    `run_local` itself tells its jobs to end."""
    wanted: dict[str, str | None] = dict.fromkeys(caches.own())
    wanted |= {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    before = {name: os.environ.get(name) for name in wanted}
    _set(wanted)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    """Set variables of the environment, and remove those whose value is None."""
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextmanager
def _noting() -> Iterator[list[int]]:
    """Collect Ctrl-C, SIGTERM and SIGHUP (the terminal was closed) in a list, so that they do not end this process in
    the middle of anything. What is ignored (nohup) stays ignored."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: came.append(number))
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Job:
    """Runs that are being done one after the other, by a job of this process, or one that another process does and that
    is watched, if `job` is None. `first` is the run that the job begins with."""

    def __init__(self, runs: Sequence[Piece], job: submitit.Job[None] | None = None, visible: str = "") -> None:
        self.runs, self.job, self.visible = list(runs), job, visible
        self.first = self.runs[0]

    def ended(self) -> bool:
        return (self.job is None or self.job.done()) and not any(is_locked(run.folder) for run in self.runs)

    def at_work(self) -> Piece:
        """The run that it works on now: the last one that has begun."""
        return next((run for run in reversed(self.runs) if is_locked(run.folder) or run.progress()), self.runs[0])

    def attempts(self, run: Piece) -> list[dict[str, Any]]:
        """What the job noted of a run (worker.py); its error is that of a file that is damaged."""
        try:
            return read_attempts(run.folder, self.job.job_id) if self.job is not None else []
        except InputError as damage:
            return [{"error": str(damage)}]


def run_local(runs: Sequence[Piece], parallel: int | None = None, every: float = 10.0) -> bool:
    """Do what is missing of every task (called a run here), as processes of submitit's local executor, `parallel` at a
    time (None: as `parallelism` says). Sets of samples of one training share the processes that are free, so that a
    process starts and compiles once for several sets.

    A run that another process works on is watched, and taken over if that process dies. Samples wait for the training
    whose weights they take. The progress of each run is printed every `every` seconds. On Ctrl-C, SIGTERM and SIGHUP
    the jobs save and end first, then KeyboardInterrupt is raised with the number of the signal; the same call continues
    the runs. Returns whether all runs are done. Raises InputError, before anything is written, if a run asks for a GPU
    that does not exist.
    """
    available = gpus()
    waiting = [run for run in runs if run.missing()]
    check_devices(waiting, available)
    parallel = parallel or parallelism(runs, available)
    threads = max(1, len(os.sched_getaffinity(0)) // parallel)
    jobs: list[_Job] = []
    started, last = time.monotonic(), time.monotonic()

    def say(text: str) -> None:
        with suppress(OSError):  # a terminal that was closed must not end the waiting for jobs
            print(f"[{clock(time.monotonic() - started)}] {text}", file=sys.stderr, flush=True)

    for run in runs:
        if run not in waiting:
            say(f"{run.name}: already done")
    with _noting() as came:
        while (waiting or jobs) and not came:
            while (free := parallel - len(jobs)) > 0 and not came and (some := together(waiting, free)):
                waiting = [run for run in waiting if run not in some]
                visible = visible_to(device_of(some[0]), available, (job.visible for job in jobs))
                jobs.append(_start(some, min(threads, THREADS_BESIDE_A_GPU) if visible else threads, visible, say))
            if not jobs:
                for run in waiting:
                    reason = problem(run.task) or f"{run.task.training} has no weights of step {run.task.step}"
                    say(f"{run.name}: not started, {reason}")
                break
            time.sleep(0.5)
            for one in jobs:
                while len(one.runs) > 1 and not one.runs[0].missing():
                    _finish(one, one.runs.pop(0), say)
            for one in [one for one in jobs if one.ended()]:
                jobs.remove(one)
                for run in one.runs:
                    if one.job is None and run.missing() and run.error() is None:
                        say(f"{run.name}: whoever worked on it is gone")
                        waiting.insert(0, run)
                    elif run is not one.first and run.missing() and not one.attempts(run):
                        waiting.insert(0, run)  # the job ended before it came to it
                    else:
                        _finish(one, run, say)
            if time.monotonic() - last >= every:
                last = time.monotonic()
                for run in [one.at_work() for one in jobs]:
                    progress = run.progress()
                    say(f"{run.name}: {describe(progress) if progress else 'starting'}")
        if came:
            _end([one for one in jobs if one.job is not None], came, say)
    if came:
        raise KeyboardInterrupt(came[0])
    return not any(run.missing() for run in runs)


def together(waiting: Sequence[Piece], free: int) -> list[Piece]:
    """What the next of so many `free` processes does: the first run that is ready and, of samples, its share of the
    other sets of that training that are ready, all in one process or one in each. Empty if no run is ready."""
    first = next((run for run in waiting if run.ready()), None)
    if first is None or is_locked(first.folder) or first.task.kind != "samples":
        return [] if first is None else [first]
    alike = [run for run in waiting if _place(run) == _place(first) and run.ready() and not is_locked(run.folder)]
    return alike[: ceil(len(alike) / free)]


def _place(run: Piece) -> tuple[Any, ...]:
    """What runs of one process have in common."""
    return run.task.kind, run.task.training, run.task.stages, device_of(run), run.plugins


def _start(runs: Sequence[Piece], threads: int, visible: str, say: Callable[[str], None]) -> _Job:
    run = runs[0]
    if is_locked(run.folder):
        say(f"{run.name}: already running, watching it")
        return _Job([run])
    tasks = [entry(one) for one in runs]
    for one, task in zip(runs, tasks, strict=True):
        prepare(task)
        (one.folder / "progress.json").unlink(missing_ok=True)
    logs = run.folder / "logs"
    logs.mkdir(exist_ok=True)
    cluster = ClusterConfig(kind="local", gpus=1 if visible else 0, signal_s=SIGNAL_S)
    manifest = logs / "manifest.json"
    write_atomically(manifest, json.dumps({"arrays": [{"cluster": asdict(cluster), "tasks": tasks}]}).encode())
    with _job_environment(threads):
        job = LocalExecutor(logs, visible).submit(work, str(manifest), 0)
    where = f" on GPU {visible}" if visible else ""
    for one in runs:
        missing = one.missing()
        left = f", {', '.join(missing)} to do" if missing != list(one.task.stages) else ""
        begun = f"started{where}" if one is run else f"follows {run.name}"
        say(f"{one.name}: {begun}{left}, log {job.paths.stdout}")
    return _Job(runs, job, visible)


def _finish(one: _Job, run: Piece, say: Callable[[str], None]) -> None:
    if not run.missing():
        say(f"{run.name}: done")
        return
    error, state = run.error(), run.state()
    if error is None and one.job is not None:
        error = next((line["error"] for line in one.attempts(run) if line.get("error")), None)
        state = "failed" if error else state
        error = error or f"the job ended without a record; its log: {one.job.paths.stdout}"
    say(f"{run.name}: {state}: {error or 'stopped'}")


def _end(jobs: Sequence[_Job], came: Sequence[int], say: Callable[[str], None]) -> None:
    """Tell jobs to save and end, and wait until they do. A second signal ends the waiting."""
    left, end, asked = [one for one in jobs if not one.ended()], time.monotonic() + END_S, len(came)
    if left:
        say(f"{', '.join(one.at_work().name for one in left)}: saving, then ending")
    while left and len(came) == asked and time.monotonic() < end:
        for one in left:
            assert one.job is not None
            if not one.job.done():  # repeated, because a job passes no signal on before its task starts
                os.kill(int(one.job.job_id), signal.SIGTERM)
        time.sleep(1)
        left = [one for one in left if not one.ended()]
    for one in left:
        say(f"{one.at_work().name}: still at work, it ends by itself")
