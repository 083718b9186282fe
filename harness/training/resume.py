"""Going on: which moments a training keeps, from where it continues, and with which backends."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...kernels import OPERATORS
from ...kernels.errors import InputError
from ...models import registry
from ..config import Config
from ..device import device_type
from ..provenance import provenance
from ..record import read_lines
from .checkpoint import (
    Checkpoint,
    check_data,
    check_model,
    file_name,
    files,
    keep,
    load,
    moments,
    nearest,
    newest,
    weights_of,
)

Say = Callable[[str], None]


def asked_moments(config: Config) -> list[int]:
    """The steps of which `config.train` keeps the averaged weights, ascending: its snapshots up to `train.steps`, and
    that one. Every N images are the steps by which k·N images were seen."""
    settings = config.train
    steps = settings.snapshots
    if isinstance(steps, int):
        images = range(steps, settings.steps * settings.batch_size + 1, steps)
        steps = [-(-seen // settings.batch_size) for seen in images]
    return sorted({settings.steps, *(step for step in steps if step <= settings.steps)})


def all_asked(config: Config, more: Sequence[int]) -> list[int]:
    """`asked_moments` and `more` steps. Raises InputError for one that the training does not reach."""
    for step in more:
        if not 0 < step <= config.train.steps:
            raise InputError(f"step {step} is asked for, but the training has the steps 1 to {config.train.steps}")
    return sorted({*asked_moments(config), *more})


def missing(folder: Path, asked: Sequence[int]) -> list[int]:
    """The moments asked for that a training folder does not keep."""
    return sorted(set(asked) - set(moments(folder)))


def continue_from(folder: Path, config: Config, asked: Sequence[int], fingerprint: str, say: Say) -> Checkpoint | None:
    """The newest whole checkpoint of a training folder; None where it was never trained.

    Moments asked for that a checkpoint holds are kept, should they not be yet; one that went by is said. Raises
    InputError where it is of another model or of other data than `fingerprint`, where such a moment is all that is left
    to ask for, and where the folder was trained but has no whole checkpoint: training never begins anew below what is
    there.
    """
    checkpoints = folder / "checkpoints"
    saved = _newest_whole(checkpoints, say)
    kept = moments(folder)
    if saved is None:
        if kept or any(
            (line.get("kind"), line.get("state")) == ("train", "done") for line in read_lines(folder / "record.jsonl")
        ):
            raise InputError(
                f"{folder} was trained, but has no whole checkpoint any more to go on from to step "
                f"{asked[-1]}; {nearest(kept, asked[-1])}"
            )
        if files(checkpoints):
            say(f"no checkpoint before it: training begins anew at step 0 of {config.train.steps}")
        return None
    check_model(saved, registry.describe(config.model), checkpoints)
    check_data(folder, fingerprint)
    late = [step for step in asked if step <= saved.step and step not in kept]
    lost = [step for step in late if not (checkpoints / file_name(step)).is_file()]
    for step in lost:
        text = f"step {step} of {folder} was not kept, and the training is at step {saved.step} already"
        if asked[-1] <= saved.step:
            raise InputError(f"{text}; {nearest(kept, step)}")
        say(text)
    for step in late:
        if step in lost:
            continue
        whole = saved if step == saved.step else load(checkpoints / file_name(step))
        keep(folder, weights_of(whole, loss=_loss_at(folder, step)))
    return saved


def _newest_whole(checkpoints: Path, say: Say) -> Checkpoint | None:
    for saved in newest(checkpoints):
        if not isinstance(saved, InputError):
            return saved
        say(f"{saved}; falling back to the one before")
    return None


def _loss_at(folder: Path, step: int) -> float | None:
    """The loss that was logged at a step, or last before it."""
    losses = [line["loss"] for line in read_lines(folder / "metrics.jsonl") if line["step"] <= step]
    return losses[-1] if losses else None


def backends_to_ask(config: Config, before: Sequence[dict[str, Any]], device: str, say: Say) -> dict[str, str]:
    """The backend of each operator to ask for: as configured, but `auto` is what the last stretch `before` ran.

    Raises InputError where that cannot run here, unless `run.new_backends` allows another one.
    """
    asked = dict(vars(config.backend))
    for operator, name in (before[-1]["backend"] if before else {}).items():
        if asked.get(operator) != "auto":
            continue
        try:
            OPERATORS[operator].resolve(name, device_type(device))
        except InputError as error:
            if not config.run.new_backends:
                raise InputError(
                    f"the training ran {operator}={name}, which cannot run here ({error}); "
                    "run.new_backends=true goes on with another one"
                ) from None
            say(f"the training ran {operator}={name}, which cannot run here: going on with another one")
            continue
        asked[operator] = name
    return asked


def with_stretch(
    before: Sequence[dict[str, Any]], step: int, backend: dict[str, str], device: str, say: Say
) -> list[dict[str, Any]]:
    """The stretches of a training that goes on at `step`: one more where backends, versions or the machine differ."""
    here = provenance(device)
    now = {"backend": backend, **{key: here[key] for key in ("torch", "commit", "dirty", "device", "host")}}
    if before and {**before[-1], "from_step": 0} == {"from_step": 0, **now}:
        return list(before)
    if before and before[-1]["commit"] != now["commit"]:
        say(f"the code is commit {now['commit']} from step {step} on; it was {before[-1]['commit']}")
    return [*before, {"from_step": step, **now}]
