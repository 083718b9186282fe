"""The section `train`: how the network is trained."""

import math
from dataclasses import dataclass, field
from typing import Any

from ...kernels.errors import InputError, unknown
from ..checks import check_numbers, check_positive, check_precision, check_steps, check_width
from .compiling import TRAIN_COMPILE, check_compile
from .limits import MOST_AT_ONCE, MOST_MOMENTS, MOST_STEPS

NOISE = ("cpu", "gpu")


@dataclass
class TrainConfig:
    """The papers' protocol by default: AdamW, constant 1e-4, no weight decay, batch 256, EMA 0.9999, bf16 autocast."""

    steps: int = 400_000
    batch_size: int = 256
    lr: float = 1e-4
    warmup: int = field(default=0, metadata={"since": 0})  # steps of a linear rise of the learning rate
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999], metadata={"since": [0.9, 0.999]})  # of AdamW
    weight_decay: float = 0.0
    clip: float | None = field(default=None, metadata={"since": None})  # the largest norm of the gradients; null: any
    ema_decay: float = 0.9999
    # The decay after n steps is at most (1 + n) / (10 + n). Without that, 37 % of the average are initial weights after
    # 10,000 steps of 0.9999.
    ema_rampup: bool = field(default=True, metadata={"since": False})
    ema_decays: list[float] = field(default_factory=list, metadata={"since": []})  # more averages: weights ema@DECAY
    # Averages of these relative widths, such as [0.05, 0.1], from which weights power@WIDTH of any width are computed
    # after the training (training/posthoc.py).
    ema_powers: list[float] = field(default_factory=list, metadata={"since": []})
    # Where the noise is drawn. gpu: by a counter-based generator (data/noise.py), for trainings that wait for the CPU.
    # Its numbers are other ones, equal on every GPU.
    noise: str = field(default="cpu", metadata={"since": "cpu"})
    class_dropout: float = 0.1  # the probability that the null class replaces a label
    precision: str = "bfloat16"
    # eager, or faster with different rounding: compile, reduce-overhead, max-autotune, whole-step; auto
    compile: str = "eager"
    checkpointing: bool = False  # recompute blocks in the backward pass: less memory, about a third more time
    # The moments whose averaged weights are kept, besides the end: a list of steps, or N for every N images. Neither
    # `snapshots` nor `steps` is in a key, so that a longer training goes on from a shorter one.
    snapshots: Any = field(default_factory=list)

    def __post_init__(self) -> None:
        check_positive("train", {"steps": self.steps}, MOST_STEPS)
        check_positive("train", {"batch_size": self.batch_size}, MOST_AT_ONCE)
        check_positive("train", {"lr": self.lr})
        if self.clip is not None:
            check_positive("train", {"clip": self.clip})
        if not 0 <= self.warmup <= MOST_STEPS:
            raise InputError(f"train.warmup must be 0 or more and at most {MOST_STEPS:,} steps, not {self.warmup}")
        self.betas = check_numbers("train.betas", self.betas)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"train.betas must be two numbers of at least 0 and below 1, not {self.betas}")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"train.weight_decay must be 0 or more and finite, not {self.weight_decay}")
        self.snapshots = check_steps("train.snapshots", self.snapshots, number=True)
        if (
            isinstance(self.snapshots, int)
            and (moments := min(self.steps, self.steps * self.batch_size // self.snapshots)) > MOST_MOMENTS
        ):
            raise InputError(
                f"train.snapshots {self.snapshots} would keep the weights of {moments:,} steps, more than "
                f"{MOST_MOMENTS:,}: give a larger number of images"
            )
        check_precision("train.precision", self.precision)
        check_compile("train.compile", self.compile, TRAIN_COMPILE)
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"train.ema_decay must be at least 0 and below 1, not {self.ema_decay}")
        self.ema_decays = sorted({*check_numbers("train.ema_decays", self.ema_decays)})
        for decay in self.ema_decays:
            if not 0 <= decay < 1 or decay == self.ema_decay:
                raise InputError(
                    f"train.ema_decays must be at least 0, below 1 and other than train.ema_decay {self.ema_decay}, "
                    f"not {decay}"
                )
        self.ema_powers = sorted({*check_numbers("train.ema_powers", self.ema_powers)})
        for width in self.ema_powers:
            check_width("train.ema_powers", width)
        if self.noise not in NOISE:
            raise unknown("train.noise", self.noise, NOISE)
        if not 0 <= self.class_dropout < 1:
            raise InputError(f"train.class_dropout must be at least 0 and below 1, not {self.class_dropout}")
