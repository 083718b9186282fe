"""From overrides to a typed configuration, through Hydra; every mistake becomes one line that lists the choices."""

import pickle
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..harness.config import Config, DataConfig
from ..harness.diffusion.objective import objective
from ..kernels.errors import InputError, unknown
from ..models import plugins
from ..models.registry import out_channels, presets, revision

GROUPS = ("model", "data")


def _register() -> None:
    store = ConfigStore.instance()
    store.store(name="_schema", node=Config)
    store.store(group="data", name="_schema", node=DataConfig)
    for name, preset in presets().items():
        store.store(group="model", name=name, node=preset.config)


def choices(group: str) -> list[str]:
    """The choices of `model=` or `data=`."""
    return list(presets()) if group == "model" else list(_data_choices())


@lru_cache(maxsize=1)
def _data_choices() -> tuple[str, ...]:
    with _hydra():
        options = GlobalHydra.instance().config_loader().get_group_options("data")
    return tuple(name for name in options if not name.startswith("_"))


def plugin_names(overrides: Sequence[str]) -> list[str]:
    """The plug-ins that overrides name with `plugins=[FILE.py, MODULE]`, files by their whole path."""
    values: list[Any] = [_parse_one(text).value() for text in overrides if text.startswith("plugins=")]
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return [str(Path(name).expanduser().absolute()) if plugins.is_file(str(name)) else name for name in names]


def value_of(text: str) -> Any:
    """What an override sets, as Hydra reads it. Raises InputError for a text that is none."""
    return _parse_one(text).value()


def load_plugins(overrides: Sequence[str]) -> list[str]:
    """Import the plug-ins of installed packages, and those that `plugins=[FILE.py, MODULE]` names.

    Returns the other overrides. Raises InputError as `plugins.load` does.
    """
    plugins.entry_points()
    plugins.load(plugin_names(overrides))
    if _revision != [revision()]:  # what was composed from a preset of that name may be another's now
        for cached in (_base, _section, _check_known):
            cached.cache_clear()
        _revision[:] = [revision()]
    return [text for text in overrides if not text.startswith("plugins=")]


_revision: list[int] = []


def _hydra() -> Any:
    _register()
    return initialize_config_module("lamabench.launch.conf", version_base="1.3")


def compose(overrides: Sequence[str]) -> tuple[Config, dict[str, str]]:
    """The configuration that overrides such as `model=dit_s_2 train.steps=200` make, and the choice of each group.

    Hydra composes a model with a data set once; overrides are merged into what it made, section by section, and a
    section that was made before is not made again: a study of a thousand runs is planned in seconds.
    Plug-ins are imported first. Raises InputError, one line, for an unknown key or choice, a value of the wrong type,
    or one out of range.
    """
    overrides = load_plugins(overrides)
    parsed = _parse(overrides)
    chosen = {o.key_or_group: str(o.value()) for o in parsed if o.key_or_group in GROUPS}
    for group, choice in chosen.items():
        if choice not in choices(group):
            raise unknown(group, choice, choices(group))
    groups = (chosen.get("model"), chosen.get("data"))
    by_section: dict[str, list[str]] = {}
    for override, text in zip(parsed, overrides, strict=True):
        if (key := override.key_or_group) not in GROUPS:
            _check_known(*groups, key)
            by_section.setdefault(key.split(".")[0], []).append(text)
    made = {}
    for field in fields(Config):
        # The model takes the shape of the data; an interpolation that a person writes may take from anywhere.
        sources = ("data", "model") if field.name == "model" else (field.name,)
        tied = any("${" in text for text in overrides)
        texts = [text for name in (by_section if tied else sources) for text in by_section.get(name, ())]
        try:
            made[field.name] = pickle.loads(_section(field.name, *groups, tuple(texts)))
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(plain_error(error)) from None
    model, goal = made["model"], objective(made["objective"])
    if (channels := goal.out_channels(model.in_channels)) != out_channels(model) and model.out_channels is None:
        made["model"] = replace(model, out_channels=channels)  # the head is the objective's, as the shape is the data's
    return Config(**made), dict(_base(*groups).chosen)


class Base(NamedTuple):
    """What Hydra makes of a model and a data set: a node to look at, the same to load and change, and the choices."""

    node: DictConfig
    pickled: bytes
    chosen: dict[str, str]


@cache
def _base(model: str | None, data: str | None) -> Base:
    chosen = {"model": model, "data": data}
    with _hydra():
        words = [f"{group}={choice}" for group, choice in chosen.items() if choice is not None]
        node = hydra_compose("config", words, return_hydra_config=True)
    picked = {group: node.hydra.runtime.choices[group] for group in GROUPS}
    OmegaConf.set_struct(node, False)
    del node["hydra"]  # what is left is the run
    return Base(node, pickle.dumps(node), picked)  # loading is ten times faster than OmegaConf's own copies


