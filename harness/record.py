"""Records: what a run wrote down. Plain JSON lines and plain Python, so that reports need no torch.

A run is a folder `ROOT/STUDY/NAME-ID/`:

    config.json      the whole resolved configuration, the overrides, the axis values
    record.jsonl     one line a finished or failed stage, appended
    metrics.jsonl    one line every few training steps
    samples.npz      `images` uint8 [N, H, W, C], `labels` int64 [N]
    checkpoints/     tensors and JSON, see training/checkpoint.py
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

SCHEMA = 1
KINDS = ("cost", "train", "sample", "evaluate", "bench")
STATES = ("done", "failed", "oom", "diverged", "wrong")
# Where and how, never what: these do not change what a run is.
OUTSIDE_IDENTITY = ("run", "data.path")


class RecordError(ValueError):
    """A folder or file that is not what a record should be, in one line."""


def identity(config: dict[str, Any]) -> str:
    """Eight hex digits that name a run: the hash of its configuration less `OUTSIDE_IDENTITY` (DESIGN.md, rule 7)."""
    kept = json.loads(json.dumps(config))
    for name in OUTSIDE_IDENTITY:
        *parents, last = name.split(".")
        node = kept
        for parent in parents:
            node = node.get(parent, {})
        node.pop(last, None)
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` so that `path` holds all of it or what it held before, even if the machine dies in between.

    The folder has to be there: where a shared one went away, making it anew would give a run two homes.
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
    """Append one JSON line and flush it to disk. A last line torn by an earlier kill is dropped first.

    The folder has to be there, as for `write_atomically`.
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
    """Replace a file of JSON lines, atomically."""
    write_atomically(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole JSON line of a file; a last line without its newline is a torn write and is left out."""
    if not path.is_file():
        return []
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not text.endswith(b"\n"):
            break
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise RecordError(f"{path} line {number} is not JSON: {error}") from None
    return lines


def entry(kind: str, state: str = "done", **fields: Any) -> dict[str, Any]:
    """One line of `record.jsonl`. `state` other than done comes with `error`, the reason in one line."""
    if kind not in KINDS or state not in STATES:
        raise ValueError(f"no such record: kind {kind!r} (of {KINDS}), state {state!r} (of {STATES})")
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"schema": SCHEMA, "kind": kind, "state": state, "time": time, **fields}


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it.

    `info` is config.json: `id`, `study`, `name`, `model` (preset), `family`, `title`, `variant` (axis values),
    `overrides`, `config`. `records` is record.jsonl, `metrics` metrics.jsonl.
    """

    path: Path
    info: dict[str, Any]
    records: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)

    def last(self, kind: str, **match: Any) -> dict[str, Any] | None:
        """The newest record of a kind whose fields equal `match`; None where there is none."""
        for line in reversed(self.records):
            if line["kind"] == kind and all(line.get(key) == value for key, value in match.items()):
                return line
        return None


def read_run(path: Path) -> Run:
    """One run folder. Raises RecordError where there is no config.json or a line cannot be read."""
    try:
        info = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        raise RecordError(f"{path} is not a run folder: it has no config.json") from None
    except ValueError as error:
        raise RecordError(f"{path / 'config.json'} is not JSON: {error}") from None
    return Run(path, info, read_lines(path / "record.jsonl"), read_lines(path / "metrics.jsonl"))


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """Every run at or below the given folders (a run, a study, a root), sorted by study and name.

    Raises RecordError for a folder that does not exist or holds no run.
    """
    runs = []
    for path in paths:
        if not path.is_dir():
            raise RecordError(f"{path} is a file: name folders of runs" if path.exists() else f"no such folder: {path}")
        found = sorted(
            {config.parent for pattern in ("", "*/", "*/*/") for config in path.glob(f"{pattern}config.json")}
        )
        if not found:
            raise RecordError(f"{path} holds no run: expected STUDY/NAME-ID/config.json at or below it")
        runs += [read_run(folder) for folder in found]
    return sorted(runs, key=lambda run: (run.info["study"], run.info["name"], run.info["id"]))
