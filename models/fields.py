"""Fields of configurations: the plain data that keys hash, and values of the types that fields declare."""

from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..kernels.errors import InputError

MOST_BLOCKS = 1_000  # of a backbone, many times as many as any preset has


def declared(section: Any) -> dict[str, Any]:
    """The fields of a dataclass as plain data, without those at their `since` value. Keys hash this."""
    return {
        f.name: _plain(getattr(section, f.name))
        for f in fields(section)
        if "since" not in f.metadata or getattr(section, f.name) != f.metadata["since"]
    }


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return declared(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def check_blocks(name: str, count: int) -> None:
    """Raise InputError if a field asks for more blocks than `MOST_BLOCKS`, which would take hours to build."""
    if count > MOST_BLOCKS:
        raise InputError(f"{name} asks for {count:,} blocks; at most {MOST_BLOCKS:,} are allowed")


def check_dropout(probability: float) -> None:
    """Raise InputError for a probability of dropout that is not at least 0 and below 1."""
    if not 0 <= probability < 1:
        raise InputError(f"model.dropout must be at least 0 and below 1, not {probability}")


def typed(what: str, config_type: type, values: dict[str, Any]) -> dict[str, Any]:
    """Values for fields of a dataclass, each of the type that its field declares. A whole number becomes a float where
    the field is one, and a single value becomes a list where the field is one.

    Raises InputError where a value has another type. `what` names the dataclass in messages.
    """
    hints = _hints(config_type)
    return {name: _typed(f"{name} of {what}", hints[name], value) for name, value in values.items()}


@cache
def _hints(config_type: type) -> dict[str, Any]:
    return get_type_hints(config_type)


def _typed(what: str, hint: Any, value: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for choice in arguments:
            if _fits(choice, value):
                return _typed(what, choice, value)
    elif origin is list:
        items = value if isinstance(value, list | tuple) else [value]
        return [_typed(f"an item of {what}", arguments[0], item) for item in items]
    elif _fits(hint, value):
        return float(value) if hint is float else value
    name = hint.__name__ if isinstance(hint, type) and origin is None else str(hint)
    expected = f"one of {', '.join(map(str, arguments))}" if origin is Literal else f"of type {name}"
    raise InputError(f"{what} must be {expected}, not {value!r}")


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value has a type. True and False are not numbers."""
    origin = get_origin(hint)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin is Literal:
        return value in get_args(hint)
    if hint is float:
        return type(value) in (int, float)
    if hint in (int, bool):
        return type(value) is hint
    kind = origin if origin is not None else hint
    return isinstance(value, kind) if isinstance(kind, type) else True