@lru_cache(maxsize=4096)
def _section(name: str, model: str | None, data: str | None, overrides: tuple[str, ...]) -> bytes:
    """A section of the configuration, or `seed`, after overrides; pickled, so that every run has its own."""
    node = pickle.loads(_base(model, data).pickled)
    for override in _parse(overrides):
        OmegaConf.update(node, override.key_or_group, _value(node, override), merge=True)
    value = node[name]
    return pickle.dumps(OmegaConf.to_object(value) if isinstance(value, DictConfig) else value)


def _value(base: DictConfig, override: Override) -> Any:
    """What an override sets; for a key that holds nothing but lists, one value is a list of one."""
    node: Any = base
    for word in override.key_or_group.split("."):
        node = node._get_node(word)
    value = override.value()
    single = isinstance(value, int | float | dict) or (isinstance(value, str) and "${" not in value)
    lists = isinstance(node, ListConfig) and node._metadata.ref_type is not Any
    return [value] if single and lists else value


def _parse(overrides: Sequence[str]) -> list[Override]:
    return [_parse_one(text) for text in overrides]


@lru_cache(maxsize=4096)
def _parse_one(text: str) -> Override:
    if "=" not in text:
        raise InputError(f"{text!r} is not an override; write key=value, such as train.steps=200")
    try:
        (override,) = OverridesParser.create().parse_overrides([text])
    except HydraException as error:
        raise InputError(f"cannot read the override {text!r}: {plain_error(error)}") from None
    if override.is_sweep_override():
        raise InputError(f"{text!r} gives several values: write a list as [a,b]; several runs are a study's axes")
    if override.is_add() or override.is_delete() or override.package is not None:
        raise InputError(f"{text!r} is not an override; write key=value, such as train.steps=200")
    return override


@lru_cache(maxsize=4096)
def _check_known(model: str | None, data: str | None, key: str) -> None:
    _check_key(_base(model, data).node, key)


def _check_key(base: DictConfig, key: str, section: str = "") -> None:
    """Raise InputError, with the keys there are, where the first word of `key` that does not exist stands."""
    node: Any = base
    walked: list[str] = []
    for word in key.split("."):
        known = [str(k) for k in node] if isinstance(node, DictConfig) else []
        if word not in known:
            inside = ".".join([section, *walked] if section else walked)
            where = f"key in {inside}" if inside else "key"
            raise unknown(where, word, known)
        walked.append(word)
        node = node._get_node(word)
    if isinstance(node, DictConfig):
        raise InputError(f"{key} is a section; set one of its keys: {', '.join(str(k) for k in node)}")


def plain_error(error: Exception) -> str:
    """The first telling line of a Hydra or OmegaConf error, and the key where it says one."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause)
    key = re.search(r"full_key: (\S+)", text)
    first = text.strip().splitlines()[0]
    return f"{key[1]}: {first}" if key else first


def override(config: Config, overrides: Sequence[str]) -> Config:
    """A configuration with overrides such as `sample.steps=25` of its sections, the model aside.

    Raises InputError as `compose` does.
    """
    texts: dict[str, list[str]] = {}
    for text in overrides:
        section, _, rest = text.partition(".")
        texts.setdefault(section, []).append(rest)
    made = {}
    for section, rest in texts.items():
        node = OmegaConf.structured(getattr(config, section))
        apply(node, rest, section)
        made[section] = OmegaConf.to_object(node)
    return replace(config, **made)


def model_config(name: str, overrides: Sequence[str]) -> Any:
    """The configuration of a preset with overrides of its own fields (`input_size=64` or `model.input_size=64`).

    Raises InputError as `compose` does.
    """
    overrides = load_plugins(overrides)
    known = presets()
    if name not in known:
        raise unknown("model", name, known)
    base = OmegaConf.structured(known[name].config)
    apply(base, [text.removeprefix("model.") for text in overrides])
    return OmegaConf.to_object(base)


def apply(node: DictConfig, overrides: Sequence[str], section: str = "") -> None:
    """Set keys of a typed node; `section` is what messages call it. Raises InputError as `compose` does."""
    for override in _parse(overrides):
        _check_key(node, override.key_or_group, section)
        try:
            OmegaConf.update(node, override.key_or_group, _value(node, override))
        except OmegaConfBaseException as error:
            raise InputError(plain_error(error)) from None
