"""The guide of autoguidance (2406.02507): another training, smaller or shorter, whose prediction samples are guided
away from. `sample.guide` names its folder, and its key and step stand for it in keys and records."""

import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from ..kernels.errors import InputError
from ..models import plugins
from ..models.fields import declared
from ..models.registry import describe
from .config import Config
from .diffusion.guidance import applies
from .diffusion.objective import objective
from .diffusion.samplers import ratios
from .keys import config_of, encoder_facts, training_key
from .measure.cost import cost
from .moments import kept_steps, not_kept, sample_sets, sampled_moments, step_of
from .run import read_info, weights_home
from .sections import ObjectiveConfig
from .training.checkpoint import load_weights


@dataclass(frozen=True)
class Guide:
    """The guide of a configuration: the folder of its weights, its own configuration, its `key`, and in words `text`,
    which is the same for guides that differ in the seed alone."""

    home: Path
    config: Config
    key: str
    text: str

    def tensors(self, settings: Any) -> dict[str, Tensor]:
        """Its weights by name, those that `settings` (a section `sample`) names."""
        step = step_of(self.home, settings.guide_at)
        return load_weights(self.home, step, settings.guide_weights, self.config.model).tensors


def guides(config: Config) -> bool:
    """Whether samples are guided by another training."""
    return config.sample.guide is not None and config.sample.guidance != 1


def passes(config: Config) -> tuple[int, int]:
    """The forward passes that one image takes of the network, and of the guide. A batch with null classes is two."""
    settings = config.sample
    calls = _calls(astuple(config.objective), settings.method, settings.steps, settings.timesteps)
    inside = sum(applies(settings.guidance, settings.guidance_interval, sigma) for sigma in calls)
    return (len(calls), inside) if guides(config) else (len(calls) + inside, 0)


@cache
def _calls(of_objective: tuple[str, ...], method: str, steps: int, timesteps: str) -> tuple[float, ...]:
    """`ratios`, once for all runs of a plan that sample alike."""
    return tuple(ratios(objective(ObjectiveConfig(*of_objective)), method, steps, timesteps))


def flops(config: Config) -> float:
    """The FLOPs of all passes that one image takes, those of the guide too."""
    own, of_guide = passes(config)
    total = float(own * cost(config.model).flops)
    return total + of_guide * cost(open_guide(config).config.model).flops if of_guide else total


def resolved(config: Config, moments: Sequence[int] | None = None) -> Config:
    """A configuration whose guide, if it has one, has an absolute path, a step and a key. `moments` are as in
    `sample_sets`.

    Raises InputError if there is no such training, if it is of another objective, shape or number of classes, if its
    key is not the one that the configuration has, or if it has the weights that are sampled.
    """
    settings = config.sample
    if settings.guide is None:
        return replace(config, sample=replace(settings, guide_at="last", guide_weights="ema", guide_key=None))
    folder = Path(os.path.expanduser(settings.guide)).absolute()
    guide = open_guide(config)
    step = step_of(guide.home, settings.guide_at)
    own = (guide.key, settings.guide_weights) == (training_key(config), settings.weights)
    if own and step in {at for at, _ in sample_sets(config, moments)}:
        curve = config.sample.curve_count is not None and step not in sampled_moments(config)
        way = "no sample.curve_count" if curve else "an earlier step (sample.guide_at=N)"
        raise InputError(
            f"sample.guide {folder} at step {step} has the weights that are sampled, which guide to nowhere: "
            f"give {way} or a smaller model"
        )
    new = {"guide": str(folder), "guide_at": step, "guide_key": guide.key}
    return replace(config, sample=replace(settings, **new))


def check_weights(config: Config) -> None:
    """Raise InputError if the weights of the guide of a `resolved` configuration are not kept, or are damaged."""
    settings = config.sample
    if settings.guide is None:
        return
    guide = open_guide(config)
    if settings.guide_at not in (kept := kept_steps(guide.home, settings.guide_weights)):
        fault = not_kept(settings.guide_at, kept)
        raise InputError(f"sample.guide {settings.guide}: {fault} ({settings.guide_weights} weights)")
    load_weights(guide.home, settings.guide_at, settings.guide_weights, guide.config.model, tensors=False)


def open_guide(config: Config) -> Guide:
    """The guide that `config.sample` names. Raises InputError as `resolved` does, without a look at the weights."""
    settings = config.sample
    folder = Path(os.path.expanduser(str(settings.guide))).absolute()
    try:
        info = read_info(folder)
    except InputError as error:
        raise InputError(f"sample.guide: {error}") from None
    if info["kind"] in ("model", "samples", "foreign"):
        raise InputError(f"sample.guide {folder} is the folder of a {info['kind']}; name that of a training")
    plugins.load_recorded(info.get("plugins", ()))
    other = config_of(folder, info)
    _check_same(folder, config, other)
    if settings.guide_key not in (None, info["key"]):
        raise InputError(f"sample.guide {folder} is the training {info['key']}, not {settings.guide_key} any more")
    recipe = training_key(replace(other, seed=0)) if info["kind"] == "training" else info["key"]
    name = f"{info.get('model', other.model)} {recipe[:8]} at step {settings.guide_at}"
    text = name if settings.guide_weights == "ema" else f"{name} ({settings.guide_weights})"
    return Guide(weights_home(folder, info), other, info["key"], text)


def _learned(settings: Any) -> dict[str, Any]:
    """The section `objective` without the distribution of t in training, which the prediction does not depend on."""
    return {name: value for name, value in declared(settings).items() if name != "times"}


def _check_same(folder: Path, config: Config, other: Config) -> None:
    for section, facts in (("objective", _learned), ("encoder", encoder_facts)):
        here, there = facts(getattr(config, section)), facts(getattr(other, section))
        for name in sorted(here.keys() | there.keys()):
            if here.get(name) != there.get(name):
                values = f"{section}.{name} {there.get(name)}, and the model {here.get(name)}"
                raise InputError(f"sample.guide {folder} has {values}: both must have learned the same")
    for name in ("input_size", "in_channels", "num_classes", "out_channels"):
        here, there = describe(config.model)[name], describe(other.model)[name]
        if here != there:
            raise InputError(f"sample.guide {folder} has {name} {there}, and the model {here}: they must be equal")
