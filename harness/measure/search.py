"""What a benchmark measures next. Plain Python: a sweep that was killed goes on from the rows that it left."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..config import BenchConfig

FIRST_BATCH = 8  # of `auto`, after one image
GAIN = 1.02  # less than that, twice running, is saturated
FINISHED = ("done", "oom")  # states that the same command does not measure again


class Point(NamedTuple):
    """One measurement."""

    input_size: int
    mode: str
    checkpointing: bool
    compile: str
    batch_size: int


def point_of(row: dict[str, Any]) -> Point:
    """The measurement that a row holds."""
    return Point(*(row[name] for name in Point._fields))


def finished(records: Sequence[dict[str, Any]], provenance: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The rows among a run's records that stand: measured or out of memory, the newest of each measurement.

    With `provenance`, only rows of the same code, machine and versions.
    """
    newest: dict[Point, dict[str, Any]] = {}
    for line in records:
        if line["kind"] == "bench" and all(name in line for name in Point._fields):
            newest[point_of(line)] = line
    return [
        row
        for row in newest.values()
        if row["state"] in FINISHED and (provenance is None or row.get("provenance") == provenance)
    ]


def next_point(settings: BenchConfig, input_size: int, rows: Sequence[dict[str, Any]]) -> Point | None:
    """The first measurement that `rows` do not hold yet; None where all is measured.

    `input_size` is the model's own, for settings that name none. The eager model comes first: it chooses the batches
    of the others where the batch is `auto`.
    """
    known = {point_of(row): row for row in rows}
    for size in settings.input_sizes or [input_size]:
        for mode in settings.modes:
            for checkpointing in settings.checkpointing if mode == "train" else [False]:
                for kind, batch in _batches(settings, known, (size, mode, checkpointing)):
                    if (point := Point(size, mode, checkpointing, kind, batch)) not in known:
                        return point
    return None


def _batches(
    settings: BenchConfig, known: dict[Point, dict[str, Any]], cell: tuple[int, str, bool]
) -> Iterator[tuple[str, int]]:
    if settings.batch_size != "auto":
        yield from ((kind, batch) for kind in settings.compile for batch in settings.batch_size)
        return
    eager = {point.batch_size: row for point, row in known.items() if point[:3] == cell and point.compile == "eager"}
    if (batch := next_batch(eager, settings.seconds)) is not None:
        yield "eager", batch
    elif (best := best_batch(eager)) is not None:
        for kind in settings.compile:
            if kind == "eager":
                continue
            rows = {point.batch_size: row for point, row in known.items() if point[:4] == (*cell, kind)}
            if (batch := next_compiled_batch(rows, best)) is not None:
                yield kind, batch


def best_batch(rows: dict[int, dict[str, Any]]) -> int | None:
    """The batch of the most images a second; None where none was measured."""
    speeds = {batch: row["images_per_s"] for batch, row in rows.items() if row["state"] == "done"}
    return max(speeds, key=lambda batch: speeds[batch]) if speeds else None


def next_batch(rows: dict[int, dict[str, Any]], seconds: float) -> int | None:
    """The batch that the search tries next, None at its end.

    One image; then 8, doubled until memory ends, two doublings running gain less than `GAIN` or a call takes
    `seconds`, or halved until it fits; at last one and a half times the best. Anything but done or out of memory ends
    the search.
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
    """The batch that is compiled next where `best` is that of the eager model, None at the end.

    `best`, then its double; where memory ends, the middle between what fitted and what did not, down to a quarter of
    the batch. Anything but done or out of memory ends the search: it would fail again, after as long a compilation.
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
    """Whether neither of the last two batches gained on the best before it."""
    return len(speeds) > 2 and all(speeds[place] < GAIN * max(speeds[:place]) for place in (-2, -1))
