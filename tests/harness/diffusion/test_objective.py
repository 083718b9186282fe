"""Objectives: times, corruption and losses, their relations to each other, their gradients, and what is refused."""

import math

import numpy as np
import pytest
import torch
from lamabench.baselines.dit import DiTConfig
from lamabench.harness import config
from lamabench.harness.diffusion import samplers
from lamabench.harness.diffusion.flow import Flow
from lamabench.harness.diffusion.gaussian import DDPM, Chain, ChainPath
from lamabench.harness.diffusion.objective import OBJECTIVES, objective
from lamabench.harness.diffusion.path import Denoised, Path
from lamabench.harness.diffusion.samplers import SAMPLERS, Denoiser, Noise, OnStep, Sampler, index_noise, sample
from lamabench.harness.diffusion.vprediction import VPrediction
from lamabench.harness.keys import samples_key, training_key
from lamabench.harness.sections import ObjectiveConfig
from lamabench.kernels.errors import InputError
from torch import Tensor

CENTRE = 0.3  # the grey of every image of the data below


def test_every_name_is_an_objective():
    assert list(OBJECTIVES) == ["ddpm", "v", "flow"] and isinstance(objective(ObjectiveConfig()), DDPM)
    assert objective(ObjectiveConfig("v", "cosine")).schedule == "cosine"
    for settings, message in (
        (ObjectiveConfig("flwo"), r"unknown objective\.kind 'flwo' \(did you mean 'flow'\?\); choices: ddpm, v, flow"),
        (ObjectiveConfig(schedule="sine"), r"unknown objective\.schedule 'sine' .*choices: linear, cosine"),
        (ObjectiveConfig("flow", times="normal"), r"unknown objective\.times 'normal'.*choices: uniform, logit_normal"),
        (ObjectiveConfig("flow", "cosine"), r"schedule=cosine says nothing to objective\.kind=flow.*kind=ddpm or v"),
        (ObjectiveConfig("v", times="logit_normal"), r"times=logit_normal says nothing to objective\.kind=v: .*=flow"),
    ):
        with pytest.raises(InputError, match=message):
            objective(settings)
    for method in ("auto", *SAMPLERS):
        config.SampleConfig(method=method)


def test_ddpm_draws_timesteps_uniformly():
    rng, ddpm = np.random.default_rng(0), DDPM()
    drawn = [ddpm.draw_t(rng) for _ in range(20_000)]
    assert all(isinstance(t, float) and t.is_integer() for t in drawn)
    assert min(drawn) == 0 and max(drawn) == 999 and abs(np.mean(drawn) - 499.5) < 4 * 289 / math.sqrt(20_000)
    assert ddpm.draw_t(np.random.default_rng(7)) == float(np.random.default_rng(7).integers(1000))


def test_ddpm_has_times_in_the_middle_of_equal_parts():
    assert DDPM().times(8) == [62, 187, 312, 437, 562, 687, 812, 937] and DDPM().times(1) == [500]


def test_flow_draws_t_uniformly_or_logit_normally():
    count = 20_000
    for kind, deviation in (("uniform", math.sqrt(1 / 12)), ("logit_normal", 0.2085)):
        rng, flow = np.random.default_rng(0), Flow(kind)
        drawn = np.array([flow.draw_t(rng) for _ in range(count)])
        assert drawn.min() >= 0 and drawn.max() < 1
        assert drawn.mean() == pytest.approx(0.5, abs=4 * deviation / math.sqrt(count))
        # P(t < 1/4): of the logit-normal, that of a standard normal number below log(1/3)
        share = 0.25 if kind == "uniform" else 0.5 * math.erfc(math.log(3) / math.sqrt(2))
        assert (drawn < 0.25).mean() == pytest.approx(share, abs=4 * math.sqrt(share / count))
        assert drawn.std() == pytest.approx(deviation, rel=0.02)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_what_an_objective_says_of_itself(kind):
    goal, x = objective(ObjectiveConfig(kind)), torch.randn(2, 3, 4, 4)
    channels, t = goal.out_channels(3), torch.tensor([0.0, goal.times(8)[-1]])
    losses = goal.loss(torch.zeros(2, channels, 4, 4), x, x, t, x)
    assert tuple(losses) == goal.metrics and goal.metrics[0] == "loss" and goal.error in goal.metrics
    assert all(value.shape == (2,) and value.dtype == torch.float32 for value in losses.values())
    assert channels == (6 if kind == "ddpm" else 3)
    assert goal.sampler == ("euler" if kind == "flow" else "ancestral")
    times = np.array(goal.times(8))
    assert (np.abs(times - goal.span * (np.arange(8) + 0.5) / 8) <= (0.5 if goal.span > 1 else 0)).all()


