"""`sweep submit`, `retry`, `cancel`: what is missing of a study as job arrays, each run in one place at a time."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ...harness.run import locked
from ...kernels.errors import InputError
from ..plan import Planned
from . import client, executor, manifest, snapshot
from .cluster import ClusterConfig, choices, load
from .manifest import Draft
from .status import ACTIVE, FAILED, Standing, standings

# What a run may be given anew without becoming another run.
FREE = ("cluster.", "run.", "data.path=")


@dataclass(frozen=True)
class Submission:
    """What a submit did: the arrays with their job ids, the code they import, and how many runs were left, by state."""

    arrays: list[tuple[manifest.Array, str]]
    code: dict[str, Any]
    left: dict[str, int]


def queue_of(name: str | None, settings: Sequence[str], parallel: int | None) -> ClusterConfig:
    """The cluster by name. Raises InputError where it is not one with a queue."""
    if name is None:
        raise InputError(
            f"name the cluster to submit to: cluster=NAME; choices: {', '.join(choices())}, or a .yaml file"
        )
    found = load(name, settings)
    if found.kind != "slurm":
        raise InputError(f"cluster {name} has no queue: lamabench sweep run works on this machine")
    _check(found)
    return replace(found, parallel=parallel) if parallel else found


def _check(asked: ClusterConfig) -> None:
    if asked.tasks_per_node * asked.nodes > 1:
        raise InputError("training takes one GPU today: leave cluster.nodes and cluster.tasks_per_node at 1")


def submit(
    runs: Sequence[Planned], study: str, words: Sequence[str], cluster: str | None, parallel: int | None, dirty: bool
) -> Submission:
    """Queue the runs that are not done, not queued and did not fail; `words` are the settings of the command.

    Raises InputError for a cluster without a queue or a tree with changes, Busy where another submit is at work,
    SlurmError where sbatch refuses; then what was queued before stays queued and the same call queues the rest.
    """
    requests = {run.info["id"]: queue_of(cluster, run.cluster, parallel) for run in runs}
    snapshot.check(dirty)
    client.check_here()
    with _alone(runs, new=True) as home:
        found, _ = standings(runs, home, need_queue=True)
        chosen = [one for one in found if one.state in ("planned", "stopped")]
        most = client.largest_array()
        manifest.remember(home, [word for word in words if not word.startswith("cluster.")])
        return _queue(home, study, found, chosen, requests, most)


def retry(
    runs: Sequence[Planned],
    study: str,
    words: Sequence[str],
    cluster: str | None,
    parallel: int | None,
    dirty: bool,
) -> Submission:
    """Queue the runs that failed again, each with what it asked for last time and `words` over it.

    Raises InputError for a setting that would make other runs of them, and as `submit` does.
    """
    for word in words:
        if not word.startswith(FREE):
            raise InputError(
                f"{word!r} would not repeat a run but make another one, with another id, that the study does not have "
                "(half the batch with less memory is run.micro_batch=N). Write it into the study and submit that; "
                "retry takes cluster.*, run.* and data.path"
            )
    settings = [word for word in words if word.startswith("cluster.")]
    snapshot.check(dirty)
    client.check_here()
    with _alone(runs) as home:
        found, _ = standings(runs, home, need_queue=True)
        chosen = [one for one in found if one.state in FAILED]
        requests = {}
        for one in chosen:
            if cluster is not None or one.array is None:
                requests[one.run.info["id"]] = queue_of(cluster, one.run.cluster, parallel)
            else:
                given = replace(one.array.cluster, parallel=parallel or one.array.cluster.parallel)
                requests[one.run.info["id"]] = load_over(given, settings)
        return _queue(home, study, found, chosen, requests, client.largest_array())


def load_over(given: ClusterConfig, settings: Sequence[str]) -> ClusterConfig:
    """A cluster with settings `cluster.KEY=…` over it."""
    plain = [f"cluster.{key}={json.dumps(value)}" for key, value in asdict(given).items() if key not in _LISTS]
    made = load("slurm", [*plain, *settings])
    _check(made)
    changed = {text.removeprefix("cluster.").split("=")[0] for text in settings}
    return replace(made, **{key: getattr(given, key) for key in _LISTS if key not in changed})


_LISTS = ("setup", "options")  # free text, which an override would have to quote


@contextmanager
def _alone(runs: Sequence[Planned], new: bool = False) -> Iterator[Path]:
    """Hold the study for this process; gives the folder of its submissions. Raises InputError where there is nothing
    of the study, unless it may be `new`."""
    home = manifest.home_of(runs[0].folder)
    executor.check(home)
    if not new and not home.parent.is_dir():
        raise InputError(
            f"no such folder: {home.parent.absolute()}; nothing of the study ran yet (run.root says where)"
        )
    try:
        home.mkdir(parents=True, exist_ok=True)
        with locked(home):
            yield home
    except OSError as error:  # a full disk, a shared folder that is away
        raise client.SlurmError(f"{error}; the same command goes on from what was queued") from None


def drafts(
    chosen: Sequence[Standing], found: Sequence[Standing], requests: dict[str, ClusterConfig], most: int
) -> list[Draft]:
    """One array for each distinct request, of at most `most` tasks; runs that take the checkpoint of another run come
    in arrays that start after those of their trainers."""
    ids = {str(one.run.folder.resolve()): one.run.info["id"] for one in found}
    going = {one.run.info["id"] for one in chosen}
    running = {one.run.info["id"]: one.array.job for one in found if one.state in ACTIVE and one.array}

    def trainer(one: Standing) -> str | None:
        source = one.run.info.get("source")
        return ids.get(str(Path(source).resolve())) if source and not one.run.ready() else None

    made: list[Draft] = []
    place: dict[str, int] = {}
    for second in (False, True):
        groups: dict[str, list[Standing]] = {}
        for one in chosen:
            if (trainer(one) in going) == second:
                groups.setdefault(json.dumps(asdict(requests[one.run.info["id"]])), []).append(one)
        for group in groups.values():
            cluster = requests[group[0].run.info["id"]]
            for start in range(0, len(group), most):
                part = group[start : start + most]
                trainers = [name for one in part if (name := trainer(one))]
                after = {place[name] for name in trainers if name in place}
                # %N holds within one array: the pieces of one that was too large go one after the other.
                after |= {len(made) - 1} if start and cluster.parallel else set()
                jobs = {job for name in trainers if (job := running.get(name))}
                tasks = [{"info": _absolute(one.run.info), "stages": list(one.run.stages)} for one in part]
                place |= {one.run.info["id"]: len(made) for one in part}
                made.append(Draft(cluster, tasks, tuple(sorted(after)), tuple(sorted(jobs))))
    return made


def _absolute(info: dict[str, Any]) -> dict[str, Any]:
    """A job whose working folder is gone starts in another one, and must not make its runs there."""
    config = info["config"]
    return info | {"config": config | {"run": config["run"] | {"root": str(Path(config["run"]["root"]).resolve())}}}


def batch_file(draft: Draft, name: str, folder: Path, index: int, code: dict[str, Any]) -> str:
    """What sbatch gets for an array of a submission in `folder`."""
    array = manifest.executor_of(folder, index, draft.cluster, name, code["path"])
    return array.batch_file(len(draft.tasks))


def _queue(
    home: Path,
    study: str,
    found: Sequence[Standing],
    chosen: Sequence[Standing],
    requests: dict[str, ClusterConfig],
    most: int,
) -> Submission:
    left: dict[str, int] = {}
    for one in found:
        if one not in chosen:
            left[one.state] = left.get(one.state, 0) + 1
    if not chosen:
        return Submission([], {}, left)
    code = snapshot.freeze(home / "code")
    made = drafts(chosen, found, requests, most)
    written = manifest.write(home, study, made, code)
    queued: list[tuple[manifest.Array, str]] = []
    try:
        for array, job in manifest.queue(written, made, code["path"]):
            queued.append((array, job))
    except client.SlurmError as error:
        raise client.SlurmError(
            f"{error}: {len(queued)} of {len(written)} arrays are queued; "
            "once that is mended, the same command queues the rest"
        ) from None
    return Submission(queued, code, left)


def cancel(runs: Sequence[Planned]) -> list[str]:
    """End every job of the study that is queued or running, also of runs that are not in it any more; what runs saves
    first. Returns the job ids."""
    with _alone(runs) as home:
        submitted = list(manifest.arrays(home))
        tasks = client.live(array.name for array in submitted)
        jobs = sorted({key.split("_")[0] for key in tasks}, key=int)
        if jobs:
            client.patiently("scancel", *jobs)
        return jobs
