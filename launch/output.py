"""Tables that the subcommands print, and arguments that they read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate


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
    """Names and overrides. An override is a word with a `=` that is not the path of an existing file."""
    names = [word for word in words if "=" not in word or Path(word).exists()]
    return names, [word for word in words if word not in names]
