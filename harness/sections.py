"""The sections of the configuration of a run, one dataclass each. `Config` (config.py) holds them.

A field that is added later declares the value that means "as before": `field(default=…, metadata={"since": VALUE})`.
A field with that value is left out of keys and of comparisons with checkpoints, so that no run of an earlier version
is lost.
"""

import math
from dataclasses import dataclass, field, make_dataclass
from typing import Any

from ..kernels import NAMES
from ..kernels.errors import InputError, unknown
from .checks import check_numbers, check_positive, check_precision, check_seed, check_steps, check_weights, check_width
from .device import COMPILE_OPTIONS, WHOLE_STEP
from .diffusion.samplers import SAMPLERS, TIMESTEPS

MODES = ("forward", "train")  # of bench
# How a network is called: directly, through torch.compile, with CUDA graphs too, or with CUDA graphs and autotuning.
COMPILE = ("eager", *COMPILE_OPTIONS)
BENCH_COMPILE = (*COMPILE, WHOLE_STEP)  # the last one is a mode of training only
TRAIN_COMPILE = ("auto", *BENCH_COMPILE)  # auto: whole-step on a GPU, eager elsewhere
NOISE = ("cpu", "gpu")
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
PARALLEL = ("ddp", "fsdp")
FEATURES = ("efficientnet_lite0", "inception_v3", "dinov2_vitl14")
METRICS = ("fd", "kid", "prc", "isc", "sfid")  # of features of samples
HELDOUT = "heldout"  # the score of weights, which needs no samples
# Metrics of layers that some networks lack: of a classifier's logits, and of the maps of which ADM computes sFID.
NETWORKS_OF = {"isc": ("efficientnet_lite0", "inception_v3"), "sfid": ("inception_v3",)}
LOGGERS = ("tensorboard", "wandb", "trackio")
LABELS = ("balanced", "random", "cyclic")
KEEP = ("images", "features")  # of samples
# What is larger is a slip of the keyboard that would fill the memory or never end.
MOST_STEPS = 99_999_999  # names of checkpoints have eight digits
MOST_SAMPLES = 10_000_000
MOST_AT_ONCE = 100_000  # images
MOST_SIDE = 16_384  # pixels or latents
MOST_MOMENTS = 10_000
MOST_WORKERS = 256
MOST_NAME = 200  # bytes of data.name, which is part of a folder's name


@dataclass
class DataConfig:
    """The images: `kind` names the loader, `path` is a file or folder, `size` the side in pixels after resizing.

    Keys contain `name` but not `path`, so set `name` where two paths hold different sets.
    """

    kind: str = "digits"
    name: str = ""
    path: str | None = None
    size: int = 16
    channels: int = 1
    num_classes: int = 10
    flip: bool = False  # random horizontal flips in training
    split: str = "train"  # or test, and most of the digits: what each set has is in data/splits.py

    def __post_init__(self) -> None:
        check_positive("data", {"size": self.size}, MOST_SIDE)
        check_positive("data", {"channels": self.channels})
        if not self.name.isprintable() or len(self.name.encode()) > MOST_NAME:
            raise InputError(
                f"data.name is part of a folder's name: at most {MOST_NAME} bytes that can be printed, "
                f"not {self.name[:40]!r}"
            )
        if self.num_classes < 0:
            raise InputError(f"data.num_classes must be 0 (unconditional) or more, not {self.num_classes}")


def _check_compile(name: str, value: str, choices: tuple[str, ...] = COMPILE) -> None:
    if value not in choices:
        raise unknown(name, value, choices)


@dataclass
class EncoderConfig:
    """What the network sees of an image. `pixels` is the image itself, in [-1, 1]."""

    kind: str = "pixels"  # of data/encoder.py


@dataclass
class ObjectiveConfig:
    """What the network learns. `ddpm` is the noise and the variance, with the hybrid loss of improved DDPM."""

    kind: str = "ddpm"  # of diffusion/objective.py
    # The betas of ddpm: linear (1e-4 … 0.02; DDPM, DiT, LaMamba-Diff, ADM from 128 px on) or cosine (improved DDPM,
    # ADM at 64 px).
    schedule: str = field(default="linear", metadata={"since": "linear"})


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
        _check_compile("train.compile", self.compile, TRAIN_COMPILE)
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


