"""A run: its folder, its identity and its stages, each done once and recorded."""

import errno
import fcntl
import json
import os
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any

import torch

from ..kernels.errors import InputError, unknown
from ..models import registry
from . import signals
from .config import SECTIONS, BenchConfig, Config, check_fit, micro_batch
from .data.images import load
from .device import pick_device
from .measure.cost import cost
from .measure.models import bench_config
from .measure.search import finished, next_point
from .measure.timing import out_of_memory
from .progress import Progress
from .provenance import provenance
from .record import KINDS, Run, append, entry, identity, read_run, write_atomically
from .sampling import generate_newest
from .signals import Stopped
from .training.loop import Diverged, train

STAGES = KINDS  # cost, train, sample, evaluate, bench: in the order in which they run
FROM_CHECKPOINT = ("sample", "evaluate")


class Busy(RuntimeError):
    """Another process works on the run."""


def config_to_dict(config: Config) -> dict[str, Any]:
    """A configuration as plain data, with the model's family."""
    plain = {f.name: getattr(config, f.name) for f in fields(config)}
    return {
        name: registry.to_dict(value) if name == "model" else value if isinstance(value, int) else asdict(value)
        for name, value in plain.items()
    }


def config_from_dict(data: dict[str, Any]) -> Config:
    """The configuration that `config_to_dict` wrote."""
    made = {name: SECTIONS[name](**value) if name in SECTIONS else value for name, value in data.items()}
    return Config(**made | {"model": registry.from_dict(data["model"])})


def describe(config: Config, *, study: str, name: str, model: str, variant: dict, overrides: Sequence[str]) -> dict:
    """What config.json says of a run; `id` is the hash of its configuration."""
    plain = config_to_dict(config)
    return {
        "id": identity(plain),
        "study": study,
        "name": name,
        "model": model,
        "family": plain["model"]["family"],
        "title": registry.preset(model).title,
        "variant": variant,
        "seed": config.seed,
        "overrides": list(overrides),
        "config": plain,
    }


def folder_of(info: dict[str, Any]) -> Path:
    """Where a run lives: ROOT/STUDY/NAME-ID."""
    return Path(info["config"]["run"]["root"]) / info["study"] / f"{info['name']}-{info['id']}"


def create(info: dict[str, Any]) -> Path:
    """The folder of a run, made if it is not there; a run that exists keeps its records."""
    folder = folder_of(info)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "config.json", json.dumps(info, indent=1).encode())
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run for this process; the lock goes with the process, however it ends. Raises Busy where it is held,
    InputError on a file system without locks."""
    with open(folder / ".lock", "a+") as file:
        if not _lock(file, fcntl.LOCK_EX):
            file.seek(0)
            raise Busy(f"{folder} is being worked on by process {file.read().strip() or '?'}")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process works on the run now."""
    if not (folder / ".lock").is_file():
        return False
    with open(folder / ".lock") as file:
        return not _lock(file, fcntl.LOCK_SH)


