"""The error for bad input: one line that names the thing and lists the choices."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A request that cannot be met as asked. Commands print the message as one line and exit with 2."""


def unknown(what: str, name: object, choices: Iterable[object]) -> InputError:
    """An `InputError` for a name that is not among `choices`. It suggests the closest choice where one is close."""
    names = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return InputError(f"unknown {what} {str(name)!r}{hint}; choices: {', '.join(names) or 'none'}")
