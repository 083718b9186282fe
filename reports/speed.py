"""Tables of benchmarks: how fast each model is at its best batch, and how much of its saved FLOPs became time."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from math import exp, log
from typing import Any

from ..kernels.errors import InputError
from .circumstances import circumstances
from .names import distinct
from .queries import measurement_of, words_of
from .runs import Line, Run
from .table import DISTURBED, Column, Table, shortened

BASELINE = "dit_xl_2"
# Models are compared where these are equal.
CELL = ("input_size", "mode", "checkpointing", "precision", "processes", "device", "cpu_threads")
HARDWARE = ("device", "precision", "cpu_threads")  # no column mixes these
# Pixels per side of a position of a latent, by its channels: of sd-vae-ft, of the autoencoders of SD3 and FLUX, and of
# VA-VAE f16d32. Inputs of other numbers of channels are images.
PIXELS = {4: 8, 16: 8, 32: 16}
MODES = {"forward": "Forward", "train": "Training"}


def measurements(runs: list[Run], kind: str = "speed") -> list[Line]:
    """The newest record of each measurement of each model; with "operator_speed", of its operators.

    `group` is the model as configured, with the implementations that were asked for by name, and `label` its name. Both
    are the same for every run and every input size.
    """
    newest: dict[tuple[Any, ...], Line] = {}
    for run in runs:
        info = run.info
        model = {key: value for key, value in (info["config"].get("model") or {}).items() if key != "input_size"}
        for line in run.rows:
            if line["kind"] != kind or line["input_size"] is None:
                continue
            asked = line.get("asked") or {}
            axes = _axes(info, asked)
            group = f"{info['title']} {info['model']} {json.dumps([axes, model, asked], sort_keys=True)}"
            where = line["provenance"] or {}
            row: Line = {**line, **{key: info[key] for key in ("id", "study", "model", "family", "title")}}
            row |= {"group": group, "axes": axes, "px": pixels(model, line["input_size"])}
            row |= {"backend": words_of(line["backend"]), "device": where.get("device"), "commit": where.get("commit")}
            row["cpu_threads"] = None if where.get("driver") else line["threads"]
            key = (group, row["device"], row["cpu_threads"], *measurement_of(line))
            if key not in newest or newest[key]["time"] <= line["time"]:
                newest[key] = row
    groups = {row["group"]: row for row in newest.values()}
    labels = distinct({group: (row["title"], row["axes"]) for group, row in groups.items()})
    taken = Counter(labels.values())
    more = {group: f" [{row['id']}]" if taken[labels[group]] > 1 else "" for group, row in groups.items()}
    return [{**row, "label": labels[row["group"]] + more[row["group"]]} for row in newest.values()]


def pixels(model: Line, side: int) -> int:
    """The side of the image in pixels that an input of `side` positions of a model's configuration stands for."""
    return PIXELS.get(model.get("in_channels") or 0, 1) * side


def _axes(info: Line, asked: Line) -> Line:
    """The axes of a study that change its model, and the implementations of operators that were asked for. The input
    size has its own column."""
    axes = {
        axis: value for axis, value in (info.get("variant") or {}).items() if axis.startswith(("model.", "variant"))
    }
    axes |= {f"backend.{operator}": name for operator, name in asked.items()}
    return {axis: value for axis, value in axes.items() if axis != "model.input_size" and value != info["model"]}


def cell_of(row: Line) -> tuple:
    """The circumstances in which measurements of two models can be compared."""
    return tuple(row[field] for field in CELL)


def baseline_of(rows: list[Line], name: str | None) -> str | None:
    """The model that others are compared with: the named one, or else DiT-XL/2 if it was measured.

    Raises InputError for a name that was not measured.
    """
    models = sorted({row["model"] for row in rows})
    if name is not None and name not in models:
        raise InputError(f"the baseline {name!r} was not measured; choices: {', '.join(models) or 'none'}")
    return name or (BASELINE if BASELINE in models else None)


def fastest(rows: Iterable[Line]) -> Line | None:
    """The measurement with the most images per second; None where there is none."""
    return max((row for row in rows if row["state"] == "done"), key=lambda row: row["images_per_s"], default=None)


def apart(rows: list[Line], fields: tuple[str, ...] = HARDWARE) -> list[tuple[str, str, list[Line]]]:
    """Measurements by hardware and precision or by more `fields`, the most frequent first: what all those of a table
    have in common, in words; what ends the name of that table, empty if there is only one; and the measurements."""
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for row in rows:
        groups.setdefault(tuple(row[field] for field in fields), []).append(row)
    apart = [len({values[place] for values in groups}) > 1 for place in range(len(fields))]
    tables = []
    for values, members in sorted(groups.items(), key=lambda item: (-len(item[1]), str(item[0]))):
        words = [_word(*item) for item in zip(fields, values, apart, strict=True)]
        differ = " ".join(["", *(word for word, differs in zip(words, apart, strict=True) if differs)])
        ending = re.sub(r"\W+", "_", differ).lower().rstrip("_")
        tables.append((", ".join(filter(None, words)), ending, members))
    return tables


