"""How every run of a study stands, from one look at the queue, one at sacct, and the run's own files."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from ...harness.progress import describe
from ...harness.record import read_lines
from ..plan import Planned
from ..worker import EXITS
from . import client
from .manifest import Array, arrays

ACTIVE = ("queued", "preempted", "running")  # states in which SLURM has the run
FAILED = ("failed", "oom", "timeout", "cancelled", "wrong")  # states that `sweep retry` does again
# The last words that slurmstepd leaves in a log, where there is no sacct to ask.
LAST_WORDS = {
    "DUE TO TIME LIMIT": "TIMEOUT",
    "oom_kill": "OUT_OF_MEMORY",
    "Out Of Memory": "OUT_OF_MEMORY",
    "DUE TO NODE FAILURE": "NODE_FAIL",
    "CANCELLED AT": "CANCELLED",
}
# What srun says after the line that says why.
SRUN_AFTER = re.compile(r"srun: (Force Terminated|error: .*: Exited with exit code)")
ENDS = {
    "TIMEOUT": ("timeout", "the time limit; sweep retry continues it, cluster.time_min=N gives it more"),
    "DEADLINE": ("timeout", "the deadline passed"),
    "OUT_OF_MEMORY": ("oom", "SLURM killed it for the host's memory; cluster.mem_gb=N gives it more"),
    "CANCELLED": ("cancelled", "cancelled; sweep retry continues it"),
    "PREEMPTED": ("failed", "preempted and not queued again; sweep retry continues it"),
    "NODE_FAIL": ("failed", "its node was lost; sweep retry continues it"),
    "BOOT_FAIL": ("failed", "its node did not boot; sweep retry continues it"),
}


@dataclass(frozen=True)
class Standing:
    """A run and how it stands. `job` is `ARRAY_TASK` of its newest submission, `requeued` how often SLURM started that
    again, `reason` why it waits."""

    run: Planned
    state: str
    error: str = ""
    job: str | None = None
    requeued: int = 0
    reason: str = ""
    log: Path | None = None
    array: Array | None = None


@dataclass(frozen=True)
class Look:
    """One look at SLURM: the tasks in the queue (None: it did not answer), the states that sacct has (None: there is no
    sacct), what to tell a person about either, and which runs the tasks in the queue are ("info" as in manifests)."""

    live: dict[str, tuple[str, str]] | None
    accounted: dict[str, list[tuple[str, str]]] | None
    notes: tuple[str, ...] = ()
    queued: dict[str, dict[str, Any]] = field(default_factory=dict)


def look(submitted: Sequence[Array], need_queue: bool = False) -> tuple[list[Array], Look]:
    """Ask squeue and sacct once each. Raises SlurmError where `need_queue` and the queue does not answer.

    Returns the arrays too, with the job ids of those whose submitter was killed before it could note them.
    """
    live, accounted, notes = None, None, []
    try:
        live = client.live((array.name for array in submitted), client.patiently if need_queue else client.call)
    except client.SlurmError as error:
        if need_queue:
            raise
        notes.append(f"squeue: {error}; what is queued or running is told by sacct, else by the runs' own files")
    jobs = {name: key.split("_")[0] for key, (_, _, name) in (live or {}).items()}
    known = [array if array.job else replace(array, job=jobs.get(array.name)) for array in submitted]
    known = [array for array in known if array.job]
    try:
        if known:
            first = datetime.fromisoformat(min(array.time for array in known)).astimezone() - timedelta(minutes=5)
            sizes = {str(array.job): len(array.tasks) for array in known}
            accounted = client.accounted(sizes, f"{first:%Y-%m-%dT%H:%M:%S}")
    except client.SlurmError as error:
        notes.append(f"sacct: {error}; how runs ended is told by their own files")
    states = None if live is None else {key: (state, reason) for key, (state, reason, _) in live.items()}
    tasks = {array.key(number): task["info"] for array in known for number, task in enumerate(array.tasks)}
    queued = {job: info for job, info in tasks.items() if job in (states or {})}
    return known, Look(states, accounted, tuple(notes), queued)


def standings(runs: Sequence[Planned], home: Path, need_queue: bool = False) -> tuple[list[Standing], Look]:
    """How every run stands. `need_queue` as in `look`."""
    submitted, seen = look(list(arrays(home)), need_queue)
    newest = {task["info"]["id"]: (array, number) for array in submitted for number, task in enumerate(array.tasks)}
    return [_standing(run, newest.get(run.info["id"]), seen) for run in runs], seen


def _standing(run: Planned, task: tuple[Array, int] | None, seen: Look) -> Standing:
    if task is None:
        state = run.state()
        return Standing(run, state, (run.error() or "") if state not in ("running", "done") else "")
    array, number = task
    key, log = array.key(number), array.log(number)
    attempts = [line for line in read_lines(run.folder / "attempts.jsonl") if line["job"] == key]
    rows = (seen.accounted or {}).get(key, [])
    # SLURM's own count, as the newest start wrote it: a start that was ended before it could write is in it.
    starts = max((line["restart"] + 1 for line in attempts if line["event"] == "start"), default=0)
    about: dict[str, Any] = {"job": key, "log": log, "array": array}
    if not run.missing():
        return Standing(run, "done", requeued=max(len(rows), starts, 1) - 1, **about)
    if (queued := _queued(key, seen, rows, attempts, log)) is not None:
        state, reason = queued
        waiting = state in client.WAITING
        # While it waits, every start so far is one that ended.
        times = max(len(rows) - 1, starts - (not waiting), 0)
        word = ("preempted" if times else "queued") if waiting else "running"
        return Standing(run, word, requeued=times, reason=reason if waiting else "", **about)
    if not replace(run, stages=tuple(array.tasks[number]["stages"])).missing():
        return Standing(run, "planned", **about)  # what was queued is done: the study has got further stages
    state, error = _ended(run, rows, attempts, log, sacct=seen.accounted is not None)
    return Standing(run, state, error, requeued=max(len(rows), starts, 1) - 1, **about)


def _queued(
    key: str, seen: Look, rows: Sequence[tuple[str, str]], attempts: Sequence[dict], log: Path
) -> tuple[str, str] | None:
    """The state of a task that SLURM still has, and the reason; None for one that has ended."""
    if seen.live is not None:
        return seen.live.get(key)  # in whatever state: SLURM has more of them than `slurm.LIVE`
    if rows:
        return (rows[-1][0], "") if rows[-1][0] in client.LIVE else None
    if any(words in _last_line(log) for words in LAST_WORDS):
        return None
    # Nobody says anything of it: as it was when it last wrote.
    states = {"start": "RUNNING", "stop": "REQUEUED", "": "PENDING"}
    state = states.get(attempts[-1]["event"] if attempts else "")
    return (state, "") if state else None


def _ended(
    run: Planned, rows: Sequence[tuple[str, str]], attempts: Sequence[dict], log: Path, sacct: bool
) -> tuple[str, str]:
    """State and error of a run that is not done and that SLURM no longer has; `sacct`: whether that answers."""
    began = max((place for place, line in enumerate(attempts) if line["event"] == "start"), default=None)
    now = attempts[began:] if began is not None else []
    # Only what this attempt wrote: older records are of attempts that were retried.
    records = run.records()[now[0]["records"] :] if now else []
    if records and records[-1]["state"] != "done":
        return records[-1]["state"], records[-1]["error"]
    last = _last_line(log)
    for line in reversed(now):
        if line.get("error"):
            return "failed", line["error"]
    state, code = rows[-1] if rows else ("", "")
    if state in client.LIVE or not state:  # sacct lags, or is not there
        state = next((found for words, found in LAST_WORDS.items() if words in last), "")
    if state in ENDS:
        return ENDS[state]
    if (number := int(code.split(":")[0] or 0) if code else 0) in EXITS:
        return "failed", EXITS[number]
    if code.endswith(":9") or number in (9, 137):  # srun's exit code is the signal that killed the task
        return "failed", "killed (signal 9), perhaps for its memory: cluster.mem_gb=N gives it more"
    stopped = next((line["signal"] for line in now if line["event"] == "stop"), None)
    if stopped:
        return "cancelled", f"saved on {stopped} and not queued again; sweep retry continues it"
    if not log.exists() and not now and (not rows or rows[-1][0] in client.WAITING):
        return "cancelled", "left the queue without a start; sweep retry queues it again"
    unknown = rows[-1][0] in client.LIVE if rows else sacct
    late = ", and sacct does not know its end yet: look again" if unknown else ""
    exit_code = f" (exit code {code})" if code else ""
    return "failed", last or f"no word of it{exit_code}: {log} is {'empty' if log.exists() else 'not there'}{late}"


def _last_line(log: Path) -> str:
    """The last line of a log that says something; SLURM's own word on the job's end where there is one."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return ""
    said = [line for line in lines if line and not SRUN_AFTER.match(line)]
    # A run says so as it starts: what is above is of the times before it was queued again.
    key = log.name.removesuffix("_0_log.out")
    start = max((place for place, line in enumerate(said) if line.startswith(f"{key} on ")), default=0)
    said = said[start:]
    ends = [line for line in said[-4:] if any(words in line for words in LAST_WORDS)]
    return (ends or said or [""])[-1][:500]