def chain_levels(t: Tensor) -> tuple[Tensor, Tensor]:
    alpha_bar = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))[t.long()].view(-1, 1, 1, 1)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def flow_levels(t: Tensor) -> tuple[Tensor, Tensor]:
    t = t.double().view(-1, 1, 1, 1)
    return 1 - t, t


CASES = [
    ("ddpm", chain_levels, [0.0, 3.0, 500.0, 999.0]),
    ("v", chain_levels, [0.0, 3.0, 500.0, 999.0]),
    ("flow", flow_levels, [0.1, 0.25, 0.5, 0.9]),
]


@pytest.mark.parametrize(("kind", "levels", "times"), CASES)
def test_one_estimate_has_losses_that_are_multiples_of_each_other(kind, levels, times):
    """The prediction of v and of the velocity, made of an estimate of the noise or of the image. The loss is the error
    of the noise over signal², and that of the image over noise level²; DDPM's is the error of the noise."""
    draw = torch.Generator().manual_seed(0)
    x0, noise, miss = (torch.randn(4, 2, 3, 3, generator=draw, dtype=torch.float64) for _ in range(3))
    goal, t = objective(ObjectiveConfig(kind)), torch.tensor(times)
    signal, level = levels(t)
    x = signal * x0 + level * noise
    torch.testing.assert_close(goal.corrupt(x0, t, noise).double(), x, rtol=1e-6, atol=1e-6)
    noise_hat = noise + 0.1 * miss
    image_hat = (x - level * noise_hat) / signal
    out = {
        "ddpm": lambda: torch.cat([noise_hat, torch.zeros_like(x)], dim=1),
        "v": lambda: signal * noise_hat - level * image_hat,
        "flow": lambda: noise_hat - image_hat,
    }[kind]()
    of_noise = (noise_hat - noise).square().mean(dim=(1, 2, 3))
    of_image = (image_hat - x0).square().mean(dim=(1, 2, 3))
    error = goal.loss(out.float(), x0.float(), x.float(), t, noise.float())[goal.error].double()
    weight = 1 if kind == "ddpm" else signal.flatten() ** -2
    torch.testing.assert_close(error, weight * of_noise, rtol=2e-3, atol=0)  # of t = 999, the output is large
    weight = (signal / level).flatten() ** 2 if kind == "ddpm" else level.flatten() ** -2
    torch.testing.assert_close(error, weight * of_image, rtol=2e-3, atol=0)


@pytest.mark.parametrize(("kind", "levels", "times"), CASES[1:])
def test_losses_and_gradients_against_autograd_in_float64(kind, levels, times):
    draw = torch.Generator().manual_seed(0)
    x0, noise, out = (torch.randn(4, 2, 3, 3, generator=draw) for _ in range(3))
    goal, t = objective(ObjectiveConfig(kind)), torch.tensor(times)
    exact = out.double().requires_grad_()
    signal, level = levels(t)
    target = signal * noise - level * x0 if kind == "v" else noise.double() - x0
    expected = (exact - target).square().flatten(1).sum(1) / exact[0].numel()
    expected.sum().backward()
    out.requires_grad_()
    loss = goal.loss(out, x0, goal.corrupt(x0, t, noise), t, noise)["loss"]
    loss.sum().backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.grad.double(), exact.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["v", "flow"])
