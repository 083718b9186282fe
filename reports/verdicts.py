"""What the numbers of a study say, in sentences that are computed from them."""

from collections.abc import Sequence
from math import inf
from typing import Any

from .checks import checks
from .differences import Difference, Mean, difference, mean_of, with_interval
from .evidence import Evidence
from .names import MOST, axis_noun, axis_word, listed, value_word
from .protocols import rankable
from .queries import better
from .runs import Line
from .speed import CELL, MODES, crossing
from .table import places_of, style_of
from .variants import Variants, is_number

FEW = 3  # variants of which each has a sentence about its speed
FEWEST_VALUES = 3  # of an axis of which the best one is named


def sentences(evidence: Evidence) -> list[str]:
    """What the numbers of one study say: for each metric the variants against the base with the 95 % interval of the
    paired difference, and the best; the best values of numeric axes; speed; and what is missing. A metric of fewer
    samples than the same one of others, as those during training, has no sentence.

    `evidence` has the runs of this study alone (`Evidence.studies`). A verdict is inconclusive with its reason: the
    interval, fewer than three seeds in common, samples made in several ways, or weights of different steps. Then what
    must hold before scores are compared (`checks`). Empty if nothing is on record.
    """
    study = evidence.variants
    text = []
    for metric in study.metrics:
        text += _against_base(study, metric)
        text += _best(study, metric)
    text += [line for metric in study.metrics[:1] for line in _best_values(study, metric)]
    return [*text, *_speeds(study), *_missing(study), *checks(study)]


def headline(evidence: Evidence) -> str:
    """The sentence that says most about one study, computed from its first metric or else from its speed."""
    study = evidence.variants
    if not study.values:
        return next(iter(_speeds(study)), "No scores yet." if study.base else "No scores.")
    metric = study.metrics[0]
    results = {group: result for group in study.members if (result := study.difference(metric, group))}
    best, _ = study.best(metric)
    if best:
        mean = mean_of(study.values[metric][best].values())
        name = f"The base {_name(study, best)}" if best == study.base else _name(study, best)
        return f"{name} is best in {metric} ({with_interval(mean)}{over_words([mean.n])})."
    if not results:
        return f"Inconclusive: {_few_scores(study, metric)}."
    counts = {verdict: [group for group in results if results[group].verdict == verdict] for verdict in VERDICTS}
    base = f"the base {_name(study, study.base)} in {metric}"
    if len(counts["inconclusive"]) == len(results):
        reasons = dict.fromkeys(result.reason for result in results.values())
        return f"Inconclusive: no variant is better or worse than {base} ({'; '.join(reasons)})."
    parts = [f"{len(groups)} {_are(groups)} {verdict}" for verdict, groups in counts.items() if groups]
    first, _, rest = parts[0].partition(" ")
    parts[0] = f"{first} of {_count(len(results), 'variant')} {rest}"
    return f"Against {base}, {listed(parts)}."


VERDICTS = ("better", "worse", "inconclusive")


def _few_scores(study: Variants, metric: str) -> str:
    """Why nothing is compared with the base."""
    scored = study.values[metric]
    if study.base is None:
        return f"{_count(len(scored), 'variant')} with {metric}, and no study names a base"
    if study.base not in scored:
        return f"the base {_name(study, study.base)} has no {metric}"
    return f"only the base {_name(study, study.base)} has {metric}"


