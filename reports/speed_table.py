"""The table of speed of a paper: one row per model and size of the image, forward and training side by side."""

from .circumstances import circumstances
from .runs import Line, Run
from .speed import HARDWARE, MODES, apart, baseline_of, compared, crossings, disturbances, fastest, measurements
from .table import DISTURBED, Column, Table, shortened


def speed(runs: list[Run], baseline: str | None = None) -> list[Table]:
    """A table for each hardware, precision, number of GPUs and kind of checkpointing, with one row per model and size.

    For a forward pass (`forward_…`) and a training step (`train_…`): `images_per_s` of the fastest batch and compile
    mode and, of that measurement, `batch_size`, `compile` and `mfu`; `speed_up` over the baseline and `realised`, the
    speed-up over `flops_ratio`, the FLOPs of the baseline over those of the model. `train_memory_gib` is the peak
    memory of a training step at `memory_batch` and `memory_compile`, at which most models of that size were measured.

    Raises InputError if the named baseline was not measured.
    """
    measured = measurements(runs)
    name = baseline_of(measured, baseline)
    parts = apart(measured, (*HARDWARE, "processes", "checkpointing"))
    return [_speed(rows, name, where, ending) for where, ending, rows in parts]


def _speed(measured: list[Line], name: str | None, where: str, ending: str) -> Table:
    groups: dict[tuple[int, str], list[Line]] = {}
    for line in measured:
        groups.setdefault((line["px"], line["group"]), []).append(line)
    rivals = {(line["px"], line["mode"]): [] for line in measured}
    for line in measured:
        if line["model"] == name:
            rivals[line["px"], line["mode"]].append(line)
    rows, shown = [], []
    for (px, _), lines in groups.items():
        first = lines[0]
        row: Line = {key: first[key] for key in ("group", "label", "study", "id", "family", "model", "title", "px")}
        row |= {key: first.get(key) for key in ("macs", "flops", "input_size")} | {"state": "done", "error": None}
        row["records"] = {}
        for mode in MODES:
            of_mode = [line for line in lines if line["mode"] == mode]
            if best := fastest(of_mode):
                _fill(row, mode, best, fastest(rivals[px, mode]))
                shown.append(best)
            elif of_mode:  # an error says more than a batch that is too large
                worst = max(of_mode, key=lambda line: line["state"] != "oom")
                row |= {f"{mode}_mark": worst["state"], "state": worst["state"], "error": worst.get("error")}
        row["status"] = row["state"] + (f" ({shortened(row['error'])})" if row["error"] else "")
        rows.append(row)
    for px in {row["px"] for row in rows}:
        _compare_memory([row for row in rows if row["px"] == px], groups)
    rows.sort(key=lambda row: (row["px"], row["model"] != name, row["family"], row["flops"] or 0, row["label"]))
    columns = [Column(key) for key in ("study", "id", "family", "model", "title", "macs")]
    columns += [Column("label", "Model"), Column("px", "Pixels", digits=0), Column("input_size")]
    columns += [Column("flops", "FLOPs (G)", 1e9, 4, rank=7), Column("flops_ratio", "FLOPs saved, ×", digits=3, rank=4)]
    for mode, title in MODES.items():
        columns += [
            Column(f"{mode}_images_per_s", f"{title} (images/s)", digits=4, mark=f"{mode}_mark"),
            Column(f"{mode}_mfu", f"{title} MFU (%)", 0.01, 3, mark=f"{mode}_mfu_mark", rank=6),
            Column(f"{mode}_speed_up", f"{title} speed-up", digits=3, mark=f"{mode}_compared_mark", rank=5),
            Column(f"{mode}_realised", f"{title} realised", digits=3, mark=f"{mode}_compared_mark", rank=2),
            *(
                Column(f"{mode}_{key}")
                for key in ("batch_size", "compile", "backend", "commit", "p20_ms", "p80_ms", "disturbed")
            ),
        ]
    columns += [Column("train_memory_gib", "Training memory (GiB)", digits=3, rank=3)]
    columns += [Column("memory_batch", "at batch", digits=0, rank=8), Column("memory_compile")]
    columns += [Column("state"), Column("error"), Column(None, "State", key="status", tex=False)]
    title = next((row["title"] for row in rows if row["model"] == name), None)
    notes = [*_terms(title, rows), *crossings(measured, name), *disturbances(shown), *circumstances(shown)]
    return Table(f"speed{ending}", f"Speed and memory of models on {where}.", columns, rows, notes)


def _fill(row: Line, mode: str, best: Line, rival: Line | None) -> None:
    """Fill in the columns of a mode: its fastest measurement, compared with that of the baseline."""
    fields = ("images_per_s", "mfu", "batch_size", "compile", "backend", "commit", "p20_ms", "p80_ms", "disturbed")
    row |= {f"{mode}_{field}": best.get(field) for field in fields}
    comparison = compared(best, rival)
    row |= {f"{mode}_{key}": comparison.get(key) for key in ("speed_up", "realised", "compared_mark")}
    row["flops_ratio"] = comparison.get("flops_ratio") or row.get("flops_ratio")
    row[f"{mode}_mark"] = DISTURBED if best.get("disturbed") else ""
    row[f"{mode}_mfu_mark"] = row[f"{mode}_mark"] if best.get("mfu") else ""
    row["records"] |= {f"{mode}_{field}": best for field in (*fields, "speed_up", "realised")}


def _compare_memory(rows: list[Line], groups: dict[tuple[int, str], list[Line]]) -> None:
    """Fill in the memory of a training step, for models of one size: at the batch and in the compile mode that most of
    them have, and of several such at the largest batch."""
    peaks: dict[tuple[int, str], list[tuple[Line, Line]]] = {}
    for row in rows:
        for line in groups[row["px"], row["group"]]:
            if line["mode"] == "train" and line.get("peak_memory_gib"):
                peaks.setdefault((line["batch_size"], line["compile"]), []).append((row, line))
    if peaks:
        batch, mode = max(peaks, key=lambda way: (len(peaks[way]), way))
        for row, line in peaks[batch, mode]:
            row |= {"train_memory_gib": line["peak_memory_gib"], "memory_batch": batch, "memory_compile": mode}
            row["records"]["train_memory_gib"] = line


def _terms(baseline: str | None, rows: list[Line]) -> list[str]:
    """What the columns mean."""
    notes = ["Images per second: each model at its fastest batch and compile mode."]
    if baseline is not None:
        notes[0] += (
            f" Speed-up: over {baseline}. FLOPs saved: a forward pass of {baseline} over one of the model. Realised: "
            "speed-up over FLOPs saved, 1 if all saved FLOPs became time."
        )
    if any(row.get("train_memory_gib") for row in rows):
        notes.append("Memory: peak of a training step at the batch at which most models of that size were measured.")
    if any(row.get("train_mfu") or row.get("forward_mfu") for row in rows):
        notes.append(
            "MFU: twice the multiply-adds of the model, three times that in training, per second over the peak of the "
            "device (PaLM, appendix B). Scans and other elementwise work do not count in it."
        )
    return notes
