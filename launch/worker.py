"""What every executor of submitit starts: `work(MANIFEST, ARRAY)`, in a SLURM task, a local job or the same process.

A job on SLURM may have several processes, one for each GPU. The first one does all that is described here, and the
others help it to train and to sample (harness/parallel.py).

The worker listens for the scheduler's signals before it imports anything slow. The run writes one line to
`attempts.jsonl` in its folder when it starts, and one when it ends or stops. If it cannot write even that, its exit
code tells why (`EXITS`). Only `prepare`, `do` and `unfinished` know what a task is.
"""

import errno
import json
import os
import platform
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..harness import parallel, signals
from ..kernels.errors import InputError

if TYPE_CHECKING:
    from ..harness.progress import Progress

BUSY_S = 120.0  # how long a run waits until the process of a lost node releases its folder
DELAYS_S = (2.0, 5.0, 10.0, 20.0, 30.0)
_FULL = "the disk of its folder is full, or a quota is; sweep retry continues it once there is room"
# Exit codes of jobs that must not write into the folder of their run. No errno is 41 or 58; SLURM cuts codes above 127.
OTHER_CODE, SETUP_FAILED = 41, 58
OTHER_CODE_LINE, SETUP_LINE = "not the code that was submitted", "cluster.setup failed with exit code"
EXITS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.ESTALE: "its node did not see the folder of the submission: is the file system mounted there?",
    OTHER_CODE: f"{OTHER_CODE_LINE}: its snapshot is gone or changed; sweep retry queues it with the code of now",
    SETUP_FAILED: f"{SETUP_LINE} that is not 0; its log names the line",
}


def prepare(task: dict[str, Any]) -> Path:
    """The folder of a task, created if it does not exist; attempts.jsonl lies in it. Plug-ins, which register families
    or mixers of their own, are imported first."""
    from ..harness import stages
    from ..harness.tasks import Task

    if task.get("plugins"):
        from ..models import plugins

        plugins.load(task["plugins"])
    return stages.prepare(Task.from_dict(task["task"]))


def do(task: dict[str, Any], progress: "Progress") -> None:
    """Do what is missing of a task. Raises Busy if another process works on it, Stopped if a signal came."""
    from ..harness import stages
    from ..harness.tasks import Task

    wanted = Task.from_dict(task["task"])
    if (text := stages.start_problem(wanted)) is not None:
        raise InputError(f"not started: {text}; sweep retry queues both again")
    stages.execute(wanted, progress)


def unfinished(task: dict[str, Any]) -> bool:
    """Whether something of a task is left to do."""
    from ..harness import stages
    from ..harness.tasks import Task

    return bool(stages.missing(Task.from_dict(task["task"])))


def environment() -> dict[str, str]:
    """Export what torch.distributed reads: MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE."""
    from submitit.helpers import TorchDistributedEnvironment

    # SLURM decides which GPUs a task sees.
    variables = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    names = ("master_addr", "master_port", "rank", "world_size", "local_rank", "local_world_size")
    return {name: str(getattr(variables, name)) for name in names}


def executor() -> str:
    """The executor that started this process: `slurm`, `local` or `debug`."""
    from submitit import JobEnvironment

    return JobEnvironment().cluster


def job_key() -> str:
    """The id of this job from submitit: `ARRAY_TASK` on SLURM, as sacct writes it, and a number locally."""
    from submitit import JobEnvironment

    return JobEnvironment().job_id


def task_number() -> int:
    """The index of this job's task in its array. Only SLURM has arrays of more than one task."""
    return int(os.environ["SLURM_ARRAY_TASK_ID"]) if executor() == "slurm" else 0


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest. If its shared folder is unreachable, waits for it for about a minute. Raises OSError."""
    for delay in (*DELAYS_S, None):
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            if delay is None:
                raise
            say(f"{platform.node()} cannot read {path}: {error}; trying again in {delay:g} s")
            time.sleep(delay)
    raise AssertionError


def say(text: str) -> None:
    """Write into the log if possible: the log may lie on a full disk too, and then srun reads no more."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """An error as a line in attempts.jsonl. An InputError needs no name of its type."""
    text = " ".join(str(error).split())
    return (text if isinstance(error, InputError) else f"{type(error).__name__}: {text}")[:500]


def read_attempts(folder: Path, job: str) -> list[dict[str, Any]]:
    """The lines of a job in attempts.jsonl of a run, oldest first. Raises InputError, one line, for a damaged file."""
    from ..harness.disk import read_lines

    return [line for line in read_lines(folder / "attempts.jsonl") if line["job"] == job]


class Attempt:
    """This start of a run: its lines in attempts.jsonl."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "attempts.jsonl"
        self.ending = threading.Lock()  # never released: the second thread waits for the end of the process

    def note(self, event: str, **fields: Any) -> None:
        from ..harness.disk import append

        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        append(self.path, {"event": event, "job": job_key(), "time": now, **fields})

    def mark(self) -> list[Any]:
        """How far the run is on disk. Two equal marks mean that nothing was saved between them."""
        newest = sorted(path.name for path in self.folder.glob("checkpoints/step-*"))[-1:]
        record = self.folder / "record.jsonl"
        records = record.read_bytes().count(b"\n") if record.is_file() else 0
        return [records, newest, len(list(self.folder.glob("shards/*/[0-9]*.npy")))]

    def stuck(self) -> bool:
        """Whether the time limit stopped the last two starts with exactly this mark. If attempts.jsonl is damaged, that
        is unknown, and the answer is no."""
        try:
            stops = [line for line in read_attempts(self.folder, job_key()) if line["event"] == "stop"]
        except InputError as error:
            say(str(error))
            return False
        here = [line.get("signal") == "SIGUSR2" and line.get("mark") == self.mark() for line in stops[-2:]]
        return len(here) == 2 and all(here)


