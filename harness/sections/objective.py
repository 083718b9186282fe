"""The section `objective`: what the network learns."""

from dataclasses import dataclass, field


@dataclass
class ObjectiveConfig:
    """What the network learns. `ddpm` is the noise and the variance, with the hybrid loss of improved DDPM."""

    kind: str = "ddpm"  # of diffusion/objective.py
    # The betas of ddpm: linear (1e-4 … 0.02; DDPM, DiT, LaMamba-Diff, ADM from 128 px on) or cosine (improved DDPM,
    # ADM at 64 px).
    schedule: str = field(default="linear", metadata={"since": "linear"})