def test_the_estimate_of_a_path_is_that_of_the_loss(kind):
    """A prediction without loss is read as the image and the noise that made x."""
    draw = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(1, 1, 4, 4, generator=draw) for _ in range(2))
    goal = objective(ObjectiveConfig(kind))
    path = goal.path(5)
    for i, time in enumerate(path.times):
        t = torch.tensor([time])
        signal, level = path.levels(i)
        out = signal * noise - level * x0 if kind == "v" else noise - x0
        x = goal.corrupt(x0, t, noise)
        assert float(goal.loss(out, x0, x, t, noise)["loss"]) < 1e-10
        estimate = path.denoised(out, x, i)
        torch.testing.assert_close(estimate.x0, x0, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(estimate.noise, noise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["ancestral", "ddim", "heun", "dpmpp_2m"])
def test_images_of_one_grey(method):
    """The exact network for them: every sampler of v-prediction ends at that grey."""

    def v(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        signal, noise = chain_levels(t)
        return (signal * (x - signal * CENTRE) / noise - noise * CENTRE).float()

    x, y = torch.randn(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
    images = sample(v, x, y, objective=VPrediction(), method=method, steps=20, noise=lambda i: torch.randn_like(x))
    torch.testing.assert_close(images, torch.full_like(x, CENTRE), rtol=0, atol=1e-4)


def test_a_sampler_is_a_function_and_a_line(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "mine", Sampler(lambda denoiser, x, noise, on_step: denoiser(x, 0).x0))
    assert config.SampleConfig(method="mine", steps=8).method == "mine"
    x = torch.randn(2, 1, 2, 2)
    out = sample(lambda x, t, y: x, x, torch.zeros(2), objective=Flow(), method="mine", steps=4)
    assert torch.equal(out, torch.zeros_like(x))


def test_noise_is_drawn_for_a_sampler_that_says_so(monkeypatch):
    """One that draws, without a posterior: every batch of noise that it asks for is there, and no more."""

    def noisy(denoiser: Denoiser, x: Tensor, noise: Noise, on_step: OnStep) -> Tensor:
        return x + sum(noise(i) for i in range(len(denoiser.path.times) - 1))

    monkeypatch.setitem(SAMPLERS, "noisy", Sampler(noisy, draws=True))
    parts = list(index_noise(3, [0, 1], (1, 2, 2), samplers.draws("noisy", 4)))
    assert len(parts) == 4 and samplers.draws("ddim", 4) == 1
    rest = iter(parts[1:])
    options = {"objective": Flow(), "method": "noisy", "steps": 4, "noise": lambda i: next(rest)}
    out = sample(lambda x, t, y: x, parts[0], torch.zeros(2), **options)
    torch.testing.assert_close(out, sum(parts), rtol=0, atol=1e-6)
    with pytest.raises(InputError, match=r"sample\.method noisy needs noise"):
        sample(lambda x, t, y: x, parts[0], torch.zeros(2), objective=Flow(), method="noisy", steps=4)


def asked(kind: str, channels: int | None = 1, **settings) -> config.Config:
    model = DiTConfig(16, 1, 10, depth=1, out_channels=channels)
    return config.Config(
        model, config.DataConfig(), objective=ObjectiveConfig(kind), sample=config.SampleConfig(**settings)
    )


def test_what_does_not_fit_is_refused_before_anything_is_trained():
    for settings in ({"method": "ddim", "steps": 1}, {"method": "heun", "steps": 1}, {"steps": 5000}):
        config.check_fit(asked("flow", **settings))
    for settings in ({"method": "dpmpp_2m"}, {"timesteps": "ddim"}):
        config.check_fit(asked("v", **settings))
    for kind, settings, message in (
        ("flow", {"method": "ancestral"}, r"ancestral draws from a posterior, .* choices: ddim, euler, heun, dpmpp_2m"),
        ("v", {"method": "euler"}, r"euler is for straight paths.* choices: ancestral, ddim, heun, dpmpp_2m"),
        ("flow", {"timesteps": "ddim"}, r"sample\.timesteps=ddim chooses among .*; choices: even"),
        ("v", {"steps": 1001}, r"sample\.steps must be 2 to 1000, not 1001"),
        ("flow", {"channels": None}, r"model\.out_channels 2 does not fit objective flow, which needs 1"),
        ("ddpm", {"channels": 1}, r"model\.out_channels 1 does not fit objective ddpm, which needs 2"),
    ):
        with pytest.raises(InputError, match=message):
            config.check_fit(asked(kind, **settings))


def test_auto_is_the_sampler_of_the_objective():
    """A configuration has its name, so that the default is in no key another one than before."""
    for kind, method in {"ddpm": "ancestral", "v": "ancestral", "flow": "euler"}.items():
        assert asked(kind).sample.method == method == asked(kind, method="auto").sample.method
        assert samples_key(asked(kind), 1) == samples_key(asked(kind, method=method), 1)
    assert asked("flow", method="heun").sample.method == "heun"


def test_the_objective_is_in_the_key_of_a_training():
    keys = [training_key(asked(kind)) for kind in OBJECTIVES]
    flow = asked("flow")
    flow.objective = ObjectiveConfig("flow", times="logit_normal")
    assert len({*keys, training_key(flow)}) == 4


def test_an_image_clipped_along_the_levels_is_the_chains():
    """What a path says of clipping by default, against the chain's own tables."""
    chain, x = ChainPath(Chain.respaced(7)), torch.randn(3, 1, 2, 2)
    estimate = Denoised(3 * torch.randn_like(x), torch.randn_like(x), None)
    for i in range(7):
        ours, theirs = Path.clipped(chain, estimate, x, i), chain.clipped(estimate, x, i)
        assert torch.equal(ours.x0, theirs.x0) and ours.x0.abs().max() <= 1
        torch.testing.assert_close(ours.noise, theirs.noise, rtol=1e-4, atol=1e-5)
    assert chain.levels(7) == (1, 0)
