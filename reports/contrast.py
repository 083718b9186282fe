"""What two runs or variants differ in besides their scores: configuration, cost and speed."""

from collections.abc import Iterable
from typing import Any

from .names import is_released
from .runs import Line, Run
from .speed import MODES, cell_of, measurements
from .table import Column, Table

Pair = tuple[list[Run], list[Run]]  # the runs of A and of B, which differ in their seeds at most
# Sections of a configuration that change what is learned or drawn, and of them what changes neither.
SECTIONS = ("model", "data", "encoder", "objective", "train", "backend")
LEFT_OUT = ("data.path",)
COUNTS = {"params": ("Params (M)", 1e6), "macs": ("MACs (G)", 1e9), "flops": ("FLOPs (G)", 1e9)}
CONFIGURATION = ("a", "b", "field", "a_value", "b_value")
COST = ("a", "b", *(f"{name}{end}" for name in COUNTS for end in ("_a", "_b", "_ratio")))
CIRCUMSTANCES = (
    "mode",
    "input_size",
    "px",
    "batch_size",
    "precision",
    "compile",
    "checkpointing",
    "processes",
    "cpu_threads",
)
SPEED = ("a", "b", *CIRCUMSTANCES, "device", "images_per_s_a", "images_per_s_b", "images_per_s_ratio")
SPEED += ("peak_memory_gib_a", "peak_memory_gib_b", "peak_memory_gib_ratio", "disturbed")


def configuration(pairs: Iterable[tuple[Pair, Line]]) -> Table:
    """A row for each setting in which A and B differ, as it was asked for: `field`, `a_value`, `b_value` (None: A or B
    has no such field). Paths, seeds and what changes neither a training nor an image are left out.

    `pairs` are the runs and the labels {"a": …, "b": …} of each pair, as for the other two tables.
    """
    rows = []
    for (one, two), labels in pairs:
        values = _settings(one[0]), _settings(two[0])
        for name in sorted(
            {**values[0], **values[1]}, key=lambda name: (*SECTIONS, "sample").index(name.split(".")[0])
        ):
            a, b = (_value(each, name) for each in values)
            if a != b and ((one[0].way and two[0].way) or not name.startswith("sample.")):
                row: Line = {**labels, "field": name, "a_value": a, "b_value": b}
                rows.append(row | {"a_text": _plain(a), "b_text": _plain(b)})
    columns = [Column("field", "Setting", width=34), Column("a_text", "A", width=30), Column("b_text", "B", width=30)]
    return Table("configuration", "Settings that differ:", columns, rows)


