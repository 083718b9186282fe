"""`lamabench sample`: draws images from a training."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ...harness import signals
from ...harness.config import Config, check_fit
from ...harness.data.encoder import encoder
from ...harness.device import pick_device
from ...harness.export import check_target, export, names
from ...harness.keys import config_from_dict, config_of, training_folder
from ...harness.moments import kept_steps, not_kept, step_of
from ...harness.progress import Progress
from ...harness.run import ABOUT, create, locked, plain_name, read_info, weights_home
from ...harness.sampling import labels_of
from ...harness.scoring.kept import open_set
from ...harness.shards import images_of, labels_at, open_samples, set_of
from ...harness.stages import execute, missing, write
from ...harness.tasks import Task, tasks
from ...harness.training.checkpoint import load_weights, moments
from ...kernels.errors import InputError
from ...models import plugins, registry
from ..compose import load_plugins, override
from ..grid import write_grid
from ..output import command, split_arguments
from ..released import SECTIONS as RELEASED
from ..released import check_decoded, settled
from .train import STUDY, note

COUNTS = (160, 1000, 10_000)  # of images, for a first look
FIRST_LOOK_S = 120.0
PLACES = ("data.path=", "encoder.path=", "encoder.decoder=")  # may be others on another machine


def run(args: argparse.Namespace) -> int:
    path, overrides = run_and_overrides(args.words)
    checked: list[Task] = []

    def check(task: Task) -> None:
        checked.append(task)
        check_weights(task)
        if "sample" in missing(task):
            settings = config_from_dict(task.config)
            encoder(settings.encoder).check_decoder(pick_device(settings.run.device))
        if task.config["sample"]["keep"] == "features" and "sample" in missing(task):
            from ...harness.scoring.networks import find_weights

            find_weights(*(task.config["evaluate"][name] for name in ("features", "features_path", "download")))
        if args.to is not None:
            words = [text for text in overrides if not text.startswith("sample.keep=")]
            check_export(args.to, checked, command("sample", path, *words, "sample.keep=images", "--to", args.to))

    config, wanted = asked_of(path, overrides, ("sample", "evaluate", "backend", "run"), ["sample"], check)
    for task in wanted:
        if gone(task):  # the newest row counts, so that they are drawn again
            with locked(task.path):
                error = "the images were deleted or damaged"
                write(task.path, {"kind": "sample", "key": task.key, "state": "failed", "error": error})
        with signals.noted():
            execute(task, Progress(task.path))
        place, images = set_of(task.path), images_of(task.path)
        kept = "images" if images == place else "features (and the first images)"
        print(f"{place}: {task.config['sample']['count']} {kept} at step {task.step}")
        classes = write_grid(grid := task.path / "grid.png", open_samples(images), labels_at(images))
        rows = f", in rows by class: {', '.join(map(str, classes))}" if classes else ""
        print(f"{grid}: some of them{rows}")
        if args.to is not None:
            export(args.to, open_samples(images), labels_at(images), config.model.num_classes, Progress())
            print(f"{args.to}: all of them")
    words = [text for text in overrides if not text.startswith("backend.")]  # evaluate takes no backend
    print(f"next: {command('evaluate', path, *words)}")
    return 0


def gone(task: Task) -> bool:
    """Whether samples were drawn, but what was kept of them cannot be read any more."""
    if "sample" in missing(task):
        return False
    try:
        open_set(set_of(task.path))
    except InputError:
        return True
    return False


def fitting(images_per_s: float, objective: str) -> list[str]:
    """Settings for a first look at a training that saw so many images a second: as many images of 25 steps without
    noise as take two minutes, if a forward pass is a third of a training step. At least 160, because KID needs 100."""
    images = 3 * images_per_s * FIRST_LOOK_S / 25
    count = max((count for count in COUNTS if count <= images), default=COUNTS[0])
    method = "euler" if objective == "flow" else "ddim"  # the same method, by its name in the objective's papers
    return [f"sample.count={count}", f"sample.method={method}", "sample.steps=25"]


def check_export(target: Path, checked: Sequence[Task], again: str) -> None:
    """Raise InputError if the last of `checked` cannot be written to `target`, if it is not the only one, or if only
    features are kept of it, with the command `again` that draws its images."""
    if len(checked) > 1:
        sets = " and ".join(f"{task.config['sample']['count']} images at step {task.step}" for task in checked[:2])
        raise InputError(f"--to takes one set of samples, not {sets}: give sample.at=[N] and sample.curve_count=null")
    config, task = config_from_dict(checked[-1].config), checked[-1]
    if config.sample.keep == "features" and ("sample" in missing(task) or images_of(task.path) != set_of(task.path)):
        raise InputError(f"--to writes images, and sample.keep=features keeps none; draw and keep them: {again}")
    labels = labels_of(config, range(config.sample.count))
    check_target(target, names(labels, config.model.num_classes))


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
    adds: bool = True,
) -> tuple[Config, list[Task]]:
    """What `sample` or `evaluate` asks of a training: its configuration with overrides, and one task for each moment.
    Each task passes `check` before anything is written. If the command `adds` samples or scores, they are noted.

    Samples are added to the training's folder. With run.root=R, or if that folder cannot be written, they go below R
    (`runs` by default), into a folder with the same key. Its config.json names the folder of the weights.
    """
    overrides = load_plugins(overrides)
    words = [text.split("=")[0].split(".")[0] for text in overrides]
    if (kind := read_info(path)["kind"]) != "training":
        noun = "set of other people's samples" if kind == "foreign" else kind
        raise InputError(f"{path} is the folder of a {noun}; name that of a training, such as runs/train/NAME")
    info = read_info(path, ABOUT)
    released = bool((info["config"].get("released") or {}).get("tensors"))
    sections = [*sections, *(RELEASED if released else ())]
    for word, text in zip(words, overrides, strict=True):
        if word not in sections and not text.startswith(PLACES):
            raise InputError(
                f"{text!r} would make another training of it; sections to set here: {', '.join(sections)}, "
                f"and {', '.join(place.rstrip('=') for place in PLACES)}"
            )
    plugins.load_recorded(info.get("plugins", ()), lambda text: print(text, file=sys.stderr))
    home = path.resolve()
    given = any(text.startswith("run.root=") for text in overrides)
    config = config_of(path, info)
    config = settled(config, overrides) if released else override(config, overrides)
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
    steps = max(last, *kept, 1)
    config = replace(config, train=replace(config.train, steps=steps), sample=replace(sample, at=at))
    if released:
        check_decoded(config, path)
    check_fit(config)
    about = {key: info[key] for key in ABOUT}
    wanted = tasks(config, about, stages, training=weights, moments=words["all"])
    for task in wanted:
        check(task)
    if any(missing(task) for task in wanted):
        pick_device(config.run.device)
    copy = training_folder(Path(config.run.root), config)
    if copy.resolve() not in (home, weights):
        create(copy, {**info, "weights": str(weights)})
    if adds:
        name = f"{info['model']}-{plain_name(config.data.name or config.data.kind)}"
        note(config, about | {"study": STUDY, "name": name}, wanted)
    return config, wanted
