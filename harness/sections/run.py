"""The section `run`: where and how a run works."""

from dataclasses import dataclass, field
from typing import Any

from ...kernels.errors import InputError, unknown
from ..checks import check_positive
from .limits import MOST_WORKERS

PARALLEL = ("ddp", "fsdp")
LOGGERS = ("tensorboard", "wandb", "trackio")


@dataclass
class RunConfig:
    """Where and how a run works, never what it computes. No field is in a key."""

    root: str = "runs"
    device: str = "auto"  # cuda where there is one, else cpu
    # The number of processes that load data, for each process of a training; 0: it loads them itself. auto: 0 on a CPU
    # and for short trainings, else up to 16 (data/workers.py).
    workers: Any = "auto"
    # The most images in one pass of a training step; null: the batch. Gradients are summed over equal parts of the
    # batch, as large as possible. The training is the same except for rounding and needs less memory.
    micro_batch: int | None = None
    # What several processes share. ddp: each has the whole state, and gradients are averaged. fsdp: each has a share of
    # weights, averages, gradients and Adam's moments. The training is the same except for rounding.
    parallel: str = "ddp"
    log_every: int = 50  # steps between lines of metrics
    log_to: list[str] = field(default_factory=list)  # loggers that get the lines too: tensorboard, wandb, trackio
    # Steps between lines that also have the held-out loss of the averaged weights (scoring/heldout.py); 0: none.
    heldout_every: int = 0
    preview_every: int = 0  # steps between pictures of 16 images, drawn by DDIM from the averaged weights; 0: none
    checkpoint_every: int = 1000  # steps
    fvcore: bool = False  # the stage cost records what fvcore counts too, which takes up to a minute for each model
    new_backends: bool = False  # continue with other backends where those of a training cannot run any more

    def __post_init__(self) -> None:
        check_positive("run", {"log_every": self.log_every, "checkpoint_every": self.checkpoint_every})
        if self.micro_batch is not None:
            check_positive("run", {"micro_batch": self.micro_batch})
        if self.parallel not in PARALLEL:
            raise unknown("run.parallel", self.parallel, PARALLEL)
        for name in self.log_to:
            if name not in LOGGERS:
                raise unknown("run.log_to", name, LOGGERS)
        if self.heldout_every < 0 or self.heldout_every % self.log_every:
            raise InputError(
                f"run.heldout_every must be 0 (none) or a multiple of run.log_every {self.log_every}, whose lines have "
                f"the loss, not {self.heldout_every}"
            )
        if self.preview_every < 0:
            raise InputError(f"run.preview_every must be 0 (no previews) or more, not {self.preview_every}")
        if "\n" in self.root:
            raise InputError(f"run.root has a line break: {self.root!r}")
        if self.workers != "auto" and (type(self.workers) is not int or not 0 <= self.workers <= MOST_WORKERS):
            raise InputError(f"run.workers must be 0 or more and at most {MOST_WORKERS}, or auto, not {self.workers}")