def cost(pairs: Iterable[tuple[Pair, Line]]) -> Table:
    """A row for each pair whose costs are on record: parameters, MACs and FLOPs of one forward pass of one image, and
    those of B over those of A (`_ratio`)."""
    rows = []
    for (one, two), labels in pairs:
        a, b = (next(filter(None, (run.last("cost", "done") for run in side)), None) for side in (one, two))
        if a and b:
            rows.append({**labels, **_ratios(a, b, COUNTS)})
    columns = []
    for rank, (name, (title, unit)) in enumerate(COUNTS.items()):
        columns.append(Column(f"{name}_a", f"{title} A", unit, 4, rank=rank + 2))
        columns.append(Column(f"{name}_b", f"{title} B", unit, 4, rank=rank // 2))
        columns.append(Column(f"{name}_ratio", "B ÷ A", digits=3))
    return Table("cost", "Cost of a forward pass of one image:", columns, rows)


def speed(pairs: Iterable[tuple[Pair, Line]]) -> Table:
    """A row for each mode, size, precision, compile mode and device in which A and B were timed, at the largest batch
    that both have: images per second, peak memory (GiB), those of B over those of A (`_ratio`), and whether other work
    disturbed one of them."""
    rows = []
    for (one, two), labels in pairs:
        a, b = (
            {_circumstances(row): row for row in measurements(side) if row["state"] == "done"} for side in (one, two)
        )
        largest: dict[tuple[Any, ...], int] = {}
        for *cell, batch in a.keys() & b.keys():
            largest[tuple(cell)] = max(batch, largest.get(tuple(cell), batch))
        common = [(a[(*cell, batch)], b[(*cell, batch)]) for cell, batch in largest.items()]
        for left, right in sorted(common, key=_order):
            row: Line = {**labels, **{name: left.get(name) for name in (*CIRCUMSTANCES, "device")}}
            row |= _ratios(left, right, ("images_per_s", "peak_memory_gib"))
            row["disturbed"] = bool(left.get("disturbed") or right.get("disturbed"))
            row["mode_text"] = str(MODES.get(row["mode"], row["mode"])) + (
                ", checkpointed" if row["checkpointing"] else ""
            )
            row["disturbed_text"] = "disturbed" if row["disturbed"] else None
            rows.append(row)
    columns = [
        Column("mode_text", "Mode"),
        Column("px", "Pixels", digits=0),
        Column("batch_size", "Batch", digits=0),
        Column("compile", "Compile", rank=2),
        Column("precision", "Precision", rank=3),
        *([Column("device", "Device", rank=1, width=20)] if len({row["device"] for row in rows}) > 1 else []),
        *([Column("cpu_threads", "Threads", digits=0, rank=1)] if any(row["cpu_threads"] for row in rows) else []),
        *([Column("processes", "GPUs", digits=0)] if len({row["processes"] for row in rows}) > 1 else []),
        Column("images_per_s_a", "Images/s A", digits=4),
        Column("images_per_s_b", "Images/s B", digits=4),
        Column("images_per_s_ratio", "B ÷ A", digits=3),
        Column("peak_memory_gib_a", "GiB A", digits=3),
        Column("peak_memory_gib_b", "GiB B", digits=3),
        Column("peak_memory_gib_ratio", "B ÷ A", digits=3),
        Column("disturbed_text", "Remark"),
    ]
    devices = {str(row["device"]) for row in rows}
    caption = f"Speed{f' on {devices.pop()}' if len(devices) == 1 else ''}, at the largest batch that both have:"
    return Table("speed", caption, columns, rows)


def _settings(run: Run) -> Line:
    """{section.field: value} as asked for; the way in which samples were drawn is that of the samples themselves. How
    released weights were trained is not on record."""
    config = run.info["config"]
    settings = {
        f"{section}.{name}": value
        for section in SECTIONS
        for name, value in (config.get(section) or {}).items()
        if not (section == "train" and is_released(run))
    }
    if "train.steps" in settings and run.info.get("steps"):
        settings["train.steps"] = run.info["steps"]  # the training may go on for another study
    return {name: value for name, value in (settings | run.way).items() if name not in LEFT_OUT}


def _value(settings: Line, name: str) -> Any:
    """One of the `_settings`. An operator that an older section `backend` does not name was left to `auto`."""
    older = name.startswith("backend.") and any(other.startswith("backend.") for other in settings)
    return settings.get(name, "auto" if older else None)


def _ratios(a: Line, b: Line, names: Iterable[str]) -> Line:
    row: Line = {}
    for name in names:
        left, right = a.get(name), b.get(name)
        row |= {f"{name}_a": left, f"{name}_b": right, f"{name}_ratio": right / left if left and right else None}
    return row


def _circumstances(row: Line) -> tuple[Any, ...]:
    """What must be equal for a comparison of speeds: last the batch."""
    return *(value or None for value in cell_of(row)), row["compile"], row["batch_size"]


def _order(rows: tuple[Line, Line]) -> tuple[Any, ...]:
    row = rows[0]
    return str(row["device"]), row["mode"], bool(row["checkpointing"]), row["px"], str(row["compile"]), row["precision"]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(each)}" for name, each in value.items())
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
