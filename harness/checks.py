"""Checks of values that several sections of a configuration share."""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ..kernels.errors import InputError, unknown

PRECISIONS = ("float32", "bfloat16")
WEIGHTS = ("ema", "live")  # or ema@DECAY or power@WIDTH
WIDEST = 0.288  # of relative widths; that of the plain mean of all steps is 12^-0.5


def check_positive(section: str, values: dict[str, int | float], most: float = math.inf) -> None:
    """Raise InputError for a value that is not above 0, finite and at most `most`."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise InputError(f"{section}.{name} must be above 0{' and finite' if value > 0 else ''}, not {value}")
        if value > most:
            raise InputError(f"{section}.{name} must be at most {most:,}, not {value}")


def check_numbers(name: str, values: Sequence[Any]) -> list[float]:
    """A list of numbers. Raises InputError if one of them is something else."""
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    if len(numbers) < len(values):
        raise InputError(f"{name} must be a list of numbers, not {list(values)}")
    return numbers


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


def check_steps(name: str, value: Any, number: bool = False, words: tuple[str, ...] = (), least: int = 1) -> Any:
    """The steps of a training as a sorted list without duplicates. Where `number` is true, a single positive int is
    allowed too and returned as it is. Raises InputError for anything else."""
    if number and type(value) is int and value > 0:
        return value
    steps = list(value) if isinstance(value, list | tuple) else None
    if steps is None or not all(type(step) is int and step >= least for step in steps):
        choices = [*words, "a list of steps such as [1000, 2000]", *(["a number of images"] if number else [])]
        raise InputError(f"{name} must be {' or '.join(choices)}, not {value!r}")
    return sorted(set(steps))


def average_name(decay: float) -> str:
    """The name of the weights that are averaged with another decay than `train.ema_decay`, such as `ema@0.999`."""
    return f"ema@{decay}"


def power_name(width: float) -> str:
    """The name of the weights that are averaged with a power-function profile, such as `power@0.1`."""
    return f"power@{width}"


def check_width(name: str, width: float) -> None:
    """Raise InputError for a number that is no relative width of a power-function profile."""
    if not 0 < width <= WIDEST:
        raise InputError(f"{name}: a relative width must be above 0 and at most {WIDEST}, not {width}")


def check_weights(name: str, value: str, choices: Sequence[str] = (*WEIGHTS, "ema@DECAY", "power@WIDTH")) -> str:
    """`ema`, `live`, or `ema@DECAY` or `power@WIDTH` with the number as Python writes it. Raises InputError, with
    `choices`, for another value."""
    if value in WEIGHTS:
        return value
    kind, _, text = value.partition("@")
    if kind not in ("ema", "power") or (number := _number(text)) is None:
        raise unknown(name, value, choices)
    if kind == "ema":
        return average_name(number)
    check_width(f"{name}={value}", number)
    return power_name(number)


def _number(text: str) -> float | None:
    with suppress(ValueError):
        return float(text)
    return None


def check_batch(batch_size: int, processes: int, name: str = "train.batch_size") -> None:
    """Raise InputError if the processes cannot have equal parts of a batch."""
    if batch_size % processes:
        raise InputError(
            f"{name} {batch_size} is no multiple of the {processes} processes, which have equal parts of "
            "each batch (one process for each GPU)"
        )
