"""The held-out loss: the error of a network's prediction on images that its training has never seen, as MLPerf's
text-to-image benchmark measures how far a training is. It needs weights and no samples.

An image is corrupted at each of eight fixed timesteps with noise that follows from its index and the timestep alone,
the same for every training. The error is the objective's `error`, a mean over elements: of DDPM, the mean square error
of the predicted noise, without the variational term. A network that predicts 0 has a loss of 1 there, the variance of
the noise. Of v-prediction and flow matching it is the mean square error of v and of the velocity, so that losses of
different objectives do not compare; they have different protocols.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from ...kernels.errors import InputError
from ...models.registry import Backbone, build, select_backends
from .. import parallel, signals
from ..config import Config
from ..data.encoder import DataSet, encoder, load, load_held_out
from ..data.items import epoch_order
from ..device import autocast, device_type, exact_float32, pick_device
from ..diffusion.guidance import Net
from ..diffusion.objective import READERS, Objective, objective
from ..keys import encoder_facts
from ..progress import Progress
from ..random import Generators, Stream
from ..released import training_facts
from ..training.checkpoint import check_data, load_weights
from ..training.sharding import assembled
from .sampling_error import of_values

if TYPE_CHECKING:
    from ..training.step import TrainStep

NAME = "held-out loss"
TIMES = 8
SEED = 0  # of the noise and of the choice of images


def times_at_once(side: int) -> int:
    """How many timesteps are in one pass of images with this side: fewer of large images, which fill the memory, and
    more of small ones, for which the host would start kernels too slowly."""
    return next(many for many in (8, 4, 2, 1) if many == 1 or many * side**2 <= 64**2)


@torch.no_grad()
def heldout_losses(
    net: Net,
    goal: Objective,
    images: DataSet,
    config: Config,
    device: str,
    *,
    together: bool = False,
    on_batch: Callable[[int, int], object] | None = None,
) -> tuple[dict[float, float], float | None]:
    """The mean error over `evaluate.heldout_count` images (all if there are fewer) at each of `TIMES` timesteps t, as
    {t: loss}; and the standard error of their mean from the choice of the images, None for a single image.

    `net` is on `device` and in eval mode. It gets the labels of the images, a fixed random choice, and runs with the
    training's precision. With `together`, all processes of the run call this, each takes a part of the batches, and
    each gets the same result as one process would, or raises Stopped if a signal came to one of them. After each batch
    `on_batch(done, total)` counts images, and may raise Stopped. `evaluate.batch_size` changes the result by rounding.
    Leaves torch's random state alone.
    """
    encoding, size = encoder(config.encoder), config.evaluate.batch_size
    times, chosen = goal.times(TIMES), epoch_order(SEED, 0, len(images))[: config.evaluate.heldout_count]
    starts = range(0, len(chosen), size)
    generators = Generators(SEED, Stream.HELD_OUT)
    sums: list[tuple[list[float], list[float]]] = []  # of each batch: the sums at each t, and the mean of each image
    stopped = suppress(signals.Stopped) if together else nullcontext()  # all of them raise it below
    with parallel.agreeing() if together else nullcontext(), stopped:
        for start in starts[parallel.rank() :: parallel.size()] if together else starts:
            part = chosen[start : start + size]
            clean, labels = encoding.inputs(images, part, part.tolist(), SEED), torch.from_numpy(images.labels[part])
            drawn, row = np.empty((TIMES, *clean.shape), dtype=np.float32), []
            for number in range(TIMES):
                for place, image in enumerate(part.tolist()):
                    generators.at(image * TIMES + number).standard_normal(dtype=np.float32, out=drawn[number, place])
            for first in range(0, TIMES, many := times_at_once(clean.shape[-1])):
                noise = torch.tensor(drawn[first : first + many], device=device).flatten(0, 1)
                x0 = clean.to(device).repeat(many, 1, 1, 1)
                t = torch.tensor(times[first : first + many], device=device).repeat_interleave(len(part))
                x_t = goal.corrupt(x0, t, noise)
                with autocast(device, config.train.precision):
                    out = net(x_t, t, labels.to(device).repeat(many))
                row.append(goal.loss(out.float(), x0, x_t, t, noise)[goal.error].double().view(many, -1))
            errors = torch.cat(row)
            sums.append((errors.sum(1).tolist(), errors.mean(0).tolist()))
            if on_batch is not None:
                on_batch(start + len(part), len(chosen))
    if together and parallel.stopping():
        signals.check()
    rows = [row for part in (parallel.gather(sums) if together else [sums]) for row in part]
    of_images = np.sort([value for _, values in rows for value in values])  # equal for any number of processes
    losses = {time: math.fsum(row[i] for row, _ in rows) / len(chosen) for i, time in enumerate(times)}
    return losses, of_values(of_images) if len(of_images) > 1 else None


def mean(losses: Mapping[float, float]) -> float:
    """The mean over the timesteps."""
    return math.fsum(losses.values()) / len(losses)


def of_training(
    step: "TrainStep", images: DataSet | None, config: Config, device: str, sharded: bool
) -> dict[str, float | None]:
    """The loss of a training's averaged weights as fields of a line of metrics: `heldout_loss`, the mean, and
    `heldout_loss_1` … of each timestep; None for what is not finite. All processes call this and share the work. If
    weights are `sharded`, the first process does it, and the others have no fields. Raises Stopped after the batch in
    which a signal came."""
    averaged = cast(Backbone, step.ema.net)
    net = assembled(averaged, device) if sharded else averaged
    if net is None or images is None:
        return {}

    def on_batch(done: int, total: int) -> None:
        parallel.heed()

    losses, _ = heldout_losses(net, step.objective, images, config, device, together=not sharded, on_batch=on_batch)
    values = {"heldout_loss": mean(losses)}
    values |= {f"heldout_loss_{number}": loss for number, loss in enumerate(losses.values(), start=1)}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def score_weights(training: Path, config: Config, step: int, progress: Progress) -> dict[str, Any]:
    """The fields of a score: the held-out loss of `sample.weights` of a step in the folder `training`.

    Raises InputError for data without a test split, for other data than the training had, for weights that are not
    there, and if the loss is not finite.
    """
    from .reference import short_hash  # with the networks of features, which a training does not need

    exact_float32()
    device, kind = pick_device(config.run.device), config.sample.weights
    data = load(config, progress.say)
    check_data(training, data.fingerprint)
    images = load_held_out(config, data.class_names, progress.say)
    weights = load_weights(training, step, kind, config.model)
    net = build(config.model)
    net.load_state_dict(weights.tensors)
    net = net.to(device).eval()
    select_backends(net, vars(config.backend), device_type(device))
    goal = objective(config.objective)

    def on_batch(done: int, total: int) -> None:
        progress.update("evaluate", done, total)
        signals.check()

    losses, error = heldout_losses(net, goal, images, config, device, on_batch=on_batch)
    if not math.isfinite(mean(losses)):
        raise InputError(f"the {NAME} of step {step} is not finite")
    count, name = min(config.evaluate.heldout_count, len(images)), config.objective.kind
    evaluation = {
        "metric": NAME,
        # Not the distribution of t in training, because t is fixed here.
        "objective": {"kind": name} | ({"schedule": config.objective.schedule} if name in READERS["schedule"] else {}),
        "error": goal.error,
        "timesteps": list(losses),
        "seed": SEED,
        "weights": kind,
        "precision": config.train.precision,
        "encoder": encoder_facts(config.encoder),
        "classes": config.data.num_classes,
        "images": [images.size, images.size, images.channels],  # of a folder, the fingerprint is of the files
        "count": count,
        "reference": {"name": images_name(config), "fingerprint": images.fingerprint},
    }
    return {
        "metric": NAME,
        "value": mean(losses),
        "sampling_error": error,
        "by_timestep": {f"{time:g}": loss for time, loss in losses.items()},
        "count": count,
        "reference": images_name(config),
        "data_fingerprint": images.fingerprint,
        "evaluation": evaluation,
        "protocol": short_hash(evaluation, 8),
        "checkpoint_step": step,
        "weights": kind,
        "weights_error": weights.error,
        **training_facts(config, step, weights.seconds),
    }


def images_name(config: Config) -> str:
    """The name of the test split in tables, such as `cifar10 test`."""
    return f"{config.data.name or config.data.kind} test"
