"""Tables of ablations: one a study, each variant beside the base, and a pivot of the first metric over two axes."""

import re
from collections.abc import Mapping, Sequence

from .differences import FEWEST, Mean, Together, count_of, mean_of
from .evidence import Evidence
from .names import axis_noun, shared
from .protocols import notes
from .published import PublishedVariant
from .queries import better
from .runs import Line
from .seeds import MARK, NOTE
from .speed import MODES
from .state_of_the_art import source_words, unchecked
from .table import Column, Table, shortened
from .variants import Variants, of_study

DIFFERENCE = (
    "Δ: the difference to the base (the first variant of the study's file) over common training seeds, ± half its 95 % "
    f"interval; better or worse if that excludes 0 and there are {FEWEST} common seeds or more."
)
TOGETHER = (
    "Δ together: the difference of the means, with 95 % intervals that hold for all {} variants of two seeds or more "
    "together (Bonferroni's correction), if the trainings of each vary alike. Seeds are not paired; the standard "
    "deviation over seeds is pooled: {}, {} degrees of freedom (of one variant {} to {}). It gives no verdict."
)
UNLIKE = (
    "No intervals that hold for all variants together, because trainings of the variants do not vary alike (standard "
    "deviations over seeds {} to {}; Bartlett's test: p = {})."
)
MANY = (
    "Each verdict is at a level of 95 %: of variants that do not differ from the base, one in twenty is called better "
    "or worse. Here are {}."
)
FASTEST = "Speed over that of the base: images per second, each variant at its fastest batch and compile mode"
COUNTS = (("params", "Params (M)", 1e6), ("macs", "MACs (G)", 1e9), ("flops", "FLOPs (G)", 1e9))


def ablations(evidence: Evidence) -> list[Table]:
    """`ablation_STUDY` for each study with a file and several variants, and `ablation_STUDY_METRIC`, a pivot of the
    first metric, if exactly two axes of the study have several values; and `ablation_STUDY_published`, if papers have
    asked the same. Published variants have a table of their own, because they were trained on other data.

    Rows are in the order of the study's file. Columns of the csv: `label`, `base` (whether it is the base), the axes,
    `n` (training seeds); `params`, `macs`, `flops`, and `macs_ratio`, that over the base's; for each score `NAME_mean`,
    `NAME_ci95`, `NAME_n`, `NAME_difference`, `NAME_difference_ci95`, `NAME_difference_n` (common seeds),
    `NAME_verdict` and `NAME_reason`; of the first score `NAME_together`, `NAME_together_ci95` and `NAME_together_n`
    (seeds of the variant), as `differences.together` has them; images per second of each mode and circumstances in
    which the base was timed too, over those of the base (`MODE_ratio…`); `state` and `error`.
    """
    tables = []
    for name, study in of_study(evidence).items():
        tables.append(ablation(name, study))
        if len(study.axes) == 2 and study.values:
            tables.append(pivot(name, study))
        if rows := [row for row in evidence.published.ablations if row.study == name]:
            tables.append(twin(name, rows))
    return tables


