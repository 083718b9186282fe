"""Repeating the steps before a loss that jumped or was not finite, from a snapshot (failures.py):

    python -m lamabench.harness.training.replay RUN/failures/step-00000123

It runs the network eagerly in one process, so that losses are those of the training except for rounding. The masks of
dropout are those of each process of the training, but others if its network was compiled.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...kernels.errors import InputError
from ...models import plugins
from ...models.registry import select_backends
from ..config import Config
from ..data.encoder import load as load_data
from ..data.items import batches, epoch_order
from ..device import device_type, exact_float32, pick_device
from ..diffusion.objective import Objective, objective
from ..keys import config_of
from ..run import read_info, read_json
from .checkpoint import check_data
from .checkpoint import load as load_checkpoint
from .resume import ran
from .start import initial_model
from .step import TrainStep, seed_dropout
from .storage import of_step
from .window import window_means


def replay(snapshot: Path, device: str = "auto") -> Iterator[dict[str, Any]]:
    """Repeat the steps of a snapshot, and yield what each was: `step`, `loss`, `grad_norm`, `quarters` (the loss by
    quarter of t), and of the image with the largest loss, or with the first one that is not finite, `image` (its number
    in the data), `t` and `image_loss`. `layer` is the first module whose output is not finite, and `gradient` the first
    parameter with such a gradient, both None if all are finite. Ends after the first step that has one.

    Raises InputError for a snapshot that is none, for other data, and where its checkpoint is missing.
    """
    facts = _facts(snapshot)
    folder = snapshot.absolute().parent.parent
    info = read_info(folder)
    plugins.load_recorded(info.get("plugins", ()))
    config = config_of(folder, info)
    exact_float32()
    device, start = pick_device(device), facts["checkpoint"]
    data = load_data(config, lambda text: print(text, file=sys.stderr))
    check_data(folder, data.fingerprint)
    net = initial_model(config).to(device).train()
    select_backends(net, ran(facts["stretch"]["backend"]), device_type(device))
    watched = _Losses(objective(config.objective))
    step = TrainStep(
        net,
        cast(Objective, watched),
        config.train,
        call=net,
        device=device,
        micro_batch=facts["micro_batch"],
        seed=config.seed,
    )
    if net.draws:
        processes = facts["stretch"].get("processes", 1)
        step.call = _drawing(step, processes, config.train.batch_size // processes // facts["micro_batch"])
    if start:
        if (path := of_step(snapshot, start)) is None:
            raise InputError(f"{snapshot} lacks the checkpoint of step {start}")
        step.restore(load_checkpoint(path))
    for number, batch in enumerate(batches(data, step.objective, config, net.null_class, start, device), start + 1):
        if number > facts["last_step"]:
            return
        step.window.zero_()
        watched.losses.clear()
        with _Layers(net) as layers:
            step(batch)
        if number < facts["first_step"]:
            continue
        means = window_means(step.window, watched.metrics, 1)
        losses = torch.cat(watched.losses)
        place = int(losses.nan_to_num(math.inf, math.inf).argmax())
        named = ((name, p.grad) for name, p in net.named_parameters() if p.grad is not None)
        row = {
            "step": number,
            "loss": means["loss"],
            "grad_norm": means["grad_norm"],
            "quarters": [means[f"loss_q{quarter}"] for quarter in (1, 2, 3, 4)],
            "image": _image(config, len(data), (number - 1) * config.train.batch_size + place),
            "t": float(batch["t"][place]),
            "image_loss": float(losses[place]),
            "layer": layers.first,
            "gradient": next((name for name, value in named if not _finite(value)), None),
        }
        yield row
        if row["layer"] or row["gradient"] or not math.isfinite(row["loss"]):
            return


def _drawing(step: TrainStep, processes: int, passes: int) -> Callable[..., Tensor]:
    """The network of a step, with the dropout of `processes`, each of which has the next so many passes of the step."""
    numbers = cycle(range(processes * passes))

    def run(*inputs: Tensor) -> Tensor:
        rank, number = divmod(next(numbers), passes)
        if number == 0:
            seed_dropout(step.seed, step.updates, rank)
        return step.net(*inputs)

    return run


def _facts(snapshot: Path) -> dict[str, Any]:
    path = snapshot / "failure.json"
    try:
        facts = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{snapshot} is no snapshot of a failure: it has no failure.json") from None
    needed = {"checkpoint": int, "first_step": int, "last_step": int, "micro_batch": int, "stretch": dict}
    for name, kind in needed.items():
        if not isinstance(facts, dict) or not isinstance(facts.get(name), kind):
            raise InputError(f"{path} was not written by lamabench: it has no {name}")
    return facts


def _image(config: Config, images: int, item: int) -> int:
    epoch, position = divmod(item, images)
    return int(epoch_order(config.seed, epoch, images)[position])


def _finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


class _Losses:
    """An objective that keeps the loss of each image of a step."""

    def __init__(self, goal: Objective) -> None:
        self.goal = goal
        self.losses: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.goal, name)

    def loss(self, *inputs: Tensor) -> Mapping[str, Tensor]:
        losses = self.goal.loss(*inputs)
        self.losses.append(losses["loss"].detach())
        return losses


class _Layers:
    """Inside the block, `first` becomes the name of the first module of a network whose output is not finite."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.first, self.hooks = net, None, []

    def __enter__(self) -> "_Layers":
        for name, module in self.net.named_modules():
            self.hooks.append(module.register_forward_hook(lambda *words, name=name: self._look(name, words[2])))
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def _look(self, name: str, output: Any) -> None:
        parts = output if isinstance(output, tuple | list) else [output]
        if self.first is None and not all(_finite(part) for part in parts if isinstance(part, Tensor)):
            self.first = name or "the network"


def describe(row: Mapping[str, Any]) -> str:
    """A step of `replay` as a line."""
    quarters = ", ".join("-" if loss is None else f"{loss:.4g}" for loss in row["quarters"])
    text = f"step {row['step']}: loss {row['loss']:.6g} (by quarter of t: {quarters}), gradient {row['grad_norm']:.4g}"
    text += f"; most: {row['image_loss']:.6g} of image {row['image']} at t {row['t']:g}"
    if row["layer"]:
        text += f"; first output that is not finite: {row['layer']}"
    if row["gradient"]:
        text += f"; first gradient that is not finite: {row['gradient']}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(prog="replay", description="Repeat the steps of a snapshot of a failure.")
    parser.add_argument("snapshot", type=Path, help="the folder RUN/failures/step-N")
    parser.add_argument("--device", default="auto")
    words = parser.parse_args()
    try:
        for row in replay(words.snapshot, words.device):
            print(describe(row), flush=True)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