def _lock(file: IO[str], kind: int) -> bool:
    """Lock an open file; False where another process holds it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        raise InputError(
            f"the file system of {file.name} has no locks ({error.strerror}), so a run could be done twice: "
            "give a run.root on one that has (Lustre: mounted with -o flock)"
        ) from None
    return True


def check_ready(config: Config) -> None:
    """Raise InputError for what would stop a training run at its start (model and data that do not fit, data that are
    not there, a backend that cannot run), before anything is written."""
    check_fit(config)
    with torch.device("meta"):
        net = registry.build(config.model)
    registry.select_backends(net, vars(config.backend), pick_device(config.run.device).split(":")[0])
    load(config.data)


def missing_stages(run: Run, stages: Sequence[str]) -> list[str]:
    """The stages that are not done, in the order in which they run: those whose newest record says otherwise, and a
    benchmark with a measurement left."""
    for stage in stages:
        if stage not in STAGES:
            raise unknown("stage", stage, STAGES)
    return [stage for stage in STAGES if stage in stages and not _done(run, stage)]


def _done(run: Run, stage: str) -> bool:
    if stage == "bench":
        config = run.info["config"]
        settings, size = BenchConfig(**config["bench"]), config["model"]["input_size"]
        return next_point(settings, size, finished(run.records)) is None
    line = run.last(stage)
    return line is not None and line["state"] == "done"


def execute(folder: Path, stages: Sequence[str], progress: Progress) -> None:
    """Do what is missing of `stages`, one after the other, and record each.

    A stage that fails is a record too, with its error, and its exception goes on. Raises Busy where another process
    holds the run, Stopped where a signal asked for it (signals.py): no record, and the same call continues.
    """
    with locked(folder):
        run = read_run(folder)
        config = config_from_dict(run.info["config"])
        check_fit(config)
        for stage in missing_stages(run, stages):
            signals.check()
            origin = {"provenance": provenance(pick_device(config.run.device))}
            try:
                for row in _STAGES[stage](folder, run.info, config, progress):
                    append(folder / "record.jsonl", entry(stage, **{"state": "done", **row, **origin}))
                    signals.check()
            except Stopped:
                raise
            except Exception as error:
                if signals.asked():  # what the signal tore, such as a compiler's process, is not the run's failure
                    raise Stopped(f"{signals.asked()} during {stage}: {_one_line(error)}") from error
                state, words = _state(error), _one_line(error)
                if (state, stage) == ("oom", "train") and (size := micro_batch(config)) > 1:
                    words += f"; it passed {size} images at a time, fewer (run.micro_batch=N) take less"
                append(folder / "record.jsonl", entry(stage, state, error=words, **origin))
                if not isinstance(error, InputError | Diverged):
                    (folder / "error.log").write_text(traceback.format_exc())
                raise


def _state(error: Exception) -> str:
    if isinstance(error, Diverged):
        return "diverged"
    return "oom" if out_of_memory(error) else "failed"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, InputError | Diverged) else f"{type(error).__name__}: {text}"[:500]


def is_ready(info: dict[str, Any], stages: Sequence[str]) -> bool:
    """Whether the checkpoint that a run takes from another one, its `source`, is there, if its stages take one."""
    if not info.get("source") or not set(stages) & set(FROM_CHECKPOINT):
        return True
    folder = Path(info["source"])
    line = read_run(folder).last("train") if (folder / "config.json").is_file() else None
    return line is not None and line["state"] == "done"


def source_of(info: dict[str, Any], folder: Path) -> Path:
    """The run that was trained: `source` in config.json is the run that another one samples or scores anew."""
    while info.get("source"):
        folder = Path(info["source"])
        info = read_run(folder).info
    return folder


def _cost(folder: Path, info: dict, config: Config, progress: Progress) -> list[dict]:
    return [cost(config.model).as_dict()]


def _train(folder: Path, info: dict, config: Config, progress: Progress) -> list[dict]:
    return [train(folder, config, progress)]


def _sample(folder: Path, info: dict, config: Config, progress: Progress) -> list[dict]:
    return [generate_newest(folder, config, progress, source_of(info, folder))]


def score(samples: Path, config: Config, cache: Path, progress: Progress) -> list[dict]:
    """The rows of `evaluate` for a file of samples against the training images of `config.data`."""
    from .scoring.score import score as score_metrics  # slow to import, and only scoring needs it

    return score_metrics(samples, config, config.evaluate.metrics, cache, progress)


def _evaluate(folder: Path, info: dict, config: Config, progress: Progress) -> list[dict]:
    samples, source = folder / "samples.npz", Path(info.get("source") or folder)
    if not samples.exists() and read_run(source).info["config"]["sample"] == info["config"]["sample"]:
        samples = source / "samples.npz"
    return [{"rows": score(samples, config, Path(config.run.root) / ".cache", progress)}]


def _bench(folder: Path, info: dict, config: Config, progress: Progress) -> Iterable[dict]:
    """Rows as they are measured, so that a killed benchmark goes on where it stopped."""
    here = provenance(pick_device(config.run.device))
    return bench_config(config, progress.say, finished(read_run(folder).records, here))


_STAGES = {"cost": _cost, "train": _train, "sample": _sample, "evaluate": _evaluate, "bench": _bench}
