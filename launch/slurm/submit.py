"""`sweep submit`, `retry`, `cancel`: queue what is missing of a study as job arrays. No task runs twice at a time.

A task is a model, a training or a set of samples with its scores. Samples are queued in arrays of their own, which
start when the trainings that they need have ended. Another study below the same root may have queued such a training.
Stages of a task that ask for other resources than those before them are in an array of their own too.
"""

import shutil
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...ablations.study import Study
from ...harness.run import Busy, locked
from ...harness.tasks import Task
from ...kernels.errors import InputError
from .. import plan
from ..output import number
from ..plan import Planned
from . import client, executor, manifest, snapshot
from .cluster import ClusterConfig
from .jobs import Choice, choose, drafts
from .manifest import Draft
from .requests import check_requests, load_over, queue_of, requests_of
from .status import FAILED, Survey, key_of, survey

# Settings that may change without making another run.
FREE = ("cluster.", "run.", "data.path=", "plugins=")
TURN_S = 120.0  # how long a submit waits for the submit of another study below the same root


@dataclass(frozen=True)
class Submission:
    """The result of a submit: the arrays with their job ids, the code that they import, the number of runs that it left
    as they are, by state, and a line about tasks for which the queue has no room."""

    arrays: list[tuple[manifest.Array, str]]
    code: dict[str, Any]
    left: dict[str, int]
    rest: str = ""


def submit(
    runs: Sequence[Planned],
    study: Study,
    words: Sequence[str],
    cluster: str | None,
    parallel: int | None,
    dirty: bool,
    whole: Sequence[Planned] = (),
) -> Submission:
    """Queue the tasks of runs that are not done, not queued and did not fail. `words` are the settings of the command.
    `whole` are all runs of the study, if `runs` are only some of them.

    Raises InputError for a cluster without a queue or a tree with changes, Busy if another submit is at work, and
    SlurmError if sbatch refuses. In the last case, what was queued before stays queued, and the same call queues the
    rest. It also queues what the queue had no room for.
    """
    requests = requests_of(plan.pieces(runs), cluster, parallel)
    check_requests(plan.pieces(runs), requests)
    snapshot.check(dirty)
    client.check_here()
    most = client.largest_array()
    with _alone(runs, study, new=True) as home:
        plan.write(study, whole or runs)
        view = survey(runs, home, need_queue=True)
        manifest.remember(home, [word for word in words if not word.startswith("cluster.")])
        return _queue(home, study, runs, choose(plan.pieces(runs), view, ("planned", "stopped"), requests), view, most)


def retry(
    runs: Sequence[Planned],
    study: Study,
    words: Sequence[str],
    cluster: str | None,
    parallel: int | None,
    dirty: bool,
) -> Submission:
    """Queue the tasks of failed runs again. Each asks for the same resources as last time, changed by `words`.

    Raises InputError for a setting that would make another run, and otherwise as `submit` does.
    """
    for word in words:
        if not word.startswith(FREE):
            raise InputError(
                f"{word!r} would not repeat a run but make another one, which the study does not have (half the batch "
                "with less memory is run.micro_batch=N). Write it into the study and submit that; retry takes "
                "cluster.*, run.*, data.path and plugins"
            )
    settings = [word for word in words if word.startswith("cluster.")]
    snapshot.check(dirty)
    client.check_here()
    most = client.largest_array()
    with _alone(runs, study) as home:
        view = survey(runs, home, need_queue=True)
        requests: dict[tuple[str, str], dict[str, ClusterConfig]] = {}
        for run in runs:
            parts = view.run(run).parts
            if not any(part.state in FAILED for part in parts):
                continue
            array = next((part.array for part in parts if part.array is not None), None)
            own = [word for word in run.cluster if str(word).startswith("cluster.stage")]

            def asked(task: Task, stage: str, run: Planned = run, array: Any = array, own: Any = own) -> ClusterConfig:
                earlier = view.array(task, stage)
                if cluster is not None or (earlier or array) is None:
                    return queue_of(cluster, run.cluster, parallel, stage)
                # What was never queued asks for the same as the training, and for what the study says of its stage.
                given, words = (earlier, settings) if earlier is not None else (array, [*own, *settings])
                return load_over(replace(given.cluster, parallel=parallel or given.cluster.parallel), words, stage)

            for task in run.tasks:
                requests.setdefault((task.kind, task.key), {stage: asked(task, stage) for stage in task.stages})
        check_requests(plan.pieces(runs), requests)
        chosen = choose(plan.pieces(runs), view, (*FAILED, "planned", "stopped"), requests)
        return _queue(home, study, runs, chosen, view, most)


