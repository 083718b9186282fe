"""The variants of one study in the study's own order: labels, base, axes, states, scores, and speed beside the base."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import inf, isfinite
from re import match, sub
from typing import Any

from .differences import Difference, Together, mean_of, together
from .evidence import Evidence
from .names import labels, value_word
from .protocols import rankable
from .queries import better, state_of
from .runs import SEEDS, Line, Run
from .seeds import Values, against, base_groups, best_of, not_done, over_seeds
from .speed import BASELINE, cell_of, fastest, measurements


def measure(rows: Mapping[Run, Line]) -> tuple[str, Any]:
    """What a column of scores measures, however many samples it has: the metric's name without their number, and the
    reference."""
    row = next(iter(rows.values()))
    return sub(r"-\d+[kK]?$", "", row["metric"]), row.get("reference")


@dataclass(frozen=True, eq=False)
class Variants:
    """The variants of a study; `evidence` has the runs of this study alone. A group is a variant: runs that differ only
    in their seeds."""

    evidence: Evidence

    @cached_property
    def members(self) -> dict[str, list[Run]]:
        """{group: its runs that can be read}, in the order of the study's file; other people's samples are last."""
        runs = sorted(self.evidence.runs, key=lambda run: run.info.get("place", inf))
        groups: dict[str, list[Run]] = {}
        for run in runs:
            if not run.damage:
                groups.setdefault(run.group, []).append(run)
        return groups

    @cached_property
    def damaged(self) -> list[Run]:
        """The runs that cannot be read."""
        return [run for run in self.evidence.runs if run.damage]

    @cached_property
    def labels(self) -> dict[str, str]:
        """{group: its label}; a run that cannot be read has its name."""
        readable = labels([run for runs in self.members.values() for run in runs])
        return {run.group: run.info["name"] for run in self.damaged} | readable

    @cached_property
    def base(self) -> str | None:
        """The first variant of the study's file; None without a file."""
        return next((base for base in base_groups(self.evidence.runs).values() if base), None)

    @cached_property
    def axes(self) -> dict[str, list[Any]]:
        """{axis: its values} of those axes of the study that have several values, in the study's order."""
        names = dict.fromkeys(axis for group in self.on_axes for axis in self.members[group][0].info["variant"])
        values: dict[str, list[Any]] = {axis: [] for axis in names if axis not in SEEDS}
        for axis, each in values.items():
            for group in self.on_axes:
                if (value := self.value(group, axis)) not in each:  # None: the variant lacks the axis
                    each.append(value)
        return {axis: each for axis, each in values.items() if len(each) > 1}

    @cached_property
    def on_axes(self) -> list[str]:
        """The variants of the study's file, without samples that were added by hand."""
        return [
            group
            for group, runs in self.members.items()
            if all("place" in run.info and not run.info.get("by_hand") for run in runs)
        ]

    def value(self, group: str, axis: str) -> Any:
        return self.members[group][0].info["variant"].get(axis)

    def word(self, axis: str, value: Any) -> str:
        """The value of an axis in words: the title of a model, "8" of a window."""
        if axis == "model":
            return next(
                (runs[0].info["title"] for runs in self.members.values() if runs[0].info["model"] == value), str(value)
            )
        return value_word(value)

    @cached_property
    def values(self) -> dict[str, Values]:
        """{metric: {group: {training seed: score}}}; the first metric is the one that figures show."""
        columns = self.evidence.scores
        order = sorted(columns, key=lambda name: (not match("FI?D", name), -len(columns[name])))
        return {name: over_seeds(self.evidence.overview.rows, name) for name in order}

    @cached_property
    def metrics(self) -> list[str]:
        """The metrics of `values` that verdicts are about, the first one first: less those of fewer samples than
        another with the same `measure`, as during training, that all their runs have."""
        scores = {name: self.evidence.scores[name] for name in self.values}
        counts = {
            name: max((row.get("count") or 0 for row in rows.values()), default=0) for name, rows in scores.items()
        }
        return [
            name
            for name, rows in scores.items()
            if not any(
                counts[other] > counts[name] and rows.keys() <= more.keys() and measure(rows) == measure(more)
                for other, more in scores.items()
            )
        ]

    def difference(self, metric: str, group: str, other: str | None = None) -> Difference | None:
        """The variant against another one, by default the base; None for itself, and if one of them has no score."""
        values, other = self.values[metric], other or self.base
        if other is None or group == other or not {group, other} <= values.keys():
            return None
        lines, both = self.evidence.scores[metric], [*self.members[group], *self.members[other]]
        return against(values, group, other, metric, {run: lines[run] for run in both if run in lines})

    def together(self, metric: str) -> Together | None:
        """The differences to the base of all variants whose scores compare with its own (`differences.together`)."""
        values, lines = self.values[metric], self.evidence.scores[metric]

        def compares(group: str) -> bool:
            runs = [*self.members.get(group, ()), *self.members.get(self.base or "", ())]
            both = {run: lines[run] for run in runs if run in lines}
            return not rankable(both, both)

        return together({group: values[group] for group in values if compares(group)}, self.base or "")

    def best(self, metric: str) -> tuple[str | None, str]:
        """The variant with the best mean if it is distinguishable from the second; or else None, and why."""
        return best_of(self.values[metric], metric, rankable(self.evidence.runs, self.evidence.scores[metric]))

    def ranked(self, metric: str, groups: Iterable[str], common: bool = False) -> list[str]:
        """Variants that have the score, from the best mean on; `common`: over the training seeds that all of them have,
        if there are such, because seeds may differ by more than variants."""
        values, sign = self.values[metric], -1 if better(metric) == "max" else 1
        scored = [group for group in groups if group in values]
        seeds = set.intersection(*(set(values[group]) for group in scored)) if common and scored else set()

        def mean(group: str) -> float:
            return mean_of(value for seed, value in values[group].items() if not seeds or seed in seeds).value

        return sorted(scored, key=lambda group: sign * mean(group))

    @cached_property
    def states(self) -> dict[Run, tuple[str, str]]:
        """The state and error of each run, also of those that cannot be read."""
        return {run: state_of(run) for run in self.evidence.runs}

    def not_done(self, group: str) -> dict[str, tuple[str, str]]:
        """{name of a run: its state and error} of those runs of a variant that are not done."""
        states = {run.info["name"]: self.states[run] for run in self.members[group]}
        return {name: state for name, state in states.items() if state[0] != "done"}

    def state(self, group: str) -> str:
        """The states of a variant's runs, such as "done" or "2 done, 1 oom"."""
        states = {run.info["name"]: self.states[run][0] for run in self.members[group]}
        counts = Counter(states.values())
        if len(counts) == 1:
            return next(iter(counts))
        return ", ".join(f"{count} {state}" for state, count in counts.items())

    def marked(self, metric: str, group: str) -> str:
        """What must stand beside a score of a variant: how many of the runs that it is a mean of are not done, such as
        "1 unfinished"."""
        lines = self.evidence.scores[metric]
        return not_done(self.states[run][0] for run in self.members[group] if run in lines)

    def cost(self, group: str) -> Line:
        """The newest cost of a variant's model; empty if none is on record."""
        return next((line for run in self.members.get(group, ()) if (line := run.last("cost", state="done"))), {})

    @cached_property
    def timed(self) -> dict[str, dict[tuple[Any, ...], Line]]:
        """{group: {circumstances: its fastest measurement over batches and compile modes}}, as in the table `bench`. A
        base that cannot be read has none."""
        result: dict[str, dict[tuple[Any, ...], Line]] = {self.base or "": {}}
        for group, runs in self.members.items():
            cells: dict[tuple[Any, ...], list[Line]] = {}
            for row in measurements(runs):
                cells.setdefault(cell_of(row), []).append(row)
            result[group] = {cell: row for cell, rows in cells.items() if (row := fastest(rows))}
        return result

    @cached_property
    def rival(self) -> str | None:
        """The variant with which others are compared in speed: the baseline of the report, the base, or DiT-XL/2."""
        models = {self.members[group][0].info["model"]: group for group in reversed(self.timed) if self.timed[group]}
        return models.get(self.evidence.baseline or "") or self.base or models.get(BASELINE)


def of_study(evidence: Evidence) -> Mapping[str, Variants]:
    """{study: its variants} of all studies with a file and several variants."""
    studies = {name: each.variants for name, each in evidence.studies.items()}
    return {name: study for name, study in studies.items() if study.base and len(study.members) > 1}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