def ablation(name: str, study: Variants) -> Table:
    """The variants of one study, a row each."""
    rows: dict[str, Line] = {group: _about(study, group) for group in study.members}
    columns = [
        Column("label", "Variant", width=34), Column("base"), *(Column(axis) for axis in study.axes),
        Column("n", "Seeds", digits=0, rank=5),
    ]  # fmt: skip
    columns += [Column(key, title, unit, 4, rank=6 + place) for place, (key, title, unit) in enumerate(COUNTS[:2])]
    differ = len({row["macs_ratio"] for row in rows.values()}) > 1
    columns += [Column("flops"), Column("macs_ratio", "MACs, ×" if differ else None, digits=3, rank=4)]
    below = [NOTE, DIFFERENCE] if study.values else []
    reasons: dict[str, list[str]] = {}
    unnamed: dict[str, list[str]] = {}
    for place, metric in enumerate(study.values):
        for group in study.members:
            rows[group] |= _scores(study, metric, group)
            if reason := rows[group].get(f"{metric}_reason"):
                reasons.setdefault(reason, []).append(study.labels[group])
        best, why = study.best(metric)
        if best:
            rows[best][f"{metric}_bold"] = True
        elif why:
            unnamed.setdefault(why, []).append(metric)
        columns += _columns(metric, place)
        if place == 0 and (together := study.together(metric)):
            columns += _together(metric, rows, together.means)
            below.append(_together_words(together))
    compared = sum(any(row.get(f"{metric}_verdict") for metric in study.values) for row in rows.values())
    below += [MANY.format(compared)] if compared > 5 else []
    below += [f"Inconclusive: {reason} ({_some(names)})." for reason, names in reasons.items()]
    below += [f"No best is bold, because {why}: {', '.join(names)}." for why, names in unnamed.items()]
    speeds, remarks = _speeds(study, rows)
    columns += [*speeds, Column("state"), Column("error"), Column(None, "State", key="status", tex=False)]
    below += [*remarks, *_errors(study), *notes(study.evidence.runs, study.evidence.scores)]
    return Table(f"ablation_{plain(name)}", caption(name, study), columns, list(rows.values()), below)


def pivot(name: str, study: Variants) -> Table:
    """The first metric over two axes: rows are the values of the first, columns those of the second."""
    metric = next(iter(study.values))
    down, across = study.axes
    best, why = study.best(metric)
    groups = {(str(study.value(group, down)), str(study.value(group, across))): group for group in study.on_axes}
    words = {str(value): study.word(across, value) for value in study.axes[across]}
    rows: list[Line] = []
    for value in study.axes[down]:
        row: Line = {down: study.word(down, value)}
        for other, word in words.items():
            if group := groups.get((str(value), other)):
                row |= _cell(study, metric, group, word) | {f"{word}_bold": group == best}
        rows.append(row)
    seeds = max((row.get(f"{word}_n") or 0 for row in rows for word in words.values()), default=0)
    rows = [{**row, "n": seeds} for row in rows]
    columns = [Column(down, axis_noun(down))]
    for word in words.values():
        columns.append(Column(f"{word}_mean", word, 1.0, 4, f"{word}_ci95", f"{word}_bold", f"{word}_mark"))
        columns += [Column(f"{word}_{key}") for key in ("ci95", "n", "verdict")]
    inconclusive = any(row.get(f"{word}_verdict") == "inconclusive" for row in rows for word in words.values())
    below = [f"{NOTE} n is {seeds} unless a cell has another.", *([MARK] if inconclusive else [])]
    below += [f"No best is bold, because {why}."] if why else []
    below += notes(study.evidence.runs, {metric: study.evidence.scores[metric]})
    order = {"min": ", lower is better", "max": ", higher is better", "": ""}[better(metric)]
    text = f"{metric}{order}: {axis_noun(down)} (rows) and {axis_noun(across)} (columns) of "
    text += caption(name, study, "study")
    return Table(f"ablation_{plain(name)}_{plain(metric)}", text, columns, rows, below)


def twin(name: str, rows: Sequence[PublishedVariant]) -> Table:
    """What papers print about the question of a study."""
    columns = [
        Column("label", "Variant"), Column("model", "Model"), Column("fid", "FID", 1.0, 6, places=2),
        Column("source", "Source"),
    ]  # fmt: skip
    lines = [{"label": row.variant, "model": row.model, "fid": row.fid, "source": source_words(row)} for row in rows]
    text = f"Published variants that ask what study {name} asks: FID of ImageNet at 256 px after 400K steps."
    below = ["Each is a single training by others. They do not compare with the numbers of these runs."]
    return Table(f"ablation_{plain(name)}_published", text, columns, lines, below + unchecked(rows))


