"""Continuing a training: the moments that it keeps, its checkpoint, and its backends."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...kernels import OPERATORS
from ...kernels.errors import InputError
from ...models import registry
from ..config import Config, averages
from ..device import device_type
from ..diffusion.objective import objective
from ..disk import read_lines
from ..provenance import provenance
from .checkpoint import (
    Checkpoint,
    averages_of,
    check_complete,
    check_data,
    check_model,
    keep,
    load,
    moments,
    nearest,
    newest,
)
from .folder import Position
from .storage import files, of_step

Say = Callable[[str], None]


def asked_moments(config: Config) -> list[int]:
    """The steps whose averaged weights `config.train` keeps, ascending: its snapshots up to `train.steps`, and
    `train.steps`. "Every N images" means the first steps at which k·N images have been seen."""
    settings = config.train
    steps = settings.snapshots
    if isinstance(steps, int):
        images = range(steps, settings.steps * settings.batch_size + 1, steps)
        steps = [-(-seen // settings.batch_size) for seen in images]
    return sorted({settings.steps, *(step for step in steps if step <= settings.steps)})


def unreached(config: Config) -> str:
    """Text about snapshots beyond the end of a training, empty if there are none."""
    settings = config.train
    snapshots, end = settings.snapshots, f"the end, train.steps {settings.steps}"
    if isinstance(snapshots, int):
        seen = settings.steps * settings.batch_size
        return f"train.snapshots {snapshots} keeps only {end}: that is after {seen} images" if snapshots > seen else ""
    late = ", ".join(str(step) for step in snapshots if step > settings.steps)
    return f"train.snapshots {late} will not be kept, beyond {end}" if late else ""


def all_asked(config: Config, more: Sequence[int]) -> list[int]:
    """`asked_moments` and the steps `more`. Raises InputError for a step that the training does not reach."""
    for step in more:
        if not 0 < step <= config.train.steps:
            raise InputError(f"step {step} is asked for, but the training has the steps 1 to {config.train.steps}")
    return sorted({*asked_moments(config), *more})


def missing(folder: Path, asked: Sequence[int]) -> list[int]:
    """The steps in `asked` whose weights a training folder does not have."""
    return sorted(set(asked) - set(moments(folder)))


def continue_from(folder: Path, config: Config, asked: Sequence[int], fingerprint: str, say: Say) -> Checkpoint | None:
    """The newest complete checkpoint of a training folder, None if the folder was never trained.

    Requested moments that a checkpoint has are kept now if they are missing. `say` gets a line about moments that have
    passed without being kept. Raises InputError if the checkpoint is of another model or of other data than
    `fingerprint`, if only such passed moments are missing, and if the folder was trained but has no complete
    checkpoint, because a training never restarts where there are results.
    """
    checkpoints = folder / "checkpoints"
    saved = _newest_complete(checkpoints, config, say)
    steps = moments(folder)
    if saved is None:
        if steps or any(
            (line.get("kind"), line.get("state")) == ("train", "done") for line in read_lines(folder / "record.jsonl")
        ):
            raise InputError(
                f"{folder} was trained, but has no complete checkpoint from which to continue to step "
                f"{asked[-1]}; {nearest(steps, asked[-1])}"
            )
        if files(checkpoints):
            say(f"no earlier checkpoint: training starts again at step 0 of {config.train.steps}")
        return None
    check_data(folder, fingerprint)
    late = [step for step in asked if step <= saved.step and step not in steps]
    whole = {step: of_step(checkpoints, step) for step in late}
    lost = [step for step in late if whole[step] is None]
    for step in lost:
        text = f"step {step} of {folder} was not kept, and the training is at step {saved.step} already"
        if asked[-1] <= saved.step:
            raise InputError(f"{text}; {nearest(steps, step)}")
        say(text)
    for step, path in whole.items():
        if path is None:
            continue
        checkpoint = saved if step == saved.step else load(path)
        keep(folder, averages_of(checkpoint, _loss_at(folder, step)))
    return saved


def _newest_complete(checkpoints: Path, config: Config, say: Say) -> Checkpoint | None:
    metrics = len(objective(config.objective).metrics)
    for saved in newest(checkpoints):
        if not isinstance(saved, InputError):
            check_model(saved, registry.describe(config.model), checkpoints)
            try:
                check_complete(saved, config.model, averages(config.train), metrics, saved.path or checkpoints)
                return saved
            except InputError as error:
                saved = error
        say(f"{saved}; falling back to the one before")
    return None


def _loss_at(folder: Path, step: int) -> float | None:
    """The loss that was logged last, up to a step."""
    losses = [line.get("loss") for line in read_lines(folder / "metrics.jsonl") if line["step"] <= step]
    return losses[-1] if losses else None


def backends_to_ask(config: Config, before: Sequence[dict[str, Any]], device: str, say: Say) -> dict[str, str]:
    """The backend to request for each operator: as configured, but for `auto` that of the last stretch in `before`.

    Raises InputError if that backend cannot run here, unless `run.new_backends` allows another one.
    """
    asked = dict(vars(config.backend))
    for operator, name in ran(before[-1]["backend"]).items() if before else ():
        if asked.get(operator) != "auto":
            continue
        try:
            OPERATORS[operator].resolve(name, device_type(device))
        except InputError as error:
            if not config.run.new_backends:
                raise InputError(
                    f"the training ran {operator}={name}, which cannot run here ({error}); "
                    "run.new_backends=true continues with another one"
                ) from None
            say(f"the training ran {operator}={name}, which cannot run here: continuing with another one")
            continue
        asked[operator] = name
    return asked


def ran(backend: dict[str, str]) -> dict[str, str]:
    """The backends of a stretch, and those of operators that its code had no name for."""
    return {name: op.since for name, op in OPERATORS.items() if op.since is not None} | backend


def with_stretch(
    before: Sequence[dict[str, Any]],
    at: Position,
    backend: dict[str, str],
    compile: str,
    device: str,
    say: Say,
    everyone: Sequence[dict[str, Any]],
    parallel: str = "ddp",
) -> list[dict[str, Any]]:
    """The stretches of a training that continues at a position, with a new one if backends, `compile` (as resolved),
    versions or machines differ. `everyone` are the facts of all processes (`parallel.facts`).

    A stretch of several processes names their number, their hosts, all kinds of devices, and `parallel` (as
    `run.parallel`). From the first such stretch on, each has the seconds of training before it.
    """
    here = provenance(device)
    machine = {key: here[key] for key in ("torch", "commit", "dirty", "device", "host")}
    stretch = {"backend": backend, "compile": compile, **machine}
    if len(everyone) > 1:
        devices, hosts = (list(dict.fromkeys(one[key] for one in everyone)) for key in ("device", "host"))
        stretch |= {"device": ", ".join(devices), "processes": len(everyone), "hosts": hosts}
        stretch |= {"parallel": parallel}
    start = {"from_step": at.step}
    since = {"parallel": "ddp"} if len(everyone) > 1 else {}  # of stretches that do not say it yet
    unmoved = {"from_step": 0, "from_seconds": 0}
    last = {**before[-1], "backend": ran(before[-1]["backend"])} if before else {}
    if before and {**since, **last, **unmoved} == {**stretch, "backend": ran(backend), **unmoved}:
        return list(before)
    if before and before[-1]["commit"] != stretch["commit"]:
        say(f"the code is commit {stretch['commit']} from step {at.step} on; it was {before[-1]['commit']}")
    if before and (now := len(everyone)) != (then := before[-1].get("processes", 1)):
        say(f"the number of processes is {now} from step {at.step} on; it was {then}")
    if any("processes" in one for one in (*before, stretch)):
        start |= {"from_seconds": round(at.seconds, 3)}
    return [*before, {**start, **stretch}]
