"""How far a report is, in a line of the terminal that disappears at the end."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
PATIENCE_S = 1.0  # shorter work says nothing
WIDTH = 24  # letters of the bar


def over(items: Sequence[Item], what: str, since: float | None = None) -> Iterator[Item]:
    """The items one by one. If standard error is a terminal and more than `PATIENCE_S` passed since the moment `since`
    of time.monotonic() (default: now), a bar such as `reading demo [######      ] 30/60` stands there meanwhile."""
    start = time.monotonic() if since is None else since
    last = None
    terminal = sys.stderr.isatty()
    try:
        for number, item in enumerate(items):
            now = time.monotonic()
            if terminal and now - start > PATIENCE_S and (last is None or now - last > 0.1):
                last = now
                bar = "#" * (WIDTH * number // len(items))
                print(
                    f"\r\x1b[K{what[:40]} [{bar:<{WIDTH}}] {number}/{len(items)}", end="", file=sys.stderr, flush=True
                )
            yield item
    finally:
        if last is not None:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
