"""The schedulers of diffusers as a second witness: the same small network, times and noise give the same images."""

from collections.abc import Sequence

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from lamabench.harness.diffusion.flow import Flow
from lamabench.harness.diffusion.gaussian import DDPM
from lamabench.harness.diffusion.samplers import sample
from lamabench.harness.diffusion.vprediction import VPrediction
from torch import Tensor, nn

CHAIN = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
PREDICTION = {"ddpm": "epsilon", "v": "v_prediction", "flow": "flow_prediction"}
GOALS = {"ddpm": DDPM(), "v": VPrediction(), "flow": Flow()}
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.zeros(2, dtype=torch.int64)


class Small(nn.Module):
    """Two convolutions that see the time, with outputs of about the size of a prediction."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last, self.scale = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1), scale

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.7 * x + self.last(torch.tanh(self.first(x) + torch.cos(self.scale * t).view(-1, 1, 1, 1)))


def net_of(kind: str):
    small = Small(3.0 if kind == "flow" else 0.003)

    def net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out = small(x, t)
        return torch.cat([out, torch.zeros_like(out)], dim=1) if kind == "ddpm" else out

    return net, small


def ours(kind: str, method: str, steps: int, **options) -> Tensor:
    return sample(net_of(kind)[0], X, Y, objective=GOALS[kind], method=method, steps=steps, **options)


@torch.no_grad()
def theirs(scheduler, kind: str, times: Sequence[float], unit: float = 1.0, **options) -> Tensor:
    """Steps of a scheduler; its times divided by `unit` are those of the network."""
    _, small = net_of(kind)
    x = X
    scheduler.set_begin_index(0) if hasattr(scheduler, "set_begin_index") else None
    for t in times:
        out = small(x, torch.full((2,), float(t) / unit))
        x = scheduler.step(out, t, x, **options).prev_sample
    return x


def close(actual: Tensor, expected: Tensor) -> None:
    """To rounding: diffusers has alpha_bar in float32."""
    assert expected.isfinite().all() and expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("steps", [5, 25])
@pytest.mark.parametrize("kind", ["ddpm", "v"])
def test_ddim(kind, steps):
    scheduler = DDIMScheduler(**CHAIN, prediction_type=PREDICTION[kind], clip_sample=False)
    scheduler.set_timesteps(steps)  # the spacing "leading"
    close(ours(kind, "ddim", steps, timesteps="ddim"), theirs(scheduler, kind, scheduler.timesteps))


def test_ancestral_sampling_of_v():
    """Its variance is that of the posterior, `fixed_small` there."""
    scheduler = DDPMScheduler(
        **CHAIN,
        prediction_type="v_prediction",
        variance_type="fixed_small",
        clip_sample=False,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(20)
    draw, again = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    expected = theirs(scheduler, "v", scheduler.timesteps, generator=draw)
    noise = lambda i: torch.randn(X.shape, generator=again)  # noqa: E731
    close(ours("v", "ancestral", 20, timesteps="ddim", noise=noise), expected)


@pytest.mark.parametrize("steps", [2, 3, 20])
@pytest.mark.parametrize("kind", GOALS)
def test_dpm_solver_2m(kind, steps):
    """With our times in place of its own. From 1 on, flow has no signal at first."""
    flow = kind == "flow"
    scheduler = DPMSolverMultistepScheduler(**CHAIN, prediction_type=PREDICTION[kind], use_flow_sigmas=flow)
    assert scheduler.config.algorithm_type == "dpmsolver++" and scheduler.config.solver_order == 2
    scheduler.set_timesteps(steps)
    path = GOALS[kind].path(steps)
    scheduler.sigmas = torch.tensor([path.levels(i)[1] / (1 if flow else path.levels(i)[0]) for i in range(steps + 1)])
    scheduler.timesteps = torch.tensor(path.times)
    close(ours(kind, "dpmpp_2m", steps), theirs(scheduler, kind, scheduler.timesteps))


@pytest.mark.parametrize("steps", [1, 7])
def test_euler_of_flow(steps):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=GOALS["flow"].path(steps).times)
    close(ours("flow", "euler", steps), theirs(scheduler, "flow", scheduler.timesteps, unit=1000))


@pytest.mark.parametrize("steps", [2, 7])
def test_heun_of_flow(steps):
    """Its last step is Euler's there too."""
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(steps)
    times = torch.tensor(GOALS["flow"].path(steps).times)
    twice = times[1:].repeat_interleave(2)
    assert len(scheduler.timesteps) == 2 * steps - 1
    scheduler.timesteps = 1000 * torch.cat([times[:1], twice])
    scheduler.sigmas = torch.cat([times[:1], twice, torch.zeros(1)])
    close(ours("flow", "heun", steps), theirs(scheduler, "flow", scheduler.timesteps, unit=1000))