def _against_base(study: Variants, metric: str) -> list[str]:
    """Better, worse and inconclusive variants, in one sentence."""
    if study.base is None or len(study.members) < 2:
        return []
    results = {group: result for group in study.members if (result := study.difference(metric, group))}
    if not results:
        return [f"Nothing is compared in {metric}: {_few_scores(study, metric)}."]
    scored = [group for group in study.members if group in study.values[metric]]
    base, start = f"the base {_name(study, study.base)}", f"Of {_count(len(scored), 'variant')}, "
    clauses = []
    for verdict in VERDICTS[:2]:
        if groups := [group for group, result in results.items() if result.verdict == verdict]:
            than = "it" if clauses else base
            means = [mean for group in groups if (mean := results[group].mean)]
            numbers = f"{'' if clauses else metric + ' '}{_numbers(means)}{over_words([mean.n for mean in means])}"
            clauses.append(f"{_names(study, groups)} {_are(groups)} {verdict} than {than} ({numbers})")
    if not clauses:
        start += f"none is better or worse than {base} in {metric}: "
    reasons: dict[str, list[str]] = {}
    for group, result in results.items():
        if result.verdict == "inconclusive":
            reasons.setdefault(result.reason, []).append(group)
    for reason, groups in reasons.items():
        why = _reason(reason, [results[group] for group in groups])
        clauses.append(f"{_names(study, groups)} {_are(groups)} inconclusive ({why})")
    if absent := [group for group in study.members if group not in study.values[metric]]:
        clauses.append(f"{_names(study, absent)} {'has' if len(absent) == 1 else 'have'} no score")
    return [start + "; ".join(clauses) + "."]


def _reason(reason: str, results: Sequence[Difference]) -> str:
    """The intervals if they include 0, or else the reason with the differences."""
    means = [result.mean for result in results if result.mean]
    if not means:
        return reason
    if reason == "the interval includes 0":
        return f"{_intervals(means)}{over_words([mean.n for mean in means])}"
    return f"{reason}; {difference_words(means)}"


def _best(study: Variants, metric: str) -> list[str]:
    """The best variant, or why there is none."""
    if len(study.values[metric]) < 2:
        return []
    best, why = study.best(metric)
    order = study.ranked(metric, study.values[metric])
    if best:
        first, second = (with_interval(mean_of(study.values[metric][group].values())) for group in order[:2])
        return [f"{_name(study, best)} is best in {metric}: {first} before {second} of {_name(study, order[1])}."]
    if why.startswith("the two best"):
        two = _names(study, order[:2])
        return [f"No variant is best in {metric}: {two} are not distinguishable{why[why.index(' (') :]}."]
    return [f"No variant is best in {metric}: {why}."] if why else []


def _best_values(study: Variants, metric: str) -> list[str]:
    """The best values of numeric axes, and whether they are the smallest or the largest one."""
    lines = study.evidence.scores[metric]
    if not better(metric) or rankable(study.evidence.runs, lines):
        return []
    text: dict[str, list[str]] = {}  # {sentence: the other axes of its lines}
    values = study.values[metric]
    for axis in study.axes:
        others = [other for other in study.axes if other != axis]
        lines_of: dict[str, list[str]] = {}
        for group in study.on_axes:
            if group in values and is_number(study.value(group, axis)):
                words = [_axis_word(study, other, study.value(group, other)) for other in others]
                lines_of.setdefault(", ".join(words), []).append(group)
        for line, groups in lines_of.items():
            numbers = [study.value(group, axis) for group in groups]
            best, *rest = study.ranked(metric, groups, common=True)
            place = study.value(best, axis)
            if len(set(numbers)) < FEWEST_VALUES:
                continue
            ends, tried = {max(numbers): "largest", min(numbers): "smallest"}, f"of {len(numbers)} tried"
            number = value_word(place)
            words = f"the {ends[place]} {tried}, {number}" if place in ends else f"{number} ({tried})"
            sentence = f"The best {axis_noun(axis)} in {metric} is {words}"
            result = difference(values[best], values[rest[0]], better(metric))
            if result.verdict != "better":
                second = value_word(study.value(rest[0], axis))
                sentence += f", which is not distinguishable from {second} ({result.reason})"
            text.setdefault(sentence, []).append(line)
    return [f"{sentence}, with {listed(each)}." if any(each) else f"{sentence}." for sentence, each in text.items()]


def _axis_word(study: Variants, axis: str, value: Any) -> str:
    return f"`{study.word(axis, value) if axis == 'model' else axis_word(axis, value)}`"


