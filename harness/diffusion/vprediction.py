"""v-prediction (Salimans and Ho, 2202.00512) on the chain of gaussian.py (SPEC.md, section 4)."""

from torch import Tensor

from .gaussian import ChainPath, OnChain
from .path import Denoised, Path


class VPrediction(OnChain):
    """The network predicts v = signal · noise − noise level · x_0 (2202.00512, section 4), C channels, and no variance.

    The loss is the mean square error of v: that of the noise, divided by alpha_bar, or that of the image, divided by
    1 − alpha_bar ("SNR + 1" weighting). `ancestral` draws with the variance of the posterior q(x_{t-1} | x_t, x_0)
    (DDPM, eq. 7), the lower end of the range that `DDPM` learns.
    """

    metrics = ("loss",)
    error = "loss"

    def out_channels(self, in_channels: int) -> int:
        """The channels of the image."""
        return in_channels

    def loss(self, out: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """The mean square error of v of each sample, float32 [B]. All [B, C, H, W], t [B]."""
        steps = t.long()
        v = self.chain.at("signal", steps) * noise.float() - self.chain.at("noise", steps) * x0.float()
        return {"loss": ((out.float() - v) ** 2).mean(dim=(1, 2, 3))}

    def path(self, steps: int, timesteps: str = "even") -> Path:
        """The chain of `spaced`, backwards."""
        return VPath(self.spaced(steps, timesteps))


class VPath(ChainPath):
    """The steps of a chain for a network that predicts v."""

    def denoised(self, out: Tensor, x: Tensor, i: int) -> Denoised:
        """The estimate from v [B, C, H, W] for x [B, C, H, W] at step i, with the log-variance of the posterior."""
        signal, noise = self._at("signal", i, x), self._at("noise", i, x)
        low = self._at("log_variance_low", i, x)
        return Denoised(signal * x - noise * out, noise * x + signal * out, low)
