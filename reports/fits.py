"""Power laws of quality against compute, a + b·C^-c, with bands over training seeds and a check of predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import leastsq
from scipy.special import stdtrit

from .differences import LEVEL

REPLICATES = 200  # of a bootstrap
STEEPEST = 8.0  # an exponent above this is a step, and no law of compute
Array = NDArray[np.float64]
Points = tuple[tuple[float, ...], ...]  # the values of each size, one for each training seed


@dataclass(frozen=True)
class Fit:
    """The law a + b·C^-c of some sizes, in the units of their compute C and values.

    a, b, c     a ≥ 0, b > 0, c > 0; a is 0, and not fitted, for two sizes
    sizes       how many
    replicates  float64 [REPLICATES, 3], (a, b, c) of each replicate of the bootstrap; None without several seeds
    """

    a: float
    b: float
    c: float
    sizes: int
    replicates: Array | None = None

    @property
    def law(self) -> str:
        return "a + b·C^-c" if self.sizes > 2 else "b·C^-c"

    def at(self, compute: float) -> float:
        return self.a + self.b * float(compute) ** -self.c

    def interval_at(self, compute: float) -> tuple[float, float] | None:
        """The 95 % interval of the law at some compute; None without several seeds."""
        return None if self.replicates is None else _ends(_values(self.replicates, compute))

    @property
    def intervals(self) -> tuple[tuple[float, float], ...] | None:
        """The 95 % intervals of a, b and c; None without several seeds."""
        return None if self.replicates is None else tuple(_ends(column) for column in self.replicates.T)


@dataclass(frozen=True)
class Check:
    """What the law of all sizes but the largest predicts for that one, and the mean that was measured."""

    predicted: float
    measured: float
    law: str

    @property
    def error(self) -> float:
        """The relative error of the prediction."""
        return self.predicted / self.measured - 1


def fit(values: Mapping[float, Sequence[float]], bootstrap: bool = True) -> Fit | str:
    """The law of {compute: values of the training seeds}, or in one line why there is none.

    Least squares of the logarithm of the mean of each size. The logarithm, because seeds differ by a factor and not by
    a distance, so that no size outweighs the others; the means, so that a size with more seeds does not either. Three
    sizes or more have the law a + b·C^-c. Two have b·C^-c, which always fits and therefore predicts nothing.

    The bootstrap is over training seeds: the value of each seed becomes the mean of its size times the factor by which
    some seed of some size lies off its own mean (all sizes of a family are taken to have equal relative spread). The
    logarithms of these factors are widened by √(n/(n-1)) and t(0.975, degrees of freedom)/1.96 (Student, 1908), because
    the bootstrap of few seeds is too narrow. It knows nothing of an error in the law itself.
    """
    computes = sorted(values)
    points = tuple(tuple(sorted(values[compute])) for compute in computes)
    if len(computes) < 2:
        return "a law needs two sizes or more"
    if not all(np.isfinite(value) and value > 0 for value in [*computes, *(one for each in points for one in each)]):
        return "a law needs values above 0"
    middle = float(np.exp(np.mean(np.log(computes))))
    result = _fit(tuple(round(float(np.log(compute / middle)), 9) for compute in computes), points, bootstrap)
    if isinstance(result, str):
        return result
    law, replicates = result
    a, b, c = _rescaled(law, middle)
    over_seeds = None if replicates is None else _rescaled(replicates, middle)
    return Fit(float(a), float(b), float(c), len(computes), over_seeds)


def check(values: Mapping[float, Sequence[float]]) -> Check | str:
    """Leave the largest size out: fit the others and predict it. A text says why that cannot be done."""
    computes = sorted(values)
    if len(computes) < 3:
        return "a check of the prediction needs three sizes or more"
    law = fit({compute: values[compute] for compute in computes[:-1]}, bootstrap=False)
    if isinstance(law, str):
        return f"without the largest size: {law}"
    return Check(law.at(computes[-1]), float(np.mean(values[computes[-1]])), law.law)


@lru_cache(maxsize=256)  # axes that are proportional, such as FLOPs forward and in training, have one fit
def _fit(logs: tuple[float, ...], points: Points, bootstrap: bool) -> tuple[Array, Array | None] | str:
    """(a, b, c) over the logarithm of compute, centred, and those of the bootstrap [REPLICATES, 3]."""
    at = np.array(logs)
    means = np.array([np.mean(each) for each in points])
    line = _line(at, means)
    if means[0] <= means[-1] or line[2] <= 0:
        return "the value does not fall with size"
    if len(at) == 2:
        best = line
    else:
        starts = [line, *(_started(at, means, share) for share in (0.3, 0.6, 0.9))]
        best = min((_law(at, means, start) for start in starts), key=lambda law: _misfit(law, at, means))
    if best[2] > STEEPEST:
        return "the value falls in a single step, and is flat before or after it"
    if best[2] < 1e-4 or not np.isfinite(best).all():
        return "the value falls, but not as a power of size"
    factors = _factors(points) if bootstrap else None
    if factors is None:
        return best, None
    random = np.random.default_rng(0)
    draws = [
        mean * np.exp(random.choice(factors, (REPLICATES, len(each)))).mean(1)
        for mean, each in zip(means, points, strict=True)
    ]
    return best, np.stack([_replicate(at, draw, best) for draw in np.stack(draws, axis=1)])


def _replicate(at: Array, values: Array, best: Array) -> Array:
    """The law of a replicate; a straight line if the law would be a step, which has no value between its sizes."""
    law = _law(at, values, best) if len(at) > 2 else _line(at, values)
    return law if law[2] <= STEEPEST else _line(at, values)


def _factors(points: Points) -> Array | None:
    """The logarithms of the factors by which seeds lie off their means, of all sizes with several seeds."""
    several = [np.log(each) for each in points if len(each) > 1]
    free = sum(len(each) - 1 for each in several)
    if not free:
        return None
    wider = float(stdtrit(free, (1 + LEVEL) / 2) / stdtrit(1e9, (1 + LEVEL) / 2))
    return np.concatenate([wider * sqrt(len(each) / (len(each) - 1)) * (each - each.mean()) for each in several])


def _line(at: Array, values: Array) -> Array:
    """(0, b, c): the straight line in logarithms, by least squares."""
    logs, off = np.log(values), at - at.mean()
    slope = float(off @ logs / (off @ off))
    return np.array([0.0, np.exp(logs.mean() - slope * at.mean()), -slope])


def _started(at: Array, values: Array, share: float) -> Array:
    floor = share * values.min()
    return _line(at, values - floor) + np.array([floor, 0.0, 0.0])


def _law(at: Array, values: Array, start: Array) -> Array:
    """(a, b, c) of least squares in logarithms from a start, with a ≥ 0: if a below 0 were better, then a is 0."""
    logs, unit = np.log(values), values.min()

    def residuals(law: Array) -> Array:
        return np.log(np.maximum(law[0] * unit + np.exp(law[1] - law[2] * at), 1e-12 * unit)) - logs

    def slopes(law: Array) -> Array:
        power = np.exp(law[1] - law[2] * at)
        height = np.maximum(law[0] * unit + power, 1e-12 * unit)
        return np.stack([np.full_like(at, unit) / height, power / height, -power * at / height])

    begin = [start[0] / unit, np.log(start[1]), start[2]]
    with np.errstate(over="ignore", invalid="ignore"):
        solution = leastsq(residuals, begin, Dfun=slopes, full_output=True, col_deriv=True, maxfev=100)[0]
        law = np.array([solution[0] * unit, np.exp(solution[1]), solution[2]])
    return law if law[0] > 0 and law[2] > 0 and np.isfinite(law).all() else _line(at, values)


def _misfit(law: Array, at: Array, values: Array) -> float:
    with np.errstate(over="ignore"):
        return float(np.sum((np.log(law[0] + law[1] * np.exp(-law[2] * at)) - np.log(values)) ** 2))


def _values(laws: Array, compute: float) -> Array:
    return laws[:, 0] + laws[:, 1] * compute ** -laws[:, 2]


def _rescaled(laws: Array, middle: float) -> Array:
    """Laws [..., 3] of compute that was divided by `middle`, as laws of the compute itself."""
    result = laws.copy()
    result[..., 1] *= middle ** laws[..., 2]
    return result


def _ends(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
