"""The table of numbers over training seeds: means, differences to the base of the study, and the best."""

from collections import Counter
from collections.abc import Iterable, Mapping

from .differences import FEWEST, NO_SEED, Difference, by_seed, count_of, difference, mean_of
from .protocols import losses_words, notes, rankable, spread_of
from .queries import SAMPLING, better, scores, state_of
from .runs import SEEDS, Line, Run
from .summary import error_column, has_errors, spread_column
from .table import Column, Table

NOTE = "±: half the 95 % interval of the mean over training seeds (Student's t); n: their number."
MARK = (
    "†: the difference to the base (the first variant of the study) over common training seeds is inconclusive: its "
    f"95 % interval includes 0, there are fewer than {FEWEST} common seeds, the samples were made in another way, or "
    "the weights are of different steps or have seen different numbers of images."
)
Values = dict[str, dict[int, float]]  # {group: {training seed: number}}


def seeds(overview: Table) -> Table:
    """The training loss and the scores of a summary over training seeds, if some variant has several. A seed counts
    once, however many folders or seeds of sampling it has.

    Columns of the csv, for each of these numbers: `NAME_mean`; `NAME_ci95`, half the 95 % interval of the mean (empty
    for one seed); `NAME_n`, the training seeds. Those of a score are also `NAME_subset_std` or `NAME_split_std`, the
    mean of its standard deviation over subsets or splits of the samples, `NAME_sampling_error`, the standard error from
    the choice of the images (of a single run, which has no interval), and against the base of the study
    `NAME_difference`, `NAME_difference_ci95`, `NAME_difference_n` (common seeds) and `NAME_verdict`.
    """
    runs = [row["run"] for row in overview.rows]
    marks, bases = scores(runs), base_groups(runs)
    values = {name: over_seeds(overview.rows, name) for name in ("final_loss", *marks)}
    counts = {group: max(count_of(each.get(group, {})) for each in values.values()) for group in bases}
    if not any(count > 1 for count in counts.values()):
        return Table("seeds", "", [], [])
    rows: dict[str, Line] = {}
    for one in overview.rows:
        group = one["group"]
        if any(group in each for each in values.values()):
            label = one["model_label"] + (" (base)" if bases[group] == group else "")
            rows[group] = {"label": label, "group": group, "n": counts[group]}
    for name, each in values.items():
        for group, numbers in each.items():
            mean = mean_of(numbers.values())
            rows[group] |= {f"{name}_mean": mean.value, f"{name}_ci95": mean.half, f"{name}_n": count_of(numbers)}
    for name, each in _states(overview.rows, values).items():
        for group, states in each.items():
            rows[group][f"{name}_mark"] = f" ({words})" if (words := not_done(states)) else ""
    runs_of = Counter(one["group"] for one in overview.rows)
    inconclusive = False
    unnamed: dict[str, list[str]] = {}
    for name, lines in marks.items():
        for group, numbers in over_seeds(overview.rows, spread_column(name)).items():
            rows[group][spread_column(name)] = mean_of(numbers.values()).value
        for row in overview.rows:
            if runs_of[row["group"]] == 1 and row["group"] in values[name]:
                rows[row["group"]][error_column(name)] = row.get(error_column(name))
        for group in values[name]:
            base = bases[group]
            if base is not None and base != group and base in values[name]:
                result = against(values[name], group, base, name, lines)
                rows[group] |= _of_difference(name, result)
                rows[group][f"{name}_mark"] += " †" * (result.verdict == "inconclusive")
                inconclusive = inconclusive or result.verdict == "inconclusive"
        best, why = best_of(values[name], name, rankable(runs, lines))
        if best:
            rows[best][f"{name}_bold"] = True
        elif why:
            unnamed.setdefault(why, []).append(name)
    columns = [Column("label", "Model"), Column("n", "Seeds", digits=0), *_columns("final_loss", "Final loss", rank=2)]
    for place, name in enumerate(marks):
        columns += _columns(name, name, rank=min(7 * place, 12))
        columns.append(Column(spread_column(name), f"{name}, std over {spread_of(name)}", 1.0, 3, rank=13))
        columns.append(Column(error_column(name), f"{name}, sampling s.e. of one seed", 1.0, 2, rank=14))
        columns += [Column(f"{name}_{end}") for end in ("difference", "difference_ci95", "difference_n", "verdict")]
    below = [NOTE, *([MARK] if inconclusive else [])]
    below += [*([SAMPLING] if has_errors(rows.values(), marks) else []), *_uneven(rows, marks)]
    text = losses_words(row["run"] for row in overview.rows if row["final_loss"] is not None)
    below += [text] if text else []
    below += [f"No best is bold, because {why}: {', '.join(names)}." for why, names in unnamed.items()]
    return Table("seeds", "Means over training seeds.", columns, list(rows.values()), [*below, *notes(runs, marks)])


