"""Records as one pandas frame, for figures of your own."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from ..harness.scoring.protocol import words
from .protocols import words_of_protocol
from .queries import current, group_labels, words_of
from .runs import Line, Run, read

FIRST = ("study", "name", "label", "variant", "seed", "family", "model", "title", "kind", "state", "error")
LAST = ("time", "commit", "dirty", "device", "host", "driver", "torch", "python", "lamabench", "id", "key")
LEFT_OUT = ("schema", "provenance", "parts", "checked_against")
BACKENDS = ("backend", "asked")
# Of the samples of a score.
DRAWN = ("method", "steps", "timesteps", "guidance", "guidance_channels", "clip", "labels", "seed", "images_per_s")
KINDS = ("score", "speed", "operator_speed", "cost")


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
                     `sample_guidance_channels`, `sample_clip`, `sample_labels`, `sample_seed`, `sample_images_per_s`
    speed            `mode`, `input_size` (side of the input), `batch_size`, `compile`, `checkpointing`, `precision`,
                     `backend`, `asked`, `images_per_s`, `p50_ms` and other percentiles, `peak_memory_gib`, `mfu`
    operator_speed   `operator`, `shape`, `pass`, `backend`, `p50_ms`, `floor_ms`, `floor`, `times_floor`
    cost             `params`, `macs`, `flops` (of one forward pass of one image), `paper_gflops` (1e9), and by part
                     such as `mlp_params`, `mlp_macs`, `mlp_flops`

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
    labels = group_labels(runs)
    rows: dict[tuple[Any, ...], Line] = {}
    for run in runs:
        records = current([*run.rows, *run.earlier])
        samples = {row["key"]: row for row in records if row["kind"] == "sample"}
        for record in records:
            if record["kind"] in KINDS:
                of_run = record["kind"] == "score"
                key = (
                    run.info["name"] if of_run else None,
                    run.group,
                    record["kind"],
                    record["key"],
                    record.get("metric"),
                )
                rows.setdefault(key, _row(run, labels[run.group], record, samples.get(record.get("samples"))))
    ordered = sorted(rows.values(), key=lambda row: KINDS.index(row["kind"]))
    columns = list(dict.fromkeys([*FIRST, *(name for row in ordered for name in row if name not in LAST), *LAST]))
    frame = pd.DataFrame(ordered, columns=columns)
    names = [name for name in columns if name in (*FIRST, "key") or frame[name].notna().any()]
    return frame[names].convert_dtypes()


def _row(run: Run, label: str, record: Line, sample: Line | None) -> Line:
    info = run.info
    row: Line = {name: info.get(name) for name in FIRST} | {"label": label, "id": info["id"]}
    row["variant"] = ", ".join(f"{axis}={value}" for axis, value in info["variant"].items() if axis != "seed")
    row["seed"] = info.get("seed") if record["kind"] == "score" else None
    row |= {name: value for name, value in record.items() if name not in LEFT_OUT}
    row |= {name: words_of(record[name]) or None for name in BACKENDS if name in record}
    for name, in_words in (("evaluation", words_of_protocol), ("generation", words)):
        row |= {name: in_words(record[name])} if record.get(name) else {}
    for part, counts in (record.get("parts") or {}).items():
        row |= {f"{part}_{name}": count for name, count in counts.items()}
    row |= {f"sample_{name}": value for name, value in (sample or {}).items() if name in DRAWN}
    return row | {name: value for name, value in (record["provenance"] or {}).items() if name in LAST}
