"""The figure of held-out losses by timestep."""

from pathlib import Path
from typing import Any

import numpy as np
from lamabench.reports.report import evidence_of
from lamabench.reports.timesteps import timesteps
from matplotlib.figure import Figure
from run_folders import Line, scored, write


def lost(objective: str, **losses: float) -> Line:
    """A held-out loss by timestep, named t62 for 62."""
    value = scored(float(np.mean([*losses.values()])), protocol=objective, metric="held-out loss")
    by_timestep = {time.removeprefix("t"): loss for time, loss in losses.items()}
    return {**value, "samples": None, "by_timestep": by_timestep, "evaluation": {"objective": {"kind": objective}}}


def figure_of(root: Path) -> Figure:
    figures: Any = timesteps(evidence_of([root]))
    assert [*figures] == ["timesteps"] and isinstance(figures["timesteps"], Figure)
    return figures["timesteps"]


def lines_of(axes: Any, thick: bool = True) -> dict[tuple[float, ...], list[float]]:
    lines = [line for line in axes.lines if (line.get_marker() != "None") is thick]
    return {tuple(line.get_ydata()): list(line.get_xdata()) for line in lines}


def test_losses_are_those_of_the_base_at_each_timestep(tmp_path: Path) -> None:
    for seed, low, high in ((0, 1.0, 0.25), (1, 3.0, 0.75)):
        write(tmp_path, f"a-s{seed}", [lost("ddpm", t937=high, t62=low)], "lamamba", "A", seed=seed)
    for seed, low, high in ((0, 0.5, 1.5), (1, 1.5, 0.5)):
        write(tmp_path, f"b-s{seed}", [lost("ddpm", t62=low, t937=high)], "dit", "B", seed=seed)
    write(tmp_path, "c-s0", [lost("ddpm", t62=1.0, t500=1.0)], "adm", "C")
    (axes,) = figure_of(tmp_path).axes
    assert lines_of(axes) == {(1.0, 1.0): [62, 937], (0.5, 2.0): [62, 937]}
    seeds = [[value for value in line if not np.isnan(value)] for line in lines_of(axes, thick=False)]
    assert sorted(seeds) == [[0.25, 3.0, 0.75, 1.0], [0.5, 0.5, 1.5, 1.5]]
    assert axes.get_yscale() == "log" and axes.get_ylabel().replace("\n", " ") == "held-out loss over that of A"


def test_each_objective_has_a_panel(tmp_path: Path) -> None:
    """Without the base, over the first one of the study."""
    for name, kind, loss in (("a", "ddpm", 1.0), ("b", "ddpm", 2.0), ("c", "flow", 1.0), ("d", "flow", 4.0)):
        losses = {"t62": loss} if kind == "ddpm" else {"t0.5": loss}
        family = {"c": "lamamba", "d": "adm"}.get(name, "dit")  # c is below d in tables
        write(tmp_path, f"{name}-s0", [lost(kind, **losses)], family, name, variant={"model": name})
    panels: list[Any] = figure_of(tmp_path).axes
    assert [lines_of(axes) for axes in panels] == [{(1.0,): [62], (2.0,): [62]}, {(1.0,): [0.5], (4.0,): [0.5]}]
    assert [axes.get_ylabel().replace("\n", " ") for axes in panels] == [
        "held-out loss@ddpm over that of a",
        "held-out loss@flow over that of c",
    ]


def test_one_model_has_nobody_beside_it(tmp_path: Path) -> None:
    """Nor has it one with a loss of 0, or with other numbers of images."""
    write(tmp_path, "a-s0", [lost("ddpm", t62=1.0)], title="a", variant={"model": "a"})
    write(tmp_path, "b-s0", [lost("ddpm", t62=0.0)], title="b", variant={"model": "b"})
    assert isinstance(timesteps(evidence_of([tmp_path])), str)
    write(tmp_path, "c-s0", [lost("ddpm", t62=1.0) | {"images_seen": 7}], title="c", variant={"model": "c"})
    assert timesteps(evidence_of([tmp_path])) == "no two models have held-out losses by timestep at equal images"
