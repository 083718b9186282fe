"""`lamabench train`: starts one training, or continues it where it stopped."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from ...harness import signals
from ...harness.checks import check_batch
from ...harness.config import Config, check_fit
from ...harness.device import device_type, is_cuda, own_device, pick_device, training_mode
from ...harness.disk import read_lines
from ...harness.guide import passes
from ...harness.keys import asked, config_to_dict, model_folder, training_folder
from ...harness.moments import kept_steps, not_kept
from ...harness.parallel import size
from ...harness.progress import Progress, clock
from ...harness.run import read_info, read_run, write_study
from ...harness.stages import execute, lost, missing, problem
from ...harness.tasks import Task, tasks
from ...harness.training.resume import unreached
from ...kernels.errors import InputError
from ...models import registry
from ..compose import compose
from ..output import command, number

LATE = 0.05
PLACES = ("run.", "data=", "data.path=", "encoder=", "encoder.path=", "encoder.decoder=")  # where things lie
STUDY = "train"  # the study to which single commands belong


def run(args: argparse.Namespace) -> int:
    if args.defaults:
        config, _ = compose(args.words)
        settings = {name: value for name, value in config_to_dict(config).items() if name != "released"}
        print(yaml.safe_dump(settings, sort_keys=False), end="")
        return 0
    if not args.words:
        args.parser.print_help()
        return 2
    config, chosen = compose(args.words)
    if not any(word.startswith("model=") for word in args.words):
        raise InputError(f"train needs a model: model=NAME; choices: {', '.join(registry.presets())}")
    name = f"{chosen['model']}-{chosen['data']}"
    about = describe(config, STUDY, name, chosen["model"], values_of(args.words))
    (task,) = tasks(config, about, ["train"])
    check_moments(task)
    check_ready(config, task.path)
    if not task.path.is_dir():
        from ..notes import similar

        for line in similar(config):
            print(line, file=sys.stderr)
    if text := unreached(config):
        print(text, file=sys.stderr)
    folder = note(config, about, [task])
    with signals.noted():
        execute(task, Progress(task.path))
    rows = [row.flat() for row in read_run(task.path).records if row.kind == "train" and row.state == "done"]
    done = next((row for row in reversed(rows) if row["steps"] == config.train.steps), None)
    last = done or rows[-1]
    lines = [line["images_per_s"] for line in read_lines(task.path / "metrics.jsonl") if line.get("images_per_s")]
    speed = median(lines) if lines else last["images_per_s"]  # without compilation, which the first line has
    if done is None:  # a moment of a longer training
        print(f"{folder}: step {config.train.steps} is kept, of {max(row['steps'] for row in rows)} steps")
    else:
        steps = number(done["steps"], "step")
        print(f"{folder}: {steps}, loss {done['final_loss']:.4f}, {speed:.1f} images/s")
    if text := late(last, config):
        print(text)
    from .sample import fitting

    speed /= last["processes"] or 1
    print(f"next: {command('sample', folder, *fitting(speed, config.objective.kind))}")
    sample = config.sample
    whole = sample.count * sum(passes(config)) / (3 * speed)
    print(f"(without settings: {sample.count:,} images of {sample.steps} steps, about {clock(whole)})")
    return 0


def late(row: dict[str, Any], config: Config) -> str:
    """Text about a GPU that waited for data more than `LATE` of the time, empty if it did not. On a CPU, steps and data
    share the cores."""
    share = row["waiting_share"] or 0.0
    if share <= LATE or not is_cuda(pick_device(config.run.device)):
        return ""
    other = "" if config.train.noise == "gpu" else "; train.noise=gpu, a training of its own, leaves them less to do"
    return f"the GPU waited for data {share:.0%} of the time: run.workers=N sets how many processes load them{other}"


def describe(
    config: Config, study: str, name: str, model: str, variant: dict[str, Any], title: str | None = None
) -> dict[str, Any]:
    """The entries of a folder's config.json beside its configuration. `title` is that of the preset `model` if none is
    given."""
    about = {"study": study, "name": name, "variant": variant, "seed": config.seed, "model": model}
    return about | {"family": registry.family_of(config.model).name, "title": title or registry.preset(model).title}


def values_of(words: Sequence[str]) -> dict[str, str]:
    """The settings that overrides vary, for names in tables."""
    return dict(word.split("=", 1) for word in words if not word.startswith(PLACES))


def note(config: Config, about: dict[str, Any], wanted: Sequence[Task], training: Path | None = None) -> Path:
    """Name the folders of a command's tasks in ROOT/train, so that `sweep prune` keeps them. Returns the link to the
    training. The name of the link ends in the training's key."""
    root = Path(config.run.root)
    home = training_folder(root, config)
    released = config.released.name
    name = f"{released or about['name']}-{home.name.rsplit('-', 1)[1]}"
    samples = [str(task.path.relative_to(root)) for task in wanted if task.kind == "samples"]
    entry = {**about, "name": name, "training": str(home.relative_to(root)), "samples": samples}
    entry |= {"steps": None if released else config.train.steps, "backend": asked(config.backend) or {}}
    entry["model_folder"] = str(model_folder(root, config.model).relative_to(root))
    try:
        return write_study(root, STUDY, None, [entry], add=True) / name
    except OSError as error:  # a full disk, or a folder of another user
        raise InputError(f"cannot write below {root}: {error.strerror}; run.root=FOLDER takes another one") from None


def check_moments(task: Task) -> None:
    """Raise InputError if a training cannot continue, if its folder is damaged, or if it has passed a requested moment
    without keeping its weights and nothing else is to do. If something is to do, print a line about such a moment on
    stderr."""
    if (task.path / "config.json").exists():
        read_info(task.path)
    if (text := problem(task)) is not None:
        raise InputError(f"{task.path}: {text}")
    for step in lost(task):
        text = f"{task.path}: {not_kept(step, kept_steps(task.path))}"
        if not missing(task):
            raise InputError(text)
        print(text, file=sys.stderr)


def check_ready(config: Config, folder: Path) -> None:
    """Raise InputError, before anything is written, for what would stop a training at its start: a model that does not
    fit the data, data that do not exist or differ from those it was trained on, or a backend that cannot run."""
    import torch

    from ...harness.data.encoder import encoder, load, load_held_out
    from ...harness.data.images import check_request
    from ...harness.data.items import check_noise
    from ...harness.training.checkpoint import check_data
    from ...harness.training.loggers import check_loggers

    check_fit(config)
    check_loggers(config.run.log_to)
    check_request(config.data)
    check_batch(config.train.batch_size, size())
    device = own_device(pick_device(config.run.device))
    training_mode(config.train.compile, device)
    check_noise(config.train, device)
    with torch.device("meta"):
        net = registry.build(config.model)
    registry.select_backends(net, vars(config.backend), device_type(device))
    data = load(config, Progress().say)
    check_data(folder, data.fingerprint)
    if config.run.heldout_every:
        load_held_out(config, data.class_names, Progress().say)
    if config.run.preview_every:
        encoder(config.encoder).check_decoder(device)
