"""The columns of `lamabench.reports.load`, with units and meanings: those of record.py, and what is added here."""

from dataclasses import fields
from typing import Any

import pandas as pd

from ..harness.record import ROWS, field_name, field_types
from .frame import BACKENDS, DRAWN, KINDS, LEFT_OUT, RENAMED

# {column: (type, meaning)} of what does not come from a field of record.py, or not as it stands there.
ADDED: dict[str, tuple[str, str]] = {
    "study": ("str", "name of the study; of single commands: train, bench and so on"),
    "name": ("str", "name of the run in its study"),
    "label": ("str", "label of the variant, as in tables; equal for all seeds"),
    "variant": ("str", "axis values of the variant in words, without the seed"),
    "seed": ("int", "seed of the training; null for speed and cost, which belong to a model"),
    "family": ("str", "family of the model"),
    "model": ("str", "preset of the model"),
    "title": ("str", "name of the model in tables"),
    "kind": ("str", f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"),
    "state": ("str", "done, failed, oom (out of memory), diverged (loss not finite) or wrong (failed its check)"),
    "error": ("str", "the reason in one line, if the state is not done"),
    "commit": ("str", "commit of lamabench that measured"),
    "dirty": ("bool", "whether the checkout had uncommitted changes"),
    "device": ("str", "name of the GPU or CPU"),
    "host": ("str", "name of the machine"),
    "driver": ("str", "version of the GPU's driver; null: no GPU"),
    "torch": ("str", "version of PyTorch"),
    "python": ("str", "version of Python"),
    "lamabench": ("str", "version of lamabench"),
    "id": ("str", "key of the training, or of the model if there is no training"),
    "evaluation": ("str", "how the samples were scored, in words"),
    "generation": ("str", "how the samples were drawn, in words; null: not on record"),
}  # fmt: skip
# {column: (kind, type, meaning)} for columns whose names depend on the records.
PATTERNS: dict[str, tuple[str, str, str]] = {
    "PART_params": ("cost", "int", "parameters of a part of the model, such as mlp_params"),
    "PART_macs": ("cost", "int", "multiply-adds of a part in one forward pass of one image"),
    "PART_flops": ("cost", "int", "FLOPs of a part in one forward pass of one image"),
    "by_timestep_T": ("score", "float", "of the held-out loss: the loss at timestep T"),
}
UNITS = {
    "params": "parameters", "macs": "multiply-adds", "flops": "FLOPs", "paper_gflops": "1e9 operations",
    "training_flops": "FLOPs", "count": "images", "reference_count": "images", "images_seen": "images",
    "batch_size": "images", "checkpoint_step": "steps", "steps": "steps", "repeats": "calls", "mfu": "share of 1",
    "threads": "threads", "processes": "processes", "fvcore": "multiply-adds",
    "time": "UTC, ISO 8601", "began": "UTC, ISO 8601", "input_size": "pixels or latents",
}  # fmt: skip
ENDINGS = {
    "_params": "parameters", "_macs": "multiply-adds", "_flops": "FLOPs", "images_per_s": "images/s",
    "exponentials_per_s": "1/s", "bytes_per_s": "bytes/s", "flops_per_s": "FLOPs/s", "_ms": "ms", "_gib": "GiB",
    "_mhz": "MHz", "seconds": "s", "_s": "s", "power_w": "W", "call_bytes": "bytes", "call_flops": "FLOPs",
}  # fmt: skip


def columns() -> pd.DataFrame:
    """Every column that `load` may return: `column`, `kinds` (of the rows that have it), `type`, `unit` (empty: none)
    and `meaning`."""
    rows = [(name, "all", kind, unit_of(name), meaning) for name, (kind, meaning) in ADDED.items()]
    rows = [row for row in rows if row[0] not in ("evaluation", "generation")]
    texts: dict[str, tuple[str, str]] = {}
    of_kinds: dict[str, list[str]] = {}
    for kind in KINDS:
        for field, name, types in _fields(kind):
            if name not in (*LEFT_OUT, *(row[0] for row in rows)):
                column = RENAMED.get((kind, name), name)
                of_kinds.setdefault(column, []).append(kind)
                texts.setdefault(column, (types, field.metadata["about"]))
    for field, name, types in _fields("sample"):
        if name in DRAWN:
            of_kinds[f"sample_{name}"] = ["score"]
            texts[f"sample_{name}"] = types, f"of the samples: {field.metadata['about']}"
    for name, kinds in of_kinds.items():
        types, meaning = ADDED.get(name) or texts[name]
        types = "str" if name in BACKENDS else types
        meaning += " (in words: operator=backend)" if name in BACKENDS else ""
        every = "all" if set(kinds) == set(KINDS) else ", ".join(kinds)
        rows.append((name, every, types, unit_of(name.removeprefix("sample_")), meaning))
    rows += [(name, kind, types, unit_of(name), meaning) for name, (kind, types, meaning) in PATTERNS.items()]
    return pd.DataFrame(rows, columns=["column", "kinds", "type", "unit", "meaning"])


def _fields(kind: str) -> list[tuple[Any, str, str]]:
    """The fields of a kind of record, with their names in the file and their types in words."""
    row = ROWS[kind]
    types = {name: [one.__name__ for one in options] for name, (_, options) in field_types(row).items()}
    plain = {name: "float" if "float" in names else names[0] for name, names in types.items()}
    return [(field, field_name(field), plain[field_name(field)]) for field in fields(row)]


def unit_of(name: str) -> str:
    """The unit of a column, empty if it has none."""
    return UNITS.get(name) or next((unit for ending, unit in ENDINGS.items() if name.endswith(ending)), "")


def page() -> str:
    """COLUMNS.md: the columns as a page."""
    text = [
        "# Columns of `records.csv`, `records.parquet` and `lamabench.reports.load`",
        "",
        "`python -m lamabench.reports.dictionary` prints this page. A row is a score, a speed, the speed of an",
        "operator or a cost. A column without any value is left out. `lamabench.reports.columns()` returns the same.",
        "",
        "| column | rows | type | unit | meaning |",
        "|---|---|---|---|---|",
    ]
    for name, *facts in columns().to_numpy().tolist():
        text.append(" | ".join([f"| `{name}`", *facts]) + " |")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    print(page(), end="")
