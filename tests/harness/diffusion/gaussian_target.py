"""The optimal networks for pixels from N(MEAN, STD²), whose paths and samples have closed forms, in float64."""

import math

import numpy as np
import torch
from lamabench.harness.diffusion.flow import Flow
from lamabench.harness.diffusion.gaussian import DDPM
from lamabench.harness.diffusion.vprediction import VPrediction
from torch import Tensor

MEAN, STD = 0.3, 0.5
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
GOALS = {"ddpm": DDPM(), "v": VPrediction(), "flow": Flow()}


def levels(kind: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise at t [B], each [B, 1, 1, 1] float64."""
    t = t.double().view(-1, 1, 1, 1)
    if kind == "flow":
        return 1 - t, t
    alpha_bar = torch.from_numpy(ALPHA_BAR)[t.long()]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def estimates(x: Tensor, signal: Tensor | float, noise: Tensor | float) -> tuple[Tensor, Tensor]:
    """The expected image and noise of x."""
    gap = (x.double() - signal * MEAN) / (signal**2 * STD**2 + noise**2)
    return MEAN + signal * STD**2 * gap, noise * gap


def net_of(kind: str):
    """The network with the least loss of an objective."""

    def net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        assert t.dtype == torch.float32
        signal, noise = levels(kind, t)
        image, e = estimates(x, signal, noise)
        out = {"ddpm": [e, torch.zeros_like(e)], "v": [signal * e - noise * image], "flow": [e - image]}[kind]
        return torch.cat(out, dim=1).float()

    return net


def along(x: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
    """Where the probability flow takes x from the levels `start` to the levels `end`: every pixel keeps its number of
    standard deviations from the mean."""
    (signal, noise), (to, level) = start, end
    ratio = math.sqrt((to**2 * STD**2 + level**2) / (signal**2 * STD**2 + noise**2))
    return to * MEAN + ratio * (x.double() - signal * MEAN)


def limit(kind: str, x: Tensor) -> Tensor:
    """The result of infinitely many steps from the first noise x. The last step of a chain, from t = 0 to the image, is
    always DDIM's."""
    if kind == "flow":
        return along(x, (0, 1), (1, 0))
    first, last = ((math.sqrt(a), math.sqrt(1 - a)) for a in (ALPHA_BAR[-1], ALPHA_BAR[0]))
    return estimates(along(x, first, last), *last)[0]