def _cell(study: Variants, metric: str, group: str, word: str) -> Line:
    """A cell of a pivot, under names that begin with `word`."""
    scores = _scores(study, metric, group)
    verdict = scores.get(f"{metric}_verdict")
    mark = " (base)" if group == study.base else " †" if verdict == "inconclusive" else ""
    marked = study.marked(metric, group) if scores else study.state(group)
    cell: Line = {f"{word}_{key}": scores.get(f"{metric}_{key}") for key in ("mean", "ci95", "n", "verdict")}
    return cell | {f"{word}_mark": mark + (f" ({marked})" if scores else marked) * bool(marked)}


def caption(name: str, study: Variants, start: str = "Study") -> str:
    """The study, what its variants share, and its question."""
    about = study.evidence.runs[0].info.get("about") or {}
    common = shared(study.evidence.runs)
    return f"{start} {name}{f' ({common})' if common else ''}" + (
        f": {about['question']}" if about.get("question") else "."
    )


def plain(text: str) -> str:
    """A name as part of the name of a file."""
    return re.sub(r"[^\w.=-]+", "_", text)


def _about(study: Variants, group: str) -> Line:
    """What a row says of a variant besides scores and speed."""
    cost, base = study.cost(group), study.cost(study.base or "")
    label = study.labels[group] + (" (base)" if group == study.base else "")
    row: Line = {"label": label, "group": group, "base": group == study.base}
    row |= {axis: study.value(group, axis) for axis in study.axes}
    row["n"] = max((count_of(values.get(group, {})) for values in study.values.values()), default=None)
    row |= {key: cost.get(key) for key, *_ in COUNTS}
    row["macs_ratio"] = cost["macs"] / base["macs"] if cost and base and base["macs"] else None
    row["status"] = study.state(group)
    states = {state for state, _ in study.not_done(group).values()}
    row["state"] = "done" if not states else row["status"] if len({row["status"], *states}) == 1 else "incomplete"
    row["error"] = "; ".join(dict.fromkeys(error for _, error in study.not_done(group).values() if error)) or None
    return row


def _scores(study: Variants, metric: str, group: str) -> Line:
    """The mean of a score, and its difference to the base with a verdict; empty without a score."""
    if group not in study.values[metric]:
        return {}
    numbers = study.values[metric][group]
    mean, marked = mean_of(numbers.values()), study.marked(metric, group)
    row: Line = {f"{metric}_mean": mean.value, f"{metric}_ci95": mean.half, f"{metric}_n": count_of(numbers)}
    row |= {f"{metric}_mark": f" ({marked})" if marked else "", f"{metric}_difference_mark": ""}
    if group == study.base:
        row[f"{metric}_difference_mark"] = "base"
    elif result := study.difference(metric, group):
        row |= _difference(metric, result.mean) | {f"{metric}_verdict": result.verdict}
        row |= {f"{metric}_reason": result.reason or None, f"{metric}_difference_mark": f" {result.verdict}"}
    return row


def _difference(metric: str, mean: Mean | None) -> Line:
    if mean is None:
        return {f"{metric}_difference_n": 0}
    numbers = {"difference": mean.value, "difference_ci95": mean.half, "difference_n": mean.n}
    return {f"{metric}_{key}": value for key, value in numbers.items()}


def _together(metric: str, rows: dict[str, Line], differences: Mapping[str, Mean]) -> list[Column]:
    """The column of the differences to the base that hold together, which are written into the rows."""
    name = f"{metric}_together"
    for group, mean in differences.items():
        rows[group] |= {name: mean.value, f"{name}_ci95": mean.half, f"{name}_n": mean.n}
    column = Column(name, "Δ together", 1.0, 4, f"{name}_ci95", rank=8, sign="+")
    return [column, Column(f"{name}_ci95"), Column(f"{name}_n")]


def _together_words(together: Together) -> str:
    number = "{:.3g}".format
    spread = number(together.smallest), number(together.largest)
    if not together.means:
        return UNLIKE.format(*spread, f"{together.alike:.1g}")
    return TOGETHER.format(len(together.means), number(together.deviation), together.freedom, *spread)