def rows(found: Sequence[Standing]) -> list[dict[str, Any]]:
    """A row a run, for a table or JSON."""
    made = []
    for standing in found:
        run, progress = standing.run, standing.run.progress()
        times = f" ×{standing.requeued}" if standing.requeued else ""
        working = (describe(progress) if progress else "starting") if standing.state == "running" else ""
        if standing.state == "running" and times:
            working = f"{working}  (preempted{times})".strip()
        made.append(
            {
                "run": run.name,
                "id": run.info["id"],
                "state": standing.state,
                "shown": f"preempted{times}" if standing.state == "preempted" else standing.state,
                "requeued": standing.requeued,
                "job": standing.job,
                "to do": " ".join(run.missing()),
                "progress": working or standing.reason.replace("None", ""),
                "error": standing.error,
                "log": str(standing.log) if standing.log else None,
                "folder": str(run.folder),
            }
        )
    return made


def strays(runs: Sequence[Planned], home: Path) -> list[Path]:
    """Folders of runs that are not in the study (any more), nor what one of its runs takes its checkpoint from."""
    kept = {run.folder.resolve() for run in runs} | {Path(s) for run in runs if (s := run.info.get("source"))}
    found = sorted(path.parent for path in home.parent.glob("*/config.json"))
    return [folder for folder in found if folder.resolve() not in kept]
