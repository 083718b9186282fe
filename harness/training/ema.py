"""Moving averages of the weights: exponential ones, and those with power-function profiles (posthoc.py)."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ...kernels.errors import InputError
from ..checks import average_name, power_name
from . import posthoc

MOST_ERROR = 0.05  # of a profile that is put together from others, relative


class EMA:
    """Copies of a network whose parameters follow the trained ones: averaged += (1 - decay) · (live - averaged).

    `net` is the copy of `decay`. `nets` are all copies by the name of their weights: `ema`, `ema@DECAY` for each of
    `others`, and `power@WIDTH` for each relative width in `powers`. They are in eval mode and without gradients.

    With `rampup`, the decay after n updates is at most (1 + n) / (10 + n), so that the initial weights are soon
    forgotten, as TensorFlow's ExponentialMovingAverage does with `num_updates`.
    """

    def __init__(
        self,
        live: nn.Module,
        decay: float,
        others: Sequence[float] = (),
        rampup: bool = False,
        powers: Sequence[float] = (),
    ) -> None:
        self.net = copy.deepcopy(live).eval().requires_grad_(False)
        names = [*map(average_name, others), *map(power_name, powers)]
        self.nets = {"ema": self.net} | {name: copy.deepcopy(self.net) for name in names}
        self.rampup = rampup
        self._live = [p.detach() for p in live.parameters()]
        shares = [partial(self._share, one) for one in (decay, *others)]
        shares += [partial(posthoc.share, posthoc.exponent(width)) for width in powers]
        self._averages = [
            (share, [p.detach() for p in net.parameters()])
            for share, net in zip(shares, self.nets.values(), strict=True)
        ]

    def update(self, updates: int) -> None:
        """Update the averages with the current weights, after `updates` updates before this one."""
        for share, averaged in self._averages:
            torch._foreach_lerp_(averaged, self._live, share(updates + 1))  # pyright: ignore[reportPrivateImportUsage]

    def _share(self, decay: float, step: int) -> float:
        """The share of the weights of a step, counted from 1, in the average of a decay."""
        return 1 - (min(decay, step / (9 + step)) if self.rampup else decay)

    def tensors(self) -> dict[str, Tensor]:
        """The averaged weights as a file of weights has them: NAME for `ema`, `KIND/NAME` for the others."""
        return {
            name if kind == "ema" else f"{kind}/{name}": value
            for kind, net in self.nets.items()
            for name, value in net.state_dict().items()
        }


def part(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `KIND/`, without that."""
    return {name.removeprefix(f"{kind}/"): value for name, value in tensors.items() if name.startswith(f"{kind}/")}


def of_width(
    kind: str, files: Sequence[Path], read: Callable[[Path, bool], Mapping[str, Tensor]], tensors: bool
) -> tuple[dict[str, Tensor], float | None]:
    """Weights `power@WIDTH` of the step of the first of `files` (step-N, the latest first), and None, if that file has
    them. Otherwise the combination by `posthoc.fit` of all averages `power@…` in the files, and its error. Without any,
    there are no weights.

    `read(path, tensors)` returns the tensors of a file by name, or only their names and shapes. Raises InputError for
    an error above MOST_ERROR.
    """
    steps = [int(path.stem.removeprefix("step-")) for path in files]
    names = [_powers(read(path, False)) for path in files]
    if kind in names[0]:
        return part(read(files[0], tensors), kind), None
    terms = [(step, name) for step, kept in zip(steps, names, strict=True) for name in kept]
    if not terms:
        return {}, None
    fit = fit_of(kind, steps[0], terms)
    coefficients = iter(fit.coefficients)

    def parts() -> Iterator[tuple[float, Mapping[str, Tensor]]]:
        for path, kept in zip(files, names, strict=True):
            everything = read(path, tensors)
            yield from ((next(coefficients), part(everything, name)) for name in kept)

    return posthoc.combined(parts()), fit.error


def fit_of(kind: str, step: int, terms: Sequence[tuple[int, str]]) -> posthoc.Fit:
    """The combination of averages (step, `power@WIDTH`) for one of a step. Raises InputError for an error above
    MOST_ERROR."""
    fit = posthoc.fit([(one, _width(name)) for one, name in terms], (step, _width(kind)))
    if fit.error > MOST_ERROR:
        raise InputError(
            f"{kind} of step {step} would have a profile that is wrong by {fit.error:.0%}, and {MOST_ERROR:.0%} is "
            f"allowed, because few moments are kept up to there ({len({one for one, _ in terms})}): take "
            f"{' or '.join(name for one, name in terms if one == step)}, or train with more train.snapshots or other "
            "train.ema_powers"
        )
    return fit


def _powers(tensors: Mapping[str, Tensor]) -> list[str]:
    return list(dict.fromkeys(name.split("/")[0] for name in tensors if name.startswith("power@")))


def _width(name: str) -> float:
    return float(name.removeprefix("power@"))