def _speeds(study: Variants) -> list[str]:
    """How fast variants are beside the base or the baseline, in training or else in forward passes."""
    rival = study.rival
    if rival is None or not study.timed.get(rival):
        return []
    text = []
    ratios = {group: _ratios(study, group, rival) for group in study.members if group != rival}
    modes = dict.fromkeys(mode for each in ratios.values() for mode, *_ in each)
    for mode in ("train", "forward"):
        if mode not in modes:
            continue
        cells = dict.fromkeys(cell for each in ratios.values() for cell in each if cell[0] == mode)
        for cell in cells:
            rows = {group: each[cell] for group, each in ratios.items() if cell in each}
            if len(rows) <= FEW:
                text += [_speed(study, group, rival, cell, points) for group, points in rows.items()]
            else:
                text.append(_speed_range(study, rival, cell, rows))
        break
    return text


def _ratios(study: Variants, group: str, rival: str) -> dict[tuple[Any, ...], list[Line]]:
    """{the values of `CELL` without the size: points} with `px`, `ratio` of images per second, and `flops_ratio`,
    ordered by size."""
    points: dict[tuple[Any, ...], list[Line]] = {}
    for cell, row in study.timed[group].items():
        if (other := study.timed[rival].get(cell)) and other["images_per_s"]:
            saved = other["flops"] / row["flops"] if other.get("flops") and row.get("flops") else None
            point = {"px": row["px"], "ratio": row["images_per_s"] / other["images_per_s"], "flops_ratio": saved}
            point["disturbed"] = bool(row.get("disturbed") or other.get("disturbed"))
            points.setdefault(cell[1:], []).append(point)
    return {cell: sorted(each, key=lambda point: point["px"]) for cell, each in points.items()}


def _speed(study: Variants, group: str, rival: str, cell: tuple[Any, ...], points: list[Line]) -> str:
    name, other, tail = _name(study, group), _name(study, rival), _circumstances(cell, points)
    mode = str(MODES.get(cell[0], cell[0])).lower()
    if len(points) > 1:
        words = crossing([point["px"] for point in points], [point["ratio"] for point in points], other)
        low, high = sorted(point["ratio"] for point in points)[:: len(points) - 1]
        return f"In {mode}, {name} {words}; it is {_times(low)} to {_times(high)} times as fast{tail}."
    (point,) = points
    saved = point["flops_ratio"]
    flops = "" if saved is None else f" (of {_times(saved)} times fewer FLOPs)"
    if saved is not None and saved < 0.995:
        flops = f" (with {_times(1 / saved)} times as many FLOPs)"
    elif saved is not None and saved < 1.005:
        flops = " (with as many FLOPs)"
    size = f"at {point['px']} px"
    return f"{name} is {_times(point['ratio'])} times as fast as {other} in {mode} {size}{flops}{tail}."


def _speed_range(study: Variants, rival: str, cell: tuple[Any, ...], rows: dict[str, list[Line]]) -> str:
    """The slowest and the fastest of many variants."""
    points = [(point["ratio"], point["px"], group) for group, each in rows.items() for point in each]
    (low, _, slow), (high, _, fast) = min(points), max(points)
    tail = _circumstances(cell, [point for each in rows.values() for point in each])
    sizes = sorted({px for _, px, _ in points})
    at = f"at {sizes[0]} px" if len(sizes) == 1 else f"from {sizes[0]} to {sizes[-1]} px"
    mode = str(MODES.get(cell[0], cell[0])).lower()
    return (
        f"In {mode} {at}, {len(rows)} variants are {_times(low)} ({_name(study, slow)}) to "
        f"{_times(high)} ({_name(study, fast)}) times as fast as {_name(study, rival)}{tail}."
    )


