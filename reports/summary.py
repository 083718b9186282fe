"""The summary, one row per run, and the spread of its numbers over seeds."""

import re
import statistics

from .queries import better, group_labels, scores, setting_words, state_of, timings, words_of
from .runs import Line, Run
from .table import Column, Table, shortened

TIMED = (("speed", "forward", "Forward", 6), ("speed", "train", "Train", 6), ("sample", None, "Sampling", 8))


def summary(runs: list[Run]) -> Table:
    """One row per run: what it is, what it costs, how fast and how good it is, and how it ended."""
    labels = group_labels(runs)
    groups = [run.group for run in runs]
    speeds, speed_columns = _speeds(runs)
    marks = scores(runs)
    rows = []
    for run, group in zip(runs, groups, strict=True):
        cost = run.last("cost", state="done") or {}
        train = run.last("train", state="done") or {}
        state, error = state_of(run)
        seed = run.info.get("seed")
        row: Line = {key: run.info[key] for key in ("id", "study", "name", "family", "model", "title")}
        row["run"] = run
        row["variant"] = ", ".join(f"{axis}={value}" for axis, value in (run.info.get("variant") or {}).items())
        row |= {"seed": seed, "state": state, "error": error}
        row["status"] = f"{state} ({shortened(error)})" if error else state
        row |= {"group": group, "model_label": labels[group]}
        row["label"] = labels[group] + (f", seed {seed}" if groups.count(group) > 1 else "")
        row |= {key: cost.get(key) for key in ("params", "macs", "flops", "paper_gflops")}
        row |= {"final_loss": train.get("final_loss"), **speeds[run]}
        for name, by_run in marks.items():
            row |= {name: by_run.get(run, {}).get("value"), f"{name}_std": by_run.get(run, {}).get("std")}
        rows.append(row)
    columns = [Column(name) for name in ("study", "name", "id", "family", "model", "title", "variant", "seed")]
    if len({run.info["study"] for run in runs}) > 1:
        columns[0] = Column("study", "Study", rank=9)
    columns += [
        Column("label", "Model"),
        Column("params", "Params (M)", 1e6, 4, rank=1),
        Column("macs", "MACs (G)", 1e9, 4),
        Column("flops", "FLOPs (G)", 1e9, 4, rank=11),
        Column("paper_gflops", "Paper Gflops", 1.0, 4, rank=10),
        Column("final_loss", "Final loss", 1.0, 4, rank=2),
        *speed_columns,
    ]
    for place, name in enumerate(marks):
        columns.append(Column(name, name, 1.0, 4, better(name), spread=f"{name}_std", rank=min(7 * place, 12)))
        columns.append(Column(f"{name}_std"))
    columns += [Column("state"), Column("error"), Column(None, "State", key="status")]
    rows.sort(key=lambda row: (row["family"], row["macs"] is None, row["macs"], row["label"], row["study"], row["id"]))
    return Table("summary", "One row per run.", columns, rows)


def _speeds(runs: list[Run]) -> tuple[dict[Run, Line], list[Column]]:
    """The throughputs of each run, and their columns: one for every setting in which some run was timed."""
    rows: dict[Run, Line] = {run: {} for run in runs}
    columns = []
    for kind, mode, title, rank in TIMED:
        settings = timings(runs, kind, mode)
        for setting, lines in settings.items():
            words = setting_words(kind, setting, among=settings)
            stem, tail = mode or kind, re.sub(r"\W+", "_", f" {words}" if words else "")
            fields = ("images_per_s", "p20_ms", "p50_ms", "p80_ms", "peak_memory_gib") if mode else ("images_per_s",)
            heading = f"{title} (images/s{', ' + words if words else ''})"
            columns.append(Column(f"{stem}_images_per_s{tail}", heading, 1.0, 4, rank=rank))
            columns += [Column(f"{stem}_{field}{tail}") for field in fields[1:]]
            columns += [Column(f"{stem}_backend{tail}")]
            for run in runs:
                line = lines.get(run, {})
                rows[run] |= {f"{stem}_{field}{tail}": line.get(field) for field in fields}
                rows[run][f"{stem}_backend{tail}"] = words_of(line.get("backend"))
    return rows, columns


def seeds(overview: Table) -> Table:
    """Mean and sample standard deviation of each measured column of a summary, for variants with several seeds."""
    first = next(place for place, column in enumerate(overview.columns) if column.name == "final_loss")
    measured = [column for column in overview.columns[first:] if column.title and column.digits is not None]
    rows = []
    for group in dict.fromkeys(row["group"] for row in overview.rows):
        members = [row for row in overview.rows if row["group"] == group]
        if len(members) < 2:
            continue
        row: Line = {"label": members[0]["model_label"], "n": len(members)}
        for column in measured:
            values = [member[column.source] for member in members if member.get(column.source) is not None]
            row[f"{column.name}_mean"] = statistics.fmean(values) if values else None
            row[f"{column.name}_std"] = statistics.stdev(values) if len(values) > 1 else None
            row[f"{column.name}_n"] = len(values)
        rows.append(row)
    columns = [Column("label", "Model"), Column("n", "Seeds", digits=0)]
    for column in measured:
        name = column.name
        columns.append(Column(f"{name}_mean", column.title, 1.0, column.digits, column.best, spread=f"{name}_std"))
        columns += [Column(f"{name}_std"), Column(f"{name}_n")]
    return Table("seeds", "Mean and sample standard deviation over seeds.", columns, rows)
