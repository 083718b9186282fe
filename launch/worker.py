"""What a task of a job array runs: `python -m lamabench.launch.worker MANIFEST ARRAY`, below srun.

The signals of the scheduler are noted before anything slow is imported. The run leaves one line in `attempts.jsonl` of
its folder as it starts, and one as it ends or stops. Where it cannot write even that, its exit code tells (`EXITS`).
"""

import errno
import json
import os
import platform
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..harness import signals

BUSY_S = 120.0  # how long a run waits for the process of a lost node to let it go
DELAYS_S = (2.0, 5.0, 10.0, 20.0, 30.0)
_FULL = "the disk of its folder is full, or a quota is; sweep retry continues it once there is room"
EXITS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.ESTALE: "its node did not see the folder of the submission: is the file system mounted there?",
}


def environment() -> dict[str, str]:
    """Export what torch.distributed reads: MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE."""
    from submitit.helpers import TorchDistributedEnvironment

    # Which GPUs a task sees is SLURM's to say.
    made = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    names = ("master_addr", "master_port", "rank", "world_size", "local_rank", "local_world_size")
    return {name: str(getattr(made, name)) for name in names}


def job_key() -> str:
    """`ARRAY_TASK` of this job, as sacct calls it."""
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest; a shared folder that is away is waited for, for about a minute. Raises OSError."""
    for delay in (*DELAYS_S, None):
        try:
            return json.loads(path.read_text())
        except OSError as error:
            if delay is None:
                raise
            say(f"{platform.node()} cannot read {path}: {error}; trying again in {delay:g} s")
            time.sleep(delay)
    raise AssertionError


def say(text: str) -> None:
    """Into the log, where that can be written: a full disk may hold it too, and then srun reads no more."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


_ending = threading.Lock()


class Attempt:
    """This start of a run: its lines in attempts.jsonl."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "attempts.jsonl"

    def note(self, event: str, **fields: Any) -> None:
        from ..harness.record import append

        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        append(self.path, {"event": event, "job": job_key(), "time": now, **fields})

    def mark(self) -> list[Any]:
        """How far the run is on disk: two marks that are alike have nothing between them."""
        newest = sorted(path.name for path in self.folder.glob("checkpoints/step-*"))[-1:]
        record = self.folder / "record.jsonl"
        records = record.read_bytes().count(b"\n") if record.is_file() else 0
        return [records, newest, len(list(self.folder.glob("samples.parts/*/*.npy")))]

    def stuck(self) -> bool:
        """Whether the last two starts were stopped by the time limit exactly here."""
        from ..harness.record import read_lines

        stops = [line for line in read_lines(self.path) if line["event"] == "stop" and line["job"] == job_key()]
        here = [line["signal"] == "SIGUSR2" and line["mark"] == self.mark() for line in stops[-2:]]
        return len(here) == 2 and all(here)


def requeue() -> None:
    """Have SLURM start this task again; while slurmctld is away, again and again. Raises SlurmError."""
    from .slurm.client import patiently

    patiently("scontrol", "requeue", os.environ["SLURM_JOB_ID"])


def ours(notice: bool) -> bool:
    """Whether it is this task that has to queue itself again: on the notice before the time limit, and where SLURM
    takes its place for another job and still waits for its end (a partition's GraceTime).

    SLURM queues again what it had to kill, not what ended by itself. What was cancelled would come back, and must not.
    Raises SlurmError.
    """
    from .slurm.client import patiently

    said = patiently("scontrol", "show", "job", "--oneliner", os.environ["SLURM_JOB_ID"])
    if "JobState=RUNNING" not in said:
        return notice and "Reason=TimeLimit" in said
    return notice or re.search(r"\bPreemptTime=\d", said) is not None


def main(arguments: list[str]) -> int:
    """Do what is missing of one run; the exit code: 0 done or queued again, a key of `EXITS`, 1 otherwise."""
    signals.listen()
    path, index = Path(arguments[0]), int(arguments[1])
    try:
        manifest = read_manifest(path)
    except OSError as error:
        say(str(error))
        return errno.ESTALE
    try:
        return _attempt(path, index, manifest["arrays"][index])
    except Exception as error:
        number = next((one.errno for one in _causes(error) if isinstance(one, OSError) and one.errno in EXITS), None)
        if number is None and not path.exists():  # whatever could not be written, read or imported then
            number = errno.ESTALE
        if number is None:
            raise
        say(traceback.format_exc())
        return number


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from or while handling, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _attempt(path: Path, index: int, array: dict[str, Any]) -> int:
    task = array["tasks"][int(os.environ["SLURM_ARRAY_TASK_ID"])]
    job = path.parent / f"array-{index}.job"
    if not job.exists():  # whoever submitted was killed before it could note the id
        job.write_text(os.environ["SLURM_ARRAY_JOB_ID"] + "\n")
    say(f"{job_key()} on {platform.node()}: " + " ".join(f"{key}={value}" for key, value in environment().items()))

    from ..harness.provenance import code
    from ..harness.record import read_lines, read_run
    from ..harness.run import create, missing_stages

    info = task["info"]
    folder = create(info)
    attempt = Attempt(folder)
    records = len(read_lines(folder / "record.jsonl"))
    restart = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    (folder / "progress.json").unlink(missing_ok=True)  # what is there after the note is this start's
    attempt.note("start", restart=restart, host=platform.node(), records=records, **code())
    threading.Thread(target=_let_go, args=(attempt, array["cluster"]["signal_s"] / 2), daemon=True).start()
    try:
        _work(folder, info, task["stages"])
    except signals.Stopped as stopped:
        if missing_stages(read_run(folder), task["stages"]):
            say(str(stopped))
            return _stopped(attempt)
    except BaseException as error:
        attempt.note("end", error=f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])
        raise
    attempt.note("end", error=None)
    return 0


def _work(folder: Path, info: dict[str, Any], stages: list[str]) -> None:
    from ..harness.progress import Progress
    from ..harness.run import Busy, execute, is_ready

    if not is_ready(info, stages):
        raise RuntimeError(f"not started: the training of {info['source']} did not end")
    end = time.monotonic() + BUSY_S
    while True:
        try:
            return execute(folder, stages, Progress(folder))
        except Busy as error:
            if time.monotonic() > end:
                raise
            say(f"{error}; waiting")
            time.sleep(5)
            signals.check()


def _stopped(attempt: Attempt) -> int:
    """After a stop: on the notice before the time limit, queue the run again, unless it gets no further that way.

    After SIGTERM too where it makes room for another job. Else that is SLURM's to decide: it queues again what it
    requeued, and not what was cancelled, be it after the notice.
    """
    from .slurm.client import SlurmError

    _ending.acquire()  # never released: whoever comes second waits for the end of the process
    number = signals.asked()
    assert number is not None
    stuck = number.name == "SIGUSR2" and attempt.stuck()
    attempt.note("stop", signal=number.name, mark=attempt.mark())
    if stuck:
        error = "nothing new was saved between three time limits: give it more with cluster.time_min=N"
        attempt.note("end", error=error)
        say(error)
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


def _let_go(attempt: Attempt, grace_s: float) -> None:
    """Queue the run again where its work does not stop by itself within `grace_s` seconds, as a long evaluation."""
    while signals.asked() is None:
        time.sleep(1)
    time.sleep(grace_s)
    if not _ending.locked():
        say("what is being done cannot stop half way; it will start anew")
        os._exit(_stopped(attempt))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    finally:
        signals.ignore()
