"""The table of what models cost, by part."""

from .names import labels
from .runs import Line, Run
from .table import Column, Table

FVCORE = (
    "fvcore: multiply-adds of the products that fvcore knows, and operations of norms and resampling, as papers print "
    "them. It counts nothing for the operators that it skips."
)


def costs(runs: list[Run]) -> Table:
    """Parameters, MACs and FLOPs of each distinct model by part; the last row of a model is the sum. Beside it is what
    fvcore counts, and what it skips, if that is on record."""
    label_of = labels(runs)
    models: dict[str, tuple[Line, list[str]]] = {}
    for run in runs:
        if line := run.last("cost", state="done"):
            counts = {key: line.get(key) for key in ("params", "macs", "flops", "parts")}
            first, sharing = models.get(f"{run.info['title']} {counts}", (line, []))
            line = line if first.get("fvcore") is None else first
            models[f"{run.info['title']} {counts}"] = (line, [*sharing, label_of[run.group]])
    rows = []
    for line, sharing in sorted(models.values(), key=lambda item: (item[0]["macs"], item[1])):
        alike = len(set(sharing)) - 1  # other variants of the same cost, such as another order of the scan
        label = sharing[0] + (f" and {alike} alike" if alike else "")
        parts = line.get("parts") or {}
        for part in [*parts, "total"]:
            counts = line if part == "total" else parts[part]
            if not any(counts[key] for key in ("params", "macs", "flops")):
                continue
            row: Line = {"label": label, "part": part, **{key: counts[key] for key in ("params", "macs", "flops")}}
            row |= {"provenance": line.get("provenance"), "time": line.get("time")}
            if part == "total":
                row |= {key: line.get(key) for key in ("fvcore", "fvcore_skips")}
            for key in ("params", "macs", "flops"):
                row[f"{key}_percent"] = 100 * counts[key] / line[key] if line[key] else None
            rows.append(row)
    columns = [Column("label", "Model"), Column("part", "Part")]
    for key, title, unit in (("params", "Params (M)", 1e6), ("macs", "MACs (G)", 1e9), ("flops", "FLOPs (G)", 1e9)):
        columns += [Column(key, title, unit, 4), Column(f"{key}_percent", f"{title[:-4]} (%)", 1.0, 3)]
    columns += [
        Column("fvcore", "fvcore (G)", 1e9, 4, rank=2),
        Column("fvcore_skips", "fvcore skips", rank=3, width=24),
    ]
    notes = [FVCORE] if any(row.get("fvcore") for row in rows) else []
    return Table("cost", "Parameters, MACs and FLOPs of one forward pass of one image, by part.", columns, rows, notes)
