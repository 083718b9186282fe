"""Paths and errors as one line of text."""

import os
from collections.abc import Sequence
from pathlib import Path

FEW = 5  # names in a message


def line_of(file: Path) -> str:
    """A path as one line of text that any UTF-8 output takes, whatever bytes it has."""
    return os.fsencode(file).decode("utf-8", "backslashreplace").replace("\n", "\\n")


def few(texts: Sequence[str], count: int | None = None, separator: str = ", ") -> str:
    """The first of `texts`, and how many of all `count` are not named."""
    rest = (len(texts) if count is None else count) - len(texts[:FEW])
    return separator.join(texts[:FEW]) + (f" and {rest:,} more" if rest else "")


def reason_of(error: BaseException | str) -> str:
    """Why something cannot be read, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # Pillow adds the object that it read from, which tells the user nothing.
    text = " ".join(str(error).split(" <_io.")[0].split())
    return text or type(error).__name__
