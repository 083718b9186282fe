"""Exponential moving averages of the weights."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..checks import average_name


class EMA:
    """Copies of a network whose parameters follow the trained ones: averaged += (1 - decay) · (live - averaged).

    `net` is the copy of `decay`. `nets` are all copies by the name of their weights: `ema`, and `ema@DECAY` for each of
    `others`. They are in eval mode and without gradients.

    With `rampup`, the decay after n updates is at most (1 + n) / (10 + n), so that the initial weights are soon
    forgotten, as TensorFlow's ExponentialMovingAverage does with `num_updates`.
    """

    def __init__(self, live: nn.Module, decay: float, others: Sequence[float] = (), rampup: bool = False) -> None:
        self.net = copy.deepcopy(live).eval().requires_grad_(False)
        self.nets = {"ema": self.net} | {average_name(other): copy.deepcopy(self.net) for other in others}
        self.rampup = rampup
        self._live = [p.detach() for p in live.parameters()]
        self._averages = [
            (decay, [p.detach() for p in net.parameters()])
            for decay, net in zip((decay, *others), self.nets.values(), strict=True)
        ]

    def update(self, updates: int) -> None:
        """Update the averages with the current weights, after `updates` updates before this one."""
        for decay, averaged in self._averages:
            if self.rampup:
                decay = min(decay, (1 + updates) / (10 + updates))
            torch._foreach_lerp_(averaged, self._live, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def tensors(self) -> dict[str, Tensor]:
        """The averaged weights as a file of weights has them: NAME for `ema`, `ema@DECAY/NAME` for the others."""
        return {
            name if kind == "ema" else f"{kind}/{name}": value
            for kind, net in self.nets.items()
            for name, value in net.state_dict().items()
        }
