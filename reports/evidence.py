"""What a report is made of: runs, and what several tables and figures compute from them, once."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ..kernels.errors import InputError
from .published import Published
from .published import read as published_rows
from .queries import scores
from .runs import Line, Run
from .samples import Mosaic, mosaic
from .seeds import seeds
from .style import Look
from .summary import summary
from .table import Table

if TYPE_CHECKING:
    from .variants import Variants


@dataclass(frozen=True, eq=False)
class Evidence:
    """The runs of a report and how they are to be shown.

    runs       all of them; one with a `damage` has no records
    baseline   the model that others are compared with in speed; None: DiT-XL/2 if it was measured
    say        gets a line about samples that cannot be read
    published  numbers that papers print: those of the suite and, after them, a user's
    """

    runs: list[Run]
    baseline: str | None = None
    say: Callable[[str], object] = field(default=lambda text: None, repr=False)
    published: Published = field(default_factory=published_rows, repr=False)

    @cached_property
    def overview(self) -> Table:
        """The summary: one row per run, with `run`, `group`, `model_label`, costs, speeds and scores by their names."""
        return summary(self.runs)

    @cached_property
    def over_seeds(self) -> Table:
        return seeds(self.overview)

    @cached_property
    def scores(self) -> dict[str, dict[Run, Line]]:
        """Scores at the furthest step: {column: {run: row}}."""
        return scores(self.runs)

    @cached_property
    def look(self) -> Look:
        """The colour, dash and marker of each model."""
        return Look(self.overview)

    @cached_property
    def studies(self) -> dict[str, "Evidence"]:
        """The same of each study, by its name, in the order of the runs."""
        names = dict.fromkeys(run.info["study"] for run in self.runs)
        if len(names) == 1:  # nothing is computed twice
            return dict.fromkeys(names, self)
        return {name: replace(self, runs=[run for run in self.runs if run.info["study"] == name]) for name in names}

    @cached_property
    def variants(self) -> "Variants":
        """The variants of one study, if these are its runs alone."""
        from .variants import Variants  # computed from Evidence itself

        return Variants(self)

    @cached_property
    def pictures(self) -> dict[Run, Mosaic | str]:
        """The samples of each run, or why they are not shown."""
        return {run: self._picture(run) for run in self.runs}

    def _picture(self, run: Run) -> Mosaic | str:
        try:
            return mosaic(run)
        except InputError as error:  # the scores stay, because they are of the file as it was
            self.say(f"{run.info['name']}: {error}")
            return str(error)
