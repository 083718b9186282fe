"""The contents of a report: every table and figure by its name, with what it is. A new one needs a line here."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from matplotlib.figure import Figure

from .costs import costs
from .evidence import Evidence
from .loss import loss
from .origins import origins
from .quality import quality_vs_flops
from .roofline import roofline
from .runs import Run
from .samples import all_samples, samples
from .speed import bench, kernels
from .speed_figures import crossover, speed_vs_flops
from .table import Table
from .throughput import throughput


class TableItem(NamedTuple):
    """A table or, for each study, one: what it is, and why it is missing if it has no rows."""

    make: Callable[[Evidence], Table | list[Table]]
    about: str
    nothing: str = ""


class FigureItem(NamedTuple):
    """A figure, or figures by their names; a text says why there is none."""

    draw: Callable[[Evidence], Figure | str | Mapping[str, Figure | str]]
    about: str


def _all_samples(evidence: Evidence) -> Figure | str:
    return all_samples(evidence.overview, evidence.pictures, evidence.look.faint)


def _samples(evidence: Evidence) -> Mapping[str, Figure | str]:
    return {name: samples(evidence.pictures[run]) for name, run in sample_names(evidence.runs).items()}


def sample_names(runs: list[Run]) -> dict[str, Run]:
    """A file name for the samples of each run: its name, with its id and study where names collide."""
    names: dict[str, Run] = {}
    for run in runs:
        info = run.info
        for name in (info["name"], f"{info['name']}-{info['id']}", f"{info['study']}-{info['name']}-{info['id']}"):
            file = "samples_" + re.sub(r"[^\w.=-]+", "_", name)
            if file not in names:
                break
        names[file] = run
    return names


TABLES: dict[str, TableItem] = {
    "summary": TableItem(lambda evidence: evidence.overview, "one row per run: cost, speed, quality and state"),
    "bench": TableItem(
        lambda evidence: bench(evidence.runs, evidence.baseline),
        "speed and memory of each model at its best batch, and how many of its saved FLOPs became time",
        "no run has been timed",
    ),
    "kernels": TableItem(
        lambda evidence: kernels(evidence.runs),
        "operators at the shapes of a model: times and the floors of the machine",
        "no operator was timed alone",
    ),
    "cost": TableItem(
        lambda evidence: costs(evidence.runs),
        "parameters, MACs and FLOPs of each model by part",
        "no run has a cost",
    ),
    "runs": TableItem(
        lambda evidence: origins(evidence.runs),
        "where the runs come from: commit, machine, versions, settings",
    ),
    "seeds": TableItem(
        lambda evidence: evidence.over_seeds,
        "means over training seeds with 95 % intervals, and differences to the base of the study",
        "no variant was run with several seeds",
    ),
}

FIGURES: dict[str, FigureItem] = {
    "loss": FigureItem(
        lambda evidence: loss(evidence.runs, evidence.overview),
        "training loss against images seen: a running median over the raw values",
    ),
    "quality_vs_flops": FigureItem(
        lambda evidence: quality_vs_flops(evidence.runs, evidence.overview),
        "the first quality metric against FLOPs, with 95 % intervals over training seeds",
    ),
    "throughput": FigureItem(
        lambda evidence: throughput(evidence.runs, evidence.overview), "forward and training throughput"
    ),
    "speed_vs_flops": FigureItem(
        lambda evidence: speed_vs_flops(evidence.runs, evidence.baseline), "images per second against FLOPs"
    ),
    "crossover": FigureItem(
        lambda evidence: crossover(evidence.runs, evidence.baseline), "speed and memory against the size of the image"
    ),
    "roofline": FigureItem(
        lambda evidence: roofline(evidence.runs), "work per second of operators against work per byte, and the floors"
    ),
    "samples": FigureItem(_all_samples, "samples of all models from equal noise, one row per model, with real images"),
    "samples_*": FigureItem(_samples, "samples of a run, one row per class"),
}
