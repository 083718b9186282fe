"""Comparisons of runs, variants, studies or roots: for each score both means, their paired difference and a verdict,
and what differs in configuration, cost and speed."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import NamedTuple

from ..harness.run import STUDY
from ..kernels.errors import InputError, unknown
from .contrast import configuration, cost, speed
from .differences import by_seed, count_of, difference, mean_of, seed_of, with_interval
from .names import is_released, labels
from .protocols import RELEASED, STEPS, UNKNOWN, by_design, generation_of, notes, rankable, words_of_protocol
from .queries import better, scores, state_of
from .runs import SEEDS, Line, Run, read
from .seeds import base_groups, not_done
from .table import Column, Table

WAYS = "‡: the samples of A and B were made in different ways, or it is not on record how. The difference has that too."
NO_SCORES = "No scores are compared: "
CELLS = "A, B: mean over training seeds ± half its 95 % interval. B − A: the same of the difference over common seeds"
FIELDS = (
    *("a", "b", "metric", "protocol", "evaluation", "a_mean", "a_ci95", "a_n", "b_mean", "b_ci95", "b_n"),
    *("difference", "difference_ci95", "pairs", "verdict", "reason"),
    *("same_generation", "a_generation", "b_generation", "a_step", "b_step"),
)


class Side(NamedTuple):
    """One side of a comparison: what was typed, its variants (the runs of each), and why runs are left out."""

    name: str
    variants: list[list[Run]]
    left_out: list[str]

    @property
    def runs(self) -> list[Run]:
        return [run for variant in self.variants for run in variant]


class Comparison(NamedTuple):
    """Four tables with a row for each pair of variants and: each score (`FIELDS`), each setting that differs
    (`contrast.CONFIGURATION`), their costs (`contrast.COST`), each measurement of speed (`contrast.SPEED`)."""

    scores: Table
    configuration: Table
    cost: Table
    speed: Table


def compare(a: Path, b: Path | None = None, metric: str | None = None) -> Comparison:
    """The scores of B against those of A, for each pair of variants and each score that both have under one evaluation
    protocol, and what else A and B differ in.

    A path is a folder as `read` takes it, or ROOT/STUDY/VARIANT for all seeds of a variant. If one side has a single
    variant, all variants of the other side are compared with it, and otherwise those that both sides have. Without `b`,
    all variants of the study `a` are compared with its first one. `metric` is the name of a single score.

    Rows of scores have the `FIELDS`: `a`, `b` (labels), `metric`, its `protocol` (hash) and `evaluation` (in words);
    `a_mean`, `a_ci95` (half the 95 % interval, None for one seed), `a_n` (training seeds), and likewise of b;
    `difference` (b minus a), `difference_ci95`, `pairs` (common seeds); the `verdict` on b (better, worse or
    inconclusive, as in the table `seeds`) and its `reason`; `same_generation` (None: not on record) and the hashes
    `a_generation`, `b_generation` of how samples were made; `a_step`, `b_step` of the weights. Values that differ
    between the seeds of one side stand side by side.

    Raises InputError, one line, for an unknown variant or metric, if both sides share no variant, and if they share
    neither a score nor a cost nor a speed: if only scores lack, the notes of their table say why.
    """
    one = _side(a)
    two = one if b is None else _side(b)
    pairs = _with_base(one) if b is None else _pairs(one, two)
    columns = scores([*one.runs, *(two.runs if two is not one else ())])
    if metric is not None and metric not in columns:
        raise unknown("--metric", metric, columns)
    chosen = {name: lines for name, lines in columns.items() if metric in (None, name)}
    label_of = labels([*one.runs, *(two.runs if two is not one else ())])
    labelled = [
        (pair, {side: label_of[runs[0].group] for side, runs in zip("ab", pair, strict=True)}) for pair in pairs
    ]
    rows = []
    for (left, right), its_labels in labelled:
        for name, lines in chosen.items():
            of_a, of_b = ({run: lines[run] for run in side if run in lines} for side in (left, right))
            if of_a and of_b:
                rows.append(its_labels | _row(name, of_a, of_b))
    others = [table(labelled) for table in (configuration, cost, speed)]
    absent = _nothing_common(one, two, chosen) if not rows else ""
    if absent and (metric is not None or not (pairs and any(table.rows for table in others[1:]))):
        raise InputError(absent)
    compared = list(dict.fromkeys(run for pair in pairs for side in pair for run in side))
    shown = {row["metric"] for row in rows}
    used = {
        name: {run: lines[run] for run in compared if run in lines} for name, lines in chosen.items() if name in shown
    }
    below = [f"{NO_SCORES}{absent}."] if absent else _remarks(pairs, rows)
    below += [*dict.fromkeys([*one.left_out, *two.left_out]), *notes(compared, used)]
    caption, sides = _sides(one, two, [its_labels for _, its_labels in labelled])
    named = [replace(table, columns=sides + table.columns) for table in others]
    return Comparison(Table("compare", caption, sides + _columns(not sides), rows, below), *named)


def _side(path: Path) -> Side:
    runs = read([path]) if path.is_dir() or not (path.parent / STUDY).is_file() else _of_variant(path)
    variants: dict[str, list[Run]] = {}
    for run in runs:
        if not run.damage:
            variants.setdefault(run.group, []).append(run)
    order = sorted(variants.values(), key=lambda variant: (variant[0].info["study"], variant[0].info.get("place", inf)))
    left_out = [f"{run.info['name']} is left out: {run.damage}" for run in runs if run.damage]
    return Side(str(path), order, left_out)


def _of_variant(path: Path) -> list[Run]:
    """The runs of ROOT/STUDY/VARIANT, whose links are called VARIANT-sSEED."""
    runs = read([path.parent])
    chosen = [run for run in runs if path.name in (run.info["name"], _stem(run))]
    if not chosen:
        raise unknown(f"variant of {path.parent}", path.name, dict.fromkeys(map(_stem, runs)))
    if all(run.damage for run in chosen):
        raise InputError(chosen[0].damage)
    return chosen


def _stem(run: Run) -> str:
    """The name of a run without its seed."""
    return run.info["name"].removesuffix(f"-s{run.info.get('seed')}")


def _with_base(side: Side) -> list[tuple[list[Run], list[Run]]]:
    """Each variant with the base of its study."""
    bases, by_group = base_groups(side.runs), {variant[0].group: variant for variant in side.variants}
    pairs = [
        (by_group[base], variant)
        for group, variant in by_group.items()
        if (base := bases[group]) in by_group and base != group
    ]
    if not pairs:
        raise InputError(f"{side.name} is no study with several variants, so name two runs, variants or studies")
    return pairs


def _pairs(one: Side, two: Side) -> list[tuple[list[Run], list[Run]]]:
    if len(one.variants) == 1 or len(two.variants) == 1:
        everything = [(left, right) for left in one.variants for right in two.variants]
        return [pair for pair in everything if {*map(_home, pair[0])} != {*map(_home, pair[1])}] or everything
    several = any(len({run.info["study"] for run in side.runs}) > 1 for side in (one, two))
    others = {_variant(variant[0], several): variant for variant in two.variants}
    return [(variant, others[key]) for variant in one.variants if (key := _variant(variant[0], several)) in others]


def _home(run: Run) -> tuple[object, ...]:
    return run.group, run.info["id"], run.samples


def _variant(run: Run, study: bool) -> tuple[object, ...]:
    """What identifies a variant in another study or below another root, of which the study may be a part."""
    axes = sorted((axis, str(value)) for axis, value in run.info["variant"].items() if axis not in SEEDS)
    return run.info["study"] if study else "", run.info["model"], *axes


def _row(metric: str, a: Mapping[Run, Line], b: Mapping[Run, Line]) -> Line:
    """A comparison of one score as plain data (FIELDS), and its cells for reading."""
    first = next(iter(a.values()))
    values = []
    for side in (a, b):
        seeds = [(seed_of(run), run) for run in side]
        values.append(by_seed((seed, side[run]["value"]) for seed, run in seeds))
    means = [mean_of(numbers.values()) for numbers in values]
    result = difference(values[1], values[0], better(metric))
    verdict, reason = result.verdict, result.reason
    if verdict != "inconclusive" and (why := _unranked(a, b)):
        verdict, reason = "inconclusive", why
    row: Line = {"metric": metric, "protocol": first["protocol"]}
    row["evaluation"] = words_of_protocol(first.get("evaluation")) or None
    counts = [count_of(numbers) for numbers in values]
    for side, mean, n, lines in (("a", means[0], counts[0], a), ("b", means[1], counts[1], b)):
        row |= {f"{side}_mean": mean.value, f"{side}_ci95": mean.half, f"{side}_n": n}
        row[f"{side}_generation"] = _words(map(generation_of, lines.values())) or None
        row[f"{side}_step"] = (
            _words(None if is_released(run) else line["checkpoint_step"] for run, line in lines.items()) or None
        )
    row["difference"] = result.mean.value if result.mean else None
    row["difference_ci95"] = result.mean.half if result.mean else None
    row |= {"pairs": result.n, "verdict": verdict, "reason": reason or None}
    ways = {generation_of(line) for lines in (a, b) for line in lines.values()}
    row["same_generation"] = None if UNKNOWN in ways else len(ways) == 1
    row["marked"] = not row["same_generation"] and (UNKNOWN in ways or not by_design([*a, *b], {**a, **b}))
    row["b_is"] = verdict + " ‡" * row["marked"]
    alike = counts[0] == counts[1] == result.n
    row["seeds"] = str(result.n) if alike else f"{counts[0]}, {counts[1]}; {result.n} common"
    for side, mean, lines in (("a", means[0], a), ("b", means[1], b)):
        words = not_done(state_of(run)[0] for run in lines)
        row[f"{side}_text"] = with_interval(mean) + (f" ({words})" if words else "")
    row["difference_text"] = with_interval(result.mean, sign="+")
    return row


def _unranked(a: Mapping[Run, Line], b: Mapping[Run, Line]) -> str:
    """Why no verdict is possible, as tables have it. Two sides of one variant may have a step each."""
    why = rankable([*a, *b], {**a, **b})
    steps = [{line["checkpoint_step"] for line in side.values()} for side in (a, b)]
    return STEPS if why not in ("", RELEASED) and steps[0] != steps[1] and max(map(len, steps)) == 1 else why


def _words(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def _sides(one: Side, two: Side, pairs: list[Line]) -> tuple[str, list[Column]]:
    """What A and B are if that is the same for all pairs, or else columns for them."""
    if all(pair["a"] == pair["b"] for pair in pairs):
        return f"A: {one.name}\nB: {two.name}", [Column("a", "Variant", width=24)]
    heads, columns = [], []
    for side, name in ((one, "a"), (two, "b")):
        names = {pair[name] for pair in pairs}
        if len(names) == 1:
            heads.append(f"{name.upper()}: {names.pop()} [{side.name}]")
        else:
            columns.append(Column(name, name.upper(), width=24))
    return "\n".join(heads), columns


def _columns(wide: bool) -> list[Column]:
    columns = [Column("metric", "Metric", width=40 if wide else 14), Column("a_text", "A"), Column("b_text", "B")]
    return [*columns, Column("difference_text", "B − A"), Column("seeds", "Seeds", width=9), Column("b_is", "B is")]


def _remarks(pairs: list[tuple[list[Run], list[Run]]], rows: list[Line]) -> list[str]:
    """What a reader must know of the pairs."""
    apart = sorted({name for left, right in pairs for name in _random_settings(left[0], right[0])})
    remarks = [f"{CELLS}, which share data order, t and noise." if not apart else f"{CELLS}."]
    if apart:
        remarks.append(f"Equal seeds do not share data order, t and noise: {', '.join(apart)} differs.")
    reasons = dict.fromkeys(row["reason"] for row in rows if row["reason"])
    remarks += [f"Inconclusive: {reason}." for reason in reasons]
    if any(row["marked"] for row in rows):
        remarks.append(WAYS)
    known = [row for row in rows if row["a_step"] and row["b_step"]]
    if steps := [row for row in known if row["a_step"] != row["b_step"] or "," in row["a_step"]]:
        remarks.append(f"The weights are of different steps: {steps[0]['a_step']} (A) and {steps[0]['b_step']} (B).")
    return remarks


def _random_settings(one: Run, two: Run) -> list[str]:
    """The settings in which two runs differ and on which data order, t and noise depend. The objectives ddpm and v draw
    the same numbers."""
    differing = []
    for section, names in (("data", None), ("train", ("noise",)), ("objective", ("kind", "times"))):
        a, b = (run.info["config"].get(section) or {} for run in (one, two))
        common = [name for name in a if name in b and name != "path" and (names is None or name in names)]
        apart = [name for name in common if a[name] != b[name] and {str(a[name]), str(b[name])} != {"ddpm", "v"}]
        differing += [f"{section}.{name}" for name in apart]
    return differing


def _nothing_common(one: Side, two: Side, columns: Mapping[str, Mapping[Run, Line]]) -> str:
    """Why no score can be compared."""
    for side in (one, two):
        if not any(run in lines for lines in columns.values() for run in side.runs):
            return f"{side.name} has no scores; lamabench evaluate computes them"
    rows = [
        [line for lines in columns.values() for run in side.runs if (line := lines.get(run))] for side in (one, two)
    ]
    names = [list(dict.fromkeys(line["metric"] for line in lines)) for lines in rows]
    if one is two:
        return f"no variant of {one.name} has a score that its first variant has too"
    both = f"{one.name} and {two.name}"
    for metric in names[0]:
        if metric in names[1]:
            first, second = (next(line for line in lines if line["metric"] == metric) for lines in rows)
            if first["protocol"] != second["protocol"]:
                evaluations = [line.get("evaluation") or {} for line in (first, second)]
                parts = [
                    key
                    for key in {**evaluations[0], **evaluations[1]}
                    if evaluations[0].get(key) != evaluations[1].get(key)
                ]
                known = all(evaluations) and parts
                how = f"in {', '.join(parts)}" if known else f"({first['protocol']} and {second['protocol']})"
                return f"{both} share no evaluation protocol: {metric} differs {how}"
            return f"{both} share no variant that was scored on both sides"
    lists = [", ".join(each) or "none" for each in names]
    return f"{both} share no score: {one.name} has {lists[0]}; {two.name} has {lists[1]}"
