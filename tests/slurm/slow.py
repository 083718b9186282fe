"""A plug-in: a mixer that sleeps, so that a training takes a minute on a fast machine and little more on a busy one."""

import time
from dataclasses import dataclass

from lamabench.models import Mixer, register_mixer
from torch import nn

SLEEP_S = 0.03


class Sleep(nn.Linear):
    def forward(self, x):
        time.sleep(SLEEP_S)
        return super().forward(x)


@register_mixer("sleep")
@dataclass
class SleepMixer(Mixer):
    def build(self, dim, side, shift):
        return Sleep(dim, dim)
