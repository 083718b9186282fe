"""Tables of models that differ in family and size: quality at equal images, at equal training FLOPs, at equal hours."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import NamedTuple

from .budgets import Comparison, Moment, at_amount, by_machine, comparisons, equal_budgets, others_words, rising
from .differences import by_seed, count_of, mean_of, seed_of
from .evidence import Evidence
from .moments import equal_images, hours_notes, is_unfinished, machine_of
from .names import labels
from .protocols import UNKNOWN, notes
from .published import PublishedRow
from .queries import state_of
from .runs import Line, Run
from .seeds import NOTE, best_of
from .state_of_the_art import is_fid_of_imagenet, remarks, source_words
from .table import BAD, Column, Table, shortened

TRAINING = ("train", "objective", "encoder")  # sections of a configuration
STEPS_400K = 400_000 * 256  # images of the protocol of `Published.steps_400k`
BETWEEN = (
    "Between two neighbouring moments of a run, its score is interpolated: linearly in the logarithms of the score and "
    "of the {0}, or of the {0} alone if a score is not positive. Nothing is extrapolated."
)
BELOW = "Published rows stand below. They were trained on as many images, by others; they are not ranked with the rest."


class Cell(NamedTuple):
    """A column of a table: its metric, the amount of training, and the runs at that amount."""

    metric: str
    amount: float
    moments: dict[Run, Moment]


class Budget(NamedTuple):
    """What models have in common: the name of their tables, a field of Moment, its name and unit in words, and whether
    scores are interpolated."""

    table: str
    field: str
    name: str
    unit: str
    between: bool = True

    def short(self, amount: float) -> str:
        if self.field == "images":
            return f"{amount / 1e6:.4g} M images" if amount >= 1e5 else f"{amount:,} images"
        return f"{amount:.3g} {self.unit}".replace("e+", "e")

    def words(self, amount: float) -> str:
        return self.short(amount).replace(self.unit, self.name)


IMAGES = Budget("scale", "images", "images", "images", between=False)
FLOPS = Budget("scale_flops", "flops", "FLOPs of training", "FLOPs")
HOURS = Budget("scale_hours", "hours", "hours of training", "h")


def scale(evidence: Evidence) -> list[Table]:
    """Quality at equal images: the largest number at which the most runs have a score (T1). A training that failed or
    is unfinished holds nobody back. One table a data set and generation protocol. Published rows of the same protocol
    stand below."""
    compared = comparisons(evidence.runs)
    return _named(evidence, compared, [_table(one, IMAGES, evidence.published.steps_400k) for one in compared], IMAGES)


def scale_flops(evidence: Evidence) -> list[Table]:
    """Quality at equal FLOPs of training, interpolated between the moments of a run (T1b)."""
    compared = comparisons(evidence.runs)
    return _named(evidence, compared, [_table(one, FLOPS) for one in compared], FLOPS)


def scale_hours(evidence: Evidence) -> list[Table]:
    """Quality at equal hours of training times processes, of one device and precision (T1c)."""
    compared = [(part, one.runs) for one in comparisons(evidence.runs) for part in by_machine(one)]
    tables = []
    for part, runs in compared:
        table, absent = _table(part, HOURS), [run for run in runs if not machine_of(run)]
        words = "Left out, because it is not on record on which device they ran, or they changed it: {}."
        more = [words.format(_whose(absent, runs, labels(runs)))] if absent else []
        more += hours_notes(part.runs)
        tables.append(replace(table, notes=[*table.notes, *more]))
    return _named(evidence, [part for part, _ in compared], tables, HOURS)


def _named(evidence: Evidence, compared: Sequence[Comparison], tables: Sequence[Table], budget: Budget) -> list[Table]:
    """The tables that have rows, or else an empty one, with names that say in what they differ, and with what is said
    of variants that are left out."""
    filled = [(one, table) for one, table in zip(compared, tables, strict=True) if table.rows]
    facts = [(one.data, one.way, one.machine) for one, _ in filled]
    apart = [place for place in range(3) if len({fact[place] for fact in facts}) > 1]
    result = []
    for fact, (one, table) in zip(facts, filled, strict=True):
        words = "_".join(fact[place] for place in apart)
        safe = "".join(sign if sign.isalnum() else "_" for sign in words).strip("_")
        remarks = [*others_words(evidence.runs, one.runs), *table.notes]
        result.append(replace(table, name=f"{budget.table}_{safe}" if safe else budget.table, notes=remarks))
    return result or [Table(budget.table, "", [], [])]


def _table(compared: Comparison, budget: Budget, printed: Sequence[PublishedRow] = ()) -> Table:
    """One row a model. Empty if no two models have a score at an equal amount of training."""
    names = labels(compared.runs)
    rows: dict[str, Line] = {}
    for run in sorted(compared.runs, key=_order):
        rows.setdefault(run.group, _about(run, names[run.group]))
    cells: dict[str, Cell] = {}
    unnamed: dict[str, list[str]] = {}
    for metric, series in compared.columns.items():
        amounts = {run: [x for x, _ in rising(each, budget.field)] for run, each in series.items()}
        if len({run.group for run, each in amounts.items() if each}) < 2:
            continue
        if budget.between and all(len(each) < 2 for each in amounts.values()):  # a score at the end alone is no curve
            continue
        finished = {run: each for run, each in amounts.items() if not is_unfinished(run)}
        if budget.between:
            targets = equal_budgets(finished) or equal_budgets(amounts)
        else:
            images = equal_images({run: [moment.images for moment in each] for run, each in series.items()})
            targets = [images] if images else []
        for target in targets:
            at = {run: _at(each, budget, target) for run, each in series.items()}
            moments = {run: moment for run, moment in at.items() if moment}
            column = metric if len(targets) == 1 else f"{metric} at {budget.short(target)}"
            cells[column] = Cell(metric, target, moments)
            if why := _fill(rows, column, cells[column], compared.way):
                unnamed.setdefault(why, []).append(column)
    if not cells:
        return Table(budget.table, "", [], [])
    for row in rows.values():
        row["n"] = max((row[f"{column}_n"] for column in cells if f"{column}_n" in row), default=None)
    used: dict[str, dict[Run, Line]] = {}
    for cell in cells.values():
        used.setdefault(cell.metric, {}).update((run, moment.row) for run, moment in cell.moments.items())
    below = [NOTE] if any((row["n"] or 0) > 1 for row in rows.values()) else []
    below += [BETWEEN.format(budget.name)] if budget.between else []
    below += [*_missing(compared, budget, cells, names), *_mark(rows, cells, names), *_settings(compared.runs, names)]
    below += [f"No best is bold, because {why}: {', '.join(columns)}." for why, columns in unnamed.items()]
    others = _published(cells, printed) if budget is IMAGES else []
    below += [BELOW, *remarks(printed)] if others else []
    caption, columns = _caption(compared, budget, cells), _columns(cells, budget, bool(others))
    return Table(budget.table, caption, columns, [*rows.values(), *others], below + notes(compared.runs, used))


def _at(moments: Sequence[Moment], budget: Budget, amount: float) -> Moment | None:
    """A run at an amount of its training; nothing is interpolated between numbers of images."""
    if budget.between:
        return at_amount(moments, budget.field, amount)
    return next((moment for moment in moments if moment.images == amount), None)


def _order(run: Run) -> tuple[str, float, str, str]:
    cost = run.last("cost", state="done") or {}
    return run.info["family"], cost.get("flops") or 0.0, run.info["title"], run.group


def _about(run: Run, label: str) -> Line:
    """What a model is and costs. "LaMamba-Diff-S" is of the family LaMamba-Diff and the size S."""
    info, cost = run.info, run.last("cost", state="done") or {}
    row: Line = {"group": run.group, "label": label, "model": info["model"], "source": "these runs"}
    family, _, size = info["title"].rpartition("-")
    row |= {"family": family, "size": size} if family else {"family": size, "size": ""}
    more = label.removeprefix(info["title"]).strip(", ")
    row["size"] = ", ".join(filter(None, (row["size"], more)))
    names = ("params", "macs", "flops", "paper_gflops")
    return row | {name: cost.get(name) for name in names} | {"records": dict.fromkeys(names, cost)}


def _fill(rows: Mapping[str, Line], column: str, cell: Cell, way: str) -> str:
    """Fill in the means of a column over training seeds, and mark the best; or else why there is none."""
    values: dict[str, dict[int, float]] = {}
    for group, row in rows.items():
        own = {run: moment for run, moment in cell.moments.items() if run.group == group}
        if own:
            seeds = [seed_of(run) for run in own]
            values[group] = by_seed(zip(seeds, (moment.row["value"] for moment in own.values()), strict=True))
            mean = mean_of(values[group].values())
            row |= {f"{column}_mean": mean.value, f"{column}_ci95": mean.half, f"{column}_n": count_of(values[group])}
            row["records"][f"{column}_mean"] = next(iter(own.values())).row
            for name in ("images", "flops"):
                amounts = [amount for moment in own.values() if (amount := getattr(moment, name)) is not None]
                row.setdefault(f"at_{name}", fmean(amounts) if amounts else None)
    best, why = best_of(values, cell.metric, "it is not on record how all samples were made" if way == UNKNOWN else "")
    if best:
        rows[best][f"{column}_bold"] = True
    return why


def _missing(compared: Comparison, budget: Budget, cells: Mapping[str, Cell], names: Mapping[str, str]) -> list[str]:
    """A line about the runs that have no number in a column, for each reason."""
    reasons: dict[str, dict[Run, None]] = {}
    for cell in cells.values():
        for run, each in compared.columns[cell.metric].items():
            if run not in cell.moments:
                amounts = [x for x, _ in rising(each, budget.field)]
                where = budget.words(cell.amount)
                if not amounts:
                    reason = f"Their {budget.name} are not on record"
                elif amounts[-1] < cell.amount:
                    reason = f"Not trained, or not scored, up to {where}"
                elif amounts[0] > cell.amount:
                    reason = f"First scored after {where}"
                else:
                    reason = f"Not scored at {where}"
                reasons.setdefault(reason, {})[run] = None
    return [f"{reason}: {_whose(runs, compared.runs, names)}." for reason, runs in reasons.items()]


def _settings(runs: Iterable[Run], names: Mapping[str, str]) -> list[str]:
    """A line about each setting in which the trainings of a table differ, besides their length."""
    values: dict[str, dict[str, dict[str, None]]] = {}
    for run in runs:
        config, train = run.info["config"], run.last("train", state="done") or {}
        each = {f"{part}.{name}": value for part in TRAINING for name, value in (config.get(part) or {}).items()}
        each |= {"train.precision": train["precision"]} if train.get("precision") else {}
        for setting in each.keys() - {"train.steps", "train.snapshots"}:
            values.setdefault(setting, {}).setdefault(str(each[setting]), {})[names[run.group]] = None
    lines = []
    for setting, by_value in sorted(values.items()):
        words = [f"{value} ({shortened(', '.join(models))})" for value, models in by_value.items()]
        lines += [f"Trainings differ in {setting}: {'; '.join(words)}."] if len(words) > 1 else []
    return lines


def _whose(some: Iterable[Run], runs: Sequence[Run], names: Mapping[str, str]) -> str:
    """Runs by their labels, with seeds unless all those of a model are among them."""
    seeds: dict[str, list[str]] = {}
    for run in some:
        seeds.setdefault(run.group, []).append(str(run.info.get("seed")))
    whole = Counter(run.group for run in runs)
    return ", ".join(
        names[group] + ("" if len(each) == whole[group] else f" (seed {', '.join(each)})")
        for group, each in seeds.items()
    )


def _mark(rows: Mapping[str, Line], cells: Mapping[str, Cell], names: Mapping[str, str]) -> list[str]:
    """Mark the numbers of runs that failed or are not finished, and say which these are."""
    states: dict[str, dict[Run, None]] = {}
    runs = list(dict.fromkeys(run for cell in cells.values() for run in cell.moments))
    ends = {run: state_of(run) for run in runs}
    for column, cell in cells.items():
        for run in cell.moments:
            state, error = ends[run]
            if state != "done":
                rows[run.group][f"{column}_mark"] = BAD
                states.setdefault(state + (f" ({shortened(error)})" if error else ""), {})[run] = None
    which = [f"{state}: {_whose(each, runs, names)}" for state, each in states.items()]
    return [f"{BAD.strip()} with a run that is not done. {'; '.join(which)}."] if which else []


def _columns(cells: Mapping[str, Cell], budget: Budget, published: bool) -> list[Column]:
    columns = [
        Column("family", "Family"),
        Column("size", "Size"),
        Column("label"),
        Column("model"),
        Column("n", "Seeds", digits=0, rank=7),
        Column("params", "Params (M)", 1e6, 4, rank=6),
        Column("macs", "MACs (G)", 1e9, 4),
        Column("flops", "FLOPs (G)", 1e9, 4, rank=9),
        Column("paper_gflops", "Printed (G)" if published else None, 1.0, 4, rank=5),
    ]
    if len({cell.amount for cell in cells.values()}) == 1:
        images = Column("at_images", "Images (M)", 1e6, 4, rank=8)
        flops = Column("at_flops", "Training FLOPs (1e18)", 1e18, 4, rank=7)
        columns += {"images": [flops], "flops": [images], "hours": [images, flops]}[budget.field]
    first = next(iter(cells.values())).metric
    for place, (name, cell) in enumerate(cells.items()):
        rank = place if cell.metric == first else 10 + place
        columns.append(Column(f"{name}_mean", name, 1.0, 4, f"{name}_ci95", f"{name}_bold", f"{name}_mark", rank))
        columns += [Column(f"{name}_ci95"), Column(f"{name}_n")]
    return columns + ([Column("source", "Source", rank=2)] if published else [])


def _caption(compared: Comparison, budget: Budget, cells: Mapping[str, Cell]) -> str:
    amounts = {cell.amount for cell in cells.values()}
    on = f" on {compared.data}" if compared.data else ""
    machine = f" (times processes) on {compared.machine}" if compared.machine else ""
    which = "all" if all(len(each.moments) == len(compared.columns[each.metric]) for each in cells.values()) else "most"
    if len(amounts) == 1:
        common = f"{budget.words(amounts.pop())}{machine}, the largest amount at which {which} runs have a score"
    elif budget.between:
        common = f"equal {budget.name}{machine}: in each column, an amount that two models or more have reached"
    else:
        common = "equal images: in each column, the largest number at which most runs have a score"
    return f"Models of all families and sizes{on} at {common}."


def _published(cells: Mapping[str, Cell], printed: Sequence[PublishedRow]) -> list[Line]:
    """Published rows, if the scores are of their protocol: FID of 50,000 samples of ImageNet at 256 px, in latents,
    of DDPM with linear betas, drawn in 250 ancestral steps without guidance after as many images of training."""
    for column, cell in cells.items():
        if cell.amount == STEPS_400K and all(as_in_papers(moment.row) for moment in cell.moments.values()):
            return [_of_paper(row, column) for row in printed if row.conditional]
    return []


def as_in_papers(row: Line) -> bool:
    """Whether a score is of the protocol of `Published.steps_400k`, whatever the number of images of training."""
    drawn = row.get("generation") or {}
    way = [drawn.get(name) for name in ("sampler", "steps", "guidance", "weights")]
    alike = way == ["ancestral", 250, 1, "ema"] and drawn.get("labels") in ("balanced", "random")
    alike &= drawn.get("objective") in (None, "ddpm") and drawn.get("schedule") in (None, "linear")
    return alike and drawn.get("encoder") not in (None, "pixels") and is_fid_of_imagenet(row, 256)


def _of_paper(row: PublishedRow, column: str) -> Line:
    family, _, size = row.model.rpartition("-")
    numbers: Line = {"params": row.params_m and 1e6 * row.params_m, "paper_gflops": row.macs_g}
    return {"family": family, "size": size, f"{column}_mean": row.fid, "source": source_words(row), **numbers}
