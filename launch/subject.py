"""The subject of `lamabench sweep`: a study and the runs of it that a command selects."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from ..ablations.study import Study
from ..kernels.errors import InputError
from .plan import Planned


@dataclass(frozen=True)
class Sweep:
    """The subject of the command: a study, all its runs, the runs that `--only` and `--stages` select, the name of the
    cluster, and the settings as typed."""

    args: argparse.Namespace
    study: Study
    whole: list[Planned]
    runs: list[Planned]
    cluster: str | None
    words: list[str]

    @property
    def root(self) -> Path:
        return self.whole[0].root

    def readable(self) -> list[Planned]:
        """The selected runs whose files can be read. A line on stderr names each of the others. Raises InputError if
        there is no run left."""
        errors = {run.name: error for run in self.runs if (error := run.unreadable())}
        if len(errors) == len(self.runs):
            raise InputError(next(iter(errors.values())))
        for name, error in errors.items():
            print(f"{name}: unreadable, left out: {error}", file=sys.stderr)
        return [run for run in self.runs if run.name not in errors]

    @property
    def home(self) -> Path:
        """The folder of its submissions."""
        return self.root / self.study.name / ".sweep"


def print_question(sweep: Sweep, whole: bool = False) -> None:
    """Print the question and the claim, and with `whole` also what would be an answer, and what the study takes."""
    study = sweep.study
    lines = {"Claim": study.claim}
    if whole:
        lines |= {"Answer": study.answer, "Settings": study.exceptions(), "Budget": study.budget}
    if not sweep.args.json:
        text = "".join(f"\n{word}: {line}" for word, line in lines.items() if line)
        print(f"{study.name}: {study.question}{text}\n")
