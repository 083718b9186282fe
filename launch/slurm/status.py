"""The state of every run of a study, from one call of squeue, one of sacct, and the files in its tasks' folders."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from ...harness.parallel import GONE
from ...harness.progress import describe
from ...harness.record import read_records
from ...harness.run import is_locked
from ...harness.stages import missing
from ...harness.tasks import Task, merged
from ...kernels.errors import InputError
from .. import plan
from ..plan import Planned, failure
from ..worker import EXITS, OTHER_CODE_LINE, SETUP_LINE, read_attempts
from . import client
from .manifest import Array, arrays

ACTIVE = ("queued", "preempted", "running")  # states in which SLURM has the run
FAILED = ("failed", "oom", "timeout", "cancelled", "wrong")  # states that `sweep retry` queues again
# What slurmstepd writes last into a log. It tells the end of a job if sacct does not.
LAST_WORDS = {
    "DUE TO TIME LIMIT": "TIMEOUT",
    "oom_kill": "OUT_OF_MEMORY",
    "Out Of Memory": "OUT_OF_MEMORY",
    "DUE TO NODE FAILURE": "NODE_FAIL",
    "CANCELLED AT": "CANCELLED",
}
# What srun writes of a process that ended badly: its number, or those of several, and how.
ENDED = re.compile(r"srun: error: .*: tasks? (\d+).*?: (.+)")
KILLED = "killed (signal 9), perhaps for its memory: cluster.mem_gb=N gives it more"
SRUN_AFTER = re.compile(r"srun: (Force Terminated|error: .*: Exited with exit code)")  # lines after the reason
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
    """A task and its state. `missing` are the stages to do. `job` is `ARRAY_TASK` of its newest submission, from any
    study. `requeued` is how often SLURM restarted that job, `reason` is why it waits."""

    task: Task
    state: str
    error: str = ""
    missing: tuple[str, ...] = ()
    job: str | None = None
    requeued: int = 0
    reason: str = ""
    log: Path | None = None
    array: Array | None = None
    asked: Task | None = None  # what that submission asked for, or all of those that SLURM still has


@dataclass(frozen=True)
class RunStanding:
    """A run and the states of its tasks. `main` is the task whose state is the state of the run."""

    run: Planned
    parts: tuple[Standing, ...]

    @property
    def main(self) -> Standing:
        return self.parts[plan.first([one.state for one in self.parts])]

    @property
    def state(self) -> str:
        return self.main.state

    @property
    def missing(self) -> list[str]:
        return plan.to_do(self.parts)


@dataclass(frozen=True)
class Look:
    """One look at SLURM. `live` are the tasks in the queue (None: squeue did not answer), `accounted` the states that
    sacct has (None: it did not answer). `notes` tell a person about either. `queued` are the tasks in the queue by job,
    as their manifests hold them."""

    live: dict[str, tuple[str, str]] | None
    accounted: dict[str, list[tuple[str, str]]] | None
    notes: tuple[str, ...] = ()
    queued: dict[str, dict[str, Any]] = field(default_factory=dict)


def submitted(
    root: Path, keys: Iterable[tuple[str, str]] | None = None, own: Path | None = None
) -> tuple[list[Array], list[str]]:
    """Every array that a study below `root` submitted, oldest first, and a line about each manifest that cannot be
    read. With `keys`: only arrays with one of these tasks, and all arrays of the study whose submissions are in `own`.
    """
    wanted = None if keys is None else {*keys}
    result: list[Array] = []
    damaged: list[str] = []
    for home in root.glob("*/.sweep"):
        ours = own is not None and home.resolve() == own.resolve()
        listed, unread = arrays(home)
        damaged += unread
        for array in listed:
            if not all("task" in entry for entry in array.tasks):
                continue  # written by an earlier version, whose runs this one cannot read
            if wanted is None or ours or any(key_of(entry) in wanted for entry in array.tasks):
                result.append(array)
    return sorted(result, key=lambda array: array.time), damaged


def key_of(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Kind and key of a task in a manifest."""
    return entry["task"]["kind"], entry["task"]["key"]