def _circumstances(cell: tuple[Any, ...], points: Sequence[Line]) -> str:
    """What a reader must know of a speed: recomputation, several GPUs, the device, and that other work disturbed it."""
    about = dict(zip(CELL[1:], cell, strict=True))
    words = [str(about["precision"]), *["checkpointed"] * bool(about["checkpointing"])]
    words.append(f"{about['processes'] or ''} × {about['device']}".lstrip(" ×"))
    words += [f"{about['cpu_threads']} threads"] * bool(about["cpu_threads"])
    disturbed = [point["disturbed"] for point in points]
    words += [("" if all(disturbed) else "some ") + "disturbed by other work"] * any(disturbed)
    return f", {', '.join(words)}"


def _missing(study: Variants) -> list[str]:
    """Planned runs without a score, and scores of runs that are not done."""
    metric = next(iter(study.metrics), None)
    lines = study.evidence.scores[metric] if metric else {}
    runs = sorted(study.evidence.runs, key=lambda run: run.info.get("place", inf))
    planned = [run for run in runs if run.info.get("trains", True)]
    if not planned or study.base is None:
        return []
    text = []
    absent, early = ([run for run in planned if wanted(run)] for wanted in (
        lambda run: run not in lines, lambda run: run in lines and study.states[run][0] != "done",
    ))  # fmt: skip
    for some, what in (
        (absent, f"{'has' if len(absent) == 1 else 'have'} no {metric or 'score'}"),
        (early, "has a score and is not done" if len(early) == 1 else "have a score and are not done"),
    ):
        states: dict[str, dict[str, list[Any]]] = {}
        for run in some:
            states.setdefault(study.states[run][0], {}).setdefault(run.group, []).append(run.info.get("seed"))
        parts = []
        for state, groups in states.items():
            names = [_name(study, group) + _seeds(seeds) * (group in study.members) for group, seeds in groups.items()]
            word = "trained" if state == "done" and some is absent else state
            parts.append(f"{sum(map(len, groups.values()))} {word} ({listed(names)})")
        if parts:
            text.append(f"{len(some)} of {_count(len(planned), 'planned run')} {what}: {'; '.join(parts)}.")
    return text


def _seeds(seeds: Sequence[Any]) -> str:
    numbers = [str(seed) for seed in dict.fromkeys(seeds) if seed is not None]
    return f" seed{'s' * (len(numbers) > 1)} {listed(numbers)}" if numbers else ""


def _name(study: Variants, group: str | None) -> str:
    return f"`{study.labels[group or '']}`"


def _names(study: Variants, groups: Sequence[str]) -> str:
    return listed([_name(study, group) for group in groups])


def difference_words(means: Sequence[Mean]) -> str:
    """Such as "differences -8 ± 10 and +5 ± 24"."""
    return f"difference{'s' * (len(means) > 1)} {_numbers(means)}"


def _numbers(means: Sequence[Mean]) -> str:
    """Differences with their intervals; of many, the range."""
    if len(means) <= MOST:
        return listed([with_interval(mean, "+") for mean in means])
    low, high = min(mean.value for mean in means), max(mean.value for mean in means)
    return f"{format(low, '+' + style_of(low, 3))} to {format(high, '+' + style_of(high, 3))}"


def _intervals(means: Sequence[Mean]) -> str:
    if len(means) > MOST:
        return "intervals that include 0"
    words = []
    for mean in means:
        least = min(abs(mean.low), abs(mean.high))  # so that neither end becomes 0
        style = "+" + max(style_of(mean.half or mean.value, 2), style_of(least or mean.value, 1), key=places_of)
        words.append(f"{format(mean.low, style)} to {format(mean.high, style)}")
    return f"interval{'s' * (len(words) > 1)} {listed(words)}"


def over_words(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f" over {_count(high, 'seed')}" if low == high else f" over {low} to {high} seeds"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _are(groups: Sequence[str]) -> str:
    return "is" if len(groups) == 1 else "are"


def _times(ratio: float) -> str:
    return format(ratio, style_of(ratio, 3))
