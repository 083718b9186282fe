"""Tasks: what one folder is asked for, and how a configuration becomes tasks. `stages.py` does them.

Cost and speed belong to a model, once for all seeds. A training keeps the weights of some moments (steps). Samples
belong to one moment and include their scores.
"""

from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..kernels.errors import InputError, unknown
from .config import Config
from .guide import check_weights, resolved
from .keys import config_to_dict, model_folder, model_key, samples_key, training_folder, training_key
from .moments import asked_moments, sample_sets
from .record import read_records

STAGES = ("cost", "train", "sample", "evaluate", "bench")  # in the order in which they run
KINDS = {"cost": "model", "bench": "model", "train": "training", "sample": "samples", "evaluate": "samples"}


@dataclass(frozen=True)
class Task:
    """What one folder is asked for: plain data, so that a manifest can hold it.

    kind      model, training or samples, and its `key`
    about     what config.json says beside the configuration: study, name, variant, seed, model, family, title
    config    the whole configuration; for a training, with the largest `train.steps` that was asked for
    stages    the stages that are asked for, out of `STAGES`
    moments   of a training: the steps whose weights are kept
    training, step, metrics   of samples: where their weights lie, and the scores that are asked for
    plans     of a model: sections `bench`, each with its `backend`
    reference of samples in a job: the SHA-256 of the file `evaluate.reference` when it was queued; empty: any
    """

    kind: str
    key: str
    folder: str
    about: dict[str, Any]
    config: dict[str, Any]
    stages: tuple[str, ...]
    moments: tuple[int, ...] = ()
    training: str = ""
    step: int = 0
    metrics: tuple[str, ...] = ()
    plans: tuple[dict[str, Any], ...] = ()
    reference: str = ""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Task":
        """The task from the plain data that `asdict` gives."""
        lists: dict[str, Any] = {name: tuple(data[name]) for name in ("stages", "moments", "metrics", "plans")}
        return cls(**{**data, **lists})

    @property
    def path(self) -> Path:
        return Path(self.folder)


def tasks(
    config: Config,
    about: dict[str, Any],
    stages: Sequence[str],
    training: Path | None = None,
    moments: Sequence[int] | None = None,
) -> list[Task]:
    """What a configuration asks for: one task for each folder, in the order in which they can be done.

    `training` is the folder of a training that already exists in another root, and `moments` are those that it has, at
    which `sample.curve_count` images are drawn (None: those that are asked for). Raises InputError for an unknown
    stage, for samples whose guide does not fit (`guide.resolved`), and for those that are to be drawn if the weights
    of their guide are gone: drawn ones need them no more.
    """
    for stage in stages:
        if stage not in STAGES:
            raise unknown("stage", stage, STAGES)
    if "samples" in (KINDS[stage] for stage in stages):
        config = resolved(config, moments)
    root, plain, result = Path(config.run.root), config_to_dict(config), []

    def of(kind: str) -> tuple[str, ...]:
        return tuple(stage for stage in STAGES if stage in stages and KINDS[stage] == kind)

    if of("model"):
        plan = {"bench": plain["bench"], "backend": plain["backend"]}
        folder, key = str(model_folder(root, config.model)), model_key(config.model)
        plans = (plan,) if "bench" in stages else ()
        result.append(Task("model", key, folder, about, plain, of("model"), plans=plans))
    home = training_folder(root, config)
    if of("training"):
        kept = tuple(asked_moments(config))
        result.append(Task("training", training_key(config), str(home), about, plain, of("training"), kept))
    metrics = tuple(dict.fromkeys(config.evaluate.metrics)) if "evaluate" in stages else ()
    for step, count in sample_sets(config, moments) if of("samples") else ():
        one = replace(config, sample=replace(config.sample, count=count, curve_count=None))
        key, content = samples_key(one, step), plain | {"sample": asdict(one.sample)}
        where = {"training": str(training or home), "step": step, "metrics": metrics}
        result.append(Task("samples", key, str(home / "samples" / key), about, content, of("samples"), **where))
        if config.sample.guide is not None and "sample" in stages and not _is_drawn(result[-1].path):
            check_weights(config)
    return result


def _is_drawn(folder: Path) -> bool:
    with suppress(InputError, OSError):  # of a damaged record, which is said elsewhere
        return any(row.kind == "sample" and row.state == "done" for row in read_records(folder / "record.jsonl"))
    return False


def merged(several: Iterable[Task]) -> list[Task]:
    """The tasks of several configurations, one for each folder, with everything that any of them asks for. Tasks keep
    the order in which they first appear."""
    known: dict[tuple[str, str], Task] = {}
    for task in several:
        other = known.get((task.kind, task.key), task)
        config = max((other, task), key=lambda one: one.config["train"]["steps"]).config
        if any(one.config["sample"].get("keep") != "features" for one in (other, task)):
            config = config | {"sample": {**config["sample"], "keep": "images"}}
        plans = (*other.plans, *task.plans)
        unions = {
            "stages": tuple(stage for stage in STAGES if stage in (*other.stages, *task.stages)),
            "moments": tuple(sorted({*other.moments, *task.moments})),
            "metrics": tuple(dict.fromkeys((*other.metrics, *task.metrics))),
            "plans": tuple(plan for n, plan in enumerate(plans) if plan not in plans[:n]),
        }
        known[task.kind, task.key] = replace(other, config=config, **unions)
    return list(known.values())


def only(task: Task, stages: Container[str]) -> Task:
    """A task without its other stages, and without what only these need."""
    return replace(
        task,
        stages=tuple(stage for stage in task.stages if stage in stages),
        metrics=task.metrics if "evaluate" in stages else (),
        plans=task.plans if "bench" in stages else (),
    )
