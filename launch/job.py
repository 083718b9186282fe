"""What a submitted job runs. Importable by name, so that no code travels in a pickle."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..harness.progress import Progress
from ..harness.run import execute


def work(folder: str, stages: Sequence[str], threads: int | None = None) -> None:
    """Do what is missing of a run, on `threads` CPU threads (None: torch's own choice)."""
    if threads:
        torch.set_num_threads(threads)
    execute(Path(folder), stages, Progress(Path(folder)))
