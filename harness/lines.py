"""What the lines of files beside record.jsonl have. RECORDS.md lists the fields of metrics.jsonl."""

import json
from types import NoneType
from typing import Any, NoReturn

from ..kernels.errors import InputError

HUGE = 1e100  # no number of a record is so large, so that sums and squares of them are finite

NUMBER = (int, float, NoneType)  # a tuple, because isinstance is slower for a union
# {field of a line of metrics.jsonl: (types, meaning)}
METRICS: dict[str, tuple[Any, str]] = {
    "step": (int, "steps since the start"),
    "images": (NUMBER, "images seen"),
    "loss": (NUMBER, "mean over the steps since the last regular line; beside it are the objective's other metrics"),
    "grad_norm": (NUMBER, "mean norm of the gradients of all parameters, before clipping"),
    "loss_q1": (NUMBER, "mean loss of the images with t in the first quarter of its range; null: none"),
    "loss_q2": (NUMBER, "of those in the second quarter"),
    "loss_q3": (NUMBER, "of those in the third quarter"),
    "loss_q4": (NUMBER, "of those in the last quarter"),
    "heldout_loss": (NUMBER, "loss of the averaged weights on the test split, the mean of eight timesteps, if asked"),
    **{f"heldout_loss_{n}": (NUMBER, f"that of timestep {n} of eight, in rising order") for n in range(1, 9)},
    "lr": (NUMBER, "learning rate of this step"),
    "seconds": (NUMBER, "seconds of training so far"),
    "waited": (NUMBER, "of these, seconds in which the device waited for data, if it is known"),
    "images_per_s": (NUMBER, "images per second since the line before, or since the start of the process"),
    "mfu": (NUMBER, "model FLOPs over the peak of all GPUs (PaLM, appendix B), if it is known"),
    "peak_memory_gib": (NUMBER, "peak memory of the first GPU that torch held since the start of the process, GiB"),
}
# What a line of these files has, and a line of attempts.jsonl for an event. What may be null may be missing too.
LINES: dict[str, dict[str, Any]] = {
    "metrics.jsonl": {name: types for name, (types, _) in METRICS.items()},
    "attempts.jsonl": {"event": str, "job": str, "records": int | None, "error": str | None},
    "claims.jsonl": {"start": int, "stop": int, "by": str, "at": float, "seconds": NUMBER},
}
EVENTS: dict[str, dict[str, Any]] = {"start": {"restart": int}, "stop": {"signal": str}}
# Entries of a provenance and of a stretch of a training.
TEXT = (str, NoneType)
ORIGIN = {
    "commit": TEXT,
    "device": TEXT,
    "host": TEXT,
    "driver": TEXT,
    "torch": TEXT,
    "python": TEXT,
    "lamabench": TEXT,
}
ORIGIN |= {"dirty": (bool, NoneType), "processes": (int, NoneType)}


def value_of(text: bytes) -> Any:
    """The value of a text in JSON. Raises ValueError for any other text, also for NaN and Infinity, which Python's own
    reader accepts and JSON does not have."""
    return json.loads(text, parse_constant=_refuse)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def check_entries(kind: str, fields: dict[str, Any]) -> None:
    """Raise InputError if a field of a record that holds a dict or a list lacks entries that are read of it, or has
    some of another type."""
    for name, part in (fields.get("parts") or {}).items():
        if not isinstance(part, dict) or not all(isinstance(part.get(key), int) for key in ("params", "macs", "flops")):
            raise InputError(f"field 'parts' of a {kind} record lacks params, macs or flops of {name}")
    stretches, moments = fields.get("stretches") or (), fields.get("moments") or ()
    if not all(isinstance(one, dict) for one in stretches) or not all(isinstance(one, int) for one in moments):
        raise InputError(f"field 'stretches' or 'moments' of a {kind} record holds something of another type")
    for field, origin in [("provenance", fields.get("provenance") or {}), *(("stretches", one) for one in stretches)]:
        if wrong := [name for name, types in ORIGIN.items() if not isinstance(origin.get(name), types)]:
            raise InputError(f"field {field!r} of a {kind} record has {wrong[0]} {origin[wrong[0]]!r}"[:200])
