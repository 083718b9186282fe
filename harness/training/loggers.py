"""Loggers that get the lines of a training's metrics.jsonl too: TensorBoard, Weights & Biases, trackio.

Their packages are optional, and imported only if `run.log_to` names them.
"""

import importlib.util
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...kernels.errors import InputError

PROJECT = "lamabench"  # WANDB_PROJECT and TRACKIO_PROJECT name another one
CLOSE_S = 20.0  # how long the end of a training waits for its loggers
# One of the packages that a logger needs.
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}

Say = Callable[[str], None]
Line = dict[str, Any]


@dataclass(frozen=True)
class Identity:
    """What loggers know of a training: its folder, whose name ends in its key, the study, if there is one, and its
    configuration as plain data. The training continues after the step `start`, and lines and pictures up to the step
    `sent` were sent by an earlier process."""

    folder: Path
    study: str | None
    config: dict[str, Any]
    start: int = 0
    sent: int = 0

    @property
    def key(self) -> str:
        return self.folder.name.rsplit("-", 1)[-1]


class Logger(Protocol):
    """Opened with the `Identity` of a training. `overwrites`: it replaces what an earlier process sent of later steps
    than `start`."""

    overwrites: bool

    def line(self, step: int, values: Line) -> None: ...

    def picture(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the folder `tensorboard` of the training."""

    overwrites = True

    def __init__(self, training: Identity) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
        folder = training.folder / "tensorboard"
        new = not folder.exists()
        self.writer = SummaryWriter(str(folder), purge_step=training.start + 1)
        if new:
            self.writer.add_text("config", f"```\n{json.dumps(training.config, indent=1)}\n```")

    def line(self, step: int, values: Line) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def picture(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        self.writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run whose id is the training's key, so that a training that continues is one run."""

    overwrites = False

    def __init__(self, training: Identity) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=training.key,
            name=training.folder.name,
            group=training.study,
            config=training.config,
            allow_val_change=True,  # of train.steps, if the training is longer than before
            resume="allow",
            dir=str(training.folder),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def line(self, step: int, values: Line) -> None:
        self.run.log(values, step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run with the name of the training's folder, so that a training that continues is one run."""

    overwrites = False

    def __init__(self, training: Identity) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self.trackio = trackio
        with redirect_stdout(sys.stderr):
            # In a context of its own, because trackio ends the current run of a context again at the process's exit.
            self.run = copy_context().run(
                trackio.init,
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=training.folder.name,
                group=training.study,
                config=training.config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def line(self, step: int, values: Line) -> None:
        self.run.log(values, step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.trackio.Image(path)}, step=step)

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self.run.finish()


LOGGERS: dict[str, Callable[[Identity], Logger]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}


def check_loggers(names: Sequence[str]) -> None:
    """Raise InputError if a logger of `run.log_to` is not installed."""
    for name in names:
        if not any(map(_installed, PACKAGES[name])):
            raise InputError(f"run.log_to={name}, which is not installed: pip install {PACKAGES[name][0]}")


def _installed(package: str) -> bool:
    with suppress(ValueError):
        spec = importlib.util.find_spec(package)
        return spec is not None and spec.origin is not None  # a folder of that name, as wandb leaves, has no origin
    return False


class Loggers:
    """The loggers of a training. One that fails is left out from then on, with one line, and the training goes on."""

    def __init__(self, names: Sequence[str], training: Identity, say: Say) -> None:
        self.training, self.say = training, say
        self.each: dict[str, Logger] = {}
        for name in names:
            self._try(name, lambda name=name: self.each.update({name: LOGGERS[name](training)}))

    def line(self, step: int, line: Line) -> None:
        """Send the numbers of a line of metrics."""
        values = {name: value for name, value in line.items() if value is not None and name != "step"}
        self._send(step, lambda logger: logger.line(step, values))

    def picture(self, step: int, name: str, path: Path) -> None:
        """Send a PNG file."""
        self._send(step, lambda logger: logger.picture(step, name, path))

    def close(self) -> None:
        """Let the loggers end what they send, but not for long, because a job may have to go."""
        for name, logger in self.each.items():
            thread = threading.Thread(target=self._try, args=(name, logger.close), daemon=True)
            thread.start()
            thread.join(CLOSE_S)
            if thread.is_alive():
                self.say(f"run.log_to: {name} still sends after {CLOSE_S:g} s: going on without it")
        self.each = {}

    def _send(self, step: int, send: Callable[[Logger], None]) -> None:
        for name, logger in [*self.each.items()]:
            if (step > self.training.sent or logger.overwrites) and not self._try(name, lambda one=logger: send(one)):
                del self.each[name]

    def _try(self, name: str, work: Callable[[], None]) -> bool:
        try:
            work()
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self.say(f"run.log_to: {name} failed, and the training goes on without it: {text[:300]}")
            return False
        return True
