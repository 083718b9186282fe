"""The typed configuration of a run. Hydra composes it, and keys.py hashes what each stage reads of it."""

from dataclasses import dataclass, field, replace
from typing import Any

from ..kernels.errors import InputError, unknown
from ..models.registry import out_channels
from .checks import WEIGHTS, average_name, check_seed, power_name
from .diffusion.objective import objective
from .diffusion.samplers import AUTO, path_of
from .sections import (
    CUDA_GRAPHS,
    HELDOUT,
    BackendConfig,
    BenchConfig,
    DataConfig,
    EncoderConfig,
    EvaluateConfig,
    ObjectiveConfig,
    ReleasedConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)


@dataclass
class Config:
    """The whole configuration of a run. `model` is the configuration of a registered family. A `sample.method` of auto
    becomes the sampler of the objective."""

    model: Any
    data: DataConfig
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    backend: Any = field(default_factory=BackendConfig)
    run: RunConfig = field(default_factory=RunConfig)
    released: ReleasedConfig = field(default_factory=ReleasedConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed("seed", self.seed)
        if self.sample.method == AUTO:
            self.sample = replace(self.sample, method=objective(self.objective).sampler)


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "encoder": EncoderConfig,
    "objective": ObjectiveConfig,
    "train": TrainConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "bench": BenchConfig,
    "backend": BackendConfig,
    "run": RunConfig,
    "released": ReleasedConfig,
}


def micro_batch(config: Config, processes: int = 1) -> int:
    """The number of images in one pass of a training step: the largest divisor of the batch, or of the part that each
    of several processes has, up to `run.micro_batch`."""
    whole = config.train.batch_size // processes
    most = min(config.run.micro_batch or whole, whole)
    return next(size for size in range(most, 0, -1) if whole % size == 0)


def averages(train: TrainConfig) -> list[str]:
    """The names of the averaged weights of a training: `ema`, `ema@DECAY` for each of `train.ema_decays`, and
    `power@WIDTH` for each of `train.ema_powers`."""
    return ["ema", *map(average_name, train.ema_decays), *map(power_name, train.ema_powers)]


def needs_test_split(config: Config) -> bool:
    """Whether a training or a score reads the images that are held out from the training's."""
    splits = {config.evaluate.split, *(config.evaluate.of(request)[1].split for request in config.evaluate.metrics)}
    return bool(config.run.heldout_every or HELDOUT in config.evaluate.metrics or "test" in splits)


def check_fit(config: Config) -> None:
    """Check that the sections of a configuration fit together.

    Raises InputError where the model does not fit the encoded data or the objective, where the sampler does not fit the
    objective, where latents would be clamped, where it takes an average of weights that the training does not keep,
    where label dropout or guidance needs a null class that the model lacks, where guidance without a guide needs
    classes, where a test split is needed that the data do not have, where more channels are guided than the model has,
    or where CUDA graphs are combined with micro-batches or shards.
    """
    from .data.encoder import encoder
    from .data.splits import held_out

    model, data, settings = config.model, config.data, config.sample
    channels, side = encoder(config.encoder).shape(data)
    pixels = config.encoder.kind == "pixels"
    shape = {
        "input_size": ("data.size" if pixels else "encoder.side", side),
        "in_channels": ("data.channels" if pixels else "encoder.channels", channels),
        "num_classes": ("data.num_classes", data.num_classes),
    }
    for name, (source, value) in shape.items():
        if getattr(model, name) != value:
            cure = f"set {source}" if source.startswith("data.") else f"leave out model.{name}"
            raise InputError(
                f"model.{name} {getattr(model, name)} does not fit {source} {value}: {cure}, and the model takes "
                "its value"
            )
    if settings.clip and not pixels:
        raise InputError(
            "sample.clip=true clamps predicted images to [-1, 1], but latents have no bounds: sample.clip=false"
        )
    if needs_test_split(config):
        held_out(data)
    goal = objective(config.objective)
    path_of(goal, settings.method, settings.steps, settings.timesteps)
    kept, power = [*averages(config.train), *WEIGHTS], settings.weights.startswith("power@")
    if power and not config.train.ema_powers:
        raise InputError(
            f"sample.weights={settings.weights} is computed from averages that a training keeps with "
            f"train.ema_powers=[0.05,0.1] and some train.snapshots; this one keeps {', '.join(dict.fromkeys(kept))}"
        )
    if settings.weights not in kept and not power:
        raise unknown("sample.weights of this training", settings.weights, dict.fromkeys(kept))
    if (head := out_channels(model)) != (needed := goal.out_channels(model.in_channels)):
        raise InputError(
            f"model.out_channels {head} does not fit objective {config.objective.kind}, which needs {needed}: "
            "leave it at null, and the model takes the number from the objective"
        )
    if config.train.class_dropout and model.num_classes and not getattr(model, "null_class", True):
        raise InputError(
            f"train.class_dropout {config.train.class_dropout} needs a null class: set model.null_class=true, "
            "or train.class_dropout=0 to train without one"
        )
    if config.train.compile in CUDA_GRAPHS and micro_batch(config) < config.train.batch_size:
        raise InputError(
            f"run.micro_batch sums gradients over several passes, but train.compile={config.train.compile} (CUDA "
            "graphs) keeps them only until the next pass: choose train.compile=compile, or run.micro_batch=null"
        )
    if config.run.parallel == "fsdp" and config.train.compile not in ("auto", "compile", "eager"):
        raise InputError(
            f"train.compile={config.train.compile} needs whole weights in each process, but run.parallel=fsdp shards "
            "them: choose train.compile=auto, compile or eager, or run.parallel=ddp"
        )
    if settings.guidance != 1 and settings.guide is None and not model.num_classes:
        raise InputError(
            f"sample.guidance {settings.guidance} needs classes, but data.num_classes is 0: set sample.guidance=1"
        )
    if settings.guidance != 1 and settings.guide is None and not getattr(model, "null_class", True):
        raise InputError(
            f"sample.guidance {settings.guidance} needs a null class: set model.null_class=true, or 1 for no guidance"
        )
    guided = settings.guidance_channels or 0
    if guided > model.in_channels:
        raise InputError(
            f"sample.guidance_channels {guided} is more than the model's {model.in_channels} channels; null "
            "guides all (recipe=dit has 3, for latents)"
        )
