"""Tables of benchmarks: how fast each model is at its best batch, and how much of its saved FLOPs became time."""

import json
from collections import Counter
from collections.abc import Iterable
from math import exp, log
from typing import Any

from ..kernels.errors import InputError
from .names import distinct
from .queries import measurement_of, words_of
from .runs import Line, Run
from .table import Column, Table, shortened

BASELINE = "dit_xl_2"
# Models are compared where these are equal.
CELL = ("input_size", "mode", "checkpointing", "precision", "processes", "device")
LATENT_CHANNELS, PIXELS = 4, 8  # an input of four channels is a latent, of 8 × 8 pixels per position (sd-vae-ft)
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
        scale = PIXELS if model.get("in_channels") == LATENT_CHANNELS else 1
        for line in run.rows:
            if line["kind"] != kind or line["input_size"] is None:
                continue
            asked = line.get("asked") or {}
            axes = _axes(info, asked)
            group = f"{info['title']} {info['model']} {json.dumps([axes, model, asked], sort_keys=True)}"
            where = line["provenance"] or {}
            row: Line = {**line, **{key: info[key] for key in ("id", "study", "model", "family", "title")}}
            row |= {"group": group, "axes": axes, "px": scale * line["input_size"]}
            row |= {"backend": words_of(line["backend"]), "device": where.get("device"), "commit": where.get("commit")}
            key = (group, row["device"], *measurement_of(line))
            if key not in newest or newest[key]["time"] <= line["time"]:
                newest[key] = row
    groups = {row["group"]: row for row in newest.values()}
    labels = distinct({group: (row["title"], row["axes"]) for group, row in groups.items()})
    taken = Counter(labels.values())
    more = {group: f" [{row['id']}]" if taken[labels[group]] > 1 else "" for group, row in groups.items()}
    return [{**row, "label": labels[row["group"]] + more[row["group"]]} for row in newest.values()]


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


def bench(runs: list[Run], baseline: str | None = None) -> Table:
    """One row per model, size, mode and compile mode: its best batch, and how much of its saved FLOPs became time.

    `speed_up` is the model's images per second over the baseline's, each at its best over batches and compile modes.
    `flops_ratio` is the baseline's FLOPs over the model's, and `realised` is `speed_up` over `flops_ratio`: 1 where all
    saved FLOPs became time. They are in the row of the model's best compile mode. `memory_ratio` is the model's peak
    memory over the baseline's, in the same compile mode and at `memory_batch`, the largest batch measured for both.

    Raises InputError where the named baseline was not measured.
    """
    measured = measurements(runs)
    name = baseline_of(measured, baseline)
    groups: dict[tuple, list[Line]] = {}
    for row in measured:
        groups.setdefault((row["group"], *cell_of(row), row["compile"]), []).append(row)
    rows = [_at_its_best(members) for members in groups.values()]
    for row in rows:
        cell = [other for other in measured if cell_of(other) == cell_of(row)]
        rivals = [other for other in cell if other["model"] == name]
        best, rival = fastest(other for other in cell if other["group"] == row["group"]), fastest(rivals)
        if best and rival and best["compile"] == row["compile"]:
            row["speed_up"] = best["images_per_s"] / rival["images_per_s"]
            if best.get("flops") and rival.get("flops"):
                row["flops_ratio"] = rival["flops"] / best["flops"]
                row["realised"] = row["speed_up"] / row["flops_ratio"]
        row["efficiency"] = efficiency(row, measured)
        alike = [other for other in cell if other["compile"] == row["compile"]]
        memory = _memory(other for other in alike if other["group"] == row["group"])
        baseline_memory = _memory(other for other in alike if other["model"] == name)
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
        Column("images_per_s", "Images/s", digits=4),
        Column("efficiency", "Efficiency", digits=3),
        Column("ms_per_image", "ms/image", digits=4, rank=11),
        *(Column(f"p{percent}_ms") for percent in (20, 25, 50, 75, 80)),
        Column("peak_memory_gib", "Peak (GiB)", digits=3, rank=3),
        Column("mfu", "MFU (%)", 0.01, 3, rank=5),
        Column("macs"),
        Column("flops"),
        Column("speed_up", "Speed-up", digits=3, rank=1),
        Column("flops_ratio", "FLOPs saved, ×", digits=3, rank=8),
        Column("realised", "Realised", digits=3),
        Column("memory_ratio", "Memory, ×", digits=3, rank=9),
        Column("memory_batch", "at batch", digits=0, rank=9),
        Column("oom_batch", "Out of memory at", digits=0, rank=10),
        Column("backend", "Backend", rank=13),
        Column("output_error"),
        Column("gradient_error"),
        Column("operator_error"),
        Column("state"),
        Column("error"),
        Column("disturbed"),
        Column(None, "State", key="status"),
    ]
    title = next((row["title"] for row in measured if row["model"] == name), None)
    caption = [*_caption(title), *crossings([row for row in measured if not row["processes"]], name)]
    if any(row["efficiency"] for row in rows):
        caption.append("Efficiency: images per second of a GPU over those of one alone, with the same batch for each.")
    if any("disturbed" in row["status"] for row in rows):
        caption.append("Disturbed: other work kept the host busy, so that the times may be too long.")
    return Table("bench", " ".join(caption), columns, rows)


