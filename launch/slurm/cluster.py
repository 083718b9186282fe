"""Clusters: where a run is done and what it gets there. A cluster is not part of a run's identity."""

import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ...ablations.yaml_file import read_yaml
from ...kernels.errors import InputError, unknown
from ..compose import Override, apply, as_data, plain_error

FOLDER = Path(__file__).parents[1] / "conf" / "cluster"
KINDS = ("local", "slurm")


@dataclass
class ClusterConfig:
    """The content of a cluster file; conf/cluster/example.yaml explains it. Times are in minutes (`_min`) or seconds
    (`_s`), memory in GiB."""

    kind: str = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time_min: int = 60
    cpus: int = 1
    mem_gb: float | None = None  # of the host; null: the cluster's default
    gpus: int = 0  # of each node, with a process for each
    nodes: int = 1
    tasks_per_node: int = 1  # processes of each node, if it has no GPU
    parallel: int | None = None  # runs of one array at a time; null: 256
    queue_at_most: int | None = None  # jobs of this user in the queue; null: as many as the cluster takes
    signal_s: int = 120  # before the time limit
    requeue: bool = True
    setup: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("cluster.kind", self.kind, KINDS)
        positive = ("time_min", "cpus", "mem_gb", "nodes", "tasks_per_node", "parallel", "queue_at_most", "signal_s")
        for name in positive:
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise InputError(f"cluster.{name} must be above 0 and finite, not {value}")
        if self.mem_gb is not None and 1024 * self.mem_gb < 1:
            raise InputError(f"cluster.mem_gb is in GiB: {self.mem_gb} is less than a MiB")  # SLURM: 0 is all
        if self.gpus < 0:
            raise InputError(f"cluster.gpus must be 0 or more, not {self.gpus}")
        if self.gpus and self.tasks_per_node not in (1, self.gpus):
            raise InputError(
                f"cluster.tasks_per_node {self.tasks_per_node} is not cluster.gpus {self.gpus}: leave it out, because "
                "each GPU has one process"
            )
        if self.signal_s >= 60 * self.time_min:
            raise InputError(
                f"cluster.signal_s {self.signal_s} is not before the end of cluster.time_min {self.time_min}: "
                "the run would be told to save as it starts"
            )
        for text in (*self.setup, *self.options):
            if not isinstance(text, str):  # YAML reads `- echo "a: b"` as a mapping
                raise InputError(f"cluster.setup and cluster.options are lines of text, not {text!r}: put it in quotes")
            if not all(line.replace("\t", " ").isprintable() for line in text.split("\n")):
                raise InputError(f"cluster.setup and cluster.options have no control characters, unlike {text!r}")
        for name in ("partition", "account", "qos", "constraint"):
            if (value := getattr(self, name)) is not None and not (value and value.isprintable()):
                raise InputError(f"cluster.{name} is a name without line breaks, not {value!r}")
        for text in self.options:
            if not text.startswith("-") or not text.isprintable() or not _is_shell(text):
                raise InputError(
                    "cluster.options are options of sbatch such as --exclude=node013, each one line with its quotes "
                    f"in pairs, not {text!r}"
                )

    @property
    def on_a_node(self) -> int:
        """The processes of a job on each of its nodes."""
        return self.gpus or self.tasks_per_node


def _is_shell(text: str) -> bool:
    """Whether a text can be split into words as a shell does."""
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return False
    return True


def choices() -> list[str]:
    """The clusters that come with lamabench."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def of_cluster(word: Override) -> bool:
    """Whether an override is a setting of the cluster rather than of the run."""
    return str(word).startswith("cluster.")


def _bare(word: Override) -> Override:
    """An override of a cluster without the word `cluster.` in front."""
    if isinstance(word, str):
        return word.removeprefix("cluster.")
    return replace(word, key=word.key.removeprefix("cluster."))


def split(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The cluster that `cluster=NAME` among overrides names, or None if none does, and the other overrides."""
    named = [word.removeprefix("cluster=") for word in words if word.startswith("cluster=")]
    return (named[-1] if named else None), [word for word in words if not word.startswith("cluster=")]


def load(name: str, settings: Sequence[Override] = ()) -> ClusterConfig:
    """A cluster by name, or from a path that ends in .yaml, with settings such as `cluster.mem_gb=64`.

    Raises InputError, one line, for an unknown name or key, and for a value of the wrong type or out of range.
    """
    return _load(name, tuple(settings))


@lru_cache(maxsize=4096)
def _load(name: str, settings: tuple[Override, ...]) -> ClusterConfig:
    path = Path(os.path.expanduser(name)) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    try:
        data = read_yaml(path)
    except FileNotFoundError:
        raise InputError(f"{unknown('cluster', name, choices())}, or a path to a .yaml file") from None
    node = OmegaConf.structured(ClusterConfig)
    known = [str(key) for key in node]
    if not isinstance(data, dict):
        raise InputError(f"{path}: a cluster is a mapping with the keys {', '.join(known)}")
    for key in data:
        if key not in known:
            raise InputError(f"{path}: {unknown('key', key, known)}")
    try:
        node.merge_with(as_data(data))
        apply(node, [_bare(word) for word in settings], "cluster", data=True)
        return OmegaConf.to_object(node)  # pyright: ignore[reportReturnType]
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: {plain_error(error)}") from None
