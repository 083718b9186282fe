"""What a network learns and how its output becomes an image: the protocol of an objective, and objectives by name.

To add an objective, add one file beside this one, a line in `OBJECTIVES`, and the fields that it reads in `READERS`.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from ...kernels.errors import InputError, unknown
from .flow import Flow
from .gaussian import DDPM
from .path import Path
from .vprediction import VPrediction

if TYPE_CHECKING:
    from ..sections import ObjectiveConfig


class Objective(Protocol):
    """How t is drawn, how x_t is made, the channels of the head, the loss, and the path back to an image.

    t is float32 [B] in the unit of the objective's paper (DDPM: 0 … 999, flow: 0 … 1). The network takes it in that
    unit.
    """

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the values that `loss` returns, "loss" first."""
        ...

    @property
    def error(self) -> str:
        """The metric that is the mean square error of the prediction, without terms of its variance."""
        ...

    @property
    def span(self) -> float:
        """t is at least 0 and at most this."""
        ...

    @property
    def sampler(self) -> str:
        """The sampler of `sample.method=auto`."""
        ...

    def out_channels(self, in_channels: int) -> int:
        """The channels of the network's head."""
        ...

    def draw_t(self, rng: np.random.Generator) -> float:
        """The t of one training image."""
        ...

    def times(self, count: int) -> list[float]:
        """So many values of t, the middles of equal parts of its range."""
        ...

    def corrupt(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t from x_0: x0 and noise [B, C, H, W] -> [B, C, H, W] float32."""
        ...

    def loss(self, out: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Every metric of each image, float32 [B]; `out` is the network's output [B, out_channels, H, W]."""
        ...

    def path(self, steps: int, timesteps: str = "even") -> Path:
        """The path of a sampler with that many steps, spaced as `timesteps` (`samplers.TIMESTEPS`) says. Raises
        InputError for an unsupported number."""
        ...


# How each is made from its configuration.
OBJECTIVES: "dict[str, Callable[[ObjectiveConfig], Objective]]" = {
    "ddpm": lambda config: DDPM(config.schedule),
    "v": lambda config: VPrediction(config.schedule),
    "flow": lambda config: Flow(config.times),
}
# The kinds that read a field of the configuration. For others it stays at its default.
READERS = {"schedule": ("ddpm", "v"), "times": ("flow",)}


def objective(config: "ObjectiveConfig") -> Objective:
    """The objective of a configuration. Raises InputError for an unknown kind, schedule or distribution of t, and for a
    field that this kind does not read."""
    if config.kind not in OBJECTIVES:
        raise unknown("objective.kind", config.kind, OBJECTIVES)
    for field in fields(config):
        kinds, value = READERS.get(field.name, OBJECTIVES), getattr(config, field.name)
        if config.kind not in kinds and value != field.default:
            raise InputError(
                f"objective.{field.name}={value} says nothing to objective.kind={config.kind}: leave it at "
                f"{field.default}, or choose objective.kind={' or '.join(kinds)}"
            )
    return OBJECTIVES[config.kind](config)
