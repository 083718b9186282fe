"""The section `objective`: what the network learns."""

from dataclasses import dataclass, field


@dataclass
class ObjectiveConfig:
    """What the network learns. `ddpm` is the noise and the variance, with the hybrid loss of improved DDPM; `v` is
    v-prediction on the same chain; `flow` is the velocity of a straight path (SiT)."""

    kind: str = "ddpm"  # or v, flow: of diffusion/objective.py
    # The betas of ddpm and v: linear (1e-4 … 0.02; DDPM, DiT, LaMamba-Diff, ADM from 128 px on) or cosine (improved
    # DDPM, ADM at 64 px).
    schedule: str = field(default="linear", metadata={"since": "linear"})
    # The distribution of t in training with flow: uniform (SiT) or logit_normal (SD3).
    times: str = field(default="uniform", metadata={"since": "uniform"})
