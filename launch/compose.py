"""From overrides to a typed configuration, through Hydra. A mistake becomes one line that lists the choices."""

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
from ..models.registry import out_channels, preset, presets, revision

GROUPS = ("model", "data")


def _register() -> None:
    store = ConfigStore.instance()
    store.store(name="_schema", node=Config)
    store.store(group="data", name="_schema", node=DataConfig)
    for name, entry in presets().items():
        store.store(group="model", name=name, node=entry.config)


def choices(group: str) -> list[str]:
    """The choices of `model=` or `data=`."""
    return list(presets()) if group == "model" else list(_data_choices())


@lru_cache(maxsize=1)
def _data_choices() -> tuple[str, ...]:
    with _hydra():
        options = GlobalHydra.instance().config_loader().get_group_options("data")
    return tuple(name for name in options if not name.startswith("_"))


def plugin_names(overrides: Sequence[str]) -> list[str]:
    """The plug-ins that overrides name with `plugins=[FILE.py, MODULE]`, files with absolute paths."""
    values: list[Any] = [_parse_one(text).value() for text in overrides if text.startswith("plugins=")]
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return [str(Path(name).expanduser().absolute()) if plugins.is_file(str(name)) else name for name in names]


def value_of(text: str) -> Any:
    """The value of an override, as Hydra reads it. Raises InputError for a text that is not an override."""
    return _parse_one(text).value()


def load_plugins(overrides: Sequence[str]) -> list[str]:
    """Import the plug-ins of installed packages, and those that `plugins=[FILE.py, MODULE]` names.

    Returns the other overrides. Raises InputError as `plugins.load` does.
    """
    plugins.entry_points()
    plugins.load(plugin_names(overrides))
    if _revision != [revision()]:  # a preset may have been replaced since its configuration was composed
        for cached in (_base, _section, _check_base_key):
            cached.cache_clear()
        _revision[:] = [revision()]
    return [text for text in overrides if not text.startswith("plugins=")]


_revision: list[int] = []


def _hydra() -> Any:
    _register()
    return initialize_config_module("lamabench.launch.conf", version_base="1.3")


def compose(overrides: Sequence[str]) -> tuple[Config, dict[str, str]]:
    """The configuration after overrides such as `model=dit_s_2 train.steps=200`, and the choice of each group.

    Hydra composes each pair of a model and a data set only once. Overrides are then merged into its result section by
    section, and sections are cached, so that a study of a thousand runs is planned in seconds.
    Plug-ins are imported first. Raises InputError, one line, for an unknown key or choice and for a value of the wrong
    type or out of range.
    """
    overrides = load_plugins(overrides)
    parsed = _parse(overrides)
    choice_of = {o.key_or_group: str(o.value()) for o in parsed if o.key_or_group in GROUPS}
    for group, choice in choice_of.items():
        if choice not in choices(group):
            raise unknown(group, choice, choices(group))
    groups = (choice_of.get("model"), choice_of.get("data"))
    by_section: dict[str, list[str]] = {}
    for override, text in zip(parsed, overrides, strict=True):
        if (key := override.key_or_group) not in GROUPS:
            _check_base_key(*groups, key)
            by_section.setdefault(key.split(".")[0], []).append(text)
    sections = {}
    for field in fields(Config):
        # The shape of the model follows from the data. An interpolation that a person writes may refer to any section.
        sources = ("data", "model") if field.name == "model" else (field.name,)
        tied = any("${" in text for text in overrides)
        texts = [text for name in (by_section if tied else sources) for text in by_section.get(name, ())]
        try:
            sections[field.name] = pickle.loads(_section(field.name, *groups, tuple(texts)))
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(plain_error(error)) from None
    model, goal = sections["model"], objective(sections["objective"])
    if (channels := goal.out_channels(model.in_channels)) != out_channels(model) and model.out_channels is None:
        # The channels of the head follow from the objective, as the shape of the model follows from the data.
        sections["model"] = replace(model, out_channels=channels)
    return Config(**sections), dict(_base(*groups).choices)


