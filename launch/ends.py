"""Ends of a command that are no faults of the program: one line and exit code 1."""

from ..harness.run import Busy
from ..harness.training.loop import Diverged
from .slurm.client import SlurmError

STOPPED = (Busy, Diverged, SlurmError)
