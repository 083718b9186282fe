"""Means and paired differences over training seeds, against tables and scipy."""

import numpy as np
import pytest
from lamabench.reports.differences import by_seed, difference, mean_of, simultaneous, with_interval
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


@pytest.mark.parametrize(("n", "others", "critical"), [(2, 4, 3.48), (3, 2, 2.86), (3, 4, 2.89), (6, 3, 2.54)])
def test_simultaneous_intervals_have_the_critical_values_of_dunnett(n: int, others: int, critical: float) -> None:
    """Table 2 of Dunnett (1955): two-sided, 95 %, by treatments and degrees of freedom."""
    draws = np.random.default_rng(n).normal(5.0, 2.0, (others + 1, n))
    values = {str(place): dict(enumerate(row.tolist())) for place, row in enumerate(draws)}
    results = simultaneous(values, "0")
    pooled = np.sqrt(draws.var(axis=1, ddof=1).mean())
    assert list(results) == list(values)[1:]
    for name, result in results.items():
        assert result.value == pytest.approx(draws[int(name)].mean() - draws[0].mean(), abs=1e-9) and result.n == n
        assert result.half == pytest.approx(critical * pooled * np.sqrt(2 / n), rel=3e-3)
    assert simultaneous(values, "0") == results


def test_simultaneous_intervals_need_two_seeds_two_variants_and_a_variance() -> None:
    base, two = {0: 1.0, 1: 2.0, 2: 3.0}, {0: 2.0, 1: 4.0}
    assert list(simultaneous({"base": base, "two": two, "other": two, "one": {0: 2.0}}, "base")) == ["two", "other"]
    assert simultaneous({"base": base, "two": two, "one": {0: 2.0}}, "base") == {}
    assert simultaneous({"base": {0: 1.0}, "two": two, "other": two}, "base") == {}
    assert simultaneous({"base": {0: 1.0, 1: 1.0}, "two": {0: 2.0, 1: 2.0}, "other": {0: 3.0, 1: 3.0}}, "base") == {}
    assert simultaneous({"two": two, "other": two}, "base") == {}


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