class Base(NamedTuple):
    """Hydra's composition of a model and a data set: a node to read, the same node pickled, and the choices."""

    node: DictConfig
    pickled: bytes
    choices: dict[str, str]


@cache
def _base(model: str | None, data: str | None) -> Base:
    groups = {"model": model, "data": data}
    with _hydra():
        words = [f"{group}={choice}" for group, choice in groups.items() if choice is not None]
        node = hydra_compose("config", words, return_hydra_config=True)
    choice_of = {group: node.hydra.runtime.choices[group] for group in GROUPS}
    OmegaConf.set_struct(node, False)
    del node["hydra"]  # only the configuration of the run stays
    return Base(node, pickle.dumps(node), choice_of)  # unpickling is ten times faster than OmegaConf's own copies


@lru_cache(maxsize=4096)
def _section(name: str, model: str | None, data: str | None, overrides: tuple[str, ...]) -> bytes:
    """A section of the configuration, or `seed`, after overrides. It is pickled, so that every run gets a copy."""
    node = pickle.loads(_base(model, data).pickled)
    for override in _parse(overrides):
        OmegaConf.update(node, override.key_or_group, _value(node, override), merge=True)
    value = node[name]
    return pickle.dumps(OmegaConf.to_object(value) if isinstance(value, DictConfig) else value)


def _value(base: DictConfig, override: Override) -> Any:
    """The value of an override. If the key takes only lists, a single value becomes a list of one."""
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
        raise InputError(f"{text!r} gives several values: write a list as [a,b], or several runs as axes of a study")
    if override.is_add() or override.is_delete() or override.package is not None:
        raise InputError(f"{text!r} is not an override; write key=value, such as train.steps=200")
    return override


@lru_cache(maxsize=4096)
def _check_base_key(model: str | None, data: str | None, key: str) -> None:
    _check_key(_base(model, data).node, key)


def _check_key(base: DictConfig, key: str, section: str = "") -> None:
    """Raise InputError for the first word of `key` that does not exist, with the keys that exist in its place."""
    node: Any = base
    path: list[str] = []
    for word in key.split("."):
        keys = [str(k) for k in node] if isinstance(node, DictConfig) else []
        if word not in keys:
            inside = ".".join([section, *path] if section else path)
            where = f"key in {inside}" if inside else "key"
            raise unknown(where, word, keys)
        path.append(word)
        node = node._get_node(word)
    if isinstance(node, DictConfig):
        raise InputError(f"{key} is a section; set one of its keys: {', '.join(str(k) for k in node)}")


def plain_error(error: Exception) -> str:
    """The first line of the cause of a Hydra or OmegaConf error, with the key if the error names one."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause)
    key = re.search(r"full_key: (\S+)", text)
    first = text.strip().splitlines()[0]
    return f"{key[1]}: {first}" if key else first


def override(config: Config, overrides: Sequence[str]) -> Config:
    """A configuration after overrides such as `sample.steps=25` of its sections, other than the model.

    Raises InputError as `compose` does.
    """
    texts: dict[str, list[str]] = {}
    for text in overrides:
        section, _, rest = text.partition(".")
        texts.setdefault(section, []).append(rest)
    sections = {}
    for section, rest in texts.items():
        node = OmegaConf.structured(getattr(config, section))
        apply(node, rest, section)
        sections[section] = OmegaConf.to_object(node)
    return replace(config, **sections)


def model_config(name: str, overrides: Sequence[str]) -> Any:
    """The configuration of a preset after overrides of its fields (`input_size=64` or `model.input_size=64`).

    Raises InputError as `compose` does.
    """
    overrides = load_plugins(overrides)
    base = OmegaConf.structured(preset(name).config)
    apply(base, [text.removeprefix("model.") for text in overrides])
    return OmegaConf.to_object(base)


def apply(node: DictConfig, overrides: Sequence[str], section: str = "") -> None:
    """Set keys of a typed node, which messages call `section`. Raises InputError as `compose` does."""
    for override in _parse(overrides):
        _check_key(node, override.key_or_group, section)
        try:
            OmegaConf.update(node, override.key_or_group, _value(node, override))
        except OmegaConfBaseException as error:
            raise InputError(plain_error(error)) from None
