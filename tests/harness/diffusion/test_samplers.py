"""Samplers against the reference's trajectories, guidance against closed forms, and noise by image index."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lamabench.harness.diffusion.gaussian import DDPM
from lamabench.harness.diffusion.samplers import index_noise, sample
from lamabench.harness.random import Stream, generator
from lamabench.kernels.errors import InputError
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "diffusion.safetensors")
ALPHA_BAR = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
SIGMA = (1 - ALPHA_BAR).sqrt()


def error(actual: Tensor, reference: Tensor) -> float:
    difference, scale = actual.double() - reference.double(), reference.double()
    return float(difference.square().mean().sqrt() / scale.square().mean().sqrt())


def linear_net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The golden file's model: eps = 0.8 · sqrt(1 - alpha_bar_t) · x, variance channels 0."""
    eps = 0.8 * SIGMA[t.long()].view(-1, 1, 1, 1) * x
    return torch.cat([eps, torch.zeros_like(eps)], dim=1).float()


def labelled_net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Noise and variance that depend on the label: eps = slope(y) · sigma_t · x, v = y / 10; class 3 is null."""
    slope = torch.tensor([0.5, 0.6, 0.7, 0.4], dtype=torch.float64)[y].view(-1, 1, 1, 1)
    eps = slope * SIGMA[t.long()].view(-1, 1, 1, 1) * x
    v = (y / 10).view(-1, 1, 1, 1).expand_as(eps)
    return torch.cat([eps, v], dim=1).float()


def ddim_factor(slope: float, steps: int) -> float:
    """The factor by which DDIM multiplies x_T if eps = slope · sigma_t · x, because every step is linear in x."""
    timesteps = [round(i * 999 / (steps - 1)) for i in range(steps)]
    factor = 1.0
    for i in reversed(range(steps)):
        now = float(ALPHA_BAR[timesteps[i]])
        before = float(ALPHA_BAR[timesteps[i - 1]]) if i else 1.0
        eps = slope * (1 - now) ** 0.5
        factor *= before**0.5 * (1 - (1 - now) ** 0.5 * eps) / now**0.5 + (1 - before) ** 0.5 * eps
    return factor


def run(net, x: Tensor, y: Tensor, steps: int = 10, method: str = "ddim", **options) -> Tensor:
    return sample(net, x, y, objective=DDPM(), method=method, steps=steps, **options)


def test_the_ddim_trajectory_matches_the_reference():
    actual = run(linear_net, GOLDEN["x_T"], torch.zeros(4, dtype=torch.int64), steps=25)
    assert error(actual, GOLDEN["ddim_x0"]) < 3e-6


def test_the_ancestral_trajectory_matches_the_reference():
    used = []

    def noise(i: int) -> Tensor:
        used.append(i)
        return GOLDEN["ancestral_noise"][i]

    y = torch.zeros(4, dtype=torch.int64)
    actual = run(linear_net, GOLDEN["x_T"], y, steps=25, method="ancestral", noise=noise)
    assert error(actual, GOLDEN["ancestral_x0"]) < 3e-6
    assert used == list(range(24))  # no noise at the last step


@pytest.mark.parametrize("steps", [2, 7, 250])
def test_ddim_is_the_closed_form_of_a_linear_model(steps):
    seen = []

    def net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(int(t[0]))
        return linear_net(x, t, y)

    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert error(run(net, x, torch.zeros(2, dtype=torch.int64), steps=steps), ddim_factor(0.8, steps) * x) < 3e-6
    assert seen == [round(i * 999 / (steps - 1)) for i in reversed(range(steps))]  # the original timesteps


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
@pytest.mark.parametrize("scale", [1.5, 3.0, 0.0])
def test_guidance_is_the_closed_form_of_a_linear_model(channels, scale):
    x = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 1, 2])
    actual = run(labelled_net, x, y, guidance=scale, guidance_channels=channels, null_class=3)
    for i, slope in enumerate((0.5, 0.6, 0.7)):
        for channel in range(4):
            guided = channels is None or channel < channels
            effective = 0.4 + scale * (slope - 0.4) if guided else slope
            assert error(actual[i, channel], ddim_factor(effective, 10) * x[i, channel]) < 1e-5


def test_guidance_leaves_the_variance_conditional():
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    y = torch.tensor([1])
    options = {"steps": 2, "method": "ancestral", "guidance": 2.0, "null_class": 3}
    noisy = run(labelled_net, x, y, noise=lambda _: noise, **options)
    still = run(labelled_net, x, y, noise=lambda _: torch.zeros_like(noise), **options)
    beta = 1 - ALPHA_BAR[999] / ALPHA_BAR[0]
    low = beta * (1 - ALPHA_BAR[0]) / (1 - ALPHA_BAR[999])
    sigma = (beta ** ((1 + 0.1) / 2) * low ** ((1 - 0.1) / 2)) ** 0.5  # v = y / 10 of the label, not of the null class
    slope = 0.4 + 2 * (0.6 - 0.4)
    last = (1 - slope * SIGMA[0] ** 2) / ALPHA_BAR[0] ** 0.5  # the last step predicts the image from the noisy one
    assert error(noisy - still, sigma * last * noise) < 1e-4  # with the null class's v: 0.6


def test_one_pass_without_guidance_and_one_doubled_batch_with():
    batches = []

    def net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        batches.append(y.tolist())
        return labelled_net(x, t, y)

    x, y = torch.ones(2, 1, 2, 2), torch.tensor([0, 2])
    run(net, x, y, steps=2, guidance=1.0, null_class=3)
    run(net, x, y, steps=2, guidance=2.0, null_class=3)
    assert batches == [[0, 2], [0, 2], [0, 2, 3, 3], [0, 2, 3, 3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": 2.0}, "no null class"),
        ({"guidance": 2.0, "null_class": 3, "guidance_channels": 5}, "1 to 4 .*not 5"),
        ({"guidance": 2.0, "null_class": 3, "guidance_channels": 0}, "1 to 4 .*not 0"),
        ({"method": "dimm"}, "did you mean 'ddim'.*choices: ancestral, ddim"),
        ({"method": "ancestral"}, "needs noise"),
        ({"steps": 1}, "2 to 1000, not 1"),
    ],
)
def test_bad_requests_are_refused_before_the_network_runs(options, message):
    def net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        raise AssertionError("the network ran")

    with pytest.raises(InputError, match=message) as caught:
        run(net, torch.zeros(1, 4, 2, 2), torch.tensor([0]), **options)
    assert "\n" not in str(caught.value)


def test_progress_counts_the_steps():
    seen = []
    x, y = torch.ones(1, 1, 2, 2), torch.tensor([0])
    run(linear_net, x, y, steps=3, progress=lambda i, steps: seen.append((i, steps)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_index_noise_is_the_generator_of_each_index():
    first, second = index_noise(7, [12, 5], (3, 4, 4), draws=2)
    assert first.dtype == torch.float32 and first.shape == (2, 3, 4, 4)
    for row, index in enumerate((12, 5)):
        both = generator(7, Stream.SAMPLE, index).standard_normal((2, 3, 4, 4), dtype=np.float32)
        assert np.array_equal(first[row].numpy(), both[0]) and np.array_equal(second[row].numpy(), both[1])
    assert not torch.equal(next(index_noise(8, [12, 5], (3, 4, 4), draws=1)), first)


def test_batch_composition_does_not_change_an_image():
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(2, 4, 3, padding=1)

    def images(indices: list[int]) -> tuple[Tensor, Tensor]:
        draws = index_noise(3, indices, (2, 8, 8), draws=10)
        drawn = [next(draws)]

        def noise(i: int) -> Tensor:
            drawn.append(next(draws))
            return drawn[-1]

        y = torch.zeros(len(indices), dtype=torch.int64)
        out = run(lambda x, t, y: layer(x).tanh(), drawn[0], y, method="ancestral", noise=noise)
        return torch.stack(drawn, dim=1), out

    noise, together = images([4, 0, 9, 2, 7])
    alone = [images([index]) for index in (4, 0, 9, 2, 7)]
    assert noise.shape == (5, 10, 2, 8, 8)  # the start and every step but the last
    assert torch.equal(noise, torch.cat([drawn for drawn, _ in alone]))
    torch.testing.assert_close(together, torch.cat([out for _, out in alone]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["ddim", "ancestral"])
def test_clipping_against_a_loop_in_float64(method):
    """The linear model from a start far outside: predicted images leave [-1, 1], and both samplers use clamped ones."""
    steps = 10
    timesteps = [round(i * 999 / (steps - 1)) for i in range(steps)]
    generator_ = torch.Generator().manual_seed(0)
    x_T = 3 * torch.randn(2, 1, 4, 4, generator=generator_)
    noises = torch.randn(steps, 2, 1, 4, 4, generator=generator_)
    x, left = x_T.double(), False
    for i in reversed(range(steps)):
        now = ALPHA_BAR[timesteps[i]]
        before = ALPHA_BAR[timesteps[i - 1]] if i else torch.tensor(1.0, dtype=torch.float64)
        eps = 0.8 * (1 - now).sqrt() * x
        x0 = (x - (1 - now).sqrt() * eps) / now.sqrt()
        left = left or bool((x0.abs() > 1).any())
        x0 = x0.clamp(-1, 1)
        if method == "ddim":
            x = before.sqrt() * x0 + (1 - before).sqrt() * (x - now.sqrt() * x0) / (1 - now).sqrt()
            continue
        beta = 1 - now / before
        tilde = beta * (1 - before) / (1 - now)
        first = (
            tilde
            if i
            else (1 - ALPHA_BAR[timesteps[1]] / ALPHA_BAR[0]) * (1 - ALPHA_BAR[0]) / (1 - ALPHA_BAR[timesteps[1]])
        )
        mean = before.sqrt() * beta / (1 - now) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - now) * x
        x = mean + (i > 0) * torch.exp(0.25 * (beta.log() + first.log())) * noises[steps - 1 - i].double()
    y = torch.zeros(2, dtype=torch.int64)
    actual = run(linear_net, x_T, y, steps, method, clip=True, noise=lambda i: noises[i])
    assert left and error(actual, x) < 3e-6
    assert method == "ancestral" or actual.abs().max() <= 1


def test_clipping_changes_nothing_inside_the_bounds():
    x_T, y = 1e-3 * GOLDEN["x_T"], torch.zeros(4, dtype=torch.int64)
    assert error(run(linear_net, x_T, y, clip=True), run(linear_net, x_T, y)) < 1e-5
