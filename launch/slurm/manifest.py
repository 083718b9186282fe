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
import secrets
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ...harness.record import write_atomically
from ...kernels.errors import InputError
from ..worker import work
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


def arrays(home: Path) -> Iterator[Array]:
    """Every submitted array, oldest first. Raises InputError for a manifest that cannot be read."""
    for path in sorted(home.glob("[0-9]*/manifest.json")):
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"{path} is not JSON: {error}") from None
        for index, array in enumerate(content["arrays"]):
            job = job_file(path.parent, index)
            yield Array(
                folder=path.parent.resolve(),
                index=index,
                name=array["name"],
                cluster=ClusterConfig(**array["cluster"]),
                tasks=array["tasks"],
                time=content["time"],
                job=job.read_text().strip() if job.is_file() else None,
            )


def job_file(folder: Path, index: int) -> Path:
    return folder / f"array-{index}.job"


def remember(home: Path, overrides: Sequence[str]) -> None:
    """Keep the settings of a submit for later commands."""
    write_atomically(home / "asked.json", json.dumps({"overrides": list(overrides)}).encode())


def remembered(home: Path) -> list[str]:
    """The settings of the newest submit; empty if there was none."""
    path = home / "asked.json"
    return json.loads(path.read_text())["overrides"] if path.is_file() else []


@dataclass(frozen=True)
class Draft:
    """An array before it is queued: the resources that it asks for, its tasks, and what must end before it starts.
    `after` are the indices of arrays of the same submission, `after_jobs` are job ids."""

    cluster: ClusterConfig
    tasks: list[dict[str, Any]]
    after: tuple[int, ...] = ()
    after_jobs: tuple[str, ...] = ()


def write(home: Path, study: str, drafts: Sequence[Draft], code: dict[str, Any]) -> list[Array]:
    """Put a submission on disk, all of it or nothing. `code` is what `snapshot.freeze` returns."""
    home.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(path.name) for path in home.glob("[0-9]*")), default=0)
    folder = home.resolve() / f"{number:04d}"
    token, time = secrets.token_hex(3), datetime.now(timezone.utc).isoformat(timespec="seconds")
    plain = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in study)
    names = [f"{plain}-{number:04d}-{index}-{token}" for index in range(len(drafts))]
    content = {
        "study": study,
        "time": time,
        "user": getpass.getuser(),
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


def executor_of(
    folder: Path, index: int, cluster: ClusterConfig, name: str, code: str | None, after: Sequence[str] = ()
) -> SlurmExecutor:
    """The executor of array `index` of the submission in `folder`. SlurmExecutor explains the other arguments."""
    return SlurmExecutor(folder / f"array-{index}", cluster, name, code, after)


def queue(written: Sequence[Array], drafts: Sequence[Draft], code: str | None) -> Iterator[tuple[Array, str]]:
    """Queue the arrays of a submission one after the other, and write down the job id of each. `code` is the folder of
    the snapshot. Raises SlurmError."""
    jobs: list[str] = []
    for array, draft in zip(written, drafts, strict=True):
        after = [*(jobs[place] for place in draft.after), *draft.after_jobs]
        queued = executor_of(array.folder, array.index, array.cluster, array.name, code, after)
        count, call = len(array.tasks), (str(array.folder / "manifest.json"), array.index)
        job = queued.map_array(work, *([value] * count for value in call))[0].job_id.split("_")[0]
        write_atomically(job_file(array.folder, array.index), f"{job}\n".encode())
        jobs.append(job)
        yield array, job