def look(submitted: Sequence[Array], need_queue: bool = False, damaged: Sequence[str] = ()) -> tuple[list[Array], Look]:
    """Ask squeue and sacct once each. With `need_queue`, raises SlurmError if squeue does not answer, and InputError if
    a manifest is `damaged`, because what is queued would be unknown.

    Returns also the arrays that have a job id. The queue supplies the ids that a killed submit could not write down.
    """
    if need_queue and damaged:
        raise InputError(f"{damaged[0]}; sweep cancel ends its jobs, and without this file its folder is ignored")
    live, accounted, notes = None, None, list(damaged)
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
    tasks = {array.key(number): task for array in known for number, task in enumerate(array.tasks)}
    queued = {job: task for job, task in tasks.items() if job in (states or {})}
    return known, Look(states, accounted, tuple(notes), queued)


@dataclass(frozen=True)
class Survey:
    """What SLURM and manifests say about the tasks of some runs: a look, the newest submission of each task, all its
    submissions that SLURM still has, and every one. SLURM may have several, because a longer training waits for a
    shorter one, and because stages may be jobs of their own."""

    seen: Look
    newest: Mapping[tuple[str, str], tuple[Array, int]]
    live: Mapping[tuple[str, str], list[tuple[Array, int]]] = field(default_factory=dict)
    every: Mapping[tuple[str, str], list[tuple[Array, int]]] = field(default_factory=dict)

    def task(self, task: Task) -> Standing:
        """The state of a task, from its running job, else from its newest one. `asked` is what all its jobs will do."""
        place, live = self.newest.get((task.kind, task.key)), self.live.get((task.kind, task.key), [])
        running = [one for one in live if (self.seen.live or {})[one[0].key(one[1])][0] not in client.WAITING]
        try:
            standing = _standing(task, (running or [self._first(place)])[0], self.seen)
        except InputError as error:  # a damaged file of the run
            standing = Standing(task, "unreadable", str(error), task.stages)
        if not live:
            return standing
        (asked,) = merged(Task.from_dict(array.tasks[number]["task"]) for array, number in live)
        return replace(standing, asked=asked)

    def _first(self, newest: tuple[Array, int] | None) -> tuple[Array, int] | None:
        """Of a submission that does the stages of a task in several jobs, the first job that is not done, because it
        tells why later ones wait or never started."""
        if newest is None:
            return None
        key, folder = key_of(newest[0].tasks[newest[1]]), newest[0].folder
        places = [one for one in self.every.get(key, []) if one[0].folder == folder]
        undone = (one for one in places if missing(Task.from_dict(one[0].tasks[one[1]]["task"])))
        return next(undone, newest) if len(places) > 1 else newest

    def array(self, task: Task, stage: str) -> Array | None:
        """The newest array that does a stage of a task, or None."""
        places = reversed(self.every.get((task.kind, task.key), []))
        return next((array for array, n in places if stage in array.tasks[n]["task"]["stages"]), None)

    def run(self, run: Planned) -> RunStanding:
        """The state of a run."""
        return RunStanding(run, tuple(map(self.task, run.tasks)))

    def job(self, kind: str, key: str) -> str | None:
        """The job of a task that SLURM still has, `ARRAY_TASK`, or None."""
        place = self.newest.get((kind, key))
        job = place[0].key(place[1]) if place is not None else None
        return job if job in (self.seen.live or {}) else None


UNSEEN = Survey(Look(None, None), {})  # SLURM is not asked, so that states come only from the tasks' folders


def survey(runs: Sequence[Planned], home: Path, need_queue: bool = False) -> Survey:
    """A look at everything that concerns some runs. `home` is ROOT/STUDY/.sweep. `need_queue` is as in `look`."""
    keys = {(task.kind, task.key) for run in runs for task in run.tasks}
    keys |= {("training", training_of(task)) for run in runs for task in run.tasks if task.kind == "samples"}
    arrays_there, damaged = submitted(home.parents[1], keys, home)
    known, seen = look(arrays_there, need_queue, damaged)
    return Survey(seen, newest_of(known, seen), live_of(known, seen), places_of(known))


def training_of(task: Task) -> str:
    """The key of the training whose weights a task of samples reads."""
    return Path(task.training).name.rsplit("-", 1)[-1]


