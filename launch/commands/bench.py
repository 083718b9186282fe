"""`lamabench bench` and `lamabench bench-kernels`: models and operators, measured."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...harness.config import BenchConfig, Config, DataConfig
from ...harness.device import pick_device
from ...harness.measure.models import WrongOutput, bench_config, check_bench
from ...harness.measure.operators import bench_kernels
from ...harness.measure.search import finished
from ...harness.provenance import provenance
from ...harness.record import append, entry, read_run
from ...harness.run import create, describe, locked
from ...kernels.errors import InputError
from ...models.registry import presets
from ..compose import compose, model_config
from .runs import show, split_arguments


def models(args: argparse.Namespace) -> int:
    """Measure models, and keep the records in RUNS/bench."""
    rows, wrong = [], []
    for config, info in _runs(args, "bench"):
        name, folder, origin = info["name"], create(info), provenance(pick_device(config.run.device))

        def say(text: str, name: str = name) -> None:
            print(f"{name}: {text}", file=sys.stderr, flush=True)

        with locked(folder):
            there = [] if args.again else finished(read_run(folder).records, origin)
            if there:
                say(f"{len(there)} measurements are in {folder} already (--again measures them anew)")
            rows += [{"model": name, **row, "run": str(folder)} for row in there]
            try:
                for row in bench_config(config, say, there):
                    line = entry("bench", **{**row, "provenance": origin})
                    append(folder / "record.jsonl", line)
                    rows.append({"model": name, **line, "run": str(folder)})
            except WrongOutput as error:
                wrong.append(f"{name}: {error}")
    columns = {"model": "Model", "input_size": "Input", "mode": "Mode", "compile": "Compile", "batch_size": "Batch"}
    columns |= {"p25_ms": "p25 (ms)", "p50_ms": "Median (ms)", "p75_ms": "p75 (ms)", "images_per_s": "Images/s"}
    show(rows, columns | {"peak_memory_gib": "Peak memory (GiB)", "mfu": "MFU", "state": "State"}, args.json)
    return _end(args, rows, wrong)


def kernels(args: argparse.Namespace) -> int:
    """Measure the operators that models call, and keep the records in RUNS/bench-kernels."""
    rows, wrong = [], []
    for config, info in _runs(args, "bench-kernels"):
        name, folder, origin = info["name"], create(info), provenance(pick_device(config.run.device))

        def say(text: str, name: str = name) -> None:
            print(f"{name}: {text}", file=sys.stderr, flush=True)

        try:
            for row in bench_kernels(config, say):
                line = entry("bench", **{**row, "provenance": origin})
                append(folder / "record.jsonl", line)
                rows.append({"model": name, **line, "backend": row["backend"][row["operator"]], "run": str(folder)})
        except WrongOutput as error:
            wrong.append(f"{name}: {error}")
    columns = {"operator": "Operator", "shape": "Shape", "pass": "Pass", "backend": "Backend", "p50_ms": "Median (ms)"}
    columns |= {"floor_ms": "Floor (ms)", "floor": "Floor of", "times_floor": "Time ÷ floor", "state": "State"}
    show(rows, columns, args.json)
    return _end(args, rows, wrong)


def _end(args: argparse.Namespace, rows: Sequence[dict[str, Any]], wrong: Sequence[str]) -> int:
    if rows and not args.json:
        where = rows[0]["provenance"]
        print(f"\n{where['device']}, {rows[0]['threads']} threads, {rows[0]['precision']}")
        if disturbed := sum(bool(row.get("disturbed")) for row in rows):
            print(f"other processes kept the host busy during {disturbed} of {len(rows)}: these times may be too long")
        print(f"next: lamabench report {Path(rows[0]['run']).parent} --out out/{args.command}")
    for line in wrong:
        print(f"lamabench {args.command}: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _runs(args: argparse.Namespace, study: str) -> list[tuple[Config, dict[str, Any]]]:
    """The configuration of each model that is named, and what its config.json will say; nothing is written."""
    names, overrides = split_arguments(args.words)
    if not names:
        raise InputError(f"{args.command} needs a model; choices: {', '.join(presets())}")
    sections = ("bench.", "backend.", "run.")
    base, _ = compose([text for text in overrides if text.startswith(sections)])
    fields = [text for text in overrides if not text.startswith(sections)]
    variant = dict(text.split("=", 1) for text in overrides if not text.startswith(("bench.", "run.")))
    runs = []
    for name in names:
        model = model_config(name, fields)
        data = DataConfig(kind="none", size=model.input_size, channels=model.in_channels, num_classes=model.num_classes)
        config = replace(base, model=model, data=data)
        check_bench(config.model, config.bench, config.backend, pick_device(config.run.device))
        # A folder for a model and a precision: its lines say their batch, size, mode and way of compiling themselves.
        subject = replace(config, bench=BenchConfig(precision=base.bench.precision))
        kept = [text for text in overrides if not text.startswith(("bench.", "run.")) or "bench.precision" in text]
        runs.append((config, describe(subject, study=study, name=name, model=name, variant=variant, overrides=kept)))
    return runs
