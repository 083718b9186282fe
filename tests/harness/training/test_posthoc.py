"""Averages with power-function profiles (Karras et al., 2312.02696), kept and reconstructed, against integrals in
float64 and against a loop over a sequence of weights."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from lamabench.harness.checks import WIDEST
from lamabench.harness.progress import Progress
from lamabench.harness.sampling import generate
from lamabench.harness.sections import SampleConfig
from lamabench.harness.training import checkpoint, posthoc
from lamabench.harness.training.ema import EMA
from lamabench.kernels.errors import InputError
from torch import nn
from trainings import DIT, assert_same, longer, make, metrics, trained

WIDTHS = (0.01, 0.05, 0.1, 0.17, 0.25, WIDEST)
T = 400


def profile(step: int, width: float, grid: np.ndarray) -> np.ndarray:
    """Equation 121 on a grid of midpoints, zero after the step."""
    gamma = posthoc.exponent(width)
    return np.where(grid < step, (gamma + 1) * np.minimum(grid / step, 1) ** gamma / step, 0)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_profile_has_its_width(width):
    """Its integral is 1, and its standard deviation over the whole time is the relative width, by midpoints."""
    grid = (np.arange(2_000_000) + 0.5) / 2_000_000
    p = profile(1, width, grid)
    mean = (p * grid).mean()
    assert p.mean() == pytest.approx(1, rel=1e-4)
    assert np.sqrt((p * (grid - mean) ** 2).mean()) == pytest.approx(width, rel=1e-4)
    assert posthoc.exponent(width) == pytest.approx(
        max(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real), rel=1e-9
    )


def test_an_exponent_has_the_papers_values():
    """Algorithm 2 and the text of section 3.1 name γ = 16.97 for 0.05, and γ = 6.94 for 0.10."""
    assert [round(posthoc.exponent(width), 2) for width in (0.05, 0.1)] == [16.97, 6.94]


@pytest.mark.parametrize("width", WIDTHS)
def test_updates_give_the_integral_of_the_profile(width):
    """The share of each step's weights in the average is the integral of the profile over that step, also of the first:
    nothing is left of the initial weights."""
    gamma, shares = posthoc.exponent(width), np.zeros(T)
    for step in range(1, T + 1):
        part = posthoc.share(gamma, step)
        shares *= 1 - part
        shares[step - 1] = part
    expected = np.diff((np.arange(T + 1) / T) ** (gamma + 1))
    assert np.abs(shares - expected).max() < 1e-13 and shares.sum() == pytest.approx(1, abs=1e-12)


def direct(profiles: list[tuple[int, float]], target: tuple[int, float]) -> tuple[np.ndarray, float]:
    """The constrained least squares of sampled profiles, by numpy's linear algebra on a grid."""
    grid = (np.arange(400_000) + 0.5) * T / 400_000
    matrix = np.stack([profile(*one, grid) for one in profiles], 1)
    p = profile(*target, grid)
    # Coefficients that add up to 1: the first is 1 less the others.
    rest, *_ = np.linalg.lstsq(matrix[:, 1:] - matrix[:, :1], p - matrix[:, 0], rcond=None)
    x = np.concatenate([[1 - rest.sum()], rest])
    return x, float(np.linalg.norm(matrix @ x - p) / np.linalg.norm(p))


@pytest.mark.parametrize("width", [0.03, 0.07, 0.13, 0.2, 0.28])
def test_a_fit_is_the_least_squares_of_sampled_profiles(width):
    profiles = [(step, one) for step in (50, 120, 200, 300, 400) for one in (0.05, 0.1)]
    fit = posthoc.fit(profiles, (T, width))
    expected, error = direct(profiles, (T, width))
    assert np.abs(np.array(fit.coefficients) - expected).max() < 2e-3 * np.abs(expected).max()
    assert fit.error == pytest.approx(error, rel=2e-3)
    assert sum(fit.coefficients) == pytest.approx(1, abs=1e-12)


def test_a_fit_of_a_kept_profile_is_that_profile():
    profiles = [(step, one) for step in (100, 200, 400) for one in (0.05, 0.1)]
    for index, target in enumerate(profiles[-2:], start=4):
        fit = posthoc.fit(profiles, target)
        assert np.abs(np.array(fit.coefficients) - np.eye(6)[index]).max() < 1e-9 and fit.error < 1e-7


def test_a_fit_bears_profiles_that_are_nearly_the_same():
    """Moments of consecutive steps: the condition of their products is beyond float64, the coefficients stay small."""
    profiles = [(step, one) for step in range(370, T + 1) for one in (0.0999, 0.1, 0.1001)]
    fit = posthoc.fit(profiles, (T, 0.098))
    assert np.isfinite(fit.coefficients).all() and np.abs(fit.coefficients).max() < 1000
    assert fit.error < 0.02 and sum(fit.coefficients) == pytest.approx(1, abs=1e-9)


class Walk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((200,), 3.0))