def requeue() -> None:
    """Have SLURM start this task again, and retry while slurmctld does not answer. Raises SlurmError."""
    from .slurm.client import patiently

    patiently("scontrol", "requeue", os.environ["SLURM_JOB_ID"])


def ours(notice: bool) -> bool:
    """Whether this task must queue itself again. It must after the notice before the time limit, and if SLURM preempts
    it and still waits for its end (a partition's GraceTime).

    SLURM requeues a job that it had to kill, but not one that ended by itself. A cancelled job must not be queued
    again. Raises SlurmError.
    """
    from .slurm.client import patiently

    job = patiently("scontrol", "show", "job", "--oneliner", os.environ["SLURM_JOB_ID"])
    if "JobState=RUNNING" not in job:
        return notice and "Reason=TimeLimit" in job
    return notice or re.search(r"\bPreemptTime=\d", job) is not None


def work(manifest: str, index: int) -> None:
    """Do what is missing of array `index` of a manifest: of the task that SLURM's environment tells, elsewhere of all.
    Returns if that is done. Otherwise raises SystemExit, because submitit would store another exception as the
    result. The code is 0 if the job is queued again and will continue, 1 if it was stopped, or a key of `EXITS`."""
    path = Path(manifest)
    with _listening():
        say(f"{job_key()} on {platform.node()}: " + " ".join(f"{key}={value}" for key, value in environment().items()))
        parallel.quiet()
        start = f"{job_key()}.{os.environ.get('SLURM_RESTART_COUNT', 0)}"
        try:
            code = _other_process(path, index) if parallel.rank() else None
            if code is None:
                code = parallel.everywhere(lambda: _guarded(path, index), path.with_name(f"{start}.port"))
        except signals.Stopped:  # before all processes of the run were there
            code = 0 if parallel.rank() else _guarded(path, index, met=False)
        except parallel.Lost as error:
            say(str(error))
            code = 1
    if code is not None:
        raise SystemExit(code)


def _other_process(path: Path, index: int) -> int | None:
    """What keeps a process other than the first from helping it, as a key of `EXITS`; None if nothing does."""
    from .slurm.snapshot import other_code

    try:
        array = (manifest := read_manifest(path))["arrays"][index]
    except OSError as error:
        say(str(error))
        return errno.ESTALE
    if (text := other_code(manifest.get("code", {}), array["tasks"][task_number()].get("plugins", ()))) is not None:
        say(f"{OTHER_CODE_LINE}: {text}")
        return OTHER_CODE
    check_gpus(array["cluster"]["gpus"])
    return None


@contextmanager
def _listening() -> Iterator[None]:
    """Listen for the scheduler's signals instead of submitit, and ignore them afterwards, while the process ends. With
    the executor `debug`, which works in the caller's process, restore the caller's handlers afterwards."""
    here, before = executor(), {n: signal.getsignal(n) for n in (*signals.SIGNALS, signal.SIGCONT)}
    signals.listen()
    signal.signal(signal.SIGCONT, signal.SIG_DFL)  # submitit's handler writes to the log in the middle of a write
    try:
        yield
    finally:
        signals.ignore()
        if here == "debug":
            for number, handler in before.items():
                signal.signal(number, handler)


