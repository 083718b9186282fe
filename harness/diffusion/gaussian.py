"""Gaussian diffusion: the chain of noise levels, respacing, and the hybrid loss as an objective (SPEC.md, section 4).

DDPM (2006.11239) with the learned variance range of improved DDPM (2102.09672), as ADM and DiT use it. `OnChain` is
what the objectives on this chain have in common; v-prediction is in vprediction.py.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ...kernels.errors import InputError, unknown
from .path import Denoised, Path

TIMESTEPS = 1000
BETA_FIRST, BETA_LAST = 1e-4, 0.02  # of the linear schedule
COSINE_OFFSET = 0.008  # of the cosine schedule: keeps its first betas above 0
LARGEST_BETA = 0.999  # of the cosine schedule: keeps alpha_bar above 0
HALF_BIN = 1 / 255  # half the distance between two 8-bit values in [-1, 1]
OPEN_END = 0.999  # beyond this value, a bin of the discretised Gaussian extends to infinity
SMALLEST_PROBABILITY = 1e-12  # in float32 a difference of two CDFs can be 0


def linear_betas() -> Tensor:
    """1e-4 … 0.02, float64 [1000] (DDPM, section 4)."""
    return torch.linspace(BETA_FIRST, BETA_LAST, TIMESTEPS, dtype=torch.float64)


def cosine_betas() -> Tensor:
    """Those of alpha_bar(t) = cos²((t / T + 0.008) / 1.008 · π / 2), at most 0.999; float64 [1000] (improved DDPM,
    eq. 17)."""
    t = torch.arange(TIMESTEPS + 1, dtype=torch.float64) / TIMESTEPS
    alpha_bar = torch.cos((t + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=LARGEST_BETA)


SCHEDULES: dict[str, Callable[[], Tensor]] = {"linear": linear_betas, "cosine": cosine_betas}


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal's CDF, as GELU uses it (Hendrycks and Gimpel, 2016)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretised_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-probability, in nats, of 8-bit pixels under a Gaussian integrated over each pixel's bin (DDPM, eq. 13).

    All [B, C, H, W] float32; `x0` is in [-1, 1]. The lowest and highest bins extend to infinity.
    """
    inverse_sigma = torch.exp(-0.5 * log_variance)
    upper = _normal_cdf((x0 - mean + HALF_BIN) * inverse_sigma)
    lower = _normal_cdf((x0 - mean - HALF_BIN) * inverse_sigma)
    probability = torch.where(x0 < -OPEN_END, upper, torch.where(x0 > OPEN_END, 1 - lower, upper - lower))
    return probability.clamp(min=SMALLEST_PROBABILITY).log()


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean) || N(other)) of each element, in nats."""
    gap = other_log_variance - log_variance
    return 0.5 * (gap + torch.expm1(-gap) + (mean - other_mean) ** 2 * torch.exp(-other_log_variance))


class Chain:
    """The chain x_0 → x_1 … of the 1000 betas of a schedule, or a chain of some of its timesteps.

    `timesteps` int64 [S] are the original timesteps of the chain's steps, `alpha_bar` float64 [S] the products of its
    1 - beta. The methods count steps `t` in this chain: 0 … S-1. Tables are computed in float64 and used in float32.
    Tensors are converted to float32 first, whatever type the network computed in.
    """

    def __init__(self, timesteps: Sequence[int] = range(TIMESTEPS), schedule: str = "linear") -> None:
        if schedule not in SCHEDULES:
            raise unknown("objective.schedule", schedule, SCHEDULES)
        self.timesteps = torch.tensor(timesteps)
        self.alpha_bar = torch.cumprod(1 - SCHEDULES[schedule](), dim=0)[self.timesteps]
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        beta = 1 - self.alpha_bar / before
        variance = beta * (1 - before) / (1 - self.alpha_bar)
        variance[0] = variance[1]  # the first variance is 0, which has no logarithm
        self._cpu = {
            "signal": self.alpha_bar.sqrt(),
            "noise": (1 - self.alpha_bar).sqrt(),
            "x0_from_x": (1 / self.alpha_bar).sqrt(),
            "x0_from_noise": (1 / self.alpha_bar - 1).sqrt(),
            "mean_from_x0": beta * before.sqrt() / (1 - self.alpha_bar),
            "mean_from_x": (1 - before) * (1 - beta).sqrt() / (1 - self.alpha_bar),
            "log_variance_low": variance.log(),
            "log_variance_high": beta.log(),
        }
        self._tables: dict[torch.device, dict[str, Tensor]] = {}

    @staticmethod
    def respaced_timesteps(n: int) -> list[int]:
        """The original timesteps of an evenly respaced chain of `n` steps: step i is round(i · 999 / (n - 1)), halves
        to even. `n` is 2 to 1000."""
        if not 2 <= n <= TIMESTEPS:
            raise InputError(f"sample.steps must be 2 to {TIMESTEPS}, not {n}")
        return [round(i * (TIMESTEPS - 1) / (n - 1)) for i in range(n)]

    @staticmethod
    def strided_timesteps(n: int) -> list[int]:
        """The multiples 0, k, 2k … of the least whole stride k that gives `n` timesteps: `ddimN` of ADM (2105.05233)
        and, if n divides 1000, the spacing "leading" of diffusers. Not every n has a stride."""
        counts = {len(range(0, TIMESTEPS, stride)): stride for stride in range(TIMESTEPS - 1, 0, -1)}
        if n not in counts:
            below, above = [count for count in counts if count < n], [count for count in counts if count > n]
            nearest = [str(count) for count in (max(below, default=0), min(above, default=0)) if count]
            raise InputError(
                f"sample.timesteps=ddim takes every k-th of {TIMESTEPS} timesteps, and no k gives sample.steps {n}; "
                f"nearest: {', '.join(nearest)}"
            )
        return list(range(0, TIMESTEPS, counts[n]))

    @classmethod
    def respaced(cls, n: int, schedule: str = "linear") -> "Chain":
        """The chain of `respaced_timesteps(n)`, its betas from the ratios of alpha_bar."""
        return cls(cls.respaced_timesteps(n), schedule)

    def at(self, name: str, t: Tensor) -> Tensor:
        """Entries `t` [B] of a table, as float32 [B, 1, 1, 1] on the device of `t`."""
        if t.device not in self._tables:
            self._tables[t.device] = {key: table.float().to(t.device) for key, table in self._cpu.items()}
        return self._tables[t.device][name][t.long()].view(-1, 1, 1, 1)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t from x_0 in one step: x0 and noise [B, C, H, W], t [B] -> [B, C, H, W] float32 (DDPM, eq. 4)."""
        return self.at("signal", t) * x0.float() + self.at("noise", t) * noise.float()

    def q_mean(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The mean of q(x_{t-1} | x_t, x_0) (DDPM, eq. 7)."""
        return self.at("mean_from_x0", t) * x0 + self.at("mean_from_x", t) * x_t


class OnChain:
    """What objectives on the chain of 1000 timesteps share: t is 0 … 999, and images are corrupted by the chain.

    `schedule` names the betas, one of `SCHEDULES`.
    """

    span = float(TIMESTEPS)
    sampler = "ancestral"

    def __init__(self, schedule: str = "linear") -> None:
        self.schedule = schedule
        self.chain = Chain(schedule=schedule)

    def draw_t(self, rng: np.random.Generator) -> float:
        """One of the timesteps, uniformly distributed."""
        return float(rng.integers(TIMESTEPS))

    def times(self, count: int) -> list[float]:
        """The timesteps in the middle of so many equal parts, rounded down: 62, 187 … 937 of eight."""
        return [float((2 * i + 1) * TIMESTEPS // (2 * count)) for i in range(count)]

    def corrupt(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t from x_0: x0 and noise [B, C, H, W], t [B] -> [B, C, H, W] float32."""
        return self.chain.q_sample(x0, t.long(), noise)

    def spaced(self, steps: int, timesteps: str) -> Chain:
        """The chain of `steps` (2 to 1000) timesteps, evenly spaced or as in `Chain.strided_timesteps`."""
        if timesteps == "even":
            return Chain.respaced(steps, self.schedule)
        return Chain(Chain.strided_timesteps(steps), self.schedule)


class DDPM(OnChain):
    """The objective of improved DDPM. The network predicts the noise and the variance, 2C channels."""

    metrics = ("loss", "mse", "vb")
    error = "mse"

    def out_channels(self, in_channels: int) -> int:
        """Twice the channels of the image: the noise, then v."""
        return 2 * in_channels

    def loss(self, out: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The hybrid loss (improved DDPM, eq. 16) of each sample, float32 [B] each.

        `loss` is the sum of `mse`, the error of the noise, and `vb`, the variational term in bits: a mean over
        elements, with a gradient only through the variance, not rescaled. out [B, 2C, H, W] is the noise, then v; x0,
        x_t and noise are [B, C, H, W], t is [B].
        """
        steps, x0, x_t = t.long(), x0.float(), x_t.float()
        predicted, v = out.float().chunk(2, dim=1)
        mse = ((noise.float() - predicted) ** 2).mean(dim=(1, 2, 3))
        image, _, log_variance = read_output(self.chain, torch.cat([predicted.detach(), v], dim=1), x_t, steps)
        low = self.chain.at("log_variance_low", steps)
        mean = self.chain.q_mean(image, x_t, steps)
        kl = gaussian_kl(self.chain.q_mean(x0, x_t, steps), low, mean, log_variance)
        first = -discretised_log_likelihood(x0, mean, log_variance)
        vb = torch.where(steps.view(-1, 1, 1, 1) == 0, first, kl).mean(dim=(1, 2, 3)) / math.log(2)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def path(self, steps: int, timesteps: str = "even") -> Path:
        """The chain of `spaced`, backwards."""
        return ChainPath(self.spaced(steps, timesteps))


def read_output(chain: Chain, out: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Convert a network's output to the image, the noise and the log-variance of the step, each [B, C, H, W] float32.

    out [B, 2C, H, W] is the noise, then v, for x_t [B, C, H, W] at the steps t [B] of a chain. The log-variance is
    interpolated between those of the posterior and of beta, at (v + 1) / 2 (improved DDPM, eq. 15). The image is not
    clipped.
    """
    noise, v = out.float().chunk(2, dim=1)
    x0 = chain.at("x0_from_x", t) * x_t.float() - chain.at("x0_from_noise", t) * noise
    high = (v + 1) / 2
    return x0, noise, high * chain.at("log_variance_high", t) + (1 - high) * chain.at("log_variance_low", t)


class ChainPath(Path):
    """The steps of a chain from noise to image. `denoised` reads the output of `DDPM`."""

    has_posterior = True

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.times = [float(t) for t in reversed(chain.timesteps.tolist())]
        signal, noise = chain.alpha_bar.sqrt().flip(0).tolist(), (1 - chain.alpha_bar).sqrt().flip(0).tolist()
        self._levels = [*zip(signal, noise, strict=True), (1.0, 0.0)]

    def levels(self, i: int) -> tuple[float, float]:
        """Roots of alpha_bar and of what it leaves to 1."""
        return self._levels[i]

    def _at(self, name: str, i: int, x: Tensor) -> Tensor:
        return self.chain.at(name, self._step(i, x))

    def _step(self, i: int, x: Tensor) -> Tensor:
        return torch.full((len(x),), len(self.times) - 1 - i, dtype=torch.int64, device=x.device)

    def denoised(self, out: Tensor, x: Tensor, i: int) -> Denoised:
        """The estimate from the output [B, 2C, H, W] for x [B, C, H, W] at step i."""
        return Denoised(*read_output(self.chain, out, x, self._step(i, x)))

    def clipped(self, estimate: Denoised, x: Tensor, i: int) -> Denoised:
        """The estimate with its image clamped to [-1, 1], and the noise that remains in x for that image."""
        x0 = estimate.x0.clamp(-1, 1)
        noise = (self._at("x0_from_x", i, x) * x - x0) / self._at("x0_from_noise", i, x)
        return estimate._replace(x0=x0, noise=noise)

    def posterior(self, estimate: Denoised, x: Tensor, i: int) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of p(x_{t-1} | x_t)."""
        assert estimate.log_variance is not None  # `denoised` gives it
        return self.chain.q_mean(estimate.x0, x, self._step(i, x)), estimate.log_variance
