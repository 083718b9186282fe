"""Clusters: where a run is done and what it gets there. A cluster is not part of a run's identity.

A stage may ask for other resources than the rest of a run: `cluster.stage.evaluate.gpus=0`.
"""

import math
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ...ablations.study import STAGES, Setting
from ...ablations.yaml_file import read_yaml
from ...kernels.errors import InputError, unknown
from ..compose import Override, apply, plain_error

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


# What a stage may ask for by itself.
OF_STAGE = tuple(one.name for one in fields(ClusterConfig) if one.name not in ("kind", "queue_at_most"))


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
    mapping = isinstance(word, Setting) and word.key == "cluster" and isinstance(word.value, dict)
    return mapping or str(word).startswith("cluster.")


def flat(word: Override) -> Iterator[Override]:
    """A setting of a cluster as settings of single keys: a study or a cluster file may have a mapping of several."""
    if isinstance(word, Setting) and isinstance(word.value, dict) and len(word.key.split(".")) < 4:
        for name, value in word.value.items():
            yield from flat(Setting(f"{word.key}.{name}", value))
    else:
        yield word


def _key(word: Override) -> str:
    return word.partition("=")[0] if isinstance(word, str) else word.key


def _renamed(word: Override, key: str) -> Override:
    """The same value for another key."""
    return key + word.removeprefix(_key(word)) if isinstance(word, str) else replace(word, key=key)


def _by_stage(words: Sequence[Override]) -> dict[str | None, list[Override]]:
    """Settings by the stage that they are for; None: for every stage. Raises InputError for an unknown stage or key."""
    result: dict[str | None, list[Override]] = {None: []}
    for word in (one for several in words for one in flat(several)):
        word = _renamed(word, key := _key(word).removeprefix("cluster."))
        first, *rest = key.split(".")
        if first != "stage":
            result[None].append(word)
            continue
        if rest and rest[0] not in STAGES:
            raise unknown("stage in cluster.stage", rest[0], STAGES)
        if len(rest) < 2:
            stage = rest[0] if rest else "STAGE"
            raise InputError(f"cluster.{key} is a section; set a key of a stage, such as cluster.stage.{stage}.gpus=0")
        if (name := ".".join(rest[1:])) not in OF_STAGE:
            raise unknown(f"key in cluster.stage.{rest[0]}", name, OF_STAGE)
        result.setdefault(rest[0], []).append(_renamed(word, name))
    return result


def split(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The cluster that `cluster=NAME` among overrides names, or None if none does, and the other overrides."""
    named = [word.removeprefix("cluster=") for word in words if word.startswith("cluster=")]
    return (named[-1] if named else None), [word for word in words if not word.startswith("cluster=")]


def load(name: str, settings: Sequence[Override] = (), stage: str | None = None) -> ClusterConfig:
    """A cluster by name, or from a path that ends in .yaml, with settings such as `cluster.mem_gb=64`. With `stage`,
    what the jobs of that stage get: its own settings (`cluster.stage.evaluate.gpus=0`) go before the others.

    Raises InputError, one line, for an unknown name, stage or key, and for a value of the wrong type or out of range,
    of any stage.
    """
    for one in STAGES:
        _load(name, tuple(settings), one)
    return _load(name, tuple(settings), stage)


@lru_cache(maxsize=4096)
def _load(name: str, settings: tuple[Override, ...], stage: str | None) -> ClusterConfig:
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
        if key not in (*known, "stage"):
            raise InputError(f"{path}: {unknown('key', key, [*known, 'stage'])}")
    try:
        of_file = _by_stage([Setting("cluster.stage", data.pop("stage"))] if data.get("stage") is not None else [])
        # `setup:` above lines that are all comments is null.
        lines = {key: [] for key in ("setup", "options") if data.get(key, "") is None}
        apply(node, [Setting(key, value) for key, value in {**data, **lines}.items() if key != "stage"], data=True)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    words = _by_stage(settings)
    own = [*of_file.get(stage, []), *words.get(stage, [])] if stage is not None else []
    try:
        apply(node, words[None], "cluster", data=True)
        if any(_key(word) == "gpus" for word in own):
            node.tasks_per_node = 1  # that of the other stages may be the number of their GPUs
        apply(node, own, f"cluster.stage.{stage}", data=True)
        return OmegaConf.to_object(node)  # pyright: ignore[reportReturnType]
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: {plain_error(error)}") from None
    except InputError as error:
        if not own or str(error).startswith("cluster.stage."):
            raise
        raise InputError(f"stage {stage}: {error}") from None
