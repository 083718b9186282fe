"""Entries of `mixers`: a kind (`window`), or a mapping with its own settings ({kind: window, size: 4})."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from ...kernels.errors import InputError, unknown
from ..fields import typed
from .mixer import EMPTY, MIXERS, Mixer


def stage_mixers(entries: Any, shared: Mapping[str, Any], stages: int) -> list[list[Mixer]]:
    """The mixers of each stage, from a list of entries or from a list of such lists, one for each stage.

    `shared` has the fields that the model shares with its mixers. Raises InputError for a mixture of entries and lists,
    for a wrong number of lists, for an unknown kind or setting, and for a value of a wrong type.
    """
    lists = [isinstance(entry, list | tuple) for entry in entries]
    if any(lists) and not all(lists):
        raise InputError(f"mixers must be a list of mixers, or a list for each stage, not {entries}")
    if any(lists) and len(lists) != stages:
        raise InputError(f"mixers has {len(lists)} lists for {stages} stages: give one for each stage, or one for all")
    by_stage = entries if any(lists) else [entries] * stages
    resolved = [[_resolve(entry, shared) for entry in stage] for stage in by_stage]
    return [[mixer for mixer in stage if mixer is not None] for stage in resolved]


def _resolve(entry: Any, shared: Mapping[str, Any]) -> Mixer | None:
    """The mixer of an entry, or None for an entry without a mixer."""
    settings = {"kind": entry} if isinstance(entry, str) else entry
    choices = [*MIXERS, EMPTY]
    if not isinstance(settings, Mapping) or "kind" not in settings:
        raise InputError(f"a mixer must be a kind or a mapping with a kind, not {entry!r}; kinds: {', '.join(choices)}")
    kind = settings["kind"]
    if kind not in choices:
        raise unknown("mixer", kind, choices)
    own = {name: value for name, value in settings.items() if name != "kind"}
    settable = {f.name: f for f in fields(MIXERS[kind])} if kind != EMPTY else {}
    for name in own:
        if name not in settable:
            raise unknown(f"setting of mixer {kind}", name, settable)
    if kind == EMPTY:
        return None
    values = typed(f"mixer {kind}", MIXERS[kind], own)
    for name, f in settable.items():
        model_field = f.metadata.get("model", name)
        if name not in values and model_field in shared:
            values[name] = shared[model_field]
        elif name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise InputError(f"mixer {kind} needs {name}: write {{kind: {kind}, {name}: …}}")
    return MIXERS[kind](**values)
