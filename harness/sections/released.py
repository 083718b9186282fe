"""The section `released`: weights that a run has in place of a training."""

from dataclasses import dataclass


@dataclass
class ReleasedConfig:
    """Weights that `lamabench convert` wrote: the name of their run, and the SHA-256 of their tensors, by which keys
    know them. Both are empty for a training. No command takes them as settings."""

    name: str = ""
    tensors: str = ""