def standings(runs: Sequence[Planned], home: Path, need_queue: bool = False) -> tuple[list[RunStanding], Look]:
    """The state of every run, from one `survey`."""
    view = survey(runs, home, need_queue)
    return [view.run(run) for run in runs], view.seen


def newest_of(known: Sequence[Array], seen: Look) -> dict[tuple[str, str], tuple[Array, int]]:
    """The newest submission of each task, or the one that SLURM still has, by kind and key."""
    newest: dict[tuple[str, str], tuple[Array, int]] = {}
    for array in known:
        for number, entry in enumerate(array.tasks):
            other = newest.get(key_of(entry))
            gone = array.key(number) not in (seen.live or {})
            if other is None or not gone or other[0].key(other[1]) not in (seen.live or {}):
                newest[key_of(entry)] = array, number
    return newest


def places_of(known: Sequence[Array]) -> dict[tuple[str, str], list[tuple[Array, int]]]:
    """Every submission of each task, oldest first, by kind and key."""
    places: dict[tuple[str, str], list[tuple[Array, int]]] = {}
    for array in known:
        for number, entry in enumerate(array.tasks):
            places.setdefault(key_of(entry), []).append((array, number))
    return places


def live_of(known: Sequence[Array], seen: Look) -> dict[tuple[str, str], list[tuple[Array, int]]]:
    """The submissions of each task that SLURM still has, oldest first, by kind and key."""
    live = {
        key: [(array, number) for array, number in places if array.key(number) in (seen.live or {})]
        for key, places in places_of(known).items()
    }
    return {key: places for key, places in live.items() if places}


def _standing(task: Task, place: tuple[Array, int] | None, seen: Look) -> Standing:
    left = tuple(missing(task))
    if place is None:
        alone = plan.look(task)
        return Standing(task, alone.state, alone.error, alone.missing)
    array, number = place
    key, log, asked = array.key(number), array.log(number), Task.from_dict(array.tasks[number]["task"])
    attempts = read_attempts(task.path, key)
    rows = (seen.accounted or {}).get(key, [])
    # SLURM's own count, as the newest start wrote it: a start that was ended before it could write is in it.
    starts = max(((line.get("restart") or 0) + 1 for line in attempts if line["event"] == "start"), default=0)
    about: dict[str, Any] = {"missing": left, "job": key, "log": log, "array": array, "asked": asked}
    if not left:
        return Standing(task, "done", requeued=max(len(rows), starts, 1) - 1, **about)
    if (queued := _queued(key, seen, rows, attempts, log)) is not None:
        state, reason = queued
        waiting = state in client.WAITING
        # While it waits, every start so far has ended.
        times = max(len(rows) - 1, starts - (not waiting), 0)
        word = ("preempted" if times else "queued") if waiting else "running"
        return Standing(task, word, requeued=times, reason=reason if waiting else "", **about)
    # A process works on it without SLURM, or what was queued is done, or something else has been asked for since.
    other = not missing(replace(asked, folder=task.folder)) or not plan.left_of(task, left) & plan.keys_of(asked)
    if is_locked(task.path) or other:
        alone = plan.look(task)
        return Standing(task, alone.state, alone.error, **about)
    state, error = _ended(task, rows, attempts, log, sacct=seen.accounted is not None)
    return Standing(task, state, error, requeued=max(len(rows), starts, 1) - 1, **about)


def _queued(
    key: str, seen: Look, rows: Sequence[tuple[str, str]], attempts: Sequence[dict], log: Path
) -> tuple[str, str] | None:
    """The state of a task that SLURM still has, and the reason; None for one that has ended."""
    if seen.live is not None:
        return seen.live.get(key)  # in any state: SLURM has more of them than `client.LIVE`
    if rows:
        return (rows[-1][0], "") if rows[-1][0] in client.LIVE else None
    if any(words in _last_line(log) for words in LAST_WORDS):
        return None
    # Neither squeue nor sacct tells: take the state in which the task last wrote.
    states = {"start": "RUNNING", "stop": "REQUEUED", "": "PENDING"}
    state = states.get(attempts[-1]["event"] if attempts else "")
    return (state, "") if state else None


