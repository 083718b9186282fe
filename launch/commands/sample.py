"""`lamabench sample`: draws images from a training."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ...harness import signals
from ...harness.config import Config, check_fit
from ...harness.device import pick_device
from ...harness.keys import config_of, training_folder
from ...harness.progress import Progress
from ...harness.run import ABOUT, create, locked, plain_name, read_info, weights_home
from ...harness.stages import Task, execute, kept_steps, missing, not_kept, step_of, tasks, write
from ...harness.training.checkpoint import load_weights, moments
from ...kernels.errors import InputError
from ...models import plugins, registry
from ..compose import load_plugins, override
from ..output import command, split_arguments
from .train import STUDY, note


def run(args: argparse.Namespace) -> int:
    path, overrides = run_and_overrides(args.words)
    config, wanted = asked_of(path, overrides, ("sample", "evaluate", "backend", "run"), ["sample"], check_weights)
    for task in wanted:
        if gone(task):  # the newest row counts, so that they are drawn again
            with locked(task.path):
                error = "samples.npz was deleted"
                write(task.path, {"kind": "sample", "key": task.key, "state": "failed", "error": error})
        with signals.noted():
            execute(task, Progress(task.path))
        print(f"{task.path / 'samples.npz'}: {config.sample.count} images at step {task.step}")
    words = [text for text in overrides if not text.startswith("backend.")]  # evaluate takes no backend
    print(f"next: {command('evaluate', path, *words)}")
    return 0


def gone(task: Task) -> bool:
    """Whether samples were drawn, but their file does not exist any more."""
    return "sample" not in missing(task) and not (task.path / "samples.npz").exists()


def check_weights(task: Task) -> None:
    """Raise InputError if the weights that samples take are damaged or, with the nearest kept steps, not kept."""
    weights = task.config["sample"]["weights"]
    if "sample" not in missing(task) and not gone(task):
        return
    if task.step in kept_steps(Path(task.training), weights):
        model = registry.from_dict(task.config["model"])
        load_weights(Path(task.training), task.step, weights, model, tensors=False)
    else:
        text = not_kept(task.step, kept_steps(Path(task.training), weights))
        raise InputError(f"{task.training}: {text} ({weights} weights)")


def run_and_overrides(words: Sequence[str]) -> tuple[Path, list[str]]:
    """The one folder or file among words, and the overrides. Raises InputError if there is none, or several."""
    names, overrides = split_arguments(words)
    if len(names) != 1:
        raise InputError(f"name one run folder (such as runs/train/NAME), not {names or 'none'}")
    return Path(os.path.expanduser(names[0])), overrides


def asked_of(
    path: Path,
    overrides: Sequence[str],
    sections: Sequence[str],
    stages: Sequence[str],
    check: Callable[[Task], None],
) -> tuple[Config, list[Task]]:
    """What `sample` or `evaluate` asks of a training: its configuration with overrides, and one task for each moment.
    Each task passes `check` before anything is written.

    Samples are added to the training's folder. With run.root=R, or if that folder cannot be written, they go below R
    (`runs` by default), into a folder with the same key. Its config.json names the folder of the weights.
    """
    overrides = load_plugins(overrides)
    info = read_info(path, ABOUT)
    for text in overrides:
        if text.split(".")[0] not in sections:
            raise InputError(f"{text!r} would make another training of it; sections to set here: {', '.join(sections)}")
    plugins.load_recorded(info.get("plugins", ()), lambda text: print(text, file=sys.stderr))
    if info["kind"] != "training":
        raise InputError(f"{path} is the folder of a {info['kind']}; name that of a training, such as runs/train/NAME")
    home = path.resolve()
    given = any(text.startswith("run.root=") for text in overrides)
    config = override(config_of(path, info), overrides)
    if not given:
        root = home.parent.parent if os.access(home, os.W_OK) else Path("runs").resolve()
        config = replace(config, run=replace(config.run, root=str(root)))
    # The steps that exist matter here, not those that the training was asked for.
    weights, sample = weights_home(home, info), config.sample
    last, kept = step_of(weights), kept_steps(weights, sample.weights)
    words = {"last": [last], "all": kept if sample.weights == "live" else moments(weights)}
    at = words[sample.at] if isinstance(sample.at, str) else sample.at
    if not at:
        raise InputError(f"{weights} has no {sample.weights} weights any more")
    steps = max(last, *kept, 0)
    config = replace(config, train=replace(config.train, steps=steps), sample=replace(sample, at=at))
    check_fit(config)
    about = {key: info[key] for key in ABOUT}
    wanted = tasks(config, about, stages, training=weights)
    for task in wanted:
        check(task)
    if any(missing(task) for task in wanted):
        pick_device(config.run.device)
    copy = training_folder(Path(config.run.root), config)
    if copy.resolve() not in (home, weights):
        create(copy, {**info, "weights": str(weights)})
    note(
        config,
        about | {"study": STUDY, "name": f"{info['model']}-{plain_name(config.data.name or config.data.kind)}"},
        wanted,
    )
    return config, wanted
