"""The figure of held-out losses by timestep: at which amounts of noise a model is ahead."""

from collections.abc import Mapping, Sequence
from math import inf

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .drawing import few_ticks
from .during import HELDOUT, MARKED, SEEDS, Trajectory, draw_group, mean_trajectory, of_seeds, style_of
from .evidence import Evidence
from .moments import at_equal_images, images_words, is_marked, moments
from .runs import Line, Run
from .style import PAGE, blank, caption, legend, wrapped
from .variants import of_study


def timesteps(evidence: Evidence) -> Figure | str | Mapping[str, Figure | str]:
    """Held-out loss at each timestep over that of the study's base, for each study: a thick line a model, the mean over
    seeds, with a thin line for each of several seeds. Panels: objectives, whose losses do not compare. Where the base
    has no loss, the first of the study's variants with one is in its place."""
    several, variants = len(evidence.studies) > 1, of_study(evidence)
    figures = {
        f"timesteps_{study}" if several else "timesteps": figure
        for study, part in evidence.studies.items()
        if (figure := _draw(part, [*variants[study].members] if study in variants else [])) is not None
    }
    return dict(figures) or "no two models have held-out losses by timestep at equal images"


def losses_of(rows: Mapping[Run, Line]) -> dict[Run, Trajectory]:
    """The loss of each run at each timestep, of runs that have those of the first one."""
    result: dict[Run, Trajectory] = {}
    for run, row in rows.items():
        losses = sorted((float(time), loss) for time, loss in (row.get("by_timestep") or {}).items())
        if losses and all(loss is not None and 0 < loss < inf for _, loss in losses):
            result[run] = Trajectory(list(range(len(losses))), *map(list, zip(*losses, strict=True)))
    first = next(iter(result.values()), None)
    return {run: one for run, one in result.items() if first is not None and one.at == first.at}


def _draw(evidence: Evidence, order: Sequence[str]) -> Figure | None:
    labels = {row["group"]: row["model_label"] for row in evidence.overview.rows}
    panels: dict[str, dict[str, dict[Run, Trajectory]]] = {}
    notes: dict[str, None] = {}
    for name, scored in moments(evidence.runs).items():
        equal = at_equal_images(scored) if name.startswith(HELDOUT) else None
        by_group: dict[str, dict[Run, Trajectory]] = {}
        for run, losses in losses_of(equal.rows if equal else {}).items():
            by_group.setdefault(run.group, {})[run] = losses
        if equal and equal.images and len(by_group) > 1:
            panels[name] = {group: by_group[group] for group in labels if group in by_group}
            notes[images_words(equal)] = None
    if not panels:
        return None
    figure = blank(PAGE, 2.6)
    keys: dict[str, Line2D] = {}
    drawn: set[str] = set()
    for axes, (name, by_group) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels.items(), strict=True):
        first = next(group for group in [*order, *by_group] if group in by_group)
        means = mean_trajectory(of_seeds(by_group[first]))
        for group, losses in by_group.items():
            ratios = {
                run: one._replace(values=[a / b for a, b in zip(one.values, means.values, strict=True)])
                for run, one in losses.items()
            }
            draw_group(evidence, axes, group, ratios)
            drawn.add(group)
            if not evidence.look.faint(group):
                keys[labels[group] + " *" * any(map(is_marked, losses))] = Line2D([], [], **style_of(evidence, group))
        axes.set_yscale("log")
        few_ticks(axes.yaxis, *axes.get_ylim(), most=5)
        axes.set_xlabel("Timestep; noise rises to the right")
        axes.set_ylabel(wrapped(f"{name} over that of {labels[first]}", 34))
    every = [losses for by_group in panels.values() for losses in by_group.values()]
    shown = {
        SEEDS: any(len(of_seeds(losses)) > 1 for losses in every),
        MARKED: any(is_marked(run) for losses in every for run in losses),
    }
    caption(figure, [*(text for text, is_shown in shown.items() if is_shown), *notes])
    legend(figure, keys, len(drawn) - len(keys))
    return figure