def _word(field: str, value: Any, differs: bool) -> str:
    """The value of a field of measurements in words. What is usual is said only if it differs."""
    usual = {"processes": "one GPU", "checkpointing": "not checkpointed", "cpu_threads": "GPU", "device": "no device"}
    if not value:
        return usual.get(field, "-") if differs else ""
    words = {"checkpointing": "checkpointed", "processes": f"{value} GPUs", "cpu_threads": f"{value} threads"}
    return words.get(field, str(value))


def bench(runs: list[Run], baseline: str | None = None) -> list[Table]:
    """A table for each hardware and precision, with one row per model, size, mode and compile mode: its best batch, and
    how much of its saved FLOPs became time.

    `speed_up` is the model's images per second over the baseline's, each at its best over batches and compile modes.
    `flops_ratio` is the baseline's FLOPs over the model's, and `realised` is `speed_up` over `flops_ratio`: 1 where all
    saved FLOPs became time. They are in the row of the model's best compile mode. `memory_ratio` is the model's peak
    memory over the baseline's, in the same compile mode and at `memory_batch`, the largest batch measured for both.

    Raises InputError where the named baseline was not measured.
    """
    measured = measurements(runs)
    name = baseline_of(measured, baseline)
    return [_bench(rows, name, where, ending) for where, ending, rows in apart(measured)]


def _bench(measured: list[Line], name: str | None, where: str, ending: str) -> Table:
    groups: dict[tuple, list[Line]] = {}
    cells: dict[tuple, dict[str, list[Line]]] = {}  # {circumstances: {group: measurements}}
    for row in measured:
        groups.setdefault((row["group"], *cell_of(row), row["compile"]), []).append(row)
        cells.setdefault(cell_of(row), {}).setdefault(row["group"], []).append(row)
    rivals = {
        cell: [row for members in models.values() if members[0]["model"] == name for row in members]
        for cell, models in cells.items()
    }
    rows = [_at_its_best(members) for members in groups.values()]
    for row in rows:
        cell = cell_of(row)
        best = fastest(cells[cell][row["group"]])
        if best and best["compile"] == row["compile"]:
            row |= compared(best, fastest(rivals[cell]))
        row |= efficiency(row, measured)
        memory = _memory(cells[cell][row["group"]], row["compile"])
        baseline_memory = _memory(rivals[cell], row["compile"])
        if common := memory.keys() & baseline_memory.keys():
            row["memory_batch"] = max(common)
            row["memory_ratio"] = memory[max(common)] / baseline_memory[max(common)]
    order = {mode: place for place, mode in enumerate(MODES)}
    rows.sort(
        key=lambda row: (
            str(row["device"]), row["px"], order.get(row["mode"], 9), bool(row["checkpointing"]), row["processes"] or 1,
            row["model"] != name, row["family"], row["label"], str(row["compile"]),
        )
    )  # fmt: skip
    columns = [Column(name) for name in ("study", "id", "family", "model", "title", "commit")]
    columns += [
        Column("label", "Model"),
        Column("input_size", "Side", digits=0, rank=12),
        Column("px", "Pixels", digits=0),
        Column("mode", "Mode"),
        Column("checkpointed", "Checkpointing"),
        Column("compile", "Compile"),
        Column("precision"),
        Column("device"),
        Column("processes", "GPUs", digits=0),
        Column("batch_size", "Batch", digits=0, rank=2),
        Column("images_per_s", "Images/s", digits=4, mark="mark"),
        Column("efficiency", "Efficiency", digits=3, mark="efficiency_mark"),
        Column("ms_per_image", "ms/image", digits=4, mark="disturbed_mark", rank=11),
        *(Column(f"p{percent}_ms") for percent in (20, 25, 50, 75, 80)),
        Column("peak_memory_gib", "Peak (GiB)", digits=3, rank=3),
        Column("mfu", "MFU (%)", 0.01, 3, mark="disturbed_mark", rank=5),
        *(Column(name) for name in ("clock_mhz", "power_w", "throttled", "began")),
        Column("macs"),
        Column("flops"),
        Column("speed_up", "Speed-up", digits=3, mark="compared_mark", rank=1),
        Column("flops_ratio", "FLOPs saved, ×", digits=3, rank=8),
        Column("realised", "Realised", digits=3, mark="compared_mark"),
        Column("memory_ratio", "Memory, ×", digits=3, rank=9),
        Column("memory_batch", "at batch", digits=0, rank=9),
        Column("oom_batch", "Out of memory at", digits=0, rank=10),
        Column("backend", "Backend", rank=13),
        Column("output_error"),
        Column("timed_error"),
        Column("gradient_error"),
        Column("operator_error"),
        Column("state"),
        Column("error"),
        Column("disturbed"),
        Column(None, "State", key="status", tex=False),
    ]
    title = next((row["title"] for row in measured if row["model"] == name), None)
    notes = _terms(title)
    if any(row["efficiency"] for row in rows):
        notes.append("Efficiency: images per second of a GPU over those of one alone, with the same batch for each.")
    notes += disturbances(rows) + circumstances(rows)
    return Table(f"bench{ending}", f"Speed and memory on {where}, each row at its best batch.", columns, rows, notes)


