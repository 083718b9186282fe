"""The start of a training: its initial weights, and how long it takes to its first step."""

import os
import time
from pathlib import Path

import torch

from ...models.registry import Backbone, build
from ..config import Config

_waiting = True  # no training of this process has made a step


def initial_model(config: Config) -> Backbone:
    """The backbone with initial weights from the run's seed. They are drawn on the CPU, the same for every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build(config.model)


def age() -> float | None:
    """Seconds since this process began; None if the system does not tell."""
    try:
        since_boot = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
        return time.clock_gettime(time.CLOCK_BOOTTIME) - int(since_boot) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


class Start:
    """The parts of the time to the first step, one after the other. The first training of a process counts from the
    beginning of the process (`start`), a later one from here."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        before = age() if _waiting else None
        self.parts: dict[str, float] = {} if before is None else {"start": before}

    def part(self, name: str) -> None:
        """End a part."""
        now = time.perf_counter()
        self.parts[name], self._last = now - self._last, now

    def text(self) -> str:
        """The parts as a line after the first step: `first step after 4.1 s: start 3.2, data 0.5, step 0.4`."""
        global _waiting
        _waiting = False
        words = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.parts.items())
        return f"first step after {sum(self.parts.values()):.1f} s: {words}"
