"""What the subcommands do, all but `report`, which imports no torch."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate

from ...harness.config import Config, check_fit
from ...harness.measure.cost import PARTS, cost
from ...harness.progress import Progress
from ...harness.record import read_run
from ...harness.run import Busy, check_ready, config_to_dict, create, describe, execute, score, source_of
from ...harness.training.checkpoint import files
from ...harness.training.loop import Diverged
from ...kernels.errors import InputError
from ...models.registry import presets
from ..compose import compose, model_config
from ..slurm.client import SlurmError

# Ends of a command that are not bugs: one line and exit code 1.
STOPPED = (Busy, Diverged, SlurmError)


def show(rows: Sequence[dict[str, Any]], columns: dict[str, str], as_json: bool) -> None:
    """Print rows as JSON with every key, or as a table of `columns` {key: heading}."""
    if as_json:
        print(json.dumps(list(rows), indent=1))
        return
    table = [[_cell(row.get(key)) for key in columns] for row in rows]
    numeric = [all(isinstance(row.get(key), int | float | None) for row in rows) for key in columns]
    align = ["right" if number else "left" for number in numeric]
    print(tabulate(table, headers=list(columns.values()), colalign=align, disable_numparse=True))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:.4g}"
        if isinstance(value, float) and abs(value) < 10
        else f"{value:,.3f}"
        if isinstance(value, float)
        else str(value)
    )


def split_arguments(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names, and overrides (words with a `=`)."""
    return [w for w in words if "=" not in w], [w for w in words if "=" in w]


def _cost_row(name: str, title: str, config: Any) -> dict[str, Any]:
    counted = cost(config)
    return {
        "model": name,
        "title": title,
        "input_size": config.input_size,
        "in_channels": config.in_channels,
        **counted.as_dict(),
        "params_m": counted.params / 1e6,
        "macs_g": counted.macs / 1e9,
        "flops_g": counted.flops / 1e9,
    }


def models(args: argparse.Namespace) -> int:
    """List every preset with its parameters and MACs."""
    rows = []
    for index, (name, preset) in enumerate(presets().items(), start=1):
        if not args.json and sys.stderr.isatty():
            print(f"\rcounting {index}/{len(presets())} {name:20s}", end="", file=sys.stderr, flush=True)
        rows.append(_cost_row(name, preset.title, preset.config) | {"source": preset.source})
    if not args.json and sys.stderr.isatty():
        print("\r" + " " * 50 + "\r", end="", file=sys.stderr)
    columns = {"model": "Model", "title": "Name", "input_size": "Input", "in_channels": "Channels"}
    show(rows, columns | {"params_m": "Params (M)", "macs_g": "MACs (G)", "source": "Source"}, args.json)
    return 0


def cost_command(args: argparse.Namespace) -> int:
    """Count models, and split their MACs by part."""
    names, overrides = split_arguments(args.words)
    if not names:
        raise InputError(f"cost needs a model; choices: {', '.join(presets())}")
    configs = [(name, model_config(name, overrides)) for name in names]
    rows = [_cost_row(name, presets()[name].title, config) for name, config in configs]
    headings = {"model": "Model", "input_size": "Input", "params_m": "Params (M)", "macs_g": "MACs (G)"}
    show(rows, headings | {"flops_g": "FLOPs (G)", "paper_gflops": "Paper's Gflops"}, args.json)
    if not args.json:
        print("\nMACs (G) by part; the scan multiplies no matrices: its FLOPs (G)")
        split = [
            {"model": row["model"]}
            | {part: row["parts"][part]["flops" if part == "scan" else "macs"] / 1e9 for part in PARTS}
            for row in rows
        ]
        show(split, {"model": "Model"} | {part: part if part != "scan" else "scan (FLOPs)" for part in PARTS}, False)
    return 0


def _info(overrides: Sequence[str], study: str) -> tuple[Config, dict[str, Any]]:
    config, chosen = compose(overrides)
    name = f"{chosen['model']}-{chosen['data']}"
    variant = dict(text.split("=", 1) for text in overrides if not text.startswith(("run.", "data=", "data.path=")))
    return config, describe(config, study=study, name=name, model=chosen["model"], variant=variant, overrides=overrides)


def train(args: argparse.Namespace) -> int:
    """Train one run, from where it stopped."""
    if args.defaults:
        config, _ = compose(args.words)
        print(yaml.safe_dump(config_to_dict(config), sort_keys=False), end="")
        return 0
    config, info = _info(args.words, "train")
    check_ready(config)
    folder = create(info)
    execute(folder, ["train"], Progress(folder))
    run = read_run(folder)
    done = run.last("train", state="done")
    assert done is not None
    print(f"{folder}: {done['steps']} steps, loss {done['final_loss']:.4f}, {done['images_per_s']:.1f} images/s")
    print(f"next: lamabench sample {folder}")
    return 0


def _derived(path: Path, overrides: Sequence[str], sections: Sequence[str]) -> Path:
    """The run itself, or with overrides a run beside it that samples the checkpoint, or scores the samples, of the
    first."""
    run = read_run(path)
    if not overrides:
        return path
    for text in overrides:
        if text.split(".")[0] not in sections:
            raise InputError(
                f"{text!r} would change what is there already; sections to set here: {', '.join(sections)}"
            )
    config, chosen = compose([*run.info["overrides"], *overrides, f"run.root={path.resolve().parent.parent}"])
    check_fit(config)
    if "sample" in sections and not files(source_of(run.info, path) / "checkpoints"):
        raise InputError(f"{path} has no checkpoint to sample: train it first")
    info = describe(
        config,
        study=run.info["study"],
        name=run.info["name"],
        model=chosen["model"],
        variant=run.info["variant"] | dict(text.split("=", 1) for text in overrides if not text.startswith("run.")),
        overrides=[*run.info["overrides"], *overrides],
    )
    if info["id"] == run.info["id"]:
        return path
    return create(info | {"source": str(path.resolve())})


def sample(args: argparse.Namespace) -> int:
    """Sample a trained run."""
    path, overrides = _run_and_overrides(args.words)
    folder = _derived(path, overrides, ("sample", "evaluate", "backend", "run"))
    execute(folder, ["sample"], Progress(folder))
    print(f"{folder / 'samples.npz'}: {read_run(folder).info['config']['sample']['count']} images")
    print(f"next: lamabench evaluate {folder}")
    return 0


def _run_and_overrides(words: Sequence[str]) -> tuple[Path, list[str]]:
    names, overrides = split_arguments(words)
    if len(names) != 1:
        raise InputError(f"name one run folder (such as runs/train/NAME-ID), not {names or 'none'}")
    return Path(names[0]), overrides


def evaluate(args: argparse.Namespace) -> int:
    """Score the samples of a run, or any .npz of images."""
    path, overrides = _run_and_overrides(args.words)
    if path.suffix == ".npz":
        config, _ = compose(overrides)
        rows = score(path, config, Path(config.run.root) / ".cache", Progress())
    else:
        if overrides and not (path / "samples.npz").is_file():
            raise InputError(f"{path} has no samples to score; draw them first (lamabench sample {path})")
        folder = _derived(path, overrides, ("evaluate", "run"))
        execute(folder, ["evaluate"], Progress(folder))
        record = read_run(folder).last("evaluate", state="done")
        assert record is not None
        rows = record["rows"]
    columns = {"metric": "Metric", "value": "Value", "std": "±", "count": "Images", "reference": "Reference"}
    show(rows, columns | {"reference_count": "Reference images", "protocol": "Protocol"}, args.json)
    return 0
