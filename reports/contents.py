"""The contents of a report: every table and figure by its name, with what it is. A new one needs a line here."""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from matplotlib.figure import Figure

from .ablation import ablations
from .axis import axis
from .claims import verdicts
from .costs import costs
from .during import during
from .evidence import Evidence
from .loss import loss
from .origins import origins
from .pareto import pareto
from .quality import quality_vs_flops
from .roofline import roofline
from .runs import Run
from .samples import all_samples, samples
from .scale import scale, scale_flops, scale_hours
from .scaling import scaling_table
from .scaling_figure import scaling
from .speed import bench, kernels
from .speed_figures import crossover, speed_vs_flops
from .speed_table import speed
from .state_of_the_art import state_of_the_art
from .style import ENTRIES
from .table import Table
from .throughput import throughput
from .timesteps import timesteps


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
    """A grid for each run with samples, or a reason; of more than `ENTRIES`, for those of the first seeds."""
    names = sample_names(evidence.runs)
    grids = {name: evidence.pictures[run] for name, run in names.items()}
    present = [name for name, grid in grids.items() if not isinstance(grid, str)]
    left = sorted(present, key=lambda name: names[name].info.get("seed") or 0)[ENTRIES:]
    more = f"a report draws the samples of {ENTRIES} runs, and {len(left)} more have some; name fewer runs"
    return {name: samples(grid) for name, grid in grids.items() if name not in left} | (
        {"samples_*": more} if left else {}
    )


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
    "speed": TableItem(
        lambda evidence: speed(evidence.runs, evidence.baseline),
        "images per second, memory and MFU of each model, and how many of its saved FLOPs became time",
        "no run has been timed",
    ),
    "bench": TableItem(
        lambda evidence: bench(evidence.runs, evidence.baseline),
        "the same by compile mode: each model at its best batch",
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
    "verdicts": TableItem(
        verdicts,
        "the pairs of variants that claims of studies name, and whether each claim holds here",
        "no study names pairs of variants that its claim is about",
    ),
    "scale": TableItem(
        scale, "models of all families and sizes at equal images", "no two models were scored alike at equal images"
    ),
    "scale_flops": TableItem(
        scale_flops,
        "the same at equal training FLOPs, between snapshots",
        "the scored moments of no two models overlap in training FLOPs; train.snapshots adds moments",
    ),
    "scale_hours": TableItem(
        scale_hours,
        "the same at equal hours of training, of one device and precision",
        "the scored moments of no two models overlap in hours on one device; train.snapshots adds moments",
    ),
    "state_of_the_art_256": TableItem(
        lambda evidence: state_of_the_art(evidence, 256),
        "published models of ImageNet at 256 px, with ours that have the same metric",
        "no model here is for ImageNet at 256 px",
    ),
    "state_of_the_art_512": TableItem(
        lambda evidence: state_of_the_art(evidence, 512),
        "published models of ImageNet at 512 px, with ours that have the same metric",
        "no model here is for ImageNet at 512 px",
    ),
    "ablation": TableItem(
        ablations,
        "the variants of a study in its own order: scores, differences to the base with verdicts, cost and speed",
        "no study with a file has several variants",
    ),
    "scaling": TableItem(
        scaling_table,
        "power laws of quality against FLOPs, GPU-hours and parameters, what they predict, and a check of that",
        "no family has scores of two sizes",
    ),
}

FIGURES: dict[str, FigureItem] = {
    "loss": FigureItem(
        lambda evidence: loss(evidence.runs, evidence.overview),
        "training loss against images seen: a running median over the raw values",
    ),
    "quality_vs_flops": FigureItem(
        quality_vs_flops,
        "the first quality metric against FLOPs, with 95 % intervals over training seeds; area: parameters",
    ),
    "scaling": FigureItem(
        scaling, "quality against FLOPs, GPU-hours and parameters: power laws, their predictions and a check of these"
    ),
    "during": FigureItem(
        during, "quality and held-out loss during training against images, training FLOPs and GPU-hours"
    ),
    "timesteps": FigureItem(
        timesteps,
        "held-out loss at each timestep over that of the study's base: at which amounts of noise a model is ahead",
    ),
    "pareto": FigureItem(
        pareto, "quality against images per second, with the models that no other is as fast and as good as"
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
    "axis": FigureItem(axis, "the first quality metric against the axis of a study, with its base marked"),
    "roofline": FigureItem(
        lambda evidence: roofline(evidence.runs), "work per second of operators against work per byte, and the floors"
    ),
    "samples": FigureItem(_all_samples, "samples of all models from equal noise, one row per model, with real images"),
    "samples_*": FigureItem(_samples, f"samples of a run, one row per class; of at most {ENTRIES} runs or models"),
}
