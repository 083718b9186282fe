"""The table of where runs come from."""

from ..harness.record import STAGE_OF
from .queries import state_of, words_of
from .runs import Run
from .table import Column, Table, shortened


def origins(runs: list[Run]) -> Table:
    """Where each run comes from: commit, machine, versions, training settings, and how it ended."""
    rows = []
    for run in runs:
        train = run.last("train", state="done") or {}
        origin = run.last("convert", state="done") or {}
        config = {} if origin else (run.info.get("config") or {}).get("train") or {}
        where = (train or (run.rows or [{}])[-1]).get("provenance") or {}
        commit = str(where.get("commit") or "")
        state, error = state_of(run)
        kinds = {row["kind"] for row in run.rows if row["state"] == "done"}
        precisions = {row["precision"] for row in run.rows if row["kind"] in ("speed", "operator_speed")} - {None}
        stages = dict.fromkeys(stage for kind, stage in STAGE_OF.items() if kind in kinds)
        reached = run.metrics[-1].get("step") if run.metrics else None
        rows.append({
            "run": run,
            **{key: run.info.get(key) for key in ("id", "study", "name", "seed")},
            "commit": commit, "dirty": where.get("dirty"),
            "short": commit[:12] + (" + dirty" if where.get("dirty") else ""),
            **{key: where.get(key) for key in ("device", "host", "driver", "torch", "python", "lamabench")},
            "backend": words_of(train.get("backend")),
            "precision": train.get("precision") or config.get("precision") or ", ".join(sorted(precisions)),
            "steps": train.get("steps") or reached,
            "batch_size": train.get("batch_size") or config.get("batch_size"),
            "file": origin.get("file"), "sha256": origin.get("sha256"), "weights_of": origin.get("source"),
            "weights": origin and f"{origin['source']}: {origin['file']}, SHA-256 {origin['sha256'][:12]}",
            "stages": ", ".join(stages), "state": state, "error": error, "brief": shortened(error),
        })  # fmt: skip
    columns = [
        Column("id", "Run", tex=False),
        Column("study", "Study", rank=5),
        Column("name", "Name"),
        Column("commit"),
    ]
    columns += [Column("dirty")]
    columns += [Column(None, "Commit", key="short"), Column("device", "Device"), Column("host"), Column("driver")]
    columns += [
        Column("torch", "torch", rank=3),
        Column("python"),
        Column("lamabench"),
        Column("backend", "Backend", rank=6),
    ]
    columns += [Column("precision", "Precision"), Column("steps", "Steps", digits=0)]
    columns += [Column("batch_size", "Batch", digits=0), Column("seed", "Seed", digits=0)]
    columns += [Column("stages", "Stages done", rank=4)]
    if any(row["weights"] for row in rows):
        columns += [Column("weights_of"), Column("file"), Column("sha256")]
        columns += [Column(None, "Released weights", key="weights", rank=2, tex=False)]
    columns += [Column("state", "State", tex=False), Column("error"), Column(None, "Error", key="brief", tex=False)]
    return Table("runs", "Where the runs come from.", columns, rows)
