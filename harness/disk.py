"""Files that survive a crash: written whole or not at all, and JSON lines of which the last may be incomplete."""

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

from ..kernels.errors import InputError
from .lines import EVENTS, HUGE, LINES, value_of

# Errors of the system for a wrong path or a missing permission. Others, as those of a network, may pass.
REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP)
REFUSALS += (errno.ENAMETOOLONG,)


@contextmanager
def access(verb: str, path: Path, hint: str = "", missing: bool = False) -> Iterator[None]:
    """Raise InputError, such as "cannot read PATH: Permission denied", for an error of the system in `REFUSALS`, and
    for a path that does not exist if it is `missing`."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS and not (missing and error.errno == errno.ENOENT):
            raise
        raise InputError(f"cannot {verb} {path}: {error.strerror}{hint}") from None


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that it has all of `data` or its old contents, even if the machine crashes in between.

    The folder must exist. If a shared folder disappeared, creating it again would split a run over two folders.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append(path: Path, line: dict[str, Any]) -> None:
    """Append one JSON line and flush it to disk. First removes a last line that an earlier kill left incomplete.

    Only the holder of the folder's lock may call this. The folder must exist, as for `write_atomically`.
    """
    with open(path, "a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            if whole < end:
                file.truncate(whole)
        file.write((json.dumps(line, allow_nan=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Replace a file of JSON lines atomically."""
    write_atomically(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode())


def read_lines(path: Path, damaged: bool = False) -> list[dict[str, Any]]:
    """Every complete line of a file of JSON objects, empty if there is no file. A last line without a newline is an
    incomplete write and is left out.

    Raises InputError, with the file and the line, for a line that is no JSON object or lacks what `LINES` names, unless
    lines may be `damaged` and are left out, and for a file that cannot be read.
    """
    with access("read", path):
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return []
    texts = list(takewhile(lambda text: text.endswith(b"\n"), content.splitlines(keepends=True)))
    values = _at_once(texts)
    lines = []
    for number, text in enumerate(texts, start=1):
        with suppress(InputError) if damaged else nullcontext():
            lines.append(_checked(path, number, values[number - 1] if values else _parsed(path, number, text)))
    return lines


def _at_once(texts: list[bytes]) -> list[Any]:
    """The values of several lines, in a third of the time that they take one by one; empty if a line is damaged."""
    with suppress(ValueError, RecursionError):
        values = value_of(b"[" + b",".join(texts) + b"]")
        return values if len(values) == len(texts) else []
    return []


def _parsed(path: Path, number: int, text: bytes) -> Any:
    try:
        return value_of(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} line {number} is not JSON: {error}") from None


def _checked(path: Path, number: int, line: Any) -> dict[str, Any]:
    if not isinstance(line, dict):
        raise InputError(f"{path} line {number} is not a record of lamabench: it is no JSON object")
    needed = LINES.get(path.name, {}) | EVENTS.get(str(line.get("event")), {})
    wrong = [name for name, kind in needed.items() if not isinstance(line.get(name), kind)]
    if wrong := wrong + [name for name, one in line.items() if isinstance(one, (int, float)) and abs(one) > HUGE]:
        text = f"its {wrong[0]} is {line.get(wrong[0])!r}"[:80]
        raise InputError(f"{path} line {number} is no line of lamabench: {text}")
    return line
