"""What is left of a training whose loss is not finite or jumps, so that the steps before can be repeated (replay.py).

A step follows from a complete state, the seed and the indices of its images. So the folder failures/step-N of a
training has failure.json, which names them, and the checkpoint before these steps, as a second name of its file.
"""

import json
import shlex
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from ..config import Config, micro_batch
from ..disk import write_atomically
from .checkpoint import files
from .folder import Position
from .storage import link, step_of

SPIKE = 5.0  # a loss is a spike above so many times the median of the largest losses of the last windows
WINDOWS, LEAST = 20, 5  # how many windows are the last, and how many are needed
MOST = 3  # snapshots of spikes; each holds a checkpoint on disk


@dataclass
class Failures:
    """Looks at the losses of a training and leaves snapshots. `losses` are those of its lines so far, which are means
    over windows and so at most the largest ones."""

    folder: Path
    config: Config
    fingerprint: str
    stretches: Sequence[dict[str, Any]]
    losses: Sequence[float]
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.recent = deque(self.losses, maxlen=WINDOWS)

    def look(self, at: Position, loss: float) -> None:
        """Note the largest loss of a step in a window. A spike is said in one line and, unless there are `MOST`
        snapshots, leaves one."""
        usual = median(self.recent) if len(self.recent) >= LEAST else loss
        self.recent.append(loss)
        if loss > SPIKE * usual:
            text = f"the loss is {loss:.4g} by step {at.step}, more than {SPIKE:g} times the usual {usual:.4g}"
            if len([*(self.folder / "failures").glob("step-*")]) < MOST:
                self._leave("spike", at, at.window_start, text)
            else:
                self.say(text)

    def diverged(self, at: Position, text: str) -> None:
        """Leave a snapshot of a training that ends with a loss that is not finite."""
        self._leave("diverged", at, at.step, text)

    def _leave(self, kind: str, at: Position, latest: int, text: str) -> None:
        """Write a snapshot from the newest checkpoint up to the step `latest`, or from the initial weights."""
        place = self.folder / "failures" / f"step-{at.step:08d}"
        kept = [path for path in files(self.folder / "checkpoints") if step_of(path) <= latest]
        start = step_of(kept[0]) if kept else 0
        stretch, batch = self.stretches[-1], self.config.train.batch_size
        first = max(start, at.window_start)
        facts = {
            "kind": kind,
            "text": text,
            "checkpoint": start,
            "first_step": first + 1,
            "last_step": at.step,
            "images": [first * batch, at.step * batch],  # from and up to, counted from the start of the training
            "seed": self.config.seed,
            "batch_size": batch,
            "micro_batch": micro_batch(self.config, stretch.get("processes", 1)),
            "data_fingerprint": self.fingerprint,
            "stretch": stretch,
            "command": f"python -m lamabench.harness.training.replay {shlex.quote(str(place))}",
        }
        try:
            place.mkdir(parents=True, exist_ok=True)
            for path in kept[:1]:
                link(path, place)
            write_atomically(place / "failure.json", (json.dumps(facts, indent=1) + "\n").encode())
        except OSError as error:
            self.say(f"{text}; no snapshot can be written: {error}")
        else:
            self.say(f"{text if kind == 'spike' else f'snapshot of step {at.step}'}; to repeat it: {facts['command']}")
