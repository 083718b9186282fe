"""The claims of studies: the pairs of variants that a study file names, their paired differences, and verdicts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .budgets import Series, at_amount, equal_budgets, moments_of, rising
from .differences import FEWEST, Difference, by_seed, difference, seed_of, with_interval
from .evidence import Evidence
from .moments import curves, first_column, hours_notes, is_unfinished, machine_of, main_device
from .names import listed, value_word
from .protocols import notes, unlike
from .queries import better
from .runs import Line, Run
from .table import Column, Table
from .variants import Variants, measure
from .verdicts import difference_words, over_words

HOLDS, FAILS, OPEN, NO_SCORE = "holds here", "does not hold here", "inconclusive", "not run yet"
WORDS = {"better": HOLDS, "worse": FAILS, "inconclusive": OPEN}  # of a difference in the direction of a claim
BUDGETS = {"flops": "training FLOPs", "hours": "GPU-hours"}  # fields of Moment
DELTA = (
    "Δ: the score of the variant less that of the other one, over common training seeds, ± half its 95 % interval. A "
    f"claim holds here if the interval at equal images excludes 0 for all of its pairs, over {FEWEST} seeds or more, "
    "and the variant is the better one. It does not hold here if one interval excludes 0 and the other one is better. "
    "Nothing is corrected for the number of pairs: without a difference, a pair holds by chance in 2.5 % of cases, and "
    "fails in 2.5 %."
)
CURVES = (
    "At equal training FLOPs and GPU-hours (of one device and precision), Δ is of {}, at the largest amount that both "
    "variants have reached, interpolated between the moments at which each was scored: linearly in the logarithms of "
    "score and amount."
)


Columns = Mapping[str, dict[Run, list[Line]]]  # {metric: {run: its scores}}


class AtBudget(NamedTuple):
    """The difference of a pair at an equal amount of training (None: there is none)."""

    result: Difference
    amount: float | None = None


@dataclass(frozen=True)
class Pair:
    """Two variants, the first of which a claim calls better: their labels, their runs, the difference at equal images,
    what must stand beside it (such as "1 failed"), the differences at equal `BUDGETS`, those in other metrics (at equal
    images, `BUDGETS[name]`, by metric), and whether one of the variants has no score."""

    labels: tuple[str, str]
    runs: list[Run]
    result: Difference
    mark: str = ""
    budgets: dict[str, AtBudget] = field(default_factory=dict)
    others: Mapping[str, Mapping[str, Difference]] = field(default_factory=dict)
    absent: bool = False

    def at(self, name: str) -> Difference:
        """The difference at equal images, or at another equal budget."""
        return self.budgets[name].result if name else self.result

    @property
    def name(self) -> str:
        return " against ".join(f"`{label}`" for label in self.labels)


@dataclass(frozen=True)
class Claim:
    """A claim of a study and what its pairs say: at equal images in `metric`, at equal FLOPs and hours in `curve`, the
    metric that was scored during training ("": none)."""

    study: str
    words: str
    metric: str
    curve: str
    pairs: list[Pair]

    @property
    def verdict(self) -> str:
        """`HOLDS`, `FAILS`, `OPEN` or, if nothing but a score is missing, `NO_SCORE`."""
        each = {pair.result.verdict for pair in self.pairs}
        if "worse" in each or each == {"better"}:
            return FAILS if "worse" in each else HOLDS
        left = [pair for pair in self.pairs if pair.result.verdict != "better"]
        return NO_SCORE if all(pair.absent for pair in left) else OPEN

    @property
    def headline(self) -> str:
        """The verdict, and at which equal amounts a claim that holds does so, if not at all of them."""
        if self.verdict != HOLDS:
            return self.verdict
        also = [
            words for name, words in BUDGETS.items()
            if all(pair.budgets[name].result.verdict == "better" for pair in self.pairs)
        ]  # fmt: skip
        return HOLDS if len(also) == len(BUDGETS) else f"{HOLDS} at equal {' and '.join(('images', *also))}"

    @property
    def title(self) -> str:
        """The headline as the beginning of a line; "FLOPs" keeps its letters."""
        return self.headline[0].upper() + self.headline[1:]

    @property
    def text(self) -> str:
        """The claim, and the numbers or the reason of its verdict. Names of variants stand between backticks."""
        which = {HOLDS: "better", FAILS: "worse"}.get(self.verdict, "inconclusive")
        pairs = [pair for pair in self.pairs if pair.result.verdict == which]
        where = ", ".join(filter(None, (self.metric, _by_reason({pair.name: pair.result for pair in pairs}))))
        text = f"{self.words.rstrip('.')} ({self.study}: {where})."
        if which != "inconclusive":
            return text + "".join(self._at_budget(name, pairs) for name in BUDGETS) + _others_words(which, pairs)
        held = {pair.name: pair.result for pair in self.pairs if pair.result.verdict == "better"}
        text += f" At equal images it holds for {_by_reason(held)}." if held else ""
        return text + "".join(map(self._decided_at, BUDGETS))

    def _at_budget(self, name: str, pairs: list[Pair]) -> str:
        """What becomes of a verdict at equal images at another equal budget, in a sentence."""
        results = {pair.name: pair.budgets[name].result for pair in pairs}
        turned = {
            pair.name: result
            for pair in pairs
            if (result := results[pair.name]).verdict not in ("inconclusive", pair.result.verdict)
        }
        left = {pair: one for pair, one in results.items() if one.verdict == "inconclusive"}
        if turned:
            text = f"the sign is reversed ({self.curve}, {_by_reason(turned)})"
        elif self.verdict == FAILS:
            return ""
        elif left:
            text = f"it is inconclusive ({', '.join(filter(None, (self.curve, _by_reason(left))))})"
        else:
            text = f"it holds too ({self.curve})"
        return f" At equal {BUDGETS[name]} {text}."

    def _decided_at(self, name: str) -> str:
        """What another equal budget decides of a claim that is inconclusive at equal images, in a sentence."""
        parts = []
        for verdict, words in {"better": "it holds", "worse": "the sign is reversed"}.items():
            results = {pair.name: pair.at(name) for pair in self.pairs if pair.at(name).verdict == verdict}
            parts += [f"{words} for {_by_reason(results)}"] if results else []
        return f" At equal {BUDGETS[name]} {' and '.join(parts)} ({self.curve})." if parts else ""


def _others_words(verdict: str, pairs: list[Pair]) -> str:
    """Which other metrics say something else than that of the claim at equal images, FLOPs or hours, in a sentence."""
    parts = []
    for name, words in {"": "images", **BUDGETS}.items():
        usual = _word(verdict, [pair.at(name) for pair in pairs])
        metrics = dict.fromkeys(metric for pair in pairs for metric in pair.others.get(name, ()))
        unlike: dict[str, list[str]] = {}
        for metric in metrics:
            results = {pair.name: pair.others[name][metric] for pair in pairs if metric in pair.others[name]}
            if (word := _word(verdict, results.values())) != usual:
                numbers = {pair: one for pair, one in results.items() if _word(verdict, [one]) == word}
                unlike.setdefault(word, []).append(metric + (f", {_by_reason(numbers)}" if word != OPEN else ""))
        words_of = [f"{word} ({'; '.join(each)})" for word, each in unlike.items()]
        parts += [f"at equal {words} {' and '.join(words_of)}"] if words_of else []
    return f" Other metrics differ: {'; '.join(parts)}." if parts else ""


def _word(verdict: str, results: Iterable[Difference]) -> str:
    """What becomes of a verdict by several differences: one that is reversed counts before one that is open."""
    each = {result.verdict for result in results}
    return "reversed" if each - {verdict, "inconclusive"} else OPEN if "inconclusive" in each else "the same"


def claims(evidence: Evidence) -> list[Claim]:
    """The claims of the studies of some runs, in the order of the studies and of their files."""
    return [claim for name, study in evidence.studies.items() for claim in _of_study(name, study.variants)]


def verdicts(evidence: Evidence) -> Table:
    """A row for each pair of each claim.

    Columns of the csv: `study`, `claim`, `claim_verdict`, `variant` (the better one, as the claim says), `against`,
    `metric`; over `n` common seeds at equal images `difference` (variant less the other), `difference_ci95`, half its
    95 % interval, and `verdict` with its `reason`; and in `curve_metric`, at an equal `flops_amount` of training FLOPs
    and at an equal `hours_amount` of hours times processes, `flops_difference`, `hours_difference` and so on.
    """
    found = claims(evidence)
    rows = [_row(claim, pair) for claim in found for pair in claim.pairs]
    metrics, several = {claim.metric for claim in found} - {""}, len({claim.study for claim in found}) > 1
    columns = [
        Column("study", "Study" if several else None, rank=7), Column("claim", "Statement", width=30, rank=1),
        Column("claim_verdict", "Verdict", width=20), Column("variant", "Variant"), Column("against", "Against"),
        Column("metric", "Metric" if len(metrics) > 1 else None, width=20, rank=6),
        Column("n", "Seeds", digits=0, rank=5), *_columns("difference", "Δ at equal images", 0),
        Column("verdict", "This pair", width=20), Column("reason", "Why", width=24, rank=4), Column("curve_metric"),
    ]  # fmt: skip
    for rank, (name, words) in enumerate(BUDGETS.items(), start=2):
        columns += [Column(f"{name}_amount"), *_columns(f"{name}_difference", f"Δ at equal {words}", rank)]
    names = ", ".join(dict.fromkeys(claim.curve for claim in found if claim.curve))
    below = [DELTA, *([CURVES.format(names)] if names else [])]
    for name, study in evidence.studies.items():
        own = dict.fromkeys(one for claim in found if claim.study == name for one in (claim.metric, claim.curve) if one)
        every = {one: {run: each[-1] for run, each in rows.items()} for one, rows in _curves(study.variants).items()}
        below += notes(study.runs, {one: (study.scores | every)[one] for one in own})
    below += hours_notes(run for claim in found for pair in claim.pairs for run in pair.runs)
    caption = f"Statements of studies, and whether they hold here{f': {min(metrics)}' if len(metrics) == 1 else ''}."
    return Table("verdicts", caption, columns, rows, list(dict.fromkeys(below)))


def _columns(name: str, title: str, rank: int) -> list[Column]:
    shown = Column(name, title, 1.0, 3, f"{name}_ci95", "", f"{name}_mark", rank, sign="+")
    return [shown, Column(f"{name}_ci95"), *([Column(f"{name}_n")] if rank else [])]


def _row(claim: Claim, pair: Pair) -> Line:
    row: Line = {"study": claim.study, "claim": claim.words, "claim_verdict": claim.headline, "runs": pair.runs}
    row |= {"variant": pair.labels[0], "against": pair.labels[1], "metric": claim.metric or None}
    row |= {"curve_metric": claim.curve or None, "n": pair.result.n, **_numbers("difference", pair.result)}
    row["difference_mark"] = f" ({pair.mark})" if pair.mark else ""
    for name, (result, amount) in pair.budgets.items():
        row |= {f"{name}_amount": amount, **_numbers(f"{name}_difference", result)}
        row |= {f"{name}_difference_n": result.n} if amount else {}
    verdict = NO_SCORE if pair.absent else WORDS[pair.result.verdict]
    return row | {"verdict": verdict, "reason": pair.result.reason or None}


def _numbers(name: str, result: Difference) -> Line:
    return {name: result.mean.value, f"{name}_ci95": result.mean.half} if result.mean else {}


def _of_study(name: str, study: Variants) -> list[Claim]:
    about = [run.info.get("about") or {} for run in study.evidence.runs]
    found: dict[str, list[Line]] = next((one["verdicts"] for one in about if one.get("verdicts")), {})
    if not found:
        return []
    metric = next(iter(study.metrics), "")
    scored = _curves(study)
    last = {name: {run: each[-1] for run, each in rows.items()} for name, rows in scored.items()}
    alike = {
        name: scored[name] for name, rows in last.items()
        if metric and measure(rows) == measure(study.evidence.scores[metric])
    }  # fmt: skip
    curve = first_column(alike or scored) if scored else ""
    scores = scored.get(curve, {})
    return [
        Claim(name, words, metric, curve, [_pair(study, metric, curve, scores, one) for one in pairs])
        for words, pairs in found.items()
    ]


def _curves(study: Variants) -> dict[str, dict[Run, list[Line]]]:
    """The metrics of samples that were scored during training and, if the study has no other, the held-out loss."""
    every = curves(study.evidence.runs)
    first = next(iter(study.metrics), "")
    return {name: rows for name, rows in every.items() if name == first or any(map(_has_samples, rows.values()))}


def _has_samples(rows: list[Line]) -> bool:
    return any(row.get("samples") for row in rows)


def _pair(study: Variants, metric: str, curve: str, scores: Mapping[Run, list[Line]], sides: Line) -> Pair:
    named = [_groups(study, sides[side]) for side in ("better", "worse")]
    labels = [
        study.labels[groups[0]] if len(groups) == 1 else ", ".join(map(value_word, sides[side].values()))
        for side, groups in zip(("better", "worse"), named, strict=True)
    ]
    runs = [run for groups in named for group in groups for run in study.members[group]]
    several = [label for label, groups in zip(labels, named, strict=True) if len(groups) > 1]
    absent = [
        label
        for label, groups in zip(labels, named, strict=True)
        if not groups or (len(groups) == 1 and groups[0] not in study.values.get(metric, {}))
    ]
    none = f"{' and '.join(absent)} {'has' if len(absent) == 1 else 'have'} no score" if absent else ""
    many = f"{' and '.join(several)} {'was' if len(several) == 1 else 'were'} trained or drawn in several ways"
    if reason := none or (many if several else ""):
        nothing = Difference("inconclusive", reason)
        budgets = dict.fromkeys(BUDGETS, AtBudget(nothing))
        return Pair((labels[0], labels[1]), runs, nothing, budgets=budgets, absent=bool(absent))
    (one,), (other,) = named
    result = study.difference(metric, one, other) or Difference("inconclusive", "it is one variant")
    mark = ", ".join(dict.fromkeys(filter(None, (study.marked(metric, group) for group in (one, other)))))
    budgets = {name: _at_equal(name, one, other, curve, scores) for name in BUDGETS}
    others = {"": _others_at_end(study, metric, one, other)}
    more = {name: rows for name, rows in _alike(study, metric, curves(study.evidence.runs)).items() if name != curve}
    for name in BUDGETS:
        found = {column: _at_equal(name, one, other, column, rows) for column, rows in more.items()}
        others[name] = {column: at.result for column, at in found.items() if at.amount}
    return Pair((labels[0], labels[1]), runs, result, mark, budgets, others)


def _others_at_end(study: Variants, metric: str, one: str, other: str) -> dict[str, Difference]:
    """The differences at the end of the trainings in the metrics besides one."""
    scores = {name: {run: [row] for run, row in study.evidence.scores[name].items()} for name in study.metrics}
    every = {name: study.difference(name, one, other) for name in _alike(study, metric, scores) if name != metric}
    return {name: result for name, result in every.items() if result}


def _alike(study: Variants, metric: str, columns: Columns) -> Columns:
    """The columns of scores against the same images as a metric. Those against others would say things twice."""
    reference = _reference(study.evidence.scores[metric])
    return {
        name: rows
        for name, rows in columns.items()
        if _reference({run: each[-1] for run, each in rows.items()}) == reference
    }


def _reference(rows: Mapping[Run, Line]) -> Any:
    return measure(rows)[1]


def _groups(study: Variants, values: Mapping[str, Any]) -> list[str]:
    """The variants of the study's file that have these axis values: one, none that can be read, or several where it
    was trained or sampled in several ways."""
    return [
        group
        for group, (run, *_) in study.members.items()
        if "place" in run.info and all(str(run.info["variant"].get(axis)) == str(one) for axis, one in values.items())
    ]


def _at_equal(name: str, one: str, other: str, curve: str, scores: Mapping[Run, list[Line]]) -> AtBudget:
    """Two groups at the amount of training (a field of Moment) at which the most common seeds have a score of one
    column, the largest of such amounts. Hours are those of the device and precision of most scores."""
    own = {run: rows for run, rows in scores.items() if run.group in (one, other)}
    device = main_device(own)
    series: Series = {
        run: moments_of(run, rows) for run, rows in own.items() if name != "hours" or machine_of(run) == device
    }
    amounts = {run: [amount for amount, _ in rising(each, name)] for run, each in series.items()}
    finished = {run: each for run, each in amounts.items() if not is_unfinished(run)}
    found = []
    for amount in equal_budgets(finished) or equal_budgets(amounts):
        rows = {run: moment.row for run, each in series.items() if (moment := at_amount(each, name, amount))}
        values, base = (
            by_seed((seed_of(run), row["value"]) for run, row in rows.items() if run.group == group)
            for group in (one, other)
        )
        result = difference(values, base, better(curve))
        if result.verdict != "inconclusive" and (why := unlike(rows, rows)):
            result = Difference("inconclusive", why, result.mean)
        found.append(AtBudget(result, amount))
    nothing = AtBudget(Difference("inconclusive", f"no scored moments at equal {BUDGETS[name]}"))
    return max(found, key=lambda at: (at.result.n, at.amount), default=nothing)


def _by_reason(results: Mapping[str, Difference]) -> str:
    """Pairs by what is said of them, such as "A against B and C against D: 1 common seed, and 3 are needed; differences
    -4.0 and +2.5"."""
    pairs: dict[str, list[str]] = {}
    for name, result in results.items():
        words = [f"{with_interval(result.mean, '+')}{over_words([result.n])}"] if result.mean else []
        words = words if result.n >= FEWEST else []
        pairs.setdefault(", ".join([*words, *([result.reason] if result.reason else [])]), []).append(name)
    parts = []
    for words, names in pairs.items():
        few = [result.mean for name in names if (result := results[name]).mean and result.n < FEWEST]
        parts.append(f"{listed(names)}: {'; '.join([words, *([difference_words(few)] if few else [])])}")
    return "; ".join(parts)
