"""Which measurements of a model its record holds, and those that are still to be made, as lines of a record."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..config import SECTIONS
from ..keys import asked, speed_key
from ..record import Row
from ..sections import BenchConfig
from .search import FINISHED, Point, next_point

Plan = dict[str, Any]  # sections `bench` and `backend`, as plain data


def stored(model: Any, plan: Plan, rows: Iterable[Row], device: str = "", processes: int = 1) -> list[dict[str, Any]]:
    """The rows of a model's record that answer a plan: of its precision and backends, on the device of that name or on
    any, done or out of memory, by so many processes together."""
    backend, lines = SECTIONS["backend"](**plan["backend"]), []
    for row in rows:
        if row.kind == "speed" and row.state in FINISHED:
            line, where = row.flat(), (row.provenance or {}).get("device", "")
            right = line["precision"] == plan["bench"]["precision"] and device in ("", where)
            right = right and (line.get("processes") or 1) == processes
            if right and row.key == speed_key(model, line, backend, where):
                lines.append(line)
    return lines


def next_measurement(model: Any, plan: Plan, rows: Iterable[Row], device: str = "") -> Point | None:
    """The first measurement of a plan that the rows, as in `stored`, do not hold; None at the end."""
    return next_point(BenchConfig(**plan["bench"]), model.input_size, stored(model, plan, rows, device))


def measure(
    model: Any,
    plan: Plan,
    objective: Any,
    device: str,
    say: Callable[[str], None],
    there: list[dict[str, Any]],
    together: bool = False,
) -> Iterator[dict[str, Any]]:
    """Lines of a record, one as each measurement of a plan that is not `there` is made (see `measure.models.bench`)."""
    from ..device import device_name
    from .models import bench

    settings, backend = BenchConfig(**plan["bench"]), SECTIONS["backend"](**plan["backend"])
    for line in bench(model, settings, backend, objective, device, say, there, together):
        key = speed_key(model, line, backend, device_name(device))
        yield {"kind": "speed", "key": key, "asked": asked(backend), **line}
