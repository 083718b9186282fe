"""Errors that end a command with one line and exit code 1, because they are no faults of the program."""

from ..harness.parallel import Lost
from ..harness.run import Busy
from ..harness.training.steps import Diverged
from .slurm.client import SlurmError

STOPPED = (Busy, Diverged, Lost, SlurmError)