def _guarded(path: Path, index: int, met: bool = True) -> int | None:
    """The exit code of `_attempts`, or a key of `EXITS` if one describes the error that stopped it."""
    try:
        manifest = read_manifest(path)
    except OSError as error:
        say(str(error))
        return errno.ESTALE
    try:
        return _attempts(path, index, manifest, met)
    except Exception as error:
        number = next((one.errno for one in _causes(error) if isinstance(one, OSError) and one.errno in EXITS), None)
        if number is None and not path.exists():  # the folder is gone, whatever the error is
            number = errno.ESTALE
        if number is None:
            raise
        say(traceback.format_exc())
        return number


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, the error that it was raised from or while handling, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _attempts(path: Path, index: int, manifest: dict[str, Any], met: bool) -> int | None:
    """Do a task of an array on SLURM, elsewhere all of them in turn, also after one that failed. Returns the exit code,
    None if all are done; raises what the last one raises."""
    array = manifest["arrays"][index]
    job = path.parent / f"array-{index}.job"
    if executor() == "slurm" and not job.exists():  # the submit was killed before it could write the id
        job.write_text(os.environ["SLURM_ARRAY_JOB_ID"] + "\n", encoding="utf-8")
    tasks, failed = [array["tasks"][task_number()]] if executor() == "slurm" else array["tasks"], None
    for number, task in enumerate(tasks, 1):
        try:
            if (code := _attempt(task, array["cluster"], manifest, met)) is not None:
                return code
        except Exception:
            if number == len(tasks):
                raise
            say(traceback.format_exc())
            failed = 1
    return failed


def _attempt(task: dict[str, Any], cluster: dict[str, Any], manifest: dict[str, Any], met: bool) -> int | None:
    """Do a task. If a signal came before its processes `met`, only queue it again where it must (`_stopped`)."""
    from .slurm.snapshot import other_code

    if (text := other_code(manifest.get("code", {}), task.get("plugins", ()))) is not None:
        say(f"{OTHER_CODE_LINE}: {text}")
        return OTHER_CODE
    from ..harness.disk import read_lines
    from ..harness.provenance import code

    folder = prepare(task)
    attempt = Attempt(folder)
    records = len(read_lines(folder / "record.jsonl"))
    restart = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    (folder / "progress.json").unlink(missing_ok=True)  # so that a file that appears later is from this start
    attempt.note("start", restart=restart, host=platform.node(), records=records, **code())
    ended = threading.Event()
    watch = threading.Thread(target=_let_go, args=(attempt, cluster["signal_s"] / 2, ended), daemon=True)
    watch.start()
    try:
        check_gpus(cluster["gpus"])
        if not met:
            signals.check()
        _patiently(task, folder)
    except signals.Stopped as stopped:
        if unfinished(task):
            say(str(stopped))
            return _stopped(attempt)
    except BaseException as error:
        attempt.note("end", error=one_line(error))
        raise
    finally:
        ended.set()
    attempt.note("end", error=None)
    return None


def check_gpus(count: int) -> None:
    """Raise RuntimeError if the job was given GPUs and torch sees none, because it would silently use the CPU."""
    import torch

    if count and not torch.cuda.is_available():
        names = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        gpus = f"{count} GPU{'s' if count > 1 else ''}"
        raise RuntimeError(f"the job was given {gpus}, and torch sees none (CUDA_VISIBLE_DEVICES: {names})")


def _patiently(task: dict[str, Any], folder: Path) -> None:
    """Do a task. If the process of a lost node holds its folder, wait until it is released."""
    from ..harness.progress import Progress
    from ..harness.run import Busy

    end = time.monotonic() + BUSY_S
    while True:
        try:
            return do(task, Progress(folder))
        except Busy as error:
            if time.monotonic() > end:
                raise
            say(f"{error}; waiting")
            time.sleep(5)
            signals.check()


def _stopped(attempt: Attempt) -> int:
    """After a stop, queue the run again if this task must do that itself (`ours`). Returns the exit code.

    It must after the notice before the time limit, unless the run makes no progress that way, and after SIGTERM if it
    makes room for another job. Otherwise SLURM decides: a requeued job starts again, and a cancelled one does not,
    even if it was cancelled after the notice. Other executors have no queue.
    """
    from .slurm.client import SlurmError

    attempt.ending.acquire()
    number = signals.asked()
    assert number is not None
    stuck = number.name == "SIGUSR2" and attempt.stuck()
    attempt.note("stop", signal=number.name, mark=attempt.mark())
    if stuck:
        error = "nothing new was saved between three time limits: give it more with cluster.time_min=N"
        attempt.note("end", error=error)
        say(error)
        return 1
    if executor() != "slurm":
        return 1
    try:
        if not ours(notice=number.name == "SIGUSR2"):
            return 1
        requeue()
    except SlurmError as error:
        attempt.note("end", error=f"saved, but not queued again: {error}; sweep retry continues it")
        say(str(error))
        return 1
    return 0


def _let_go(attempt: Attempt, grace_s: float, ended: threading.Event) -> None:
    """Queue the run again if its work, such as a long evaluation, does not stop by itself within `grace_s` seconds."""
    while signals.asked() is None:
        if ended.wait(1):
            return
    if not ended.wait(grace_s) and not attempt.ending.locked():
        say("the work cannot stop half way; it will start again")
        code = _stopped(attempt)
        parallel.end(code)
        os._exit(code)
