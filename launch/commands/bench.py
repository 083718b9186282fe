"""`lamabench bench`: measures speed and memory of models, and keeps the results in the folder of each model."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...harness.caches import forget_choices, keep_compiled
from ...harness.config import Config
from ...harness.device import device_name, is_cuda, own_device, pick_device
from ...harness.keys import asked, config_to_dict, model_folder
from ...harness.measure.gpus import derived
from ...harness.measure.models import WrongOutput, bench, check_bench
from ...harness.measure.speed import measure, stored
from ...harness.parallel import size
from ...harness.provenance import provenance
from ...harness.record import newest, read_records
from ...harness.run import locked, write_study
from ...harness.sections import DataConfig
from ...harness.stages import prepare, write
from ...harness.tasks import Task, tasks
from ...kernels.errors import InputError
from ...models.registry import presets
from ..compose import compose, model_config
from ..named import named, with_head
from ..output import command, show, split_arguments
from .train import describe

COLUMNS = {"model": "Model", "input_size": "Input", "mode": "Mode", "compile": "Compile", "batch_size": "Batch"}
COLUMNS |= {"p25_ms": "p25 (ms)", "p50_ms": "Median (ms)", "p75_ms": "p75 (ms)", "images_per_s": "Images/s"}
COLUMNS |= {"peak_memory_gib": "Peak memory (GiB)", "mfu": "MFU", "clock_mhz": "Clock (MHz)"}
COLUMNS |= {"power_w": "Power (W)", "throttled": "Held down by", "state": "State"}


def run(args: argparse.Namespace) -> int:
    if args.profile:
        from .profiling import run as profile

        return profile(args)
    rows, wrong, subjects = [], [], asked_of(args, "bench")
    device = own_device(pick_device(subjects[0][0].run.device))
    for config, _ in subjects:  # all, before the first is measured
        check_bench(config.model, config.bench, config.backend, device, size())
    if args.ahead:
        return compile_ahead(args, subjects, device)
    for config, task in subjects:
        name, say = task.about["name"], speaker(task)
        keep_compiled(config.run.root, device)
        folder, origin = begin(task, config), provenance(device)
        with locked(folder):
            newest_rows = newest(read_records(folder / "record.jsonl")).values()
            there = stored(config.model, task.plans[0], newest_rows, device_name(device), size())
            # Only rows of the same code, machine and versions are the same measurement.
            there = [row for row in there if row["provenance"] == origin and not args.again]
            if there:
                say(f"{len(there)} measurements are in {folder} already (--again measures them again)")
            rows += [{"model": name, **row, "run": str(folder)} for row in there]
            try:
                for line in measure(config.model, task.plans[0], config.objective, device, say, there, together=True):
                    row = write(folder, {"provenance": origin, **line})
                    rows.append({"model": name, **row, "run": str(folder)})
            except WrongOutput as error:
                wrong.append(f"{name}: {error}")
    show([row | derived(row) for row in rows], COLUMNS, args.json)
    return end(args, rows, wrong)


def compile_ahead(args: argparse.Namespace, subjects: Sequence[tuple[Config, Task]], device: str) -> int:
    """Compile and check all that would be measured; nothing is recorded. Returns the exit code."""
    if size() > 1:
        raise InputError("bench --ahead is for one process: start it without torchrun")
    if any(config.bench.batch_size == "auto" for config, _ in subjects):
        raise InputError("bench --ahead needs numbers in bench.batch_size, because auto needs times")
    wrong, started = [], time.time()
    try:
        for config, task in subjects:
            keep_compiled(config.run.root, device)
            what, say = (config.model, config.bench, config.backend, config.objective), speaker(task)
            rows = []
            try:
                rows += bench(*what, device, say, ahead=True)
            except WrongOutput as error:
                wrong.append(f"{task.about['name']}: {error}")
            if short := sum(row["state"] == "oom" for row in rows):
                wrong.append(f"{task.about['name']}: memory ran out in {short} of {len(rows)}, which are not compiled")
    finally:
        if is_cuda(device):
            forget_choices(started)
    if args.json:
        print("[]")
    return end(args, [], wrong)


def speaker(task: Task) -> Any:
    """A function that prints a line of progress under the model's name."""
    return lambda text: print(f"{task.about['name']}: {text}", file=sys.stderr, flush=True)


def begin(task: Task, config: Config) -> Path:
    """Create the folder of a model and name it in ROOT/STUDY, so that `sweep prune` keeps it."""
    root, folder = Path(config.run.root), prepare(task)
    name = f"{task.about['name']}-{task.key}"
    entry = {**task.about, "name": name, "training": None, "samples": [], "backend": asked(config.backend) or {}}
    entry["model_folder"] = str(model_folder(root, config.model).relative_to(root))
    write_study(root, task.about["study"], None, [entry], add=True)
    return folder


def end(args: argparse.Namespace, rows: Sequence[dict[str, Any]], wrong: Sequence[str]) -> int:
    """Print where the rows were measured and what comes next. Returns the exit code."""
    if rows and not args.json:
        where = rows[0]["provenance"]
        print(f"\n{where['device']}, {rows[0]['threads']} threads, {rows[0]['precision']}")
        if disturbed := sum(bool(row.get("disturbed")) for row in rows):
            print(f"other processes kept the host busy during {disturbed} of {len(rows)}: these times may be too long")
        root = Path(rows[0]["run"]).parent.parent
        print(f"next: {command('report', root / args.command, '--out', f'out/{args.command}')}")
    for line in wrong:
        print(f"lamabench {args.command}: {line}", file=sys.stderr)
    return 1 if wrong else 0


def asked_of(args: argparse.Namespace, study: str) -> list[tuple[Config, Task]]:
    """The configuration of each named model, and its task. Nothing is written."""
    names, overrides = split_arguments(args.words)
    if not names:
        raise InputError(f"{args.command} needs a model; choices: {', '.join(presets())}")
    sections = ("bench.", "backend.", "objective.", "run.")
    base, _ = compose([text for text in overrides if text.startswith(sections)])
    fields = [text for text in overrides if not text.startswith(sections)]
    variant = dict(text.split("=", 1) for text in overrides if not text.startswith(("bench.", "run.")))
    pairs = []
    for name in names:
        model = named(name)
        config = replace(base, model=with_head(model_config(name, fields), base.objective), data=DataConfig())
        if model.root is not None and not any(text.startswith("run.root=") for text in overrides):
            config = replace(config, run=replace(base.run, root=str(model.root)))
        about = describe(config, study, model.model, model.model, variant, model.title)
        task = tasks(config, about, ["bench"])[0]
        pairs.append((config, replace(task, config=config_to_dict(config))))
    return pairs
