"""A plug-in: a backbone that starts and computes in no time, and in a job takes a little while at each step."""

import os
import time
from dataclasses import dataclass

import torch
from lamabench.models import Backbone, Preset, register
from lamabench.models.registry import out_channels
from torch import nn

STEP_S = 0.04


@dataclass
class TinyConfig:
    input_size: int = 4
    in_channels: int = 1
    num_classes: int = 2
    out_channels: int | None = None


class Tiny(Backbone):
    """Every output channel is the input's first one times a weight, plus a value for the class."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.scale = nn.Parameter(torch.zeros(out_channels(config), 1, 1))
        self.classes = nn.Parameter(torch.zeros(config.num_classes + 1, out_channels(config), 1, 1))

    def forward(self, x, t, y):
        if "SLURM_JOB_ID" in os.environ:
            time.sleep(STEP_S)
        return x[:, :1] * self.scale + self.classes[y]

    def own_macs(self, x, t, y):
        return 0


register("tiny", TinyConfig, Tiny, [Preset("tiny", "Tiny", TinyConfig(), "a test")])
