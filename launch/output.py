"""Tables that the subcommands print, and arguments that they read."""

import json
import os
import shlex
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from ..kernels.errors import InputError


def show(rows: Sequence[dict[str, Any]], columns: dict[str, str], as_json: bool) -> None:
    """Print rows as JSON with every key, or as a table of `columns` {key: heading}."""
    if as_json:
        print(json.dumps(list(rows), indent=1))
        return
    table = [[_cell(row.get(key)) for key in columns] for row in rows]
    numeric = [all(isinstance(row.get(key), int | float | None) for row in rows) for key in columns]
    align = ["right" if number else "left" for number in numeric]
    print(tabulate(table, headers=list(columns.values()), colalign=align, disable_numparse=True))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10 else f"{value:,.3f}"
    return str(value)


def number(count: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def split_arguments(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names and overrides. An override is a word with a `=` that is no path: no file has that name, and no `/` stands
    before the `=`. Raises InputError for a word that is not text."""
    names, overrides = [], []
    for word in words:
        key, sign, _ = word.partition("=")
        path = not sign or "/" in key or os.path.exists(os.path.expanduser(word))
        (names if path else overrides).append(word)
        if "\0" in word:
            raise InputError(f"no name or setting has a NUL: {word!r}")
    return names, overrides


def command(*words: object) -> str:
    """A `lamabench` command as one types it in a shell."""
    return shlex.join(["lamabench", *map(str, words)])
