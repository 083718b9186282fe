"""Means and paired differences over training seeds, against tables and scipy."""

import numpy as np
import pytest
from lamabench.reports.differences import NO_SEED, by_seed, difference, mean_of, together, with_interval
from scipy import stats

A = {0: 60.0, 1: 62.0, 2: 67.0, 3: 61.5, 4: 64.25}
B = {0: 58.5, 1: 61.0, 2: 65.0, 3: 60.75, 4: 62.0, 9: 1000.0}


@pytest.mark.parametrize(("n", "quantile"), [(3, 4.302653), (5, 2.776445), (10, 2.262157)])
def test_the_interval_of_a_mean_has_the_quantile_of_the_tables(n: int, quantile: float) -> None:
    values = np.random.default_rng(n).normal(5.0, 2.0, n)
    mean = mean_of(values.tolist())
    assert (mean.value, mean.n) == (pytest.approx(values.mean(), rel=1e-12), n)
    assert mean.half is not None and mean.half == pytest.approx(quantile * values.std(ddof=1) / np.sqrt(n), rel=1e-6)
    assert (mean.low, mean.high) == (mean.value - mean.half, mean.value + mean.half)


def test_one_seed_has_no_interval() -> None:
    mean = mean_of([3.0])
    assert (mean.value, mean.half, mean.n) == (3.0, None, 1)
    assert with_interval(mean) == "3.000" and with_interval(None) == "-"
    assert with_interval(mean_of([60.0, 62.0, 67.0]), "+") == "+63.0 ± 9.0"  # 4.302653 · √13 / √3
    assert with_interval(mean_of([0.5, 0.5])) == "0.5000 ± 0"


