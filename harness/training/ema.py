"""The exponential moving average of the weights."""

import copy

import torch
from torch import nn


class EMA:
    """A copy of a network whose parameters follow the trained ones: averaged += (1 - decay) · (live - averaged).

    `net` is the copy, in eval mode and without gradients.
    """

    def __init__(self, live: nn.Module, decay: float) -> None:
        self.net = copy.deepcopy(live).eval().requires_grad_(False)
        self.weight = 1 - decay
        self._averaged = [p.detach() for p in self.net.parameters()]
        self._live = [p.detach() for p in live.parameters()]

    def update(self) -> None:
        """Update the averages with the current weights."""
        torch._foreach_lerp_(self._averaged, self._live, self.weight)  # pyright: ignore[reportPrivateImportUsage]