def _ended(
    task: Task, rows: Sequence[tuple[str, str]], attempts: Sequence[dict], log: Path, sacct: bool
) -> tuple[str, str]:
    """State and error of a task that is not done and that SLURM no longer has. `sacct` is whether sacct answered."""
    began = max((place for place, line in enumerate(attempts) if line["event"] == "start"), default=None)
    now = attempts[began:] if began is not None else []
    # Only what this attempt wrote, because older records belong to attempts that were retried.
    records = read_records(task.path / "record.jsonl")[now[0].get("records") or 0 :] if now else []
    another, last = _another(log), _last_line(log)
    if (failed := failure(task, missing(task), records)) is not None:
        return failed.state, another if GONE in (failed.error or "") and another else failed.error or ""
    for line in reversed(now):
        if line.get("error"):
            return "failed", another if GONE in line["error"] and another else line["error"]
    state, code = rows[-1] if rows else ("", "")
    if state in client.LIVE or not state:  # sacct lags or does not answer
        state = next((state for words, state in LAST_WORDS.items() if words in last), "")
    if state in ENDS:
        return ENDS[state]
    if (number := int(code.split(":")[0] or 0) if code else 0) in EXITS:
        told = last.startswith((OTHER_CODE_LINE, SETUP_LINE))
        return "failed", last if told else EXITS[number]
    if another:
        return "failed", another
    if code.endswith(":9") or number in (9, 137):  # srun's exit code is the signal that killed the task
        return "failed", KILLED
    stopped = next((line.get("signal") for line in now if line["event"] == "stop"), None)
    if stopped:
        return "cancelled", f"saved on {stopped} and not queued again; sweep retry continues it"
    if not log.exists() and not now and (not rows or rows[-1][0] in client.WAITING):
        return "cancelled", "left the queue without a start; sweep retry queues it again"
    unknown = rows[-1][0] in client.LIVE if rows else sacct
    late = ", and sacct does not know its end yet: look again" if unknown else ""
    exit_code = f" (exit code {code})" if code else ""
    return "failed", last or f"no word of it{exit_code}: {log} is {'empty' if log.exists() else 'not there'}{late}"


def _another(log: Path) -> str:
    """How a process of a job other than the first one ended the job: by srun's line in the log of the first, and by the
    last line of its own log. Empty if none did."""
    ends = [match for line in _lines(log) if (match := ENDED.match(line))]
    if not ends or ends[0][1] == "0":
        return ""
    number, how = ends[0].groups()
    if how == "Killed":
        return f"process {number} was {KILLED}"
    words = _last_line(log.with_name(log.name.replace("_0_log.out", f"_{number}_log.out")))
    return f"process {number}: {words or how}"


def _last_line(log: Path) -> str:
    """The last line of a log that says something, or SLURM's own line on the end of the job if there is one."""
    texts = [line for line in _lines(log) if not SRUN_AFTER.match(line)]
    ends = [line for line in texts[-4:] if any(words in line for words in LAST_WORDS)]
    return (ends or texts or [""])[-1][:500]


def _lines(log: Path) -> list[str]:
    """The last lines of a log that say something, from the newest start on."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return []
    texts = [line for line in lines if line]
    # A process writes this line as it starts. Lines above it are from earlier starts.
    key = log.name.rsplit("_", 2)[0] if log.name.endswith("_log.out") else log.name
    start = max((place for place, line in enumerate(texts) if line.startswith(f"{key} on ")), default=0)
    return texts[start:]


def rows(view: Sequence[RunStanding]) -> list[dict[str, Any]]:
    """A row for each run, for a table or JSON. Job, log and error are those of its main task."""
    lines = []
    for one in view:
        run, main = one.run, one.main
        progress = plan.progress(main.task.path)
        times = f" ×{main.requeued}" if main.requeued else ""
        working = (describe(progress) if progress else "starting") if main.state == "running" else ""
        if main.state == "running" and times:
            working = f"{working}  (preempted{times})".strip()
        lines.append(
            {
                "run": run.name,
                "id": run.id,
                "state": main.state,
                "shown": f"preempted{times}" if main.state == "preempted" else main.state,
                "requeued": main.requeued,
                "job": main.job,
                "to do": " ".join(one.missing),
                "progress": working or main.reason.replace("None", ""),
                "error": main.error,
                "log": str(main.log) if main.log else None,
                "folder": str(run.folder),
            }
        )
    return lines
