"""Submissions: manifests below RUNS/STUDY/.sweep. Each is on disk before its first job is queued.

asked.json           the settings of the newest `sweep submit`
code/TREE/           the code that jobs import (snapshot.py)
0001/manifest.json   who, when, which code, the arrays and the runs in each
0001/array-0.pkl     the call that every task of an array makes, for submitit
0001/array-0.sh      what sbatch got; array-0.job: the job id that it returned
0001/logs/           submitit's folder: for each task a log, JOB_TASK_0_log.out, and its result
"""

import getpass
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ...harness.disk import write_atomically
from ...harness.run import read_json
from ...harness.tasks import Task
from ...kernels.errors import InputError
from ..worker import work
from . import client
from .cluster import ClusterConfig
from .executor import SlurmExecutor


@dataclass(frozen=True)
class Array:
    """One job array of a submission. `tasks` are dicts of `name` (the run), `folder`, `task` (a Task as plain data)
    and, if there are any, `plugins`. `job` is None if no job id is known: the array was never queued, or the process
    that queued it was killed before it noted the id."""

    folder: Path
    index: int
    name: str
    cluster: ClusterConfig
    tasks: list[dict[str, Any]]
    time: str
    job: str | None

    def key(self, task: int) -> str:
        """The id of a task, `JOB_TASK`."""
        return f"{self.job}_{task}"

    def log(self, task: int) -> Path:
        return self.folder / "logs" / f"{self.key(task)}_0_log.out"


def arrays(home: Path) -> tuple[list[Array], list[str]]:
    """Every submitted array, oldest first, and a line about each manifest that cannot be read."""
    result: list[Array] = []
    damaged: list[str] = []
    for path in _manifests(home):
        try:
            result += _arrays(path)
        except InputError as error:
            damaged.append(str(error))
    return result, damaged


def _manifests(home: Path) -> list[Path]:
    return sorted(path / "manifest.json" for path in home.glob("[0-9]*") if path.name.isdecimal())


def _arrays(path: Path) -> list[Array]:
    try:
        content = read_json(path)
        datetime.fromisoformat(content["time"])
        return [_array(path.parent, content["time"], *one) for one in enumerate(content["arrays"])]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise InputError(f"{path} was not written by lamabench") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def _array(folder: Path, time: str, index: int, content: dict[str, Any]) -> Array:
    for entry in content["tasks"]:
        if not isinstance(entry["name"], str):
            raise TypeError
        if "task" in entry:  # else of an earlier version, whose runs this one cannot read
            Task.from_dict(entry["task"])
    job = job_file(folder, index)
    return Array(
        folder=folder.resolve(),
        index=index,
        name=content["name"],
        cluster=ClusterConfig(**content["cluster"]),
        tasks=content["tasks"],
        time=time,
        job=job.read_text(errors="replace", encoding="utf-8").strip() if job.is_file() else None,
    )


def names(home: Path) -> tuple[list[str], list[str]]:
    """The names of all arrays that sbatch may have got, as their batch files have them, and a line about each batch
    file that cannot be read. The names are known even if no manifest can be read."""
    result: list[str] = []
    damaged: list[str] = []
    for path in sorted(path for path in home.glob("[0-9]*/array-*.sh") if path.is_file()):
        try:
            text = path.read_text(errors="replace", encoding="utf-8")
            for line in re.findall(r"^#SBATCH --job-name=(.+)$", text, re.MULTILINE):
                result += shlex.split(line)
        except (OSError, ValueError) as error:  # ValueError: half a quoted name
            damaged.append(f"cannot read {path}: {getattr(error, 'strerror', error)}")
    return result, damaged


def job_file(folder: Path, index: int) -> Path:
    return folder / f"array-{index}.job"


def remember(home: Path, overrides: Sequence[str]) -> None:
    """Keep the settings of a submit for later commands."""
    write_atomically(home / "asked.json", json.dumps({"overrides": list(overrides)}).encode())


def remembered(home: Path) -> list[str]:
    """The settings of the newest submit; empty if there was none. Raises InputError if their file cannot be read."""
    path = home / "asked.json"
    try:
        overrides = read_json(path)["overrides"]
    except FileNotFoundError:
        return []
    except (KeyError, TypeError):
        overrides = None
    if not isinstance(overrides, list) or not all(isinstance(text, str) for text in overrides):
        raise InputError(f"{path} was not written by lamabench: delete it, and give the settings of the submit again")
    return overrides


@dataclass(frozen=True)
class Draft:
    """An array before it is queued: the resources that it asks for, its tasks, and what must end before it starts.
    `after` are the indices of arrays of the same submission, `after_jobs` are job ids. `pair` is the index of an array
    of whose tasks each must be done before the task of the same number here starts."""

    cluster: ClusterConfig
    tasks: list[dict[str, Any]]
    after: tuple[int, ...] = ()
    after_jobs: tuple[str, ...] = ()
    pair: int | None = None


