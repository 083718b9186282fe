"""Whether a difference is one: means and paired differences over training seeds, with 95 % intervals of Student's t.

A seed counts once. Its numbers from several folders or several seeds of sampling are averaged first, because repeated
sampling does not show how much trainings differ.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf, sqrt
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.special import stdtrit

from .runs import Run
from .table import style_of

LEVEL = 0.95
NO_SEED = -1  # of samples that no training on record made
FEWEST = 3  # common seeds, below which no difference is conclusive
UNLIKE = 0.01  # the p-value below which variances are not pooled
LOWER_IS_BETTER, HIGHER_IS_BETTER = "min", "max"  # as `queries.better` says it


@dataclass(frozen=True)
class Mean:
    """The mean of `n` seeds, and half the width of its 95 % interval (None for one seed)."""

    value: float
    half: float | None
    n: int

    @property
    def low(self) -> float:
        return self.value - (inf if self.half is None else self.half)

    @property
    def high(self) -> float:
        return self.value + (inf if self.half is None else self.half)


@dataclass(frozen=True)
class Difference:
    """A verdict (better, worse or inconclusive), why it is inconclusive, and the mean of the differences over `n`
    common seeds (None if there is no common seed)."""

    verdict: str
    reason: str = ""
    mean: Mean | None = None

    @property
    def n(self) -> int:
        return self.mean.n if self.mean else 0


def mean_of(values: Iterable[float]) -> Mean:
    """The mean of at least one number, and its interval: t(0.975, n - 1) · s / √n with the sample standard deviation s
    (Student, 1908)."""
    numbers = list(values)
    n = len(numbers)
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * stdev(numbers) / sqrt(n) if n > 1 else None
    return Mean(fmean(numbers), half, n)


def seed_of(run: Run) -> int:
    """The training seed of a run; `NO_SEED` if no training on record made its samples."""
    return NO_SEED if run.info.get("seed") is None else run.info["seed"]


def count_of(values: Mapping[int, float]) -> int:
    """The number of training seeds of {training seed: number}: 0 for samples that no training on record made."""
    return len(values.keys() - {NO_SEED})


def by_seed(values: Iterable[tuple[int, float]]) -> dict[int, float]:
    """The mean of the numbers of each seed, from pairs of a seed and a number."""
    numbers: dict[int, list[float]] = {}
    for seed, value in values:
        numbers.setdefault(seed, []).append(value)
    return {seed: fmean(numbers[seed]) for seed in sorted(numbers)}


def difference(values: Mapping[int, float], base: Mapping[int, float], best: str) -> Difference:
    """`values` against `base`, both {training seed: number}, paired over their common seeds.

    `best` says which number is the best: "min", "max" or, if that is unknown, "". *better* and *worse* need at least
    `FEWEST` common seeds and a 95 % interval of the mean difference that excludes 0.
    """
    common = sorted((values.keys() & base.keys()) - {NO_SEED})
    if not common:
        return Difference("inconclusive", "no common seed")
    mean = mean_of(values[seed] - base[seed] for seed in common)
    if len(common) < FEWEST:
        seeds = f"{len(common)} common seed{'s' if len(common) > 1 else ''}"
        return Difference("inconclusive", f"{seeds}, and {FEWEST} are needed", mean)
    if mean.low <= 0 <= mean.high:
        return Difference("inconclusive", "the interval includes 0", mean)
    if best not in (LOWER_IS_BETTER, HIGHER_IS_BETTER):
        return Difference("inconclusive", "it is not known whether lower or higher is better", mean)
    return Difference("better" if (mean.value < 0) == (best == LOWER_IS_BETTER) else "worse", "", mean)


class Together(NamedTuple):
    """The differences of several variants to a base with intervals that hold for all of them together (empty if their
    variances differ), the pooled standard deviation over seeds with its degrees of freedom, the smallest and the
    largest of one variant, and the p-value of Bartlett's test that all are one."""

    means: dict[str, Mean]
    deviation: float
    freedom: int
    smallest: float
    largest: float
    alike: float


def together(values: Mapping[str, Mapping[int, float]], base: str) -> Together | None:
    """The differences of {variant: {training seed: number}} to `base`: those of the means, ± t(1 - 0.025 / k, freedom)
    · s · √(1 / n + 1 / n_base) for k variants (Bonferroni's correction), with the standard deviation s pooled.

    Seeds are not paired. Variants of one seed are left out. None if there are fewer than two besides `base`, if `base`
    has one seed, or if one of them does not vary.
    """
    from scipy.stats import bartlett  # takes half a second

    seeds = {name: [each[seed] for seed in each.keys() - {NO_SEED}] for name, each in values.items()}
    seeds = {name: numbers for name, numbers in seeds.items() if len(numbers) > 1}
    if base not in seeds or len(seeds) < 3:
        return None
    deviations = {name: stdev(numbers) for name, numbers in seeds.items()}
    if any(deviations[name] <= 1e-12 * max(map(abs, numbers)) for name, numbers in seeds.items()):
        return None
    freedoms = {name: len(numbers) - 1 for name, numbers in seeds.items()}
    freedom = sum(freedoms.values())
    variance = sum(freedoms[name] * deviations[name] ** 2 for name in seeds) / freedom
    alike = float(bartlett(*seeds.values()).pvalue)
    means: dict[str, Mean] = {}
    if alike >= UNLIKE:
        critical = float(stdtrit(freedom, 1 - (1 - LEVEL) / 2 / (len(seeds) - 1)))
        for name, numbers in seeds.items():
            half = critical * sqrt(variance * (1 / len(numbers) + 1 / len(seeds[base])))
            means[name] = Mean(fmean(numbers) - fmean(seeds[base]), half, len(numbers))
        del means[base]
    return Together(means, sqrt(variance), freedom, min(deviations.values()), max(deviations.values()), alike)


def with_interval(mean: Mean | None, sign: str = "") -> str:
    """Such as "63.00 ± 8.96", to two digits of the interval. A single seed has no interval. `sign` "+" shows that of a
    positive number."""
    if mean is None:
        return "-"
    if not mean.half:
        return format(mean.value, sign + style_of(mean.value, 4)) + ("" if mean.half is None else " ± 0")
    style = style_of(mean.half, 2)
    return f"{format(mean.value, sign + style)} ± {format(mean.half, style)}"