def efficiency(row: Line, measured: list[Line]) -> float | None:
    """The images per second of each of several processes over those of one process, for the same model, compile mode
    and batch of each. None for one process, and if there is no such measurement of one."""
    if not row.get("processes") or not row["images_per_s"]:
        return None
    share = {**row, "processes": None, "batch_size": row["batch_size"] // row["processes"]}
    for other in measured:
        same = all(other[name] == share[name] for name in ("group", "compile", "batch_size", *CELL))
        if same and other["state"] == "done":
            return row["images_per_s"] / row["processes"] / other["images_per_s"]
    return None


def _at_its_best(members: list[Line]) -> Line:
    best = fastest(members)
    too_large = [row["batch_size"] for row in members if row["state"] == "oom"]
    bad = [row for row in members if row["state"] not in ("done", "oom")]
    shown = bad[-1] if bad and best is None else best or min(members, key=lambda row: row["batch_size"])
    row = {**shown, "oom_batch": min(too_large, default=None)}
    row["checkpointed"] = "yes" if row["checkpointing"] else None
    row["ms_per_image"] = 1e3 / row["images_per_s"] if best else None
    row["batch_size"] = row["batch_size"] if best else None
    state = bad[-1] if bad else shown
    row |= {"state": state["state"], "error": state.get("error")}
    row["status"] = row["state"] + (f" ({shortened(row['error'])})" if row["error"] and bad else "")
    row["status"] += ", disturbed" if best and row.get("disturbed") else ""
    return row


def _memory(rows: Iterable[Line]) -> dict[int, float]:
    """{batch: peak memory} of measurements."""
    return {row["batch_size"]: row["peak_memory_gib"] for row in rows if row.get("peak_memory_gib")}


def _caption(baseline: str | None) -> list[str]:
    words = ["Speed and memory, each row at its best batch."]
    if baseline is not None:
        words += [
            f"Speed-up: images per second over those of {baseline}, each model at its best over batches and compile "
            f"modes. FLOPs saved: a forward pass of {baseline} over one of the model. Realised: speed-up over FLOPs "
            f"saved, 1 where all saved FLOPs became time. Memory: peak over that of {baseline}, at the largest batch "
            "measured for both."
        ]
    return words


def crossings(measured: list[Line], baseline: str | None) -> list[str]:
    """Where each model becomes faster or slower than the baseline as images grow, one sentence per model and mode.

    There is no sentence without a baseline or with fewer than two sizes in common. Between sizes, ratios are
    interpolated linearly in log-log.
    """
    sentences = []
    cells: dict[tuple, dict[str, dict[int, Line]]] = {}
    for row in measured:
        best = fastest(other for other in measured if other["group"] == row["group"] and cell_of(other) == cell_of(row))
        if best is not None:
            models = cells.setdefault((row["mode"], *cell_of(row)[2:]), {})
            models.setdefault(row["group"], {})[row["px"]] = best
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


def kernels(runs: list[Run]) -> Table:
    """One row per operator, shape, backend and pass: its time, and how far that is from the floor of the machine."""
    rows = measurements(runs, "operator_speed")
    for row in rows:
        row["status"] = row["state"] + (f" ({shortened(row['error'])})" if row.get("error") else "")
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
        Column("backend", "Backend"),
        Column("p20_ms"),
        Column("p50_ms", "Median (ms)", digits=3),
        Column("p80_ms"),
        Column("floor_ms", "Floor (ms)", digits=3),
        Column("floor", "Floor of", rank=9),
        Column("times_floor", "Time ÷ floor", digits=3),
        *(Column(f"{name}_floor_ms") for name in ("bytes", "exponentials", "flops")),
        *(Column(f"{name}_per_s") for name in ("bytes", "exponentials", "flops")),
        Column("relative_error", "Error", digits=2, rank=8),
        Column("error_of"),
        Column("state"),
        Column("error"),
        Column(None, "State", key="status"),
    ]
    caption = (
        "Operators at the shapes of a model, each checked against float64 before it is timed. Floor: the largest of "
        "three least times: for inputs and outputs once through memory, for the exponentials, and for the products."
    )
    return Table("kernels", caption, columns, rows)


def _numbers(shape: str) -> list[int]:
    """A sort key that puts large shapes first, by the dimensions of the first tensor."""
    words = shape.split(",")[0].split(" ")[-1].split("×")
    return [-int(word) for word in words if word.isdigit()]