def _columns(metric: str, place: int) -> list[Column]:
    """The mean and the difference of a metric; the first one stays longest where there is little room."""
    rank = 0 if place == 0 else min(8 + 2 * place, 18)
    mean = Column(f"{metric}_mean", metric, 1.0, 4, f"{metric}_ci95", f"{metric}_bold", f"{metric}_mark", rank)
    difference = Column(
        f"{metric}_difference", f"Δ {metric}", 1.0, 3, f"{metric}_difference_ci95", "", f"{metric}_difference_mark",
        rank + bool(place), sign="+",
    )  # fmt: skip
    others = [Column(f"{metric}_{key}") for key in ("difference_ci95", "difference_n", "verdict", "reason")]
    return [mean, Column(f"{metric}_ci95"), Column(f"{metric}_n"), difference, *others]


def _speeds(study: Variants, rows: dict[str, Line]) -> tuple[list[Column], list[str]]:
    """Columns of speed over that of the base, one for each mode, size, precision, device and number of processes in
    which the base was timed, and what stands below. Adds the cells to `rows`."""
    timed = study.timed
    cells = [
        cell for cell in timed[study.base or ""] if any(cell in timed[group] for group in rows if group != study.base)
    ]
    columns = []
    for cell in cells:
        first = timed[study.base or ""][cell]
        words = _circumstances(first, [timed[study.base or ""][other] for other in cells])
        name = f"{first['mode']}_ratio" + "".join(f"_{word}" for word in re.findall(r"\w+", words))
        title = f"{MODES.get(first['mode'], first['mode'])}, ×" + (f" ({words})" if words else "")
        for group, row in rows.items():
            if (line := timed[group].get(cell)) and first["images_per_s"]:
                row[name] = line["images_per_s"] / first["images_per_s"]
                disturbed = line.get("disturbed") or first.get("disturbed")
                row[f"{name}_mark"] = " (disturbed)" if disturbed else ""
                row[f"{name}_images_per_s"] = line["images_per_s"]
        show = first["mode"] == "train" or not any(timed[study.base or ""][other]["mode"] == "train" for other in cells)
        columns.append(Column(name, title if show else None, digits=3, mark=f"{name}_mark", rank=3))
        columns.append(Column(f"{name}_images_per_s"))
    if not cells:
        return [], []
    same = _same([timed[study.base or ""][cell] for cell in cells])
    remarks = [f"{FASTEST}{f': {same}' if same else ''}."]
    if any("(disturbed)" in str(value) for row in rows.values() for value in row.values()):
        remarks.append(
            "Disturbed: other work kept the host busy, so that a time of this variant or the base may be long."
        )
    return columns, remarks


def _words(row: Line) -> Line:
    return {
        "size": f"{row['px']} px",
        "precision": str(row["precision"]),
        "processes": f"{row['processes'] or 1} GPUs" if (row["processes"] or 1) > 1 else "",
        "checkpointing": "checkpointed" if row["checkpointing"] else "",
        "device": str(row["device"]),
        "threads": f"{row['cpu_threads']} threads" if row["cpu_threads"] else "",
    }


def _circumstances(row: Line, among: Sequence[Line]) -> str:
    """In what a timing differs from others of its mode."""
    rivals = [_words(other) for other in among if other["mode"] == row["mode"]]
    return ", ".join(word for key, word in _words(row).items() if word and len({other[key] for other in rivals}) > 1)


def _same(among: Sequence[Line]) -> str:
    rivals = [_words(row) for row in among]
    return ", ".join(word for key, word in rivals[0].items() if word and len({other[key] for other in rivals}) == 1)


def _errors(study: Variants) -> list[str]:
    """A line for each error, with the runs that ended with it."""
    runs: dict[str, list[str]] = {}
    for group in study.members:
        for run, (state, error) in study.not_done(group).items():
            if error:
                runs.setdefault(f"({state}): {shortened(error)}", []).append(run)
    lines = [f"{_some(names)} {error}" for error, names in runs.items()]
    lines += [f"{run.info['name']} is left out: {shortened(run.damage)}" for run in study.damaged]
    return [*lines[:4], *([f"And {len(lines) - 4} more errors: table runs."] if len(lines) > 4 else [])]


def _some(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
