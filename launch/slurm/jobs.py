"""Which tasks a submit queues, in which jobs: stages of a task that ask for the same resources share one, and the jobs
of one task come one after the other."""

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from ...harness.data.files import sha256
from ...harness.sections import HELDOUT
from ...harness.stages import problem, start_problem
from ...harness.tasks import Task, merged, only
from ..plan import Piece
from .cluster import ClusterConfig
from .manifest import Draft
from .requests import Requests
from .status import Survey, training_of


@dataclass(frozen=True)
class Choice:
    """A job to queue: its task, or some stages of it, the resources that it asks for, and what must end first: jobs,
    the training in a folder, queued by the same submit, and `before`, the place of the choice that does the stages
    before these."""

    piece: Piece
    cluster: ClusterConfig
    jobs: tuple[str, ...] = ()
    training: str = ""
    before: int | None = None


def choose(pieces: Sequence[Piece], view: Survey, states: Container[str], requests: Requests) -> list[Choice]:
    """The jobs to queue for the tasks that have a request. A task is queued if it is in one of `states`. It is also
    queued if a job of it, from any study, asks for less than is asked for now; then it starts after that job.

    Samples are queued if their weights exist or if a queued training will keep them, and scores alone if their samples
    exist or are queued. Samples that are already in the queue wait for an earlier training job. If that training is
    queued again, they are queued again after it.
    """
    chosen: list[Choice] = []
    for piece in pieces:
        task, part, job = piece.task, view.task(piece.task), view.job(*piece.id)
        more = job is not None and part.asked is not None and bool(part.missing) and not covers(part.asked, task)
        other = view.job("training", training_of(task)) if task.kind == "samples" else None
        ours = any(one.piece.task.path == Path(task.training) for one in chosen)
        again = job is not None and ours and other is None and not piece.ready()
        if piece.id not in requests or not (part.state in states or more or again):
            continue
        jobs, training = (job,) if job else (), ""
        if piece.ready() and job is None and start_problem(task) is not None:
            continue  # scores of samples that nobody drew or queued
        if not piece.ready():
            if problem(task) is not None:
                continue
            if ours:
                training = task.training
            elif other is None:
                continue
            else:
                jobs = (*jobs, other)
        queued = part.asked if more and part.state not in states and not again else None
        before = None
        for one, cluster in _parts(piece, requests[piece.id]):
            if not one.missing() or (queued is not None and covers(queued, one.task)):
                continue
            first = before is None
            chosen.append(Choice(one, cluster, jobs if first else (), training if first else "", before))
            before = len(chosen) - 1
    return chosen


def _parts(piece: Piece, requests: Mapping[str, ClusterConfig]) -> Iterator[tuple[Piece, ClusterConfig]]:
    """A task as one job or several: consecutive stages that ask for the same share one."""
    for _, group in groupby(piece.task.stages, lambda stage: json.dumps(asdict(requests[stage]))):
        stages = tuple(group)
        yield replace(piece, task=only(piece.task, stages)), requests[stages[0]]


def covers(task: Task, other: Task) -> bool:
    """Whether `task` includes everything that `other` asks for."""
    both, *more = merged([task, other])
    names = ("stages", "moments", "metrics", "plans")
    further = task.kind == "training" and both.config["train"]["steps"] > task.config["train"]["steps"]
    return not more and not further and all(getattr(both, name) == getattr(task, name) for name in names)


def drafts(chosen: Sequence[Choice], most: int) -> list[Draft]:
    """One array for each distinct request, of at most `most` tasks. Samples that wait for trainings of the same submit
    are in arrays that start after those trainings. Later stages of tasks are in an array whose tasks start each after
    the same task of an earlier array, if they are in the same order there, else after that whole array."""
    arrays: list[Draft] = []
    place: dict[int, tuple[int, int]] = {}  # of choices: the array, and the task in it
    folders: dict[str, int] = {}  # of the first arrays of tasks, by their folders
    waiting = list(range(len(chosen)))

    def is_ready(number: int) -> bool:
        one = chosen[number]
        if one.before is not None:
            return one.before in place
        return one.piece.task.kind != "samples" or not any(chosen[n].piece.task.kind != "samples" for n in waiting)

    while waiting:
        ready = [number for number in waiting if is_ready(number)]
        groups: dict[str, list[int]] = {}
        for number in ready:
            one = chosen[number]
            before = place[one.before][0] if one.before is not None else None
            key = json.dumps([asdict(one.cluster), bool(one.training or one.jobs), before])
            groups.setdefault(key, []).append(number)
        for group in groups.values():
            cluster = chosen[group[0]].cluster
            for start in range(0, len(group), most):
                numbers = group[start : start + most]
                part = [chosen[number] for number in numbers]
                after = {folders[one.training] for one in part if one.training}
                # %N limits one array, so that the parts of one that was too large run one after the other.
                after |= {len(arrays) - 1} if start and cluster.parallel else set()
                before = [place[one.before] for one in part if one.before is not None]
                aligned = bool(before) and [task for _, task in before] == list(range(len(before)))
                after |= {before[0][0]} if before and not aligned else set()
                jobs = dict.fromkeys(job for one in part for job in one.jobs)
                for index, number in enumerate(numbers):
                    place[number] = len(arrays), index
                    folders.setdefault(chosen[number].piece.task.folder, len(arrays))
                tasks = [entry(one.piece) for one in part]
                pair = before[0][0] if aligned else None
                arrays.append(Draft(cluster, tasks, tuple(sorted(after)), tuple(jobs), pair))
        waiting = [number for number in waiting if number not in ready]
    return arrays


PATHS = {"data": ("path",), "evaluate": ("reference", "features_path")}  # what a job reads from other folders


def entry(piece: Piece) -> dict[str, Any]:
    """A task as a manifest holds it, with absolute paths: a job whose working folder is gone starts in another one, and
    must neither make its runs there nor look for data there. A link keeps its name, which scores may have in theirs. A
    file that samples are scored against is noted with its SHA-256, because keys have only its name."""
    task, config = piece.task, piece.task.config
    root = str(Path(config["run"]["root"]).resolve())
    sections = {"run": config["run"] | {"root": root}}
    for section, names in PATHS.items():
        given = {name: config[section][name] for name in names if config[section].get(name)}
        sections[section] = config[section] | {name: str(Path(path).absolute()) for name, path in given.items()}
    absolute = replace(
        task,
        folder=str(piece.folder.resolve()),
        training=task.training and str(Path(task.training).resolve()),
        config=config | sections,
        reference=_digest(sections["evaluate"]["reference"]) if _is_scored_against_a_file(task) else "",
    )
    more = {"plugins": list(piece.plugins)} if piece.plugins else {}
    return {"name": piece.run, "folder": absolute.folder, "task": asdict(absolute), **more}


def _is_scored_against_a_file(task: Task) -> bool:
    sampled = any(metric != HELDOUT for metric in task.metrics)
    return sampled and bool(task.config["evaluate"].get("reference"))


def _digest(path: str) -> str:
    """The SHA-256 of a file; empty if it is not there, which the job says."""
    try:
        status = Path(path).stat()
        return _digest_of(path, status.st_size, status.st_mtime_ns)
    except OSError:
        return ""


@cache
def _digest_of(path: str, size: int, changed: int) -> str:
    return sha256(Path(path))
