"""A training, from its configuration and the state of its folder to its record."""

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...models import plugins, registry
from ...models.registry import Backbone, build, select_backends
from .. import parallel, signals
from ..config import Config, check_fit, micro_batch
from ..data.images import ImageData, load
from ..data.items import batches, check_noise
from ..device import WHOLE_STEP, compiled, device_type, exact_float32, pick_device, training_mode
from ..diffusion.objective import objective
from ..keys import config_from_dict, config_to_dict
from ..measure.cost import cost
from ..progress import Progress
from ..provenance import provenance
from ..record import read_lines, write_lines
from .averaging import averaging
from .checkpoint import Checkpoint, file_name
from .checkpoint import load as load_checkpoint
from .folder import Position, TrainingFolder, record
from .graph import WholeStep
from .resume import all_asked, backends_to_ask, continue_from, missing, with_stretch
from .step import TrainStep
from .steps import Diverged, loop


def train(folder: Path, config: Config, progress: Progress, moments: Sequence[int] = ()) -> dict[str, Any]:
    """Train to `config.train.steps`, from the newest complete checkpoint of the folder if there is one.

    Keeps the averaged weights of the steps `moments`, of `config.train.snapshots` and of the end. Appends to
    metrics.jsonl, saves checkpoints, and returns the fields of the `train` record. Does nothing if every moment is kept
    already. Raises Diverged if the loss is not finite; the last checkpoint before it stays. Raises InputError for data,
    a model, a checkpoint or backends that do not fit, if there is no checkpoint to continue from, and if only moments
    that were not kept are missing (see `continue_from`). Raises Stopped after the step in which a signal came, with a
    checkpoint of that step.
    """
    check_fit(config)
    parallel.check_batch(config.train.batch_size, parallel.size())
    exact_float32()
    asked, device = all_asked(config, moments), parallel.own_device(pick_device(config.run.device))
    flops = cost(config.model).flops
    if not missing(folder, asked):
        return record(folder, config, flops)
    check_noise(config.train, device)
    data = load(config.data, progress.say)
    saved = continue_from(folder, config, asked, data.fingerprint, progress.say)
    if not missing(folder, asked):
        return record(folder, config, flops)
    parallel.call(
        folder=str(folder.absolute()),
        config=config_to_dict(config),
        asked=asked,
        step=saved.step if saved else 0,
        sources=plugins.loaded(),
    )
    with parallel.attending():
        _train(folder, config, asked, device, data, saved, progress)
    return record(folder, config, flops)


class _Quiet(Progress):
    def say(self, text: str) -> None:
        pass


def join(
    folder: str, config: dict[str, Any], asked: Sequence[int], step: int, sources: Sequence[dict[str, str]]
) -> None:
    """What the other processes of a run do in `train` of the first one: the same steps on their parts of the batches,
    from the checkpoint of `step`, without files and messages."""
    with suppress(Diverged, signals.Stopped), parallel.attending():
        try:
            plugins.load_recorded(sources)
            here = config_from_dict(config)
            exact_float32()
            device = parallel.own_device(pick_device(here.run.device))
            data = load(here.data, _Quiet().say)
            saved = load_checkpoint(Path(folder, "checkpoints", file_name(step))) if step else None
        except Exception as error:
            parallel.check(error)
            raise
        _train(Path(folder), here, asked, device, data, saved, _Quiet())


def _train(
    folder: Path,
    config: Config,
    asked: Collection[int],
    device: str,
    data: ImageData,
    saved: Checkpoint | None,
    progress: Progress,
) -> None:
    """The part of `train` that all processes do together. The first one writes the files."""
    before = saved.stretches if saved else []
    with parallel.agreeing():
        net = initial_model(config).to(device)
        backend = select_backends(net, backends_to_ask(config, before, device, progress.say), device_type(device))
    origin = provenance(device)
    code = {key: origin[key] for key in ("torch", "commit", "dirty")}
    everyone = parallel.facts(device, backend=backend, data_fingerprint=data.fingerprint, **code)
    mode = training_mode(config.train.compile, device, parallel.size())
    at = Position() if saved is None else Position(saved.step, saved.seconds, saved.window_start, saved.waited)
    stretches = with_stretch(before, at, backend, mode, device, progress.say, everyone)

    def without_graph(reason: str, start: int = at.step) -> None:
        last = stretches.pop() if stretches[-1]["from_step"] == start else stretches[-1]
        stretches.append({**last, "from_step": start, "compile": "compile"})
        progress.say(f"the step cannot be one CUDA graph ({reason}): it runs compiled, without one")

    step = _step(net, config, device, mode, without_graph if config.train.compile == "auto" else None)
    if saved is not None:
        step.restore(saved)
        progress.say(f"continuing at step {at.step} of {config.train.steps}")
    if data.omissions:
        progress.say(data.omissions)
    files = TrainingFolder(
        folder, step, registry.describe(config.model), data.fingerprint, stretches, config.train.batch_size
    )
    first = parallel.rank() == 0
    if first:
        metrics = folder / "metrics.jsonl"
        write_lines(metrics, [line for line in read_lines(metrics) if line["step"] <= at.window_start])
    loop(
        step,
        batches(data, step.objective, config, step.net.null_class, at.step, device),
        at,
        until=config.train.steps,
        asked=asked,
        run=config.run,
        log=files.log if first else _nothing,
        save=files.save if first else _nothing,
        keep=files.keep if first else _nothing,
        progress=progress,
    )


def _nothing(*arguments: Any) -> None:
    pass


def _step(net: Backbone, config: Config, device: str, mode: str, fallback: Callable[[str], None] | None) -> TrainStep:
    """The step of a training from the weights of a network. `mode` is that of `training_mode`, `fallback` that of
    `WholeStep`."""
    settings = config.train
    net.train()
    net.checkpointing = settings.checkpointing
    size = micro_batch(config, parallel.size())
    passes = settings.batch_size // parallel.size() // size
    return TrainStep(
        net,
        objective(config.objective),
        settings,
        call=averaging(compiled(net, mode), passes),
        device=device,
        micro_batch=size,
        seed=config.seed,
        rank=parallel.rank(),
        graph=partial(WholeStep, fallback=fallback) if mode == WHOLE_STEP else None,
    )


def initial_model(config: Config) -> Backbone:
    """The backbone with initial weights from the run's seed. They are drawn on the CPU, the same for every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build(config.model)
