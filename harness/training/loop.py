"""A training, from its configuration and the state of its folder to its record."""

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

from ...models import plugins, registry
from ...models.registry import Backbone, select_backends
from .. import parallel, signals
from ..caches import keep_compiled
from ..checks import check_batch
from ..config import Config, check_fit, micro_batch
from ..data.encoder import DataSet, load, load_held_out
from ..data.items import batches, check_noise
from ..device import WHOLE_STEP, compiled, device_type, exact_float32, own_device, pick_device, training_mode, wake
from ..diffusion.objective import objective
from ..keys import config_from_dict, config_to_dict
from ..measure.cost import cost
from ..progress import Progress, Quiet
from ..provenance import provenance
from ..scoring.heldout import of_training
from .averaging import WARM_UP, averaging
from .checkpoint import Checkpoint
from .checkpoint import load as load_checkpoint
from .folder import Position, TrainingFolder, record
from .graph import WholeStep
from .loggers import check_loggers
from .logs import Log, peak_of
from .resume import all_asked, backends_to_ask, continue_from, missing, with_stretch
from .sharding import assembled, passes, shard, sharded_mode
from .start import Start, initial_model
from .step import TrainStep
from .steps import Diverged, freeing, loop


def train(folder: Path, config: Config, progress: Progress, moments: Sequence[int] = ()) -> dict[str, Any]:
    """Train to `config.train.steps`, from the newest complete checkpoint of the folder if there is one.

    Keeps the averaged weights of the steps `moments`, of `config.train.snapshots` and of the end. Appends to
    metrics.jsonl, saves checkpoints, and returns the fields of the `train` record. Does nothing if every moment is kept
    already. Raises Diverged if the loss is not finite; the last checkpoint before it stays. Raises InputError for data,
    a model, a checkpoint or backends that do not fit, if there is no checkpoint to continue from, and if only moments
    that were not kept are missing (see `continue_from`). Raises Stopped after the step in which a signal came, with a
    checkpoint of that step.
    """
    start = Start()
    check_fit(config)
    check_loggers(config.run.log_to)
    check_batch(config.train.batch_size, parallel.size())
    exact_float32()
    asked, device = all_asked(config, moments), own_device(pick_device(config.run.device))
    if parallel.size() == 1:  # several processes set theirs up in own_device
        wake(device)
    price = cost(config.model)
    start.part("cost")
    if not missing(folder, asked):
        return record(folder, config, price.flops)
    check_noise(config.train, device)
    data = load(config, progress.say)
    saved = continue_from(folder, config, asked, data.fingerprint, progress.say)
    start.part("data")
    if not missing(folder, asked):
        return record(folder, config, price.flops)
    parallel.call(
        "train",
        folder=str(folder.absolute()),
        config=config_to_dict(config),
        asked=asked,
        saved=str(saved.path.absolute()) if saved and saved.path else None,
        sources=plugins.loaded(),
    )
    with parallel.attending("train"):
        _train(folder, config, asked, device, data, saved, progress, start, price.macs)
    return record(folder, config, price.flops)


def join(
    folder: str, config: dict[str, Any], asked: Sequence[int], saved: str | None, sources: Sequence[dict[str, str]]
) -> None:
    """What the other processes of a run do in `train` of the first one: the same steps on their parts of the batches,
    from the checkpoint `saved`, without messages and, unless the training is in shards, without files."""
    start = Start()
    with suppress(Diverged, signals.Stopped), parallel.attending("train"):
        try:
            plugins.load_recorded(sources)
            here = config_from_dict(config)
            exact_float32()
            device = own_device(pick_device(here.run.device))
            keep_compiled(here.run.root, device)
            data = load(here, Quiet().say)
            before = load_checkpoint(Path(saved), tensors=not _sharded(here)) if saved else None
        except Exception as error:
            parallel.check(error)
            raise
        _train(Path(folder), here, asked, device, data, before, Quiet(), start)