@contextmanager
def _alone(runs: Sequence[Planned], study: Study, new: bool = False) -> Iterator[Path]:
    """Lock the study for this process, and give the folder of its submissions. A `new` folder is deleted again if
    nothing could be queued. Raises InputError if the study has no folder yet, unless it may be `new`, and if the folder
    cannot be written."""
    root = runs[0].root
    home = root / study.name / ".sweep"
    fresh = not home.parent.exists()
    executor.check(home)
    if not new:
        check_there(home)
    with ExitStack() as stack:
        try:
            home.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(home))
            _take_turn(stack, root)
        except OSError as error:
            text = f"cannot write below {root}: {error.strerror}; run.root=FOLDER takes another one"
            raise InputError(text) from None
        try:
            yield home
        except client.SlurmError:
            if fresh and not any(home.glob("[0-9]*")):
                shutil.rmtree(home.parent, ignore_errors=True)
            raise
        except OSError as error:  # a full disk, or a shared folder that is unreachable
            raise client.SlurmError(f"{error}; the same command goes on from what was queued") from None


def check_there(home: Path) -> None:
    """Raise InputError if the study whose submissions would be in `home` has no folder."""
    if not home.parent.is_dir():
        raise InputError(
            f"no such folder: {home.parent.absolute()}; nothing of the study ran yet (run.root says where)"
        )


def _take_turn(stack: ExitStack, root: Path) -> None:
    """Lock a root, because two studies that submit at once would both train what they share. Raises Busy after a
    while."""
    end = time.monotonic() + TURN_S
    while True:
        try:
            stack.enter_context(locked(root))
            return
        except Busy:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def batch_file(draft: Draft, name: str, folder: Path, index: int, code: dict[str, Any]) -> str:
    """What sbatch gets for an array of a submission in `folder`."""
    array = manifest.executor_of(folder, index, draft.cluster, name, code["path"])
    return array.batch_file(len(draft.tasks))


def _queue(
    home: Path, study: Study, runs: Sequence[Planned], chosen: Sequence[Choice], view: Survey, most: int
) -> Submission:
    ids = {one.piece.id for one in chosen}
    left: dict[str, int] = {}
    for run in runs:
        if not any((task.kind, task.key) in ids for task in run.tasks):
            state = view.run(run).state
            left[state] = left.get(state, 0) + 1
    if not chosen:
        return Submission([], {}, left)
    fit = _fitting(chosen)
    reason, count = f"cluster.queue_at_most is {min(_limits(chosen), default=0)}", len(chosen) - len(fit)
    if not fit:
        return Submission([], {}, left, _rest(count, reason))
    code = snapshot.freeze(home / "code")
    fit = [replace(one, piece=snapshot.with_plugins(one.piece, home / "code")) for one in fit]
    code["plugins"] = snapshot.plugin_hashes(one.piece for one in fit)
    parts = drafts(fit, most)
    result = manifest.queue(manifest.write(home, study.name, parts, code), parts, code["path"])
    if result.limit:
        reason, count = f"the cluster takes no more jobs of yours, {result.limit}", count + result.left
    if not result.arrays:
        raise client.SlurmError(_rest(count, reason))
    return Submission(result.arrays, code, left, _rest(count, reason) if count else "")


def _limits(chosen: Sequence[Choice]) -> list[int]:
    return [one.cluster.queue_at_most for one in chosen if one.cluster.queue_at_most is not None]


def _fitting(chosen: Sequence[Choice]) -> list[Choice]:
    """The first of the tasks, as many as `cluster.queue_at_most` leaves room for. What a task waits for comes first."""
    if not (limits := _limits(chosen)):
        return list(chosen)
    return list(chosen[: max(0, min(limits) - client.mine())])


def _rest(count: int, reason: str) -> str:
    """A line about tasks for which the queue has no room."""
    return f"{number(count, 'job')} not queued ({reason}): the same command queues more once there is room"


def cancel(home: Path, keys: Container[tuple[str, str]] | None = None) -> tuple[list[str], list[str]]:
    """End every queued or running job of the study whose submissions are in `home`, including jobs of runs that are no
    longer in it, or only the jobs of some tasks by kind and key. Running jobs save first.

    Returns the job ids, and a line about each manifest that cannot be read. Its jobs are ended all the same, unless
    there are `keys`, because nothing else tells what the jobs do.
    """
    check_there(home)
    with ExitStack() as stack:
        with suppress(OSError, InputError):  # neither a full disk nor a damaged lock must keep jobs running
            stack.enter_context(locked(home))
        return _cancel(home, keys)


def _cancel(home: Path, keys: Container[tuple[str, str]] | None) -> tuple[list[str], list[str]]:
    submitted, damaged = manifest.arrays(home)
    numbered = {array.name: array for array in submitted if all("task" in one for one in array.tasks)}
    if keys is None:
        names, unread = manifest.names(home)
        damaged += unread
        live = client.live(dict.fromkeys([*numbered, *names]))
        jobs = {key.split("_")[0] for key in live}
    else:
        jobs = {
            key
            for key, (_, _, name) in client.live(numbered).items()
            if key_of(numbered[name].tasks[int(key.split("_")[1])]) in keys
        }
    ordered = sorted(jobs, key=lambda job: [int(number) for number in job.split("_")])
    if ordered:
        client.patiently("scancel", *ordered)
    return ordered, damaged
