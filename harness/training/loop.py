"""The training loop: one protocol for every backbone (SPEC.md, section 4)."""

import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...kernels.errors import InputError
from ...models.registry import Backbone, build, select_backends, to_dict
from .. import signals
from ..config import Config, check_fit, micro_batch
from ..data.encoder import encoder
from ..data.images import load
from ..data.items import TrainItems
from ..device import autocast, compiled, pick_device
from ..diffusion.gaussian import TIMESTEPS, Diffusion
from ..progress import Progress
from ..record import append, read_lines, write_lines
from . import checkpoint as ckpt

METRICS = ("loss", "mse", "vb")
# float32 means float32: cuDNN's convolutions would round their inputs to TF32 unasked.
torch.backends.cudnn.allow_tf32 = False
_INPUT_ERROR = f"{InputError.__module__}.{InputError.__qualname__}"


class EvenTimesteps:
    """Each of the 1000 timesteps as often as any other (DDPM)."""

    def draw_t(self, rng: np.random.Generator) -> float:
        return int(rng.integers(TIMESTEPS))


class Diverged(RuntimeError):
    """The loss is no longer finite."""


def follow(averaged: list[Tensor], live: list[Tensor], weight: float) -> None:
    """Move the exponential moving average towards the weights: averaged += weight · (live - averaged)."""
    torch._foreach_lerp_(averaged, live, weight)  # pyright: ignore[reportPrivateImportUsage]


