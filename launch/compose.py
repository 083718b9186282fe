"""From overrides to a typed configuration, through Hydra; every mistake becomes one line that lists the choices."""

import re
from collections.abc import Sequence
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..harness.backbones import presets
from ..harness.config import Config, DataConfig
from ..kernels.errors import InputError, unknown

GROUPS = ("model", "data")


def _register() -> None:
    store = ConfigStore.instance()
    store.store(name="_schema", node=Config)
    store.store(group="data", name="_schema", node=DataConfig)
    for name, preset in presets().items():
        store.store(group="model", name=name, node=preset.config)


def choices(group: str) -> list[str]:
    """The choices of `model=` or `data=`."""
    if group == "model":
        return list(presets())
    with _hydra():
        options = GlobalHydra.instance().config_loader().get_group_options(group)
    return [name for name in options if not name.startswith("_")]


def _hydra() -> Any:
    _register()
    return initialize_config_module("lamabench.launch.conf", version_base="1.3")


def compose(overrides: Sequence[str]) -> tuple[Config, dict[str, str]]:
    """The configuration that overrides such as `model=dit_s_2 train.steps=200` make, and the choice of each group.

    Raises InputError, one line, for an unknown key or choice, a value of the wrong type, or one out of range.
    """
    parsed = _parse(overrides)
    chosen = {o.key_or_group: o.value() for o in parsed if o.key_or_group in GROUPS}
    for group, choice in chosen.items():
        if choice not in choices(group):
            raise unknown(group, choice, choices(group))
    with _hydra():
        try:
            base = hydra_compose("config", [f"{group}={choice}" for group, choice in chosen.items()])
            for override in parsed:
                if override.key_or_group not in GROUPS:
                    _check_key(base, override.key_or_group)
            node = hydra_compose("config", list(overrides), return_hydra_config=True)
            picked = {group: node.hydra.runtime.choices[group] for group in GROUPS}
            OmegaConf.set_struct(node, False)
            del node["hydra"]  # what is left is the run
            config = OmegaConf.to_object(node)
        except (HydraException, OmegaConfBaseException) as error:
            raise InputError(_plain(error)) from None
    assert isinstance(config, Config)
    return config, picked


def _parse(overrides: Sequence[str]) -> list[Override]:
    for text in overrides:
        if "=" not in text:
            raise InputError(f"{text!r} is not an override; write key=value, such as train.steps=200")
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise InputError(f"cannot read the override {' '.join(overrides)!r}: {_plain(error)}") from None


def _check_key(base: DictConfig, key: str) -> None:
    """Raise InputError, with the keys there are, where the first word of `key` that does not exist stands."""
    node: Any = base
    walked: list[str] = []
    for word in key.split("."):
        known = [str(k) for k in node] if isinstance(node, DictConfig) else []
        if word not in known:
            where = f"key in {'.'.join(walked)}" if walked else "key"
            raise unknown(where, word, known)
        walked.append(word)
        node = node._get_node(word)
    if isinstance(node, DictConfig):
        raise InputError(f"{key} is a section; set one of its keys: {', '.join(str(k) for k in node)}")


def _plain(error: Exception) -> str:
    """The first telling line of a Hydra or OmegaConf error, and the key where it says one."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause)
    key = re.search(r"full_key: (\S+)", text)
    first = text.strip().splitlines()[0]
    return f"{key[1]}: {first}" if key else first


def model_config(name: str, overrides: Sequence[str]) -> Any:
    """The configuration of a preset with overrides of its own fields (`input_size=64` or `model.input_size=64`).

    Raises InputError as `compose` does.
    """
    known = presets()
    if name not in known:
        raise unknown("model", name, known)
    base = OmegaConf.structured(known[name].config)
    parsed = _parse([text.removeprefix("model.") for text in overrides])
    for override in parsed:
        _check_key(base, override.key_or_group)
        try:
            OmegaConf.update(base, override.key_or_group, override.value())
        except OmegaConfBaseException as error:
            raise InputError(_plain(error)) from None
    return OmegaConf.to_object(base)
