"""Gaussian diffusion: the noise schedule, the hybrid loss and respacing (SPEC.md, section 4).

DDPM (2006.11239) with the learned variance range of improved DDPM (2102.09672), as ADM and DiT use it.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.errors import InputError

TIMESTEPS = 1000
BETA_FIRST, BETA_LAST = 1e-4, 0.02
HALF_BIN = 1 / 255  # half of the distance between two 8-bit values in [-1, 1]
OPEN_END = 0.999  # beyond it, a bin of the discretised Gaussian reaches to infinity
SMALLEST_PROBABILITY = 1e-12  # in float32 a difference of two CDFs can be 0


class Posterior(NamedTuple):
    """p(x_{t-1} | x_t) as the network gives it, and the image it implies; each [B, C, H, W] float32."""

    mean: Tensor
    log_variance: Tensor
    pred_x0: Tensor


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the standard normal's CDF, the one that GELU uses (Hendrycks and Gimpel, 2016)."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretised_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-probability, in nats, of 8-bit pixels under a Gaussian integrated over each pixel's bin (DDPM, eq. 13).

    All [B, C, H, W] float32; `x0` in [-1, 1]. The lowest and highest bins are open: they reach to infinity.
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


class Diffusion:
    """The chain x_0 → x_1 … of 1000 linear betas, or of some of its timesteps.

    `timesteps` int64 [S] are the original timesteps of the chain's steps, `alpha_bar` float64 [S] its products.
    A step `t` of the methods counts in this chain: 0 … S-1. Tables are computed in float64 and used in float32;
    every tensor is taken to float32 first, whatever the network ran in.
    """

    def __init__(self, timesteps: Sequence[int] = range(TIMESTEPS)) -> None:
        every_beta = torch.linspace(BETA_FIRST, BETA_LAST, TIMESTEPS, dtype=torch.float64)
        self.timesteps = torch.tensor(timesteps)
        self.alpha_bar = torch.cumprod(1 - every_beta, dim=0)[self.timesteps]
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        beta = 1 - self.alpha_bar / before
        variance = beta * (1 - before) / (1 - self.alpha_bar)
        variance[0] = variance[1]  # the first is 0, which has no logarithm
        self._cpu = {
            "signal": self.alpha_bar.sqrt(),
            "noise": (1 - self.alpha_bar).sqrt(),
            "signal_before": before.sqrt(),
            "noise_before": (1 - before).sqrt(),
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
            raise InputError(f"sampling steps must be 2 to {TIMESTEPS}, not {n}")
        return [round(i * (TIMESTEPS - 1) / (n - 1)) for i in range(n)]

    @classmethod
    def respaced(cls, n: int) -> "Diffusion":
        """The chain of `respaced_timesteps(n)`, its betas from the ratios of alpha_bar."""
        return cls(cls.respaced_timesteps(n))

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

    def p_mean_variance(self, model_output: Tensor, x_t: Tensor, t: Tensor) -> Posterior:
        """p(x_{t-1} | x_t): model_output [B, 2C, H, W] (noise, then v), x_t [B, C, H, W], t [B].

        The log-variance lies between that of the posterior and beta, at (v + 1) / 2 (improved DDPM, eq. 15). The
        predicted image is not clipped.
        """
        noise, v = model_output.float().chunk(2, dim=1)
        x_t = x_t.float()
        pred_x0 = self.at("x0_from_x", t) * x_t - self.at("x0_from_noise", t) * noise
        high = (v + 1) / 2
        log_variance = high * self.at("log_variance_high", t) + (1 - high) * self.at("log_variance_low", t)
        return Posterior(self.q_mean(pred_x0, x_t, t), log_variance, pred_x0)

    def losses(self, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The hybrid loss of each sample, float32 [B] each: `mse` of the noise, `vb` the variational term in bits (mean
        over elements, gradient through the variance only, not rescaled) and `loss`, their sum (improved DDPM, eq. 16).

        model_output [B, 2C, H, W]: noise, then v; x0, x_t and noise [B, C, H, W]; t [B].
        """
        x0, x_t = x0.float(), x_t.float()
        predicted, v = model_output.float().chunk(2, dim=1)
        mse = ((noise.float() - predicted) ** 2).mean(dim=(1, 2, 3))
        p = self.p_mean_variance(torch.cat([predicted.detach(), v], dim=1), x_t, t)
        kl = gaussian_kl(self.q_mean(x0, x_t, t), self.at("log_variance_low", t), p.mean, p.log_variance)
        first = -discretised_log_likelihood(x0, p.mean, p.log_variance)
        vb = torch.where(t.view(-1, 1, 1, 1) == 0, first, kl).mean(dim=(1, 2, 3)) / math.log(2)
        return {"mse": mse, "vb": vb, "loss": mse + vb}
