"""The typed configuration of a run. Hydra composes it, a run's identity is its hash, nothing else decides a result."""

from dataclasses import dataclass, field
from typing import Any

from ..kernels.errors import InputError, unknown

PRECISIONS = ("float32", "bfloat16")
MODES = ("forward", "train")  # of bench
# How a network is called: plainly, through torch.compile, the same with CUDA graphs, the same with kernels tried out.
COMPILE = ("eager", "compile", "reduce-overhead", "max-autotune")
FEATURES = ("efficientnet_lite0", "inception_v3")
METRICS = ("fd", "kid", "prc", "isc")


def _positive(section: str, values: dict[str, int | float]) -> None:
    for name, value in values.items():
        if value <= 0:
            raise InputError(f"{section}.{name} must be above 0, not {value}")


def _check_precision(key: str, precision: str) -> None:
    if precision == "float16":
        raise InputError(
            f"{key}=float16 is not supported: states and outputs of a scan pass float16's largest number (65504), and "
            f"there is no loss scaling for its smallest; choices: {', '.join(PRECISIONS)}"
        )
    if precision not in PRECISIONS:
        raise unknown(key, precision, PRECISIONS)


@dataclass
class DataConfig:
    """Which images: `kind` names the loader, `path` a file or folder, `size` the side in pixels after resizing.

    A path is not part of a run's identity; `name` is: give it where two paths hold different sets.
    """

    kind: str = "digits"
    name: str = ""
    path: str | None = None
    size: int = 16
    channels: int = 1
    num_classes: int = 10
    flip: bool = False  # random horizontal flips in training

    def __post_init__(self) -> None:
        _positive("data", {"size": self.size, "channels": self.channels})
        if self.num_classes < 0:
            raise InputError(f"data.num_classes must be 0 (unconditional) or more, not {self.num_classes}")


def _check_compile(name: str, value: str) -> None:
    if value not in COMPILE:
        raise unknown(name, value, COMPILE)


@dataclass
class TrainConfig:
    """The papers' protocol by default: AdamW, constant 1e-4, no weight decay, batch 256, EMA 0.9999, bf16 autocast."""

    steps: int = 400_000
    batch_size: int = 256
    lr: float = 1e-4
    weight_decay: float = 0.0
    ema_decay: float = 0.9999
    class_dropout: float = 0.1  # how often a label is replaced by the null class
    precision: str = "bfloat16"
    compile: str = "eager"  # or compile, reduce-overhead, max-autotune: faster, and other rounding
    checkpointing: bool = False  # blocks run again in the backward pass: less memory, about a third more time

    def __post_init__(self) -> None:
        _positive("train", {"steps": self.steps, "batch_size": self.batch_size, "lr": self.lr})
        _check_precision("train.precision", self.precision)
        _check_compile("train.compile", self.compile)
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"train.ema_decay must be at least 0 and below 1, not {self.ema_decay}")
        if not 0 <= self.class_dropout < 1:
            raise InputError(f"train.class_dropout must be at least 0 and below 1, not {self.class_dropout}")


@dataclass
class SampleConfig:
    """How images are drawn: 250 ancestral steps without guidance by default, the papers' protocol."""

    count: int = 50_000
    method: str = "ancestral"  # or ddim
    steps: int = 250
    guidance: float = 1.0  # 1: none
    guidance_channels: int | None = None  # the first channels guided; null: all
    clip: bool = False  # clamp predicted images to [-1, 1]: ADM's rule in pixels; latents have no bounds
    precision: str = "float32"
    compile: str = "eager"  # or compile, reduce-overhead, max-autotune: faster, and other rounding
    batch_size: int = 64

    def __post_init__(self) -> None:
        _positive("sample", {"count": self.count, "batch_size": self.batch_size})
        if self.method not in ("ancestral", "ddim"):
            raise unknown("sample.method", self.method, ("ancestral", "ddim"))
        if not 2 <= self.steps <= 1000:
            raise InputError(f"sample.steps must be 2 to 1000, not {self.steps}")
        _check_precision("sample.precision", self.precision)
        _check_compile("sample.compile", self.compile)
        if self.guidance_channels is not None and self.guidance_channels < 1:
            raise InputError(
                f"sample.guidance_channels must be 1 or more, or null for all, not {self.guidance_channels}"
            )


