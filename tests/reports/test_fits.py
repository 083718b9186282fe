"""Power laws against known laws, scipy's and numpy's fits, and simulations."""

import numpy as np
import pytest
from lamabench.reports import fits
from lamabench.reports.fits import Check, Fit, check, fit
from scipy.optimize import curve_fit

COMPUTES = (5.0, 21.3, 70.8, 96.8)


def values_of(a: float, b: float, c: float, computes: tuple[float, ...] = COMPUTES) -> dict[float, list[float]]:
    return {compute: [a + b * compute**-c] for compute in computes}


def noisy(seed: int, seeds: int = 3, sizes: int = 4, noise: float = 0.02) -> dict[float, list[float]]:
    random = np.random.default_rng(seed)
    exact = values_of(8.0, 60.0, 0.45, COMPUTES[:sizes])
    return {compute: list(mean * np.exp(noise * random.standard_normal(seeds))) for compute, (mean,) in exact.items()}


@pytest.mark.parametrize("law", [(8.0, 60.0, 0.45), (0.0, 50.0, 0.3), (3.0, 1e3, 1.5), (15.0, 10.0, 0.2)])
@pytest.mark.parametrize("computes", [COMPUTES, COMPUTES[:3], (5e18, 2e19, 7e19)])
def test_a_law_without_noise_comes_back(law: tuple[float, float, float], computes: tuple[float, ...]) -> None:
    a, b, c = law[0], law[1] * (1.0 if computes[0] < 1e9 else 1e18 ** law[2]), law[2]
    result = fit(values_of(a, b, c, computes))
    assert isinstance(result, Fit) and result.replicates is None and result.law == "a + b·C^-c"
    assert (result.a, result.b, result.c) == pytest.approx((a, b, c), rel=1e-5, abs=1e-5)
    assert result.at(4 * computes[-1]) == pytest.approx(a + b * (4 * computes[-1]) ** -c, rel=1e-6)


def test_a_fit_with_noise_agrees_with_scipy() -> None:
    """`curve_fit` of the logarithm from the true law, with bounds, as a second witness."""
    for seed in range(5):
        values = noisy(seed, noise=0.005)
        means = [float(np.log(np.mean(each))) for each in values.values()]
        expected, _ = curve_fit(
            lambda x, a, b, c: np.log(a + b * x**-c), COMPUTES, means, (8.0, 60.0, 0.45), bounds=(0, np.inf)
        )
        result = fit(values)
        assert isinstance(result, Fit)
        assert (result.a, result.b, result.c) == pytest.approx(tuple(expected), rel=1e-3)


def test_two_sizes_have_a_straight_line_in_logarithms() -> None:
    values = {5.0: [30.0, 32.0], 20.0: [20.0, 20.5]}
    result = fit(values)
    slope, height = np.polyfit(np.log([5.0, 20.0]), np.log([31.0, 20.25]), 1)
    assert isinstance(result, Fit) and result.law == "b·C^-c"
    assert (result.a, result.b, result.c) == pytest.approx((0.0, np.exp(height), -slope))
    concave = fit({5.0: [100.0], 20.0: [90.0], 80.0: [50.0]})  # a below 0 would be better
    slope, height = np.polyfit(np.log([5.0, 20.0, 80.0]), np.log([100.0, 90.0, 50.0]), 1)
    assert isinstance(concave, Fit)
    assert (concave.a, concave.b, concave.c) == pytest.approx((0.0, np.exp(height), -slope))


def test_the_largest_size_is_predicted_from_the_others() -> None:
    """From two sizes the law is b·C^-c, so that the third is y2 · (y2 / y1)^(log(x3/x2) / log(x2/x1))."""
    values = {5.0: [40.0, 42.0], 20.0: [20.5], 160.0: [9.0, 11.0]}
    result = check(values)
    assert isinstance(result, Check) and result.law == "b·C^-c"
    assert result.predicted == pytest.approx(20.5 * (20.5 / 41) ** (np.log(8) / np.log(4)))
    assert result.measured == 10.0 and result.error == pytest.approx(result.predicted / 10 - 1)
    four = check(values_of(8.0, 60.0, 0.45))
    assert isinstance(four, Check) and four.law == "a + b·C^-c" and four.error == pytest.approx(0, abs=1e-6)


def test_the_band_holds_the_true_law_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """150 studies of four sizes with three seeds: of bands of 95 %, between 89 and 99 % hold the law. The binomial
    standard deviation of 150 is 1.8 %, and 60 replicates instead of 200 make the band a little narrow."""
    monkeypatch.setattr(fits, "REPLICATES", 60)
    inside, beyond = 0, 0
    for seed in range(150):
        result = fit(noisy(1000 + seed))
        assert isinstance(result, Fit)
        for compute in (COMPUTES[1], 4 * COMPUTES[-1]):
            low, high = result.interval_at(compute) or (np.nan, np.nan)
            holds = low <= 8.0 + 60.0 * compute**-0.45 <= high
            inside, beyond = (inside + holds, beyond) if compute < COMPUTES[-1] else (inside, beyond + holds)
    assert 133 <= inside <= 149 and 133 <= beyond <= 149


def test_a_band_is_the_same_each_time_and_needs_several_seeds() -> None:
    one, other = fit(noisy(1)), fit({compute: each[::-1] for compute, each in noisy(1).items()})
    assert isinstance(one, Fit) and isinstance(other, Fit) and one.intervals is not None
    assert one.intervals == other.intervals and len(one.intervals) == 3
    single = fit(noisy(1, seeds=1))
    assert isinstance(single, Fit) and single.intervals is None and single.interval_at(5.0) is None


@pytest.mark.parametrize(
    ("heights", "why"),
    [
        ([10.0, 10.0, 10.0], "does not fall"),
        ([10.0, 11.0, 12.0], "does not fall"),
        ([10.0, 9.0, 12.0], "does not fall"),
        ([100.0, 1.0, 1.0], "single step"),
        ([12.0, 10.0, 11.0], "single step"),
        ([12.0, 0.0, -1.0], "above 0"),
        ([12.0, float("nan"), 1.0], "above 0"),
        ([12.0], "two sizes"),
    ],
)
def test_values_without_a_law_say_why(heights: list[float], why: str) -> None:
    result = fit({compute: [height] for compute, height in zip(COMPUTES, heights, strict=False)})
    assert isinstance(result, str) and why in result and "\n" not in result


def test_two_sizes_predict_nothing() -> None:
    two = check({5.0: [3.0], 10.0: [2.0]})
    assert isinstance(two, str) and "three sizes" in two
    rising = check({5.0: [3.0], 10.0: [4.0], 20.0: [2.0]})
    assert isinstance(rising, str) and rising.startswith("without the largest size: the value does not fall")


@pytest.mark.filterwarnings("error")
def test_noise_as_large_as_the_values_gives_finite_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "REPLICATES", 30)
    for seed in range(12):
        result = fit(noisy(seed, seeds=2, noise=1.0))
        if isinstance(result, Fit):
            numbers = [*result.interval_at(0.01), *result.interval_at(1e6), *np.ravel(result.intervals)]  # type: ignore[misc]
            assert np.isfinite(numbers).all()
