"""`lamabench sample`: images from a training."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...harness.config import Config, check_fit
from ...harness.keys import config_from_dict, training_folder
from ...harness.progress import Progress
from ...harness.run import create, read_info
from ...harness.stages import Task, execute, step_of, tasks
from ...harness.training.checkpoint import moments
from ...kernels.errors import InputError
from ...models import plugins
from ..compose import load_plugins, override
from ..output import split_arguments
from .train import STUDY, note


def run(args: argparse.Namespace) -> int:
    path, overrides = run_and_overrides(args.words)
    config, wanted = asked_of(path, overrides, ("sample", "evaluate", "backend", "run"), ["sample"])
    for task in wanted:
        execute(task, Progress(task.path))
        print(f"{task.path / 'samples.npz'}: {config.sample.count} images at step {task.step}")
    print(f"next: lamabench evaluate {' '.join([str(path), *overrides])}")
    return 0


def run_and_overrides(words: Sequence[str]) -> tuple[Path, list[str]]:
    """The one folder or file among words, and the overrides. Raises InputError where there are none or several."""
    names, overrides = split_arguments(words)
    if len(names) != 1:
        raise InputError(f"name one run folder (such as runs/train/NAME), not {names or 'none'}")
    return Path(names[0]).expanduser(), overrides


def asked_of(
    path: Path, overrides: Sequence[str], sections: Sequence[str], stages: Sequence[str]
) -> tuple[Config, list[Task]]:
    """What `sample` or `evaluate` asks of a training: its configuration with overrides, and a task a moment.

    Keys are added to the training's folder. With run.root=R, or where that folder cannot be written, they come below R
    (`runs` by default), in a folder of the same key that says where the weights lie.
    """
    overrides = load_plugins(overrides)
    for text in overrides:
        if text.split(".")[0] not in sections:
            raise InputError(f"{text!r} would make another training of it; sections to set here: {', '.join(sections)}")
    info = read_info(path)
    plugins.load_recorded(info.get("plugins", ()), lambda text: print(text, file=sys.stderr))
    if info["kind"] != "training":
        raise InputError(f"{path} is the folder of a {info['kind']}; name that of a training, such as runs/train/NAME")
    home = path.resolve()
    given = any(text.startswith("run.root=") for text in overrides)
    config = override(config_from_dict(info["config"]), overrides)
    if not given:
        root = home.parent.parent if os.access(home, os.W_OK) else Path("runs").resolve()
        config = replace(config, run=replace(config.run, root=str(root)))
    # What it was asked for does not matter here, but what is there.
    steps, sample = step_of(home), config.sample
    if sample.at == "all":
        sample = replace(sample, at=moments(home))
    config = replace(config, train=replace(config.train, steps=steps), sample=sample)
    check_fit(config)
    about: dict[str, Any] = {key: info[key] for key in ("study", "name", "variant", "seed", "model", "family", "title")}
    wanted = tasks(config, about, stages, training=home)
    copy = training_folder(Path(config.run.root), config)
    if copy.resolve() != home:
        create(copy, {**info, "weights": str(home)})
    note(config, about | {"study": STUDY, "name": f"{info['model']}-{config.data.name or config.data.kind}"}, wanted)
    return config, wanted
