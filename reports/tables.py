"""Records to tables: what a run came to, what its model costs, how seeds scatter, where it ran."""

import re
import statistics
from pathlib import Path

from ..harness.record import Run
from .queries import Row, backend_words, better, group_labels, group_of, scores, setting_words, state_of, timings
from .table import Column, Table, shortened

PARTS = ("ssm", "scan", "attention", "mlp", "conditioning", "rest")
TIMED = (("bench", "forward", "Forward", 6), ("bench", "train", "Train", 6), ("sample", None, "Sampling", 8))


def summary(runs: list[Run]) -> Table:
    """One row a run: what it is, what it costs, how fast and how good it was, and how it ended."""
    labels = group_labels(runs)
    groups = [group_of(run) for run in runs]
    speeds, speed_columns = _speeds(runs)
    marks = scores(runs)
    rows = []
    for run, group in zip(runs, groups, strict=True):
        cost = run.last("cost", state="done") or {}
        train = run.last("train", state="done") or {}
        state, error = state_of(run)
        seed = run.info.get("seed")
        row: Row = {key: run.info[key] for key in ("id", "study", "name", "family", "model", "title")}
        row["folder"] = run.path
        row["variant"] = ", ".join(f"{axis}={value}" for axis, value in (run.info.get("variant") or {}).items())
        row |= {"seed": seed, "state": state, "error": error}
        row["status"] = f"{state} ({shortened(error)})" if error else state
        row |= {"group": group, "model_label": labels[group]}
        row["label"] = labels[group] + (f", seed {seed}" if groups.count(group) > 1 else "")
        row |= {key: cost.get(key) for key in ("params", "macs", "flops", "paper_gflops")}
        row |= {"final_loss": train.get("final_loss"), **speeds[run.path]}
        for name, found in marks.items():
            row |= {name: found.get(run.path, {}).get("value"), f"{name}_std": found.get(run.path, {}).get("std")}
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
    return Table("summary", "One row a run.", columns, rows)


def _speeds(runs: list[Run]) -> tuple[dict[Path, Row], list[Column]]:
    """Each run's throughputs and their columns: one for every setting that some run was timed under."""
    rows: dict[Path, Row] = {run.path: {} for run in runs}
    columns = []
    for kind, mode, title, rank in TIMED:
        found = timings(runs, kind, mode)
        for setting, lines in found.items():
            words = setting_words(kind, setting, among=found)
            stem, tail = mode or kind, re.sub(r"\W+", "_", f" {words}" if words else "")
            fields = ("images_per_s", "p20_ms", "p50_ms", "p80_ms", "peak_memory_gib") if mode else ("images_per_s",)
            heading = f"{title} (images/s{', ' + words if words else ''})"
            columns.append(Column(f"{stem}_images_per_s{tail}", heading, 1.0, 4, rank=rank))
            columns += [Column(f"{stem}_{field}{tail}") for field in fields[1:]]
            columns += [Column(f"{stem}_backend{tail}")]
            for run in runs:
                line = lines.get(run.path, {})
                rows[run.path] |= {f"{stem}_{field}{tail}": line.get(field) for field in fields}
                rows[run.path][f"{stem}_backend{tail}"] = backend_words(line)
    return rows, columns


def seeds(overview: Table) -> Table:
    """Mean and sample standard deviation of every measured column of a summary, for variants with several seeds."""
    first = next(place for place, column in enumerate(overview.columns) if column.name == "final_loss")
    measured = [column for column in overview.columns[first:] if column.title and column.digits is not None]
    rows = []
    for group in dict.fromkeys(row["group"] for row in overview.rows):
        members = [row for row in overview.rows if row["group"] == group]
        if len(members) < 2:
            continue
        row: Row = {"label": members[0]["model_label"], "n": len(members)}
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


def costs(runs: list[Run]) -> Table:
    """Where each distinct model spends its parameters, MACs and FLOPs; the last row of a model is their sum."""
    labels = group_labels(runs)
    seen: dict[str, tuple[Row, list[str]]] = {}
    for run in runs:
        if line := run.last("cost", state="done"):
            counts = {key: line.get(key) for key in ("params", "macs", "flops", "parts")}
            seen.setdefault(f"{run.info['title']} {counts}", (line, []))[1].append(labels[group_of(run)])
    rows = []
    for line, sharing in sorted(seen.values(), key=lambda item: (item[0]["macs"], item[1])):
        alike = len(set(sharing)) - 1  # variants that cost the same, such as two orders of a scan
        label = sharing[0] + (f" and {alike} alike" if alike else "")
        parts = line.get("parts") or {}
        for part in [*sorted(parts, key=lambda part: PARTS.index(part) if part in PARTS else -1), "total"]:
            counts = line if part == "total" else parts[part]
            if not any(counts[key] for key in ("params", "macs", "flops")):
                continue
            row: Row = {"label": label, "part": part, **{key: counts[key] for key in ("params", "macs", "flops")}}
            for key in ("params", "macs", "flops"):
                row[f"{key}_percent"] = 100 * counts[key] / line[key] if line[key] else None
            rows.append(row)
    columns = [Column("label", "Model"), Column("part", "Part")]
    for key, title, unit in (("params", "Params (M)", 1e6), ("macs", "MACs (G)", 1e9), ("flops", "FLOPs (G)", 1e9)):
        columns += [Column(key, title, unit, 4), Column(f"{key}_percent", f"{title[:-4]} (%)", 1.0, 3)]
    return Table("cost", "Parameters, MACs and FLOPs of one forward pass of one image, by part.", columns, rows)


def origins(runs: list[Run]) -> Table:
    """Where every run comes from: commit, machine, versions, training settings, and how it ended."""
    rows = []
    for run in runs:
        train = run.last("train", state="done") or {}
        config = (run.info.get("config") or {}).get("train") or {}
        where = (train or (run.records or [{}])[-1]).get("provenance") or {}
        commit = str(where.get("commit") or "")
        state, error = state_of(run)
        stages = dict.fromkeys(line["kind"] for line in run.records if line["state"] == "done")
        reached = run.metrics[-1].get("step") if run.metrics else None
        rows.append({
            **{key: run.info.get(key) for key in ("id", "study", "name", "seed")},
            "commit": commit, "dirty": where.get("dirty"),
            "short": commit[:12] + (" + dirty" if where.get("dirty") else ""),
            **{key: where.get(key) for key in ("device", "host", "driver", "torch", "python", "lamabench")},
            "backend": backend_words(train),
            "precision": train.get("precision") or config.get("precision"),
            "steps": train.get("steps") or reached,
            "batch_size": train.get("batch_size") or config.get("batch_size"),
            "stages": ", ".join(stages), "state": state, "error": error, "brief": shortened(error),
        })  # fmt: skip
    columns = [Column("id", "Run"), Column("study", "Study"), Column("name", "Name"), Column("commit"), Column("dirty")]
    columns += [Column(None, "Commit", key="short"), Column("device", "Device"), Column("host"), Column("driver")]
    columns += [Column("torch", "torch"), Column("python"), Column("lamabench"), Column("backend", "Backend")]
    columns += [Column("precision", "Precision"), Column("steps", "Steps", digits=0)]
    columns += [Column("batch_size", "Batch", digits=0), Column("seed", "Seed", digits=0)]
    columns += [Column("stages", "Stages done")]
    columns += [Column("state", "State"), Column("error"), Column(None, "Error", key="brief")]
    return Table("runs", "Where the runs come from.", columns, rows)