def compared(best: Line, rival: Line | None) -> Line:
    """`speed_up` of a measurement over that of the baseline, `flops_ratio` and `realised`, as far as they are known;
    and `compared_mark`, if one of the two was disturbed."""
    if rival is None:
        return {}
    row: Line = {"speed_up": best["images_per_s"] / rival["images_per_s"]}
    row["compared_mark"] = DISTURBED if best.get("disturbed") or rival.get("disturbed") else ""
    if best.get("flops") and rival.get("flops"):
        row["flops_ratio"] = rival["flops"] / best["flops"]
        row["realised"] = row["speed_up"] / row["flops_ratio"]
    return row


def disturbances(rows: Iterable[Line]) -> list[str]:
    """A note that explains the mark of disturbed measurements, if there are any."""
    reasons = sorted({row["disturbed"] for row in rows if row.get("disturbed")})
    more = f" and {len(reasons) - 3} other reasons" if len(reasons) > 3 else ""
    text = f"{DISTURBED.strip()}: disturbed, so that the time may be too long ({'; '.join(reasons[:3])}{more})."
    return [text] if reasons else []


def efficiency(row: Line, measured: list[Line]) -> Line:
    """`efficiency`: the images per second of each of several processes over those of one process, for the same model,
    compile mode and batch of each. None for one process, and if there is no such measurement of one."""
    if row.get("processes") and row["images_per_s"]:
        share = {**row, "processes": None, "batch_size": row["batch_size"] // row["processes"]}
        for other in measured:
            same = all(other[name] == share[name] for name in ("group", "compile", "batch_size", *CELL))
            if same and other["state"] == "done":
                mark = DISTURBED if row.get("disturbed") or other.get("disturbed") else ""
                value = row["images_per_s"] / row["processes"] / other["images_per_s"]
                return {"efficiency": value, "efficiency_mark": mark}
    return {"efficiency": None}


def _at_its_best(members: list[Line]) -> Line:
    best = fastest(members)
    too_large = [row["batch_size"] for row in members if row["state"] == "oom"]
    bad = [row for row in members if row["state"] not in ("done", "oom")]
    shown = bad[-1] if bad and best is None else best or min(members, key=lambda row: row["batch_size"])
    row = {**shown, "oom_batch": min(too_large, default=None)}
    row["checkpointed"] = "yes" if row["checkpointing"] else None
    row["ms_per_image"] = 1e3 / row["images_per_s"] if best and row["images_per_s"] else None
    row["batch_size"] = row["batch_size"] if best else None
    state = bad[-1] if bad else shown
    row |= {"state": state["state"], "error": state.get("error")}
    row["status"] = row["state"] + (f" ({shortened(row['error'])})" if row["error"] and bad else "")
    row["disturbed_mark"] = DISTURBED if best and row.get("disturbed") else ""
    row["mark"] = row["disturbed_mark"] if best else row["state"]
    row["status"] += ", disturbed" if best and row.get("disturbed") else ""
    return row


def _memory(rows: Iterable[Line], compile_mode: str) -> dict[int, float]:
    """{batch: peak memory} of measurements in one compile mode."""
    return {
        row["batch_size"]: row["peak_memory_gib"]
        for row in rows
        if row["compile"] == compile_mode and row.get("peak_memory_gib")
    }


def _terms(baseline: str | None) -> list[str]:
    """What the columns mean that compare with the baseline."""
    if baseline is None:
        return []
    return [
        f"Speed-up: images per second over those of {baseline}, each model at its best over batches and compile "
        f"modes. FLOPs saved: a forward pass of {baseline} over one of the model. Realised: speed-up over FLOPs saved, "
        f"1 where all saved FLOPs became time. Memory: peak over that of {baseline}, at the largest batch measured for "
        "both."
    ]


def crossings(measured: list[Line], baseline: str | None) -> list[str]:
    """Where each model becomes faster or slower than the baseline as images grow, one sentence per model and mode.

    There is no sentence without a baseline or with fewer than two sizes in common. Between sizes, ratios are
    interpolated linearly in log-log.
    """
    sentences = []
    cells: dict[tuple, dict[str, dict[int, Line]]] = {}
    for row in measured:
        if row["state"] == "done":
            models = cells.setdefault((row["mode"], *cell_of(row)[2:]), {})
            sizes = models.setdefault(row["group"], {})
            sizes[row["px"]] = max(sizes.get(row["px"], row), row, key=lambda one: one["images_per_s"])
    for (mode, checkpointing, *_), models in cells.items():
        rivals = [sizes for sizes in models.values() if next(iter(sizes.values()))["model"] == baseline]
        for sizes in models.values():
            first = next(iter(sizes.values()))
            common = sorted(sizes.keys() & rivals[0].keys()) if rivals else []
            if first["model"] == baseline or len(common) < 2:
                continue
            ratios = [sizes[px]["images_per_s"] / rivals[0][px]["images_per_s"] for px in common]
            title = next(iter(rivals[0].values()))["title"]
            where = f"{MODES.get(mode, mode)}{', checkpointed' if checkpointing else ''}"
            sentences.append(f"{where}: {first['label']} {crossing(common, ratios, title)}.")
    return sentences


def turns(sizes: list[int], ratios: list[float]) -> list[tuple[float, bool]]:
    """Where a speed-up passes 1, interpolated linearly in log-log: the size in pixels, and whether it rises there."""
    places = []
    for place in range(1, len(sizes)):
        low, high = log(ratios[place - 1]), log(ratios[place])
        if (low < 0) != (high < 0):
            left, right = log(sizes[place - 1]), log(sizes[place])
            places.append((exp(left + (right - left) * low / (low - high)), low < 0))
    return places


def crossing(sizes: list[int], ratios: list[float], rival: str) -> str:
    """Speed-ups over a rival at growing sizes in pixels as words: "overtakes DiT-XL/2 at 400 px"."""
    words = [f"{'overtakes' if up else 'falls behind'} {rival} at {px:.0f} px" for px, up in turns(sizes, ratios)]
    if words:
        return " and ".join(words) + " (interpolated)"
    side = "slower" if ratios[0] < 1 else "faster"
    return f"is {side} than {rival} from {sizes[0]} to {sizes[-1]} px, no crossing in the measured range"


def kernels(runs: list[Run]) -> list[Table]:
    """A table for each hardware and precision, with one row per operator, shape, backend and pass: its time, and how
    far that is from the floor of the machine."""
    return [_kernels(rows, where, ending) for where, ending, rows in apart(measurements(runs, "operator_speed"))]


def _kernels(rows: list[Line], where: str, ending: str) -> Table:
    for row in rows:
        done = row["state"] == "done"
        row["mark"] = DISTURBED if done and row.get("disturbed") else "" if done else row["state"]
        row["status"] = row["state"] + (f" ({shortened(row['error'])})" if row.get("error") else "")
        row["implementation"] = row["backend"].partition("=")[2]  # that of the operator in its own column
    rows.sort(key=lambda row: (str(row["device"]), row["label"], row["operator"], _numbers(row["shape"]), row["pass"]))
    columns = [Column(name) for name in ("study", "id", "family", "model", "commit")]
    columns += [
        Column("label", "Model", rank=7),
        Column("input_size", "Side", digits=0, rank=12),
        Column("batch_size", "Batch", digits=0, rank=11),
        Column("precision"),
        Column("device"),
        Column("operator", "Operator"),
        Column("shape", "Shape"),
        Column("pass", "Pass"),
        Column("backend", "Backend", key="implementation"),
        Column("p20_ms"),
        Column("p50_ms", "Median (ms)", digits=3, mark="mark"),
        Column("p80_ms"),
        Column("floor_ms", "Floor (ms)", digits=3),
        Column("floor", "Floor of", rank=9),
        Column("times_floor", "Time ÷ floor", digits=3, mark="mark"),
        *(Column(f"{name}_floor_ms") for name in ("bytes", "exponentials", "flops")),
        *(Column(f"{name}_per_s") for name in ("bytes", "exponentials", "flops")),
        *(Column(name) for name in ("clock_mhz", "power_w", "throttled", "began", "timed_error")),
        Column("relative_error", "Error", digits=2, rank=8),
        Column("error_of"),
        Column("state"),
        Column("error"),
        Column(None, "State", key="status", tex=False),
    ]
    notes = [
        "Each operator is checked against float64 before it is timed. Floor: the largest of three least times: for "
        "inputs and outputs once through memory, for the exponentials, and for the products.",
        *disturbances(rows),
        *circumstances(rows),
    ]
    return Table(f"kernels{ending}", f"Operators at the shapes of a model, on {where}.", columns, rows, notes)


def _numbers(shape: str) -> list[int]:
    """A sort key that puts large shapes first, by the dimensions of the first tensor."""
    words = shape.split(",")[0].split(" ")[-1].split("×")
    return [-int(word) for word in words if word.isdigit()]