def write(home: Path, study: str, drafts: Sequence[Draft], code: dict[str, Any]) -> list[Array]:
    """Put a submission on disk, all of it or nothing. `code` is what `snapshot.freeze` returns."""
    home.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.name) for path in home.glob("[0-9]*") if path.name.isdecimal()), default=0)
    folder = home.resolve() / f"{number:04d}"
    token, time = secrets.token_hex(3), datetime.now(timezone.utc).isoformat(timespec="seconds")
    plain = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in study)
    names = [f"{plain}-{number:04d}-{index}-{token}" for index in range(len(drafts))]
    content = {
        "study": study,
        "time": time,
        "user": _user(),
        "host": platform.node(),
        "cwd": os.getcwd(),
        "code": code,
        "arrays": [
            {"name": name, "cluster": asdict(draft.cluster), "tasks": draft.tasks}
            for name, draft in zip(names, drafts, strict=True)
        ],
    }
    with tempfile.TemporaryDirectory(dir=home, prefix=".new-") as temporary:
        new = Path(temporary, "submission")
        (new / "logs").mkdir(parents=True)
        write_atomically(new / "manifest.json", json.dumps(content).encode())
        new.rename(folder)
    return [
        Array(folder, index, name, draft.cluster, draft.tasks, time, None)
        for index, (name, draft) in enumerate(zip(names, drafts, strict=True))
    ]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name
        return str(os.getuid())


def executor_of(
    folder: Path,
    index: int,
    cluster: ClusterConfig,
    name: str,
    code: str | None,
    after: Sequence[str] = (),
    pair: str | None = None,
) -> SlurmExecutor:
    """The executor of array `index` of the submission in `folder`. SlurmExecutor explains the other arguments."""
    return SlurmExecutor(folder / f"array-{index}", cluster, name, code, after, pair)


@dataclass(frozen=True)
class Queued:
    """What became of a submission: its arrays with their job ids, and if the cluster takes no more jobs, the name of
    the limit and how many tasks are left."""

    arrays: list[tuple[Array, str]]
    limit: str = ""
    left: int = 0


def queue(written: Sequence[Array], drafts: Sequence[Draft], code: str | None) -> Queued:
    """Queue the arrays of a submission one after the other, and write down the job id of each. `code` is the folder of
    the snapshot.

    If an array exceeds a limit of the cluster, its first half is queued, and so on, until the cluster is full. The
    manifest keeps only what is queued. Raises SlurmError if sbatch refuses for another reason; then the arrays before
    stay queued.
    """
    waiting = list(zip(written, range(len(drafts)), strict=True))
    jobs: dict[int, list[str]] = {place: [] for place in range(len(drafts))}
    queued: list[tuple[Array, str]] = []
    while waiting:
        array, place = waiting[0]
        draft, count = drafts[place], len(array.tasks)
        after = [*(job for other in draft.after for job in jobs[other]), *draft.after_jobs]
        if draft.cluster.parallel:  # %N limits one array
            after += jobs[place]
        earlier = jobs[draft.pair] if draft.pair is not None else []
        whole = len(earlier) == 1 and count == len(draft.tasks)  # else the numbers of their tasks differ
        after += [] if whole else earlier
        pair = earlier[0] if whole else None
        sbatch = executor_of(array.folder, array.index, array.cluster, array.name, code, after, pair)
        try:
            call = (str(array.folder / "manifest.json"), array.index)
            job = sbatch.map_array(work, *([value] * count for value in call))[0].job_id.split("_")[0]
        except client.Full as error:
            if count == 1:
                _keep(array.folder, [one for one, _ in queued])
                return Queued(queued, str(error), sum(len(one.tasks) for one, _ in waiting))
            half = [
                (replace(array, tasks=tasks), place) for tasks in (array.tasks[: count // 2], array.tasks[count // 2 :])
            ]
            waiting[:1] = half
            waiting = [(_numbered(one, len(queued) + number), place) for number, (one, place) in enumerate(waiting)]
            _keep(array.folder, [one for one, _ in (*queued, *waiting)])
            continue
        except client.SlurmError as error:
            if not isinstance(error, client.Passing):  # else the array may be in the queue
                _keep(array.folder, [one for one, _ in queued])
            count = f"{len(queued)} of {len(queued) + len(waiting)} arrays are queued"
            raise client.SlurmError(
                f"{error}: {count}; once that is solved, the same command queues the rest"
            ) from None
        write_atomically(job_file(array.folder, array.index), f"{job}\n".encode())
        jobs[place].append(job)
        queued.append((array, job))
        waiting.pop(0)
    return Queued(queued)


def _numbered(array: Array, index: int) -> Array:
    """An array at another place of its submission. The name has the place in it."""
    start, _, token = array.name.rsplit("-", 2)
    return replace(array, index=index, name=f"{start}-{index}-{token}")


def _keep(folder: Path, kept: Sequence[Array]) -> None:
    """Make these the arrays of a submission on disk. Without any, nothing of it stays."""
    if not kept:
        shutil.rmtree(folder)
        return
    content = read_json(folder / "manifest.json")
    content["arrays"] = [{"name": one.name, "cluster": asdict(one.cluster), "tasks": one.tasks} for one in kept]
    write_atomically(folder / "manifest.json", json.dumps(content).encode())
    for path in folder.glob("array-*"):
        if int(path.stem.removeprefix("array-")) >= len(kept):
            path.unlink()
