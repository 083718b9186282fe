"""The sections `bench`: what is measured, and `backend`: the implementations of operators."""

from dataclasses import dataclass, field, make_dataclass
from typing import Any

from ...kernels import NAMES
from ...kernels.errors import InputError, unknown
from ..checks import check_positive, check_precision
from ..device import WHOLE_STEP
from .compiling import BENCH_COMPILE, check_compile
from .limits import MOST_AT_ONCE, MOST_SIDE

MODES = ("forward", "train")  # of bench

# The implementation of each operator by name. `auto` takes the first that runs on the device.
BackendConfig = make_dataclass(
    "BackendConfig",
    [(name, str, field(default="auto", metadata={"since": "auto"})) for name in NAMES],
    namespace={"__module__": __name__},
)


@dataclass
class BenchConfig:
    """What `bench` and the stage `bench` of a run measure: every combination of the lists.

    `batch_size` is a number, a list of numbers, or `auto`. `auto` measures one image, then larger batches of the eager
    model until a larger batch gains nothing, does not fit or takes longer than `seconds`. It measures the other
    `compile` modes at the best of these batches, at twice that batch, and in between where memory ends there. A
    measurement takes about `seconds`, with at least 5 and at most `repeats` calls.
    """

    batch_size: Any = 16
    modes: list[str] = field(default_factory=lambda: ["forward", "train"])
    compile: list[str] = field(default_factory=lambda: ["eager"])
    input_sizes: list[int] | None = None  # sides of the input, in latents or pixels; null: the model's own
    checkpointing: list[bool] = field(default_factory=lambda: [False])  # of training: as train.checkpointing
    repeats: int = 20
    seconds: float = 3.0
    warmup: int = 3
    precision: str = "bfloat16"

    def __post_init__(self) -> None:
        check_positive("bench", {"repeats": self.repeats, "warmup": self.warmup}, 100_000)
        check_positive("bench", {"seconds": self.seconds}, 86_400)
        if self.batch_size != "auto":
            self.batch_size = list(self.batch_size) if isinstance(self.batch_size, list | tuple) else [self.batch_size]
            if not all(type(size) is int and size > 0 for size in self.batch_size):
                raise InputError(f"bench.batch_size must be numbers above 0, or auto, not {self.batch_size}")
            for size in self.batch_size:
                check_positive("bench", {"batch_size": size}, MOST_AT_ONCE)
        for name in ("batch_size", "modes", "compile", "input_sizes", "checkpointing"):
            if getattr(self, name) == []:
                raise InputError(f"bench.{name} is empty")
        for mode in self.modes:
            if mode not in MODES:
                raise unknown("bench.modes", mode, MODES)
        for kind in self.compile:
            check_compile("bench.compile", kind, BENCH_COMPILE)
        if self.compile == [WHOLE_STEP] and "forward" in self.modes:
            raise InputError(f"bench.compile={WHOLE_STEP} is a mode of training: give bench.modes=[train]")
        for size in self.input_sizes or []:
            check_positive("bench", {"input_sizes": size}, MOST_SIDE)
        check_precision("bench.precision", self.precision)
