"""Released weights of others: which file has which model, and its tensors by the names that the network here has.

A source is a module: `fits` says whether it knows a file, `known` which fields of the configuration the file tells, and
`state` gives the tensors by the names of the released code, from which the family's `from_reference` fills a network.
"""

import importlib
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from ...kernels.errors import InputError, unknown
from .. import registry
from ..fields import typed
from ..registry import Backbone
from . import diffusers_dit, dit, files, guided_diffusion, lamamba
from .files import Source

SOURCES: tuple[ModuleType, ...] = (dit, guided_diffusion, lamamba, diffusers_dit)


@dataclass(frozen=True)
class Released:
    """A network with released weights. `title` names the release, `weights` says which it has: `ema`, or `model` for a
    bare state dict. `notes` are what a reader must know, a line each."""

    net: Backbone
    title: str
    weights: str
    notes: list[str]
    settings_path: Path | None = None


def load(
    path: Path, preset: str | None = None, settings: dict[str, Any] | None = None, settings_path: Path | None = None
) -> Released:
    """The network of a released file or folder, on the CPU.

    `preset` and `settings` (fields of its configuration) tell what the tensors do not, and are compared with what they
    do. Without `preset`, the file's sizes find one. `settings_path` is a YAML file of the training. Raises InputError,
    which names what does not fit and the likely cure, for anything else.
    """
    source = files.read(path, settings_path)
    module = source_of(source)
    try:
        config = configuration(source, module, preset, settings or {})
        state, notes = module.state(source), module.notes(source)
    except InputError:
        raise
    except files.NO_DATA as error:
        raise InputError(
            f"{path} has tensors or settings of a form that {module.TITLE} does not have: {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None
    family = registry.family_of(config)
    home = importlib.import_module(family.net_type.__module__)
    try:
        net = home.from_reference(state, config)
    except InputError as error:
        raise InputError(f"{path}: {error}; {_cure(str(error))}") from None
    return Released(net, module.TITLE, source.weights, notes, source.settings_path)


def _cure(fault: str) -> str:
    """The likely cure of a fault that `registry.load_reference` names."""
    if "not of real numbers" in fault:
        return "it is quantised: convert the file that it was made of"
    if "unexpected" in fault:
        return "the code that wrote it has parts that this model lacks, so that it is of another model or version"
    return "the file is incomplete" if "missing" in fault else "it is of a model of other sizes"


def source_of(source: Source) -> ModuleType:
    """The module that knows a file. Raises InputError, with a few of its names, if there is none."""
    for module in SOURCES:
        if module.fits(source):
            return module
    names = ", ".join(list(source.tensors)[:3])
    raise InputError(
        f"{source.path} has the weights of no model that lamabench reads "
        f"({', '.join(module.TITLE for module in SOURCES)}): its tensors are {names}, …"
    )


def configuration(source: Source, module: ModuleType, preset: str | None, settings: dict[str, Any]) -> Any:
    """The configuration of the network in a file. Raises InputError where a preset or a setting contradicts it, and
    where something is untold."""
    family = registry.families()[module.FAMILY]
    names = [f.name for f in fields(family.config_type)]
    what = preset or family.name
    for name in settings:
        if name not in names:
            raise unknown(f"field of {what}", name, names)
    settings = typed(what, family.config_type, settings)
    known = module.known(source)
    if settings.get("null_class", preset is not None and getattr(registry.preset(preset).config, "null_class", False)):
        known["num_classes"] -= 1  # the last label is that of no class
    if preset is None:
        told = _recognised(family, module, known, settings)
        if missing := [name for name in module.TOLD if name not in told | known | settings]:
            raise InputError(
                f"{source.path} does not tell {' and '.join(missing)} ({module.HINT}): give model=NAME, or "
                f"{' '.join(f'model.{name}=…' for name in missing)}"
            )
        config = family.config_type(**_without_twice(told | known) | settings)
    else:
        entry = registry.preset(preset)
        if type(entry.config) is not family.config_type:
            raise InputError(f"{source.path} has weights of {module.TITLE}, but {preset} is no such model")
        config = family.config_type(**vars(entry.config) | settings)
    _compare(source, config, known, what)
    return config


def _recognised(
    family: registry.Family, module: ModuleType, known: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """The fields `module.TOLD` of the first preset that agrees with a file in `module.SAME`."""
    whole = known | settings
    for entry in family.presets.values():
        if module.SAME and all(getattr(entry.config, name) == whole.get(name) for name in module.SAME):
            return {name: getattr(entry.config, name) for name in module.TOLD}
    return {}


def _without_twice(values: dict[str, Any]) -> dict[str, Any]:
    """Fields with `out_channels` None where it is twice `in_channels`, as presets have it."""
    twice = values.get("out_channels") == 2 * values["in_channels"]
    return values | ({"out_channels": None} if twice else {})


def _compare(source: Source, config: Any, known: dict[str, Any], what: str) -> None:
    """Raise InputError, with the fields, where a configuration is not that of a file."""
    own = vars(config) | {"out_channels": registry.out_channels(config)}
    faults = [f"{name} {value}, not {own[name]}" for name, value in known.items() if own[name] != value]
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise InputError(f"{source.path} does not fit {what}: it has {'; '.join(faults[:4])}{more}")
