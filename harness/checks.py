"""Checks of values that several sections of a configuration share."""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..kernels.errors import InputError, unknown

PRECISIONS = ("float32", "bfloat16")
WEIGHTS = ("ema", "live")  # or ema@DECAY


def check_positive(section: str, values: dict[str, int | float], most: float = math.inf) -> None:
    """Raise InputError for a value that is not above 0, finite and at most `most`."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise InputError(f"{section}.{name} must be above 0{' and finite' if value > 0 else ''}, not {value}")
        if value > most:
            raise InputError(f"{section}.{name} must be at most {most:,}, not {value}")


def check_precision(key: str, precision: str) -> None:
    """Raise InputError, with the choices, for a precision that is not supported."""
    if precision == "float16":
        raise InputError(
            f"{key}=float16 is not supported: states and outputs of a scan exceed float16's largest number (65504), "
            f"and there is no loss scaling for small gradients; choices: {', '.join(PRECISIONS)}"
        )
    if precision not in PRECISIONS:
        raise unknown(key, precision, PRECISIONS)


def check_seed(name: str, seed: int, bits: int = 64) -> None:
    """Raise InputError for a seed that is negative or has more than `bits` bits."""
    if not 0 <= seed < 2**bits:
        raise InputError(f"{name} must be 0 or more and below 2^{bits}, not {seed}")


def check_steps(name: str, value: Any, number: bool = False, words: tuple[str, ...] = ()) -> Any:
    """The steps of a training as a sorted list without duplicates. Where `number` is true, a single positive int is
    allowed too and returned as it is. Raises InputError for anything else."""
    if number and type(value) is int and value > 0:
        return value
    steps = list(value) if isinstance(value, list | tuple) else None
    if steps is None or not all(type(step) is int and step > 0 for step in steps):
        choices = [*words, "a list of steps such as [1000, 2000]", *(["a number of images"] if number else [])]
        raise InputError(f"{name} must be {' or '.join(choices)}, not {value!r}")
    return sorted(set(steps))


def average_name(decay: float) -> str:
    """The name of the weights that are averaged with another decay than `train.ema_decay`, such as `ema@0.999`."""
    return f"ema@{decay}"


def check_weights(name: str, value: str, choices: Sequence[str] = (*WEIGHTS, "ema@DECAY")) -> str:
    """`ema`, `live`, or `ema@DECAY` with the decay as Python writes it. Raises InputError, with `choices`, for another
    value."""
    if value in WEIGHTS:
        return value
    if value.startswith("ema@"):
        with suppress(ValueError):
            return average_name(float(value.removeprefix("ema@")))
    raise unknown(name, value, choices)