@dataclass
class SampleConfig:
    """How images are drawn. The default is the papers' protocol: 250 ancestral steps without guidance."""

    count: int = 50_000
    method: str = "ancestral"  # or ddim: of diffusion/samplers.py
    steps: int = 250
    guidance: float = 1.0  # 1: none
    guidance_channels: int | None = None  # how many of the first channels are guided; null: all
    clip: bool = False  # clamp predicted images to [-1, 1], as ADM does for pixels; latents have no bounds
    precision: str = "float32"
    compile: str = "eager"  # or compile, reduce-overhead, max-autotune: faster, with different rounding
    batch_size: int = 64
    at: Any = "last"  # or all (every kept moment), or a list of steps
    # Or live: not averaged; ema@DECAY: of train.ema_decays; power@WIDTH: of any relative width, by train.ema_powers.
    weights: str = "ema"
    seed: int | None = None  # of the noise; null: the training's
    # The class of each image. balanced: index modulo classes or, of fewer images than classes, evenly over all classes.
    # random: drawn for each image, as in the papers of DiT and ADM. cyclic: index modulo classes, however few images.
    labels: str = field(default="balanced", metadata={"since": "balanced"})
    # Which of an objective's timesteps are steps. even: from the first to the last. ddim: 0, 40, … 960 for 25 of 1000.
    timesteps: str = field(default="even", metadata={"since": "even"})
    # Or features: of the network evaluate.features, by which the set is scored, and no images. In no key.
    keep: str = "images"

    def __post_init__(self) -> None:
        check_positive("sample", {"count": self.count}, MOST_SAMPLES)
        check_positive("sample", {"batch_size": self.batch_size}, MOST_AT_ONCE)
        check_positive("sample", {"steps": self.steps})
        if not math.isfinite(self.guidance):
            raise InputError(f"sample.guidance must be finite, not {self.guidance}; 1 is no guidance")
        self.weights = check_weights("sample.weights", self.weights)
        if self.at not in ("last", "all"):
            self.at = check_steps("sample.at", self.at, words=("last", "all"))
            if not self.at:
                raise InputError("sample.at is empty: give last, all, or a list of steps")
        if self.seed is not None:
            check_seed("sample.seed", self.seed)
        if self.method not in SAMPLERS:
            raise unknown("sample.method", self.method, SAMPLERS)
        if self.labels not in LABELS:
            raise unknown("sample.labels", self.labels, LABELS)
        if self.timesteps not in TIMESTEPS:
            raise unknown("sample.timesteps", self.timesteps, TIMESTEPS)
        if self.keep not in KEEP:
            raise unknown("sample.keep", self.keep, KEEP)
        check_precision("sample.precision", self.precision)
        _check_compile("sample.compile", self.compile)
        if self.guidance_channels is not None and self.guidance_channels < 1:
            raise InputError(
                f"sample.guidance_channels must be 1 or more, or null for all, not {self.guidance_channels}"
            )


@dataclass
class EvaluateConfig:
    """How samples are scored. `features` names the network and `metrics` what is computed from its features: Fréchet
    distance (`fd`), kernel distance (`kid`), precision and recall (`prc`), inception score (`isc`), and the Fréchet
    distance of spatial features (`sfid`). `heldout` is the loss of the weights on the test split, and needs no
    samples."""

    # Or inception_v3 (the Inception-2015 network of FID), or dinov2_vitl14 (of FD-DINOv2).
    features: str = "efficientnet_lite0"
    # Weights of inception_v3 or dinov2_vitl14: a file, or a folder with the published file; null: torch's cache.
    features_path: str | None = None
    metrics: list[str] = field(default_factory=lambda: ["fd", "kid", "prc"])
    # A file that samples are compared with in place of the data: moments, as ADM and `lamabench reference --out` write
    # them, or images. Keys have its name without the folder, so give other contents another name.
    reference: str | None = field(default=None, metadata={"since": None})
    reference_count: int | None = None  # size of a fixed random subset of the data; null: all of it
    batch_size: int = 64
    seed: int = 0  # for the subsets of kid and the splits of isc; independent of the training's seed
    # How many reference images, drawn at random once, precision and recall take; null: all. ADM's protocol has 10,000.
    prc_reference_count: int | None = field(default=10_000, metadata={"since": None})
    # Whether weights that are missing may be fetched: true, or the address of a folder that has them. In no key.
    download: Any = field(default=False, metadata={"since": False})
    # The images that samples are compared with: those of the training (train), or the test split that belongs to them.
    split: str = field(default="train", metadata={"since": "train"})
    heldout_count: int = field(default=2048, metadata={"since": 2048})  # most images of the held-out loss

    def __post_init__(self) -> None:
        for name in ("reference_count", "prc_reference_count"):
            if (count := getattr(self, name)) is not None:
                check_positive("evaluate", {name: count})
        check_positive("evaluate", {"batch_size": self.batch_size}, MOST_AT_ONCE)
        check_seed("evaluate.seed", self.seed, bits=32)  # numpy's RandomState, by which torch-fidelity draws
        if self.features not in FEATURES:
            raise unknown("evaluate.features", self.features, FEATURES)
        if not isinstance(self.download, bool) and "://" not in str(self.download):
            raise InputError(
                f"evaluate.download must be true, false or the address of a mirror, such as https://HOST/FOLDER, not "
                f"{self.download!r}"
            )
        if self.split not in ("train", "test"):
            raise unknown("evaluate.split", self.split, ("train", "test"))
        check_positive("evaluate", {"heldout_count": self.heldout_count})
        if not self.metrics:
            raise InputError(f"evaluate.metrics is empty; choices: {', '.join((*METRICS, HELDOUT))}")
        for metric in self.metrics:
            if metric != HELDOUT:
                check_metric(metric, self.features)


def check_metric(metric: str, features: str) -> None:
    """Raise InputError for an unknown metric, and for one that a network of features cannot give."""
    choices = (*METRICS, HELDOUT)
    if metric == "fid":  # by its letters, sfid is nearer
        raise InputError(f"unknown evaluate.metrics 'fid' (did you mean 'fd'?); choices: {', '.join(choices)}")
    if metric not in METRICS:
        raise unknown("evaluate.metrics", metric, choices)
    if features not in (networks := NETWORKS_OF.get(metric, FEATURES)):
        raise InputError(
            f"evaluate.metrics={metric} cannot be computed with evaluate.features={features}; choices of "
            f"evaluate.features: {', '.join(networks)}"
        )


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
            _check_compile("bench.compile", kind, BENCH_COMPILE)
        if self.compile == [WHOLE_STEP] and "forward" in self.modes:
            raise InputError(f"bench.compile={WHOLE_STEP} is a mode of training: give bench.modes=[train]")
        for size in self.input_sizes or []:
            check_positive("bench", {"input_sizes": size}, MOST_SIDE)
        check_precision("bench.precision", self.precision)


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
