"""The summary, one row per run."""

import re
from collections import Counter
from collections.abc import Iterable

from .differences import FEWEST
from .names import labels, shared
from .protocols import losses_words, notes, spread_of
from .queries import SAMPLING, better, scores, setting_words, state_of, timings, words_of
from .runs import Line, Run
from .speed import disturbances
from .table import DISTURBED, Column, Table, shortened

NOT_BOLD = f"No score is bold: single runs do not tell models apart, which takes {FEWEST} training seeds or more."
# A set of samples is timed whole: with the compilation of its first batch, and beside whatever else ran.
TIMED = (
    ("speed", "forward", "Forward", 6), ("speed", "train", "Train", 6), ("sample", None, "Sampling, start included", 8),
)  # fmt: skip


def summary(runs: list[Run]) -> Table:
    """One row per run: what it is, what it costs, how fast and how good it is, and how it ended.

    Its csv has the value of a score under its name, its standard deviation over subsets or splits of the samples as
    `NAME_subset_std` or `NAME_split_std`, its standard error from the choice of its images as `NAME_sampling_error`,
    and `generation_protocol`, the hash of how the samples were made. No score is bold, because one run distinguishes
    nothing.
    """
    label_of = labels(runs)
    members = Counter(run.group for run in runs)
    speeds, speed_columns, disturbed = _speeds(runs)
    marks = scores(runs)
    rows = []
    for run in runs:
        group = run.group
        cost = run.last("cost", state="done") or {}
        train = run.last("train", state="done") or {}
        state, error = state_of(run)
        seed = run.info.get("seed")
        row: Line = {key: run.info[key] for key in ("id", "study", "name", "family", "model", "title")}
        row["run"] = run
        row["variant"] = ", ".join(f"{axis}={value}" for axis, value in (run.info.get("variant") or {}).items())
        row |= {"seed": seed, "state": state, "error": error}
        row["status"] = f"{state} ({shortened(error)})" if error else state
        row |= {"group": group, "model_label": label_of[group]}
        row["label"] = label_of[group] + (f", {_seed_words(run)}" if members[group] > 1 else "")
        row |= {key: cost.get(key) for key in ("params", "macs", "flops", "paper_gflops")}
        row |= {"final_loss": train.get("final_loss"), **speeds[run]}
        for name, by_run in marks.items():
            line = by_run.get(run, {})
            row |= {name: line.get("value"), spread_column(name): line.get("std")}
            row[error_column(name)] = line.get("sampling_error")
            row["generation_protocol"] = row.get("generation_protocol") or line.get("generation_protocol")
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
        columns.append(Column(name, name, 1.0, 4, rank=min(7 * place, 12)))
        title = f"{name}, std over {spread_of(name)}"
        columns.append(Column(spread_column(name), title, 1.0, 3, rank=13))
        columns.append(Column(error_column(name), f"{name}, sampling s.e.", 1.0, 2, rank=14))
    columns += [
        Column("generation_protocol"),
        Column("state"),
        Column("error"),
        Column(None, "State", key="status", tex=False),
    ]
    rows.sort(key=lambda row: (row["family"], row["macs"] is None, row["macs"], row["label"], row["study"], row["id"]))
    caption = "One row per run" + (f" of {alike}" if (alike := shared(runs)) else "")
    ranked = any(better(name) and len(by_run) > 1 for name, by_run in marks.items())
    below = [*([NOT_BOLD] if ranked else []), *([SAMPLING] if has_errors(rows, marks) else [])]
    below += [text] if (text := losses_words(row["run"] for row in rows if row["final_loss"] is not None)) else []
    return Table("summary", f"{caption}.", columns, rows, [*below, *disturbed, *notes(runs, marks)])


def spread_column(metric: str) -> str:
    """The name of the column with a metric's own standard deviation, over subsets or splits of the samples."""
    return f"{metric}_{spread_of(metric)[:-1]}_std"


def error_column(metric: str) -> str:
    """The name of the column with a metric's standard error from the choice of its images alone."""
    return f"{metric}_sampling_error"


def has_errors(rows: Iterable[Line], metrics: Iterable[str]) -> bool:
    """Whether some row has the sampling error of a metric. Scores of earlier versions have none."""
    names = [error_column(name) for name in metrics]
    return any(row.get(name) is not None for row in rows for name in names)


def _seed_words(run: Run) -> str:
    """The seed of a run, and that of its samples if it is an axis."""
    sample = run.info["variant"].get("sample.seed")
    return f"seed {run.info.get('seed')}" + ("" if sample is None else f", sample seed {sample}")


def _speeds(runs: list[Run]) -> tuple[dict[Run, Line], list[Column], list[str]]:
    """The throughputs of each run, their columns (one for every setting in which some run was timed), and a note about
    those that were disturbed."""
    rows: dict[Run, Line] = {run: {} for run in runs}
    columns, used = [], []
    for kind, mode, title, rank in TIMED:
        settings = timings(runs, kind, mode)
        for setting, lines in settings.items():
            words = setting_words(kind, setting, among=settings)
            stem, tail = mode or kind, re.sub(r"\W+", "_", f" {words}" if words else "")
            fields = ("images_per_s", "p20_ms", "p50_ms", "p80_ms", "peak_memory_gib") if mode else ("images_per_s",)
            heading = f"{title} (images/s{', ' + words if words else ''})"
            mark = f"{stem}_mark{tail}"
            columns.append(Column(f"{stem}_images_per_s{tail}", heading, 1.0, 4, mark=mark, rank=rank))
            columns += [Column(f"{stem}_{field}{tail}") for field in fields[1:]]
            columns += [Column(f"{stem}_backend{tail}")]
            for run in runs:
                line = lines.get(run, {})
                rows[run] |= {f"{stem}_{field}{tail}": line.get(field) for field in fields}
                rows[run][f"{stem}_backend{tail}"] = words_of(line.get("backend"))
                rows[run][mark] = DISTURBED if line.get("disturbed") else ""
                used += [line]
    return rows, columns, disturbances(used)
