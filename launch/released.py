"""Settings of a run with released weights in place of a training."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from ..harness.config import Config
from ..harness.sections import DataConfig
from ..kernels.errors import InputError
from ..models import registry
from .compose import compose, override

SECTIONS = ("data", "encoder", "objective")  # that samples of released weights may set too: no training used others

PLACEHOLDER = ("model=dit_nano", "model.patch_size=1")  # a model that fits data and latents of any size


def settled(config: Config, overrides: Sequence[str]) -> Config:
    """`compose.override`, in which `data=NAME` and `encoder=FOLDER` choose a set and a cache of latents too, as they do
    for a training. Raises InputError as `compose` does."""
    keys = {word: word.partition("=")[0] for word in overrides}
    of = {name: [word for word, key in keys.items() if key.split(".")[0] == name] for name in ("data", "encoder")}
    chosen = {key for key in keys.values() if key in ("data", "encoder", "encoder.path")}
    if not chosen:
        return override(config, overrides)
    sections, _ = compose([*PLACEHOLDER, *of["data"], *of["encoder"]])
    new = {"encoder": sections.encoder} if chosen - {"data"} else {}
    new |= {"data": sections.data} if "data" in chosen or sections.encoder.kind != "pixels" else {}
    done = [word for name in new for word in of[name]]
    return override(replace(config, **new), [word for word in overrides if word not in done])


def is_latent(config: Config) -> bool:
    """Whether the network draws something else than images, which only an autoencoder decodes."""
    return config.model.in_channels not in (1, 3) or config.encoder.kind != "pixels"


def default_data(model: Any) -> DataConfig:
    """ImageNet at the model's size, as the released models had it: eight pixels for each latent."""
    latent = model.in_channels not in (1, 3)
    size, channels = (8 * model.input_size, 3) if latent else (model.input_size, model.in_channels)
    return DataConfig("folder", "imagenet", None, size, channels, model.num_classes, flip=True)


def check_decoded(config: Config, where: object) -> None:
    """Raise InputError if samples cannot be decoded because a run of latents has no encoder."""
    if is_latent(config) and config.encoder.kind == "pixels":
        model = config.model
        raise InputError(
            f"{where} draws latents of {model.in_channels} × {model.input_size} × {model.input_size}, which only an "
            "autoencoder decodes: encoder=FOLDER names a cache of lamabench encode (cost and bench need none)"
        )


def preset_of(config: Any) -> registry.Preset | None:
    """The preset of a configuration, whatever its number of classes and its head."""
    family = registry.family_of(config)
    loose = ("num_classes", "out_channels")
    for entry in family.presets.values():
        same = (getattr(entry.config, f.name) == getattr(config, f.name) for f in fields(config) if f.name not in loose)
        if all(same):
            return entry
    return None
