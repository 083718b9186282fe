"""The next measurement of a benchmark. It depends only on earlier rows, so that a killed benchmark continues."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..device import WHOLE_STEP
from ..sections import BenchConfig

FIRST_BATCH = 8  # the second batch of `auto`, after one image
GAIN = 1.02  # two batches in a row that gain less end the search
FINISHED = ("done", "oom")  # states of measurements that the same command does not repeat


class Point(NamedTuple):
    """One measurement."""

    input_size: int
    mode: str
    checkpointing: bool
    compile: str
    batch_size: int


def point_of(row: dict[str, Any]) -> Point:
    """The measurement of a row."""
    return Point(*(row[name] for name in Point._fields))


def next_point(settings: BenchConfig, input_size: int, rows: Sequence[dict[str, Any]]) -> Point | None:
    """The first measurement that is not among `rows`, None if everything is measured.

    `input_size` is the model's own, for settings without input sizes. The eager model comes first because, with
    `batch_size` `auto`, it determines the batches of the other compile modes.
    """
    measured = {point_of(row): row for row in rows}
    for size in settings.input_sizes or [input_size]:
        for mode in settings.modes:
            for checkpointing in settings.checkpointing if mode == "train" else [False]:
                for kind, batch in _batches(settings, measured, (size, mode, checkpointing)):
                    if (point := Point(size, mode, checkpointing, kind, batch)) not in measured:
                        return point
    return None


def _batches(
    settings: BenchConfig, measured: dict[Point, dict[str, Any]], cell: tuple[int, str, bool]
) -> Iterator[tuple[str, int]]:
    kinds = [kind for kind in settings.compile if cell[1] == "train" or kind != WHOLE_STEP]
    if settings.batch_size != "auto":
        yield from ((kind, batch) for kind in kinds for batch in settings.batch_size)
        return
    eager = {point.batch_size: row for point, row in measured.items() if point[:3] == cell and point.compile == "eager"}
    if (batch := next_batch(eager, settings.seconds)) is not None:
        yield "eager", batch
    elif (best := best_batch(eager)) is not None:
        for kind in kinds:
            if kind == "eager":
                continue
            rows = {point.batch_size: row for point, row in measured.items() if point[:4] == (*cell, kind)}
            if (batch := next_compiled_batch(rows, best)) is not None:
                yield kind, batch


def best_batch(rows: dict[int, dict[str, Any]]) -> int | None:
    """The batch with the most images a second, None if none was measured."""
    speeds = {batch: row["images_per_s"] for batch, row in rows.items() if row["state"] == "done"}
    return max(speeds, key=lambda batch: speeds[batch]) if speeds else None


def next_batch(rows: dict[int, dict[str, Any]], seconds: float) -> int | None:
    """The next batch of the search, None at its end.

    The search begins with one image, then 8. It doubles the batch until memory ends, two doublings in a row gain less
    than `GAIN`, or a call takes `seconds`. If 8 images do not fit, it halves the batch until it fits. Its last batch is
    one and a half times the best. A state other than done or out of memory ends the search.
    """
    if not rows:
        return 1
    if any(row["state"] not in FINISHED for row in rows.values()):
        return None
    too_large = min((batch for batch, row in rows.items() if row["state"] == "oom"), default=None)
    if too_large == 1:
        return None
    ladder = sorted(batch for batch, row in rows.items() if row["state"] == "done" and batch & (batch - 1) == 0)
    speeds = [rows[batch]["images_per_s"] for batch in ladder]
    if too_large is None and not _saturated(speeds) and rows[ladder[-1]]["p50_ms"] < 1e3 * seconds:
        return FIRST_BATCH if ladder == [1] else 2 * ladder[-1]
    if ladder == [1] and too_large is not None and too_large > 2:
        return too_large // 2
    best = ladder[speeds.index(max(speeds))]
    more = best * 3 // 2
    return more if more not in rows and (too_large is None or more < too_large) else None


def next_compiled_batch(rows: dict[int, dict[str, Any]], best: int) -> int | None:
    """The next batch of a compiled model, None at the end. `best` is the best batch of the eager model.

    The search begins with `best`, then tries twice that. Where memory ends, it tries the middle between the largest
    batch that fitted and the smallest that did not, until they differ by at most a quarter. A state other than done or
    out of memory ends the search, because another batch would fail too, after another long compilation.
    """
    if not rows:
        return best
    if any(row["state"] not in FINISHED for row in rows.values()):
        return None
    fitted = max((batch for batch, row in rows.items() if row["state"] == "done"), default=0)
    too_large = min((batch for batch, row in rows.items() if row["state"] == "oom"), default=None)
    if too_large is None:
        return 2 * best if 2 * best not in rows else None
    middle = (fitted + too_large) // 2
    return middle if too_large - fitted > max(1, fitted // 4) else None


def _saturated(speeds: list[float]) -> bool:
    """Whether neither of the last two batches is faster, by `GAIN`, than the best batch before it."""
    return len(speeds) > 2 and all(speeds[place] < GAIN * max(speeds[:place]) for place in (-2, -1))
