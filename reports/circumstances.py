"""Notes below tables of speed: the clock and power of the GPU, and which measurements were made together."""

from collections import Counter
from collections.abc import Iterable

from .runs import Line

MOST = 3  # calls of a command that a note lists, by when they began


def circumstances(rows: Iterable[Line]) -> list[str]:
    """A note about the clock and power of the GPU during measurements, and one if not all are of one call of the
    command, so far as that is on record."""
    rows, notes = [row for row in rows if row["state"] == "done"], []
    if clocks := [row["clock_mhz"] for row in rows if row.get("clock_mhz")]:
        powers = [row["power_w"] for row in rows if row.get("power_w")]
        power = f", {span(powers)} W" if powers else ""
        held = Counter(reason for row in rows if row.get("throttled") for reason in row["throttled"].split(", "))
        words = [f"{reason} in {count}" for reason, count in held.most_common()]
        down = f"; held down by {', '.join(words)} of {len(rows)} measurements" if words else ""
        notes.append(f"The GPU ran at {span(clocks)} MHz{power}{down}.")
    calls = Counter(row.get("began") for row in rows)
    if len(calls) > 1:
        words = [f"{began or 'not on record'} ({count})" for began, count in sorted(calls.items(), key=str)]
        when = f": {', '.join(words)}" if len(calls) <= MOST else ""
        notes.append(f"Measured by {len(calls)} calls of the command{when}.")
    return notes


def span(values: list[float]) -> str:
    """The least and the largest of some values in words, one number if they round to the same."""
    low, high = f"{min(values):,.0f}", f"{max(values):,.0f}"
    return low if low == high else f"{low} to {high}"
