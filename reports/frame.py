"""Records as one pandas frame, for figures of your own, and as files."""

import io
import warnings
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from ..harness.record import ROWS, field_types
from ..harness.scoring.protocol import words
from .names import labels
from .protocols import words_of_protocol
from .queries import current, words_of
from .runs import Line, Run, read

FIRST = ("study", "name", "label", "variant", "seed", "family", "model", "title", "kind", "state", "error")
LAST = ("time", "commit", "dirty", "device", "host", "driver", "torch", "python", "lamabench", "id", "key")
LEFT_OUT = ("schema", "provenance", "parts", "checked_against", "by_timestep")
BACKENDS = ("backend", "asked")
# Of the samples of a score.
DRAWN = ("method", "steps", "timesteps", "guidance", "guidance_channels", "guidance_interval", "guide", "passes")
DRAWN += ("sampling_flops", "clip", "labels", "seed", "images_per_s")
KINDS = ("score", "speed", "operator_speed", "cost")
FLOATS = {name for kind in ROWS for name, (_, types) in field_types(ROWS[kind]).items() if float in types}
RENAMED = {("operator_speed", "floor"): "floor_name"}  # a column has one type: the `floor` of a score is a number


def load(paths: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """All records at or below some folders (runs, studies or roots): one row per score, speed, operator speed or cost.

    Every row begins with `study`, `name` (of the run), `label` (of its variant, as in tables), `variant` (axis values
    in words), `seed`, `family`, `model` (preset), `title`, `kind` (score, speed, operator_speed or cost), `state`
    (done, failed, oom, diverged or wrong) and `error`. It ends with `time` (UTC), the origin (`commit`, `dirty`,
    `device`, `host`, `driver`, `torch`, `python`, `lamabench`), `id` (key of the training, or of the model where there
    is no training) and `key` (of the row). Between them are the fields of harness/RECORDS.md, under the same names,
    which include units:

    score            `metric`, `value`, `std` (over the metric's own subsets or splits, not over trainings),
                     `sampling_error` (standard error from the choice of the images alone), `count`, `reference`,
                     `reference_count`, `features`, `floor`, `note`; how it was scored, as the hash
                     `protocol` and in words `evaluation`; how its samples were made, as the hash `generation_protocol`
                     and in words `generation`, both empty if that is not on record; the moment: `checkpoint_step`,
                     `weights`, `images_seen`, `training_flops`, `training_seconds`; how the images were drawn:
                     `sample_method`, `sample_steps`, `sample_timesteps`, `sample_guidance`,
                     `sample_guidance_channels`, `sample_guidance_interval`, `sample_guide`, `sample_passes`,
                     `sample_sampling_flops`, `sample_clip`, `sample_labels`, `sample_seed`, `sample_images_per_s`
    speed            `mode`, `input_size` (side of the input), `batch_size`, `compile`, `checkpointing`, `precision`,
                     `backend`, `asked`, `images_per_s`, `p50_ms` and other percentiles, `peak_memory_gib`, `mfu`
    operator_speed   `operator`, `shape`, `pass`, `backend`, `p50_ms`, `floor_ms`, `floor_name`, `times_floor`
    cost             `params`, `macs`, `flops` (of one forward pass of one image), `paper_gflops` (1e9), and by part
                     such as `mlp_params`, `mlp_macs`, `mlp_flops`

    `lamabench.reports.columns()` is a table of all columns with their units, and reports/COLUMNS.md the same as a page.
    Only the newest row of each key is kept. Every moment of a training that was scored has its own rows. Speed and cost
    belong to a model: they appear once for all seeds of a variant, without a `seed`. Columns without any value are left
    out. A run with a file that this version cannot read is left out with a warning. Raises InputError, one line, for a
    folder that does not exist or holds no run, and if no run can be read.
    """
    folders = [paths] if isinstance(paths, str | Path) else paths
    runs = read([Path(folder) for folder in folders])
    for run in runs:
        if run.damage:
            warnings.warn(f"{run.info['name']} is left out: {run.damage}", stacklevel=2)
    return frame(runs)


def frame(runs: list[Run]) -> pd.DataFrame:
    """The records of some runs, as `load` returns them."""
    label_of = labels(runs)
    rows: dict[tuple[Any, ...], Line] = {}
    for run in runs:
        records = current([*run.rows, *run.earlier])
        samples = {row["key"]: row for row in records if row["kind"] == "sample"}
        for record in records:
            if record["kind"] in KINDS:
                of_run = record["kind"] == "score"
                name = run.info["name"] if of_run else None
                key = (name, run.group, record["kind"], record["key"], record.get("metric"))
                if key not in rows:
                    rows[key] = _row(run, label_of[run.group], record, samples.get(record.get("samples")))
    ordered = sorted(rows.values(), key=lambda row: KINDS.index(row["kind"]))
    columns = list(dict.fromkeys([*FIRST, *(name for row in ordered for name in row if name not in LAST), *LAST]))
    result = pd.DataFrame(ordered, columns=columns)
    names = [name for name in columns if name in (*FIRST, "key") or result[name].notna().any()]
    result = result[names].convert_dtypes()  # which makes integers of floats that are whole
    return result.astype({name: "Float64" for name in names if name.removeprefix("sample_") in FLOATS})


def write(records: pd.DataFrame, folder: Path) -> list[str]:
    """Write a frame as records.csv and, if pyarrow is installed, as records.parquet. Returns the names of the files."""
    text = records.to_csv(index=False, lineterminator="\n")
    (folder / "records.csv").write_text(text, encoding="utf-8", errors="backslashreplace")
    if find_spec("pyarrow") is None:
        return ["records.csv"]
    # Columns without any value have no type of their own, and a file of bytes that are no text cannot be written.
    texts = [name for name in records.columns if records[name].isna().all() or records[name].dtype == object]
    buffer = io.BytesIO()
    records.astype(dict.fromkeys(texts, "string")).to_parquet(buffer, engine="pyarrow", index=False)
    (folder / "records.parquet").write_bytes(buffer.getvalue())
    return ["records.csv", "records.parquet"]


def _row(run: Run, label: str, record: Line, sample: Line | None) -> Line:
    info = run.info
    row: Line = {name: info.get(name) for name in FIRST} | {"label": label, "id": info["id"]}
    row["variant"] = ", ".join(f"{axis}={value}" for axis, value in info["variant"].items() if axis != "seed")
    row["seed"] = info.get("seed") if record["kind"] == "score" else None
    kind = record["kind"]
    row |= {RENAMED.get((kind, name), name): value for name, value in record.items() if name not in LEFT_OUT}
    row |= {name: words_of(record[name]) or None for name in BACKENDS if name in record}
    for name, in_words in (("evaluation", words_of_protocol), ("generation", words)):
        row |= {name: in_words(record[name])} if record.get(name) else {}
    for part, counts in (record.get("parts") or {}).items():
        row |= {f"{part}_{name}": count for name, count in counts.items()}
    row |= {f"by_timestep_{time}": loss for time, loss in (record.get("by_timestep") or {}).items()}
    row |= {f"sample_{name}": value for name, value in (sample or {}).items() if name in DRAWN}
    row |= {name: value for name, value in (record["provenance"] or {}).items() if name in LAST}
    return {name: _text(value) if isinstance(value, str) else value for name, value in row.items()}


def _text(text: str) -> str:
    """A text that pyarrow takes: an error may name a file whose bytes are not UTF-8."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()
