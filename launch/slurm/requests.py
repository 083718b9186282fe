"""What the job of each stage asks a cluster for: of every task that a submit may queue."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace

from ...ablations.study import Setting
from ...harness.checks import check_batch
from ...kernels.errors import InputError
from ..compose import Override
from ..plan import Piece
from .cluster import ClusterConfig, choices, load

Requests = Mapping[tuple[str, str], Mapping[str, ClusterConfig]]  # of each stage of a task, by kind and key


def queue_of(
    name: str | None, settings: Sequence[Override], parallel: int | None, stage: str | None = None
) -> ClusterConfig:
    """The cluster by name, as a stage asks for it. Raises InputError if it has no queue."""
    if name is None:
        raise InputError(
            f"name the cluster to submit to: cluster=NAME; choices: {', '.join(choices())}, or a .yaml file"
        )
    cluster = load(name, settings, stage)
    if cluster.kind != "slurm":
        raise InputError(f"cluster {name} has no queue: lamabench sweep run works on this machine")
    return replace(cluster, parallel=parallel) if parallel else cluster


def requests_of(pieces: Sequence[Piece], name: str | None, parallel: int | None) -> Requests:
    """What each stage asks for by the settings of its study and of the command. Raises InputError as `queue_of`."""
    return {
        piece.id: {stage: queue_of(name, piece.cluster, parallel, stage) for stage in piece.task.stages}
        for piece in pieces
    }


def load_over(given: ClusterConfig, settings: Sequence[str], stage: str | None = None) -> ClusterConfig:
    """A cluster, changed by settings `cluster.KEY=…` and, of a stage, `cluster.stage.STAGE.KEY=…`."""
    words = (Setting(f"cluster.{key}", value) for key, value in asdict(given).items())
    return load("slurm", [*words, *settings], stage)


def check_requests(pieces: Sequence[Piece], requests: Requests) -> None:
    """Raise InputError for a training whose batch the processes of its job cannot share, and for a stage without a GPU
    in a run that asks for one, by name and for other stages."""
    for piece in pieces:
        asked = requests.get(piece.id, {})
        if (train := asked.get("train")) is not None:
            try:
                check_batch(piece.task.config["train"]["batch_size"], train.nodes * train.on_a_node)
            except InputError as error:
                count = "gpus" if train.gpus else "tasks_per_node"
                raise InputError(f"{piece.name}: {error}: cluster.{count} and cluster.nodes decide") from None
    every = [one for asked in requests.values() for one in asked.values()]
    for piece in pieces:
        for stage, one in requests.get(piece.id, {}).items():
            device = piece.task.config["run"]["device"]
            if not one.gpus and stage != "cost" and device.startswith("cuda") and any(other.gpus for other in every):
                raise InputError(
                    f"{piece.name}: run.device={device}, but stage {stage} has no GPU (cluster.stage.{stage}.gpus=0): "
                    "with run.device=auto, each stage takes what its job has"
                )


def idle(pieces: Sequence[Piece], requests: Requests) -> Iterator[str]:
    """A line for each stage that works in one process and asks for several."""
    several: dict[tuple[str, int], str] = {}
    for piece in pieces:
        for stage, one in requests.get(piece.id, {}).items():
            if stage in ("cost", "evaluate", "bench") and one.nodes * one.on_a_node > 1:
                several.setdefault((stage, one.nodes * one.on_a_node), piece.run)
    for (stage, count), run in several.items():
        yield (
            f"{run}: stage {stage} works in one process and asks for {count}; "
            f"cluster.stage.{stage}.gpus, .nodes and .tasks_per_node ask for fewer"
        )