def test_a_paired_difference_is_that_of_scipy() -> None:
    result = difference(A, B, "min")
    pairs = stats.ttest_rel(list(A.values()), [B[seed] for seed in A])
    interval = pairs.confidence_interval(0.95)
    assert result.mean is not None and result.n == 5  # seed 9 has no partner
    assert (result.mean.low, result.mean.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert result.verdict == "worse" and pairs.pvalue < 0.05


def test_pairs_tell_apart_what_means_do_not() -> None:
    """Seeds differ more than the two variants, but alike for both."""
    low, high = mean_of(B[seed] for seed in A), mean_of(A.values())
    assert low.high > high.low  # the intervals of the means overlap
    assert difference(B, A, "min").verdict == "better" and difference(A, B, "max").verdict == "better"
    assert difference(B, A, "max").verdict == "worse"


def test_the_verdict_is_that_of_a_test_at_five_percent() -> None:
    draws = np.random.default_rng(0)
    seen = set()
    for shift in np.linspace(-2, 2, 40):
        one, two = draws.normal(shift, 1.0, 4), draws.normal(0.0, 1.0, 4)
        verdict = difference(dict(enumerate(one)), dict(enumerate(two)), "min").verdict
        pvalue = stats.ttest_rel(one, two).pvalue
        assert verdict == ("inconclusive" if pvalue > 0.05 else "better" if one.mean() < two.mean() else "worse")
        seen.add(verdict)
    assert seen == {"better", "worse", "inconclusive"}


@pytest.mark.parametrize(("sizes", "quantile"), [((2, 2, 2), 4.176535), ((3, 3, 2, 2, 2, 3), 3.249836)])
def test_intervals_that_hold_together_have_bonferronis_quantiles(sizes: tuple[int, ...], quantile: float) -> None:
    """t(0.9875, 3) and t(0.995, 9) of tables; the variance is pooled; the test of variances is Bartlett's (1937)."""
    draws = np.random.default_rng(0)
    numbers = [draws.normal(5.0, 2.0, size) for size in sizes]
    values = {str(place): dict(enumerate(each.tolist())) for place, each in enumerate(numbers)}
    result = together(values | {"one": {0: 9.0}, "other": {NO_SEED: 500.0, 0: 2.0}}, "0")
    assert result is not None and list(result.means) == list(values)[1:] and result.freedom == sum(sizes) - len(sizes)
    pooled = sum((size - 1) * each.var(ddof=1) for size, each in zip(sizes, numbers, strict=True)) / result.freedom
    freedoms = np.array(sizes) - 1
    logs = sum(freedom * np.log(each.var(ddof=1)) for freedom, each in zip(freedoms, numbers, strict=True))
    scale = 1 + (sum(1 / freedoms) - 1 / result.freedom) / (3 * (len(sizes) - 1))
    statistic = (result.freedom * np.log(pooled) - logs) / scale
    assert result.deviation == pytest.approx(np.sqrt(pooled))
    assert result.alike == pytest.approx(stats.chi2.sf(statistic, len(sizes) - 1))
    deviations = [each.std(ddof=1) for each in numbers]
    assert (result.smallest, result.largest) == (pytest.approx(min(deviations)), pytest.approx(max(deviations)))
    for size, each, mean in zip(sizes[1:], numbers[1:], result.means.values(), strict=True):
        assert mean.value == pytest.approx(each.mean() - numbers[0].mean()) and mean.n == size
        assert mean.half == pytest.approx(quantile * np.sqrt(pooled * (1 / size + 1 / sizes[0])), rel=1e-6)


def test_all_intervals_hold_together_in_95_of_100_studies() -> None:
    draws = np.random.default_rng(1)
    misses = 0
    for _ in range(1000):
        values = {name: dict(enumerate(draws.normal(5.0, 2.0, 2).tolist())) for name in "abcdef"}
        result = together(values, "a")
        assert result is not None
        misses += any(not mean.low <= 0 <= mean.high for mean in result.means.values())
    assert 20 < misses < 65  # Bonferroni's correction allows 50, and fewer where variants share their base


def test_variances_that_differ_are_not_pooled() -> None:
    steady = {name: {0: 31.9 + place, 1: 33.1 + place, 2: 30.2 + place} for place, name in enumerate("abc")}
    result = together(steady | {"diverged": {0: 50.0, 1: 47.0, 2: 366.0}}, "a")
    assert result is not None and result.means == {} and result.alike < 1e-4
    alike = together(steady, "a")
    assert alike is not None and list(alike.means) == ["b", "c"] and alike.alike == pytest.approx(1.0)


def test_intervals_that_hold_together_need_two_seeds_two_variants_and_variances() -> None:
    base, two = {0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 1: 4.0}
    assert together({"base": base, "two": two, "one": {0: 2.0}}, "base") is None
    assert together({"base": {0: 1.0}, "two": two, "other": two}, "base") is None
    assert together({"base": base, "two": two, "constant": {0: 0.1 + 0.2, 1: 0.3}}, "base") is None
    assert together({"two": two, "other": two}, "base") is None


def test_few_seeds_are_inconclusive_and_say_why() -> None:
    few = difference({0: 1.0, 1: 1.0}, {0: 9.0, 1: 9.0, 2: 9.0}, "min")
    assert (few.verdict, few.reason, few.n) == ("inconclusive", "2 common seeds, and 3 are needed", 2)
    assert few.mean is not None and few.mean.value == -8.0
    one = difference({0: 1.0}, {0: 9.0}, "min")
    assert one.reason == "1 common seed, and 3 are needed" and one.mean is not None and one.mean.half is None
    none = difference({0: 1.0, 1: 1.0, 2: 1.0}, {3: 9.0, 4: 9.0, 5: 9.0}, "min")
    assert (none.verdict, none.reason, none.n, none.mean) == ("inconclusive", "no common seed", 0, None)
    same = difference(A, A, "min")
    assert (same.verdict, same.reason) == ("inconclusive", "the interval includes 0")
    assert difference(A, B, "").reason == "it is not known whether lower or higher is better"


def test_a_seed_counts_once() -> None:
    assert by_seed([(1, 2.0), (0, 5.0), (1, 4.0)]) == {0: 5.0, 1: 3.0}
