"""Progress of long work: lines on the terminal, and a small file for other processes."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    whole = int(seconds + 0.5)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class Progress:
    """Prints at most one line every `every` seconds and updates `progress.json` in `folder` with it."""

    def __init__(self, folder: Path | None = None, every: float = 5.0) -> None:
        self.folder, self.every = folder, every
        self._stage, self._started, self._first, self._last, self._printed = "", 0.0, 0, 0, 0.0

    def say(self, text: str) -> None:
        """Print one line immediately. If nobody can read it any more, as after `2>&1 | head`, the work goes on without
        further lines."""
        try:
            print(text, file=sys.stderr, flush=True)
        except (OSError, ValueError):  # ValueError: the stream is closed
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def update(self, stage: str, done: int, total: int, **facts: Any) -> None:
        """Report that `done` of `total` units of a stage are done."""
        now = time.monotonic()
        if stage != self._stage or done < self._last:  # a second set of samples begins anew
            self._stage, self._started, self._first, self._printed = stage, now, done, 0.0
        self._last = done
        rate = (done - self._first) / (now - self._started) if now > self._started else 0.0
        left = (total - done) / rate if rate else None
        if now - self._printed < self.every and done < total:
            return
        self._printed = now
        state = {"stage": stage, "done": done, "total": total, "rate": rate, "left_s": left, **facts}
        if self.folder is not None:
            temporary = self.folder / f".progress.{os.getpid()}.tmp"
            try:
                temporary.write_text(json.dumps(state), encoding="utf-8")
                os.replace(temporary, self.folder / "progress.json")
            finally:  # on a full disk, part of it would remain
                temporary.unlink(missing_ok=True)
        self.say(describe(state))


def read(folder: Path) -> dict[str, Any] | None:
    """The newest progress in `progress.json` of a folder, None if there is none or if it cannot be read."""
    try:
        state = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        describe(state)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return state


def describe(state: dict[str, Any]) -> str:
    """The line on the terminal: `train 400/1500  12.1/s  1:31 left  loss 0.0812`."""
    words = [f"{state['stage']} {state['done']}/{state['total']}"]
    if state["rate"]:
        words.append(f"{state['rate']:.3g}/s")
    if state["left_s"]:
        words.append(f"{clock(state['left_s'])} left")
    words += [f"{k} {v}" for k, v in state.items() if k not in ("stage", "done", "total", "rate", "left_s")]
    return "  ".join(words)


class Quiet(Progress):
    """Progress without lines, of a process that is not the first of its run."""

    def say(self, text: str) -> None:
        pass