def _train(
    folder: Path,
    config: Config,
    asked: Collection[int],
    device: str,
    data: DataSet,
    saved: Checkpoint | None,
    progress: Progress,
    start: Start,
    macs: int = 0,
) -> None:
    """What all processes do together in `train`. The first knows the `macs` of a forward pass and writes files."""
    before = saved.stretches if saved else []
    with parallel.agreeing():
        net = initial_model(config)
        test = load_held_out(config, data.class_names, progress.say) if config.run.heldout_every else None
        backend = select_backends(net, backends_to_ask(config, before, device, progress.say), device_type(device))
    origin = provenance(device)
    code = {key: origin[key] for key in ("torch", "commit", "dirty")}
    everyone = parallel.facts(device, backend=backend, data_fingerprint=data.fingerprint, **code)
    mode = (sharded_mode if _sharded(config) else training_mode)(config.train.compile, device)
    at = Position() if saved is None else Position(saved.step, saved.seconds, saved.window_start, saved.waited)
    stretches = with_stretch(before, at, backend, mode, device, progress.say, everyone, config.run.parallel)

    def without_graph(reason: str, start: int = at.step) -> None:
        last = stretches.pop() if stretches[-1]["from_step"] == start else stretches[-1]
        stretches.append({**last, "from_step": start, "compile": "compile"})
        progress.say(f"the step cannot be one CUDA graph ({reason}): it runs compiled, without one")

    step = _step(net, config, device, mode, without_graph if config.train.compile == "auto" else None)
    if saved is not None:
        step.restore(saved)
        saved.tensors = {}  # the memory of another state
        progress.say(f"continuing at step {at.step} of {config.train.steps}")
    if data.omissions:
        progress.say(data.omissions)
    files = TrainingFolder(
        folder, step, registry.describe(config.model), data.fingerprint, stretches, config.train.batch_size
    )
    peak = peak_of((one["device"] for one in everyone), config.train.precision)
    first, writes = parallel.rank() == 0, parallel.rank() == 0 or _sharded(config)

    def preview(at: Position) -> None:
        net = assembled(cast(Backbone, step.ema.net), device)
        if log is not None and net is not None:
            log.preview(at, net)

    logs = Log(files, config, data, at, macs=macs, peak=peak, say=progress.say) if first else nullcontext()
    with freeing(step), logs as log:
        loop(
            step,
            batches(data, step.objective, config, step.net.null_class, at.step, device),
            at,
            until=config.train.steps,
            asked=asked,
            run=config.run,
            log=log.line if log else _nothing,
            save=files.save if writes else _nothing,
            keep=files.keep if writes else _nothing,
            preview=preview,
            heldout=partial(of_training, step, test, config, device, _sharded(config)),
            start=start,
            progress=progress,
        )


def _sharded(config: Config) -> bool:
    """Whether weights lie in shards. One process has them whole."""
    return config.run.parallel == "fsdp" and parallel.size() > 1


def _nothing(*arguments: Any) -> None:
    pass


def _step(net: Backbone, config: Config, device: str, mode: str, fallback: Callable[[str], None] | None) -> TrainStep:
    """The step of a training from the weights of a network on the CPU. `mode` is that of `training_mode` or
    `sharded_mode`, `fallback` that of `WholeStep`."""
    settings = config.train
    net.train()
    net.checkpointing = settings.checkpointing
    size = micro_batch(config, parallel.size())
    count = settings.batch_size // parallel.size() // size
    together: dict[str, Any] = {"warm_up": WARM_UP, "most": parallel.most} if parallel.size() > 1 else {}
    if _sharded(config):
        shard(net, device, mode)
        call = passes(net, count)
    else:
        call = averaging(net, compiled(net.to(device), mode), count)
    return TrainStep(
        net,
        objective(config.objective),
        settings,
        call=call,
        device=device,
        micro_batch=size,
        seed=config.seed,
        rank=parallel.rank(),
        graph=partial(WholeStep, fallback=fallback, **together) if mode == WHOLE_STEP else None,
    )