def initial_model(config: Config) -> Backbone:
    """The backbone with weights drawn on the CPU from the run's seed, the same on every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build(config.model)


class State:
    """Everything that a step changes: weights, their average, Adam's moments and the metrics not yet logged."""

    def __init__(self, config: Config, device: str) -> None:
        self.net = initial_model(config).to(device)
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        trained = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            trained, lr=config.train.lr, weight_decay=config.train.weight_decay, fused=True
        )
        self.window = torch.zeros(len(METRICS), device=device)
        self.step = 0
        self.seconds = 0.0

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under the name that a checkpoint gives it."""
        named = {f"model/{name}": v for name, v in self.net.state_dict().items()}
        named |= {f"ema/{name}": v for name, v in self.ema.state_dict().items()}
        for name, parameter in self.net.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                if parameter in self.optimizer.state:
                    named[f"{moment}/{name}"] = self.optimizer.state[parameter][moment]
        return named | {"window": self.window}

    def restore(self, saved: ckpt.Checkpoint) -> None:
        """Continue from a checkpoint, bit for bit."""
        self.net.load_state_dict(saved.group("model"))
        self.ema.load_state_dict(saved.group("ema"))
        first, second = saved.group("exp_avg"), saved.group("exp_avg_sq")
        for name, parameter in self.net.named_parameters():
            if name in first:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(saved.step)),
                    "exp_avg": first[name].to(parameter.device),
                    "exp_avg_sq": second[name].to(parameter.device),
                }
        self.window.copy_(saved.tensors["window"])
        self.step, self.seconds = saved.step, saved.seconds


def train(folder: Path, config: Config, progress: Progress) -> dict[str, Any]:
    """Train to `config.train.steps`, from the newest whole checkpoint of the folder where there is one.

    Appends to metrics.jsonl, saves checkpoints, returns the fields of the `train` record. Raises Diverged on a loss
    that is not finite; the last checkpoint before it stays. Raises InputError for data or a checkpoint that do not fit,
    Stopped after the step in which a signal came (signals.py), with a checkpoint of that step.
    """
    check_fit(config)
    device = pick_device(config.run.device)
    settings = config.train
    data = load(config.data)
    state = State(config, device)
    backend = select_backends(state.net, vars(config.backend), device.split(":")[0])
    _resume(state, folder, config, data.fingerprint, progress)
    items = TrainItems(
        data,
        EvenTimesteps(),
        encoder=encoder(config.encoder),
        seed=config.seed,
        flip=config.data.flip,
        class_dropout=settings.class_dropout,
        null_class=state.net.null_class,
    )
    loader = DataLoader(
        items,
        batch_size=settings.batch_size,
        sampler=range(state.step * settings.batch_size, settings.steps * settings.batch_size),
        num_workers=config.run.workers,
        worker_init_fn=signals.ignore,
        pin_memory=device.startswith("cuda"),
    )
    state.net.train()
    state.net.checkpointing = settings.checkpointing
    _steps(state, loader, folder, config, device, data.fingerprint, progress)
    last = read_lines(folder / "metrics.jsonl")[-1]
    images = settings.steps * settings.batch_size
    return {
        "steps": settings.steps,
        "images": images,
        "seconds": round(state.seconds, 3),
        "images_per_s": images / state.seconds,
        "final_loss": last["loss"],
        "backend": backend,
        "precision": settings.precision,
        "compile": settings.compile,
        "checkpointing": settings.checkpointing,
        "batch_size": settings.batch_size,
        "micro_batch": micro_batch(config),
        "data_fingerprint": data.fingerprint,
    }


def _resume(state: State, folder: Path, config: Config, fingerprint: str, progress: Progress) -> None:
    checkpoints = folder / "checkpoints"
    for saved in ckpt.newest(checkpoints):
        if isinstance(saved, InputError):
            progress.say(f"{saved}; falling back to the one before")
            continue
        ckpt.check_model(saved, to_dict(config.model), checkpoints)
        if saved.fingerprint != fingerprint:
            raise InputError(
                f"{folder} was trained on other data (fingerprint {saved.fingerprint}, now {fingerprint}): "
                "give the new set another data.name"
            )
        state.restore(saved)
        progress.say(f"continuing at step {state.step} of {config.train.steps}")
        break
    else:
        if ckpt.files(checkpoints):
            progress.say(f"no checkpoint before it: training begins anew at step 0 of {config.train.steps}")
    metrics = folder / "metrics.jsonl"
    write_lines(metrics, [line for line in read_lines(metrics) if line["step"] <= state.step])


def _batches(loader: DataLoader) -> Iterator[dict[str, Tensor]]:
    """The loader's batches; bad input found by a worker process comes as one line, without the worker's traceback."""
    try:
        yield from loader
    except InputError as error:
        raise InputError(str(error).strip().splitlines()[-1].removeprefix(f"{_INPUT_ERROR}: ")) from None


def _steps(
    state: State,
    loader: DataLoader,
    folder: Path,
    config: Config,
    device: str,
    fingerprint: str,
    progress: Progress,
) -> None:
    settings, diffusion = config.train, Diffusion()
    size = micro_batch(config)
    passes = settings.batch_size // size
    averaged = [p.detach() for p in state.ema.parameters()]
    live = [p.detach() for p in state.net.parameters()]
    net = compiled(state.net, settings.compile)
    started, before = time.perf_counter(), state.seconds
    window_start = state.step - state.step % config.run.log_every
    progress.update("train", state.step, settings.steps)
    logged: dict[str, str] = {}
    for batch in _batches(loader):
        state.optimizer.zero_grad(set_to_none=True)
        whole = (batch[key].to(device, non_blocking=True) for key in ("x0", "y", "t", "noise"))
        for x0, y, t, noise in zip(*(tensor.split(size) for tensor in whole), strict=True):
            x_t = diffusion.q_sample(x0, t, noise)
            with autocast(device, settings.precision):
                out = net(x_t, t, y)
            losses = diffusion.losses(out.float(), x0, x_t, t, noise)
            loss = losses["loss"].mean() / passes
            loss.backward()
            state.window += torch.stack([losses[name].detach().mean() / passes for name in METRICS]).to(state.window)
        state.optimizer.step()
        follow(averaged, live, 1 - settings.ema_decay)
        state.step += 1
        last = state.step == settings.steps
        logging, stopping = state.step % config.run.log_every == 0, signals.asked() is not None
        saving = last or stopping or state.step % config.run.checkpoint_every == 0
        if not (logging or saving):
            progress.update("train", state.step, settings.steps, **logged)
            continue
        means = (state.window / (state.step - window_start)).tolist()
        state.seconds = before + time.perf_counter() - started
        if not all(math.isfinite(value) for value in means):
            named = ", ".join(f"{name} {value}" for name, value in zip(METRICS, means, strict=True))
            raise Diverged(f"the loss is not finite by step {state.step} of {settings.steps}: {named}")
        if logging or last:
            line = {"step": state.step, "images": state.step * settings.batch_size}
            line |= dict(zip(METRICS, means, strict=True))
            append(folder / "metrics.jsonl", line | {"seconds": round(state.seconds, 3)})
            window_start = state.step
            state.window.zero_()
            logged = {"loss": f"{means[0]:.4f}"}
            progress.update("train", state.step, settings.steps, **logged)
        if saving:
            ckpt.save(
                folder / "checkpoints",
                ckpt.Checkpoint(state.step, state.seconds, to_dict(config.model), fingerprint, state.tensors()),
            )
        if stopping and not last:
            progress.say(f"saved at step {state.step} of {settings.steps}")
            signals.check()