@dataclass
class EvaluateConfig:
    """How samples are scored: `features` names the network, `metrics` what is computed from its features: Fréchet
    distance (`fd`), kernel distance (`kid`), precision and recall (`prc`), inception score (`isc`)."""

    features: str = "efficientnet_lite0"  # or inception_v3 (the Inception-2015 network that FID means)
    features_path: str | None = None  # weights of inception_v3; null: torch-fidelity's, downloaded
    metrics: list[str] = field(default_factory=lambda: ["fd", "kid", "prc"])
    reference_count: int | None = None  # a fixed random subset of the data; null: all of it
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.reference_count is not None:
            _positive("evaluate", {"reference_count": self.reference_count})
        _positive("evaluate", {"batch_size": self.batch_size})
        if self.features not in FEATURES:
            raise unknown("evaluate.features", self.features, FEATURES)
        if not self.metrics:
            raise InputError(f"evaluate.metrics is empty; choices: {', '.join(METRICS)}")
        for metric in self.metrics:
            if metric not in METRICS:
                raise unknown("evaluate.metrics", metric, METRICS)


@dataclass
class BackendConfig:
    """The implementation of each operator, by name; `auto` takes the first that runs on the device."""

    depthwise_conv: str = "auto"
    selective_scan: str = "auto"
    gated_norm: str = "auto"
    window_attention: str = "auto"
    attention: str = "auto"


@dataclass
class BenchConfig:
    """What `bench` and the benchmark of a run measure: every combination of the lists.

    `batch_size` is a number, a list of them, or `auto`: one image, then larger batches of the eager model until they
    gain nothing, do not fit or take longer than `seconds`; the other `compile` modes at the best of them, at its
    double, and between the two where memory ends there. A measurement takes about `seconds`, at least 5 and at most
    `repeats` calls.
    """

    batch_size: Any = 16
    modes: list[str] = field(default_factory=lambda: ["forward", "train"])
    compile: list[str] = field(default_factory=lambda: ["eager"])
    input_sizes: list[int] | None = None  # sides of the input, in latents or pixels; null: the model's own
    checkpointing: list[bool] = field(default_factory=lambda: [False])  # of training: blocks run again going backward
    repeats: int = 20
    seconds: float = 3.0
    warmup: int = 3
    precision: str = "bfloat16"

    def __post_init__(self) -> None:
        _positive("bench", {"repeats": self.repeats, "seconds": self.seconds, "warmup": self.warmup})
        if self.batch_size != "auto":
            self.batch_size = list(self.batch_size) if isinstance(self.batch_size, list | tuple) else [self.batch_size]
            if not all(type(size) is int and size > 0 for size in self.batch_size):
                raise InputError(f"bench.batch_size must be numbers above 0, or auto, not {self.batch_size}")
        for name in ("batch_size", "modes", "compile", "input_sizes", "checkpointing"):
            if getattr(self, name) == []:
                raise InputError(f"bench.{name} is empty")
        for mode in self.modes:
            if mode not in MODES:
                raise unknown("bench.modes", mode, MODES)
        for kind in self.compile:
            _check_compile("bench.compile", kind)
        if self.input_sizes is not None and not all(size > 0 for size in self.input_sizes):
            raise InputError(f"bench.input_sizes must be above 0, not {self.input_sizes}")
        _check_precision("bench.precision", self.precision)


@dataclass
class RunConfig:
    """Where and how, never what: left out of a run's identity."""

    root: str = "runs"
    device: str = "auto"  # cuda where there is one, else cpu
    workers: int = 0  # processes that load data
    # The most images that a training step passes at a time; null: the batch. Gradients are added up over equal parts,
    # the largest that divide the batch: the same training but for rounding, in less memory.
    micro_batch: int | None = None
    log_every: int = 50  # steps between lines of metrics
    checkpoint_every: int = 1000  # steps

    def __post_init__(self) -> None:
        _positive("run", {"log_every": self.log_every, "checkpoint_every": self.checkpoint_every})
        if self.micro_batch is not None:
            _positive("run", {"micro_batch": self.micro_batch})
        if self.workers < 0:
            raise InputError(f"run.workers must be 0 or more, not {self.workers}")


@dataclass
class Config:
    """Everything that a run is. `model` is the configuration of a registered family."""

    model: Any
    data: DataConfig
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    backend: BackendConfig = field(default_factory=BackendConfig)
    run: RunConfig = field(default_factory=RunConfig)
    seed: int = 0