def test_a_reconstruction_is_what_would_have_been_kept():
    """On a random walk with float32 averages, by 16 moments: the difference from the average in float64 is at most that
    of the profile times the size of the walk."""
    net, widths, more = Walk(), (0.05, 0.1), (0.07, 0.13, 0.2)
    ema = EMA(net, 0.99, powers=(*widths, *more))
    random, weights, kept = np.random.default_rng(0), [], {}
    for n in range(T):
        with torch.no_grad():
            net.w += torch.from_numpy(random.normal(size=200) / T**0.5).float()
        weights.append(net.w.detach().double().numpy().copy())
        ema.update(n)
        if (n + 1) % 25 == 0:
            kept[n + 1] = {name: net.state_dict()["w"].clone() for name, net in ema.nets.items()}
    profiles = [(step, width) for step in kept for width in widths]
    for width in more:
        fit = posthoc.fit(profiles, (T, width))
        terms = zip(fit.coefficients, ({"w": kept[step][f"power@{one}"]} for step, one in profiles), strict=True)
        actual = posthoc.combined(terms)["w"].double().numpy()
        gamma = posthoc.exponent(width)
        exact = np.diff((np.arange(T + 1) / T) ** (gamma + 1)) @ np.stack(weights)
        assert np.abs(kept[T][f"power@{width}"].double().numpy() - exact).max() < 1e-5, "the kept average itself"
        spread = np.abs(np.stack(weights) - weights[-1]).max()
        assert np.abs(actual - exact).max() < fit.error * spread < 0.1
        assert np.sqrt(np.mean((actual - exact) ** 2)) < 2e-3


def test_constant_weights_stay_as_they_are():
    value = torch.tensor([3.3, -1e-4])
    fit = posthoc.fit([(100, 0.1), (400, 0.05), (400, 0.1)], (400, 0.2))
    assert torch.equal(
        posthoc.combined((one, {"w": value, "n": torch.tensor(5)}) for one in fit.coefficients)["w"], value
    )


def test_a_training_keeps_them_and_gives_any_width(tmp_path):
    """Those that were kept are what a training that keeps them alone has, and others come close to what a training with
    that width keeps; in a file of weights and in a checkpoint."""
    steps = [2, 4, 6, 8, 9, 10, 11]
    config = make(steps=12, snapshots=steps, ema_powers=[0.05, 0.1], checkpoint_every=12)
    folder, other = trained(tmp_path / "a", config), trained(tmp_path / "b", longer(config, 12, ema_powers=[0.13]))
    assert metrics(folder) == metrics(other)
    for step in (11, 12):
        (tmp_path / "a" / "weights" / checkpoint.file_name(12)).unlink(missing_ok=True)  # the checkpoint has them
        kept = checkpoint.load_weights(folder, step, "power@0.10", DIT)
        assert kept.error is None and kept.step == step
        alone = checkpoint.load_weights(other, step, "power@0.13", DIT).tensors
        fit = checkpoint.load_weights(folder, step, "power@0.13", DIT)
        assert fit.error is not None and 0 < fit.error < 0.05 and fit.tensors.keys() == alone.keys()
        plain = checkpoint.load_weights(folder, step, "ema", DIT).tensors
        worst = max((v - alone[name]).abs().max() for name, v in fit.tensors.items())
        moved = max((v - plain[name]).abs().max() for name, v in alone.items())
        assert worst < 0.05 * moved, (worst, moved)
    wanted = replace(config, sample=SampleConfig(count=2, method="ddim", steps=2, weights="power@0.13"))
    row = generate(tmp_path, folder, wanted, 12, Progress())
    assert (row["weights"], row["weights_error"]) == ("power@0.13", fit.error)
    names = checkpoint.load_weights(folder, 12, "power@0.13", DIT, tensors=False).tensors
    assert {name: v.shape for name, v in names.items()} == {name: v.shape for name, v in alone.items()}


def test_what_cannot_be_reconstructed_is_one_line(tmp_path):
    folder = trained(tmp_path / "a", make(snapshots=[3], ema_powers=[0.05, 0.1]))
    with pytest.raises(
        InputError, match=r"wrong by \d+%, .*: take power@0.05 or power@0.1, .*train.snapshots"
    ) as caught:
        checkpoint.load_weights(folder, 6, "power@0.25", DIT, tensors=False)
    assert "\n" not in str(caught.value)
    plain = trained(tmp_path / "b", make())
    with pytest.raises(InputError, match=r"has no weights power@0.1; train.ema_powers lists"):
        checkpoint.load_weights(plain, 6, "power@0.1")
    with pytest.raises(InputError, match="no averaged weights of step 5; the nearest kept: 3 and 6"):
        checkpoint.load_weights(folder, 5, "power@0.1")


def test_a_training_with_them_continues_bit_for_bit(tmp_path):
    config = make(steps=7, ema_powers=[0.05, 0.2])
    broken = trained(tmp_path / "broken", longer(config, 3))
    assert_same(trained(tmp_path / "whole", config), trained(broken, config))


def test_a_fit_is_the_same_with_other_libraries_and_threads():
    """Bit for bit with another kernel of OpenBLAS and without the vector units that numpy would use."""
    code = "from lamabench.harness.training.posthoc import fit; import sys\n"
    code += "one = fit([(s, w) for s in range(25, 401, 25) for w in (0.05, 0.1)], (400, 0.13))\n"
    code += "print([x.hex() for x in one.coefficients], one.error.hex())"
    plain = {"OPENBLAS_CORETYPE": "Prescott", "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3", "OMP_NUM_THREADS": "1"}
    outputs = {
        subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True).stdout
        for env in ({}, plain)
    }
    assert len(outputs) == 1