def _uneven(rows: Mapping[str, Line], marks: Mapping[str, Mapping[Run, Line]]) -> list[str]:
    """A line about each variant whose seeds were scored at different steps."""
    steps: dict[str, set[int]] = {group: set() for group in rows}
    for lines in marks.values():
        for run, line in lines.items():
            steps[run.group] |= {line["checkpoint_step"]} - {None}
    return [
        f"{rows[group]['label']}: its seeds have weights of different steps ({', '.join(map(str, sorted(each)))})."
        for group, each in steps.items()
        if len(each) > 1
    ]


def _states(rows: Iterable[Line], names: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """{column: {group: the states of the runs that its numbers are of}}."""
    names = list(names)
    result: dict[str, dict[str, list[str]]] = {name: {} for name in names}
    for row in rows:
        state = state_of(row["run"])[0]
        for name in names:
            if row.get(name) is not None:
                result[name].setdefault(row["group"], []).append(state)
    return result


def not_done(states: Iterable[str]) -> str:
    """What must stand beside a mean over runs of these states: how many are not done, such as "1 unfinished"."""
    return ", ".join(f"{count} {state}" for state, count in Counter(states).items() if state != "done")


def _columns(name: str, title: str, rank: int) -> list[Column]:
    mean = Column(f"{name}_mean", title, 1.0, 4, f"{name}_ci95", f"{name}_bold", f"{name}_mark", rank)
    return [mean, Column(f"{name}_ci95"), Column(f"{name}_n")]


def over_seeds(rows: Iterable[Line], name: str) -> Values:
    """A column of the rows of a summary over training seeds: {group: {seed: mean}}."""
    pairs: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.get(name) is not None:
            seed = NO_SEED if row["seed"] is None else row["seed"]
            pairs.setdefault(row["group"], []).append((seed, row[name]))
    return {group: by_seed(numbers) for group, numbers in pairs.items()}


def base_groups(runs: Iterable[Run]) -> dict[str, str | None]:
    """The base of each group: the group of the first run of its study, also of other people's samples that are a row of
    it; None outside of studies with a file. Of a first run that cannot be read, it is the group of its other seeds."""
    runs = list(runs)
    first: dict[str, Run] = {}
    for run in runs:
        if run.info.get("of_file"):
            known = first.setdefault(run.info["study"], run)
            if run.info["place"] < known.info["place"]:
                first[run.info["study"]] = run
    bases: dict[str, str] = {}
    for study, one in first.items():
        alike = [
            run for run in runs if run.info["study"] == study and not run.damage and _variant(run) == _variant(one)
        ]
        bases[study] = (alike[0] if one.damage and alike else one).group
    return {run.group: bases.get(run.info["study"]) for run in runs}


def _variant(run: Run) -> tuple[object, ...]:
    axes = (run.info["variant"] or {}).items()
    return run.info["model"], *sorted((axis, str(value)) for axis, value in axes if axis not in SEEDS)


def against(values: Values, group: str, base: str, metric: str, lines: Mapping[Run, Line]) -> Difference:
    """The difference of a group to another one. It is inconclusive if their samples were made in different ways, or if
    their weights are of different steps, and the study did not ask for that."""
    result = difference(values[group], values[base], better(metric))
    both = {run: row for run, row in lines.items() if run.group in (group, base)}
    if result.verdict != "inconclusive" and (why := rankable(both, both)):
        return Difference("inconclusive", why, result.mean)
    return result


def _of_difference(name: str, result: Difference) -> Line:
    mean = result.mean
    row: Line = {f"{name}_verdict": result.verdict, f"{name}_difference_n": result.n}
    if mean is not None:
        row |= {f"{name}_difference": mean.value, f"{name}_difference_ci95": mean.half}
    return row


def best_of(values: Values, metric: str, unranked: str) -> tuple[str | None, str]:
    """The group with the best mean if it is distinguishable from the second; or else None, and why. `unranked` is what
    `rankable` says."""
    order = better(metric)
    if not order or len(values) < 2:
        return None, ""
    if unranked:
        return None, unranked
    sign = 1 if order == "min" else -1
    best, second = sorted(values, key=lambda group: sign * mean_of(values[group].values()).value)[:2]
    result = difference(values[best], values[second], order)
    if result.verdict == "better":
        return best, ""
    return None, f"the two best are not distinguishable ({result.reason})"
