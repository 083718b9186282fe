"""`lamabench convert`: makes a run of released weights."""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ...harness import released as runs
from ...harness.config import Config, check_fit
from ...harness.diffusion.objective import OBJECTIVES, READERS, objective
from ...harness.keys import config_to_dict, training_folder, training_key
from ...harness.progress import Progress
from ...harness.provenance import provenance
from ...harness.record import read_records
from ...harness.run import create, is_locked, locked, plain_name
from ...harness.sections import ObjectiveConfig, ReleasedConfig
from ...harness.stages import execute, missing, write
from ...harness.tasks import tasks
from ...harness.training.checkpoint import load_weights, moments
from ...kernels.errors import InputError
from ...models import registry, released
from ..compose import load_plugins, text_of
from ..output import command, show, split_arguments
from ..released import check_decoded, default_data, is_latent, preset_of, settled
from .train import STUDY, note

SECTIONS = ("model", "data", "encoder", "objective", "run")
MOST_NAME = 100  # bytes


def run(args: argparse.Namespace) -> int:
    names, overrides = split_arguments(args.words)
    if len(names) != 1:
        raise InputError(f"name one file or folder of released weights, not {names or 'none'}")
    path, overrides = Path(os.path.expanduser(names[0])), load_plugins(overrides)
    for text in overrides:
        if text.split("=")[0].split(".")[0] not in SECTIONS:
            raise InputError(f"{text!r} is nothing that convert reads; sections to set here: {', '.join(SECTIONS)}")
    name = args.to or plain_name(path.resolve().stem)
    check_name(name)
    progress = Progress()
    weights = released.load(path, *_model(overrides), args.config)
    config = _config(weights, name, [text for text in overrides if not text.startswith("model")])
    source = {
        "source": weights.title,
        "file": path.resolve().name,
        "sha256": runs.file_digest(path),
        "tensors": config.released.tensors,
        "weights": weights.weights,
        "notes": weights.notes,
    }
    folder, about = training_folder(Path(config.run.root), config), _about(config, name)
    _write(folder, config, about, source, weights)
    link = note(config, about, [])
    for task in tasks(config, about, ["cost"]):
        if missing(task) and not is_locked(task.path):
            execute(task, progress)
    _show(args, config, link, folder, source)
    return 0


def check_name(name: str) -> None:
    """Raise InputError for a name that cannot be part of a folder's name."""
    if plain_name(name) != name or name.startswith(".") or len(name.encode()) > MOST_NAME:
        raise InputError(
            f"--to takes the name of a run, of letters, digits and ._+=-, at most {MOST_NAME} bytes and not beginning "
            f"with a dot, not {name[:40]!r}; run.root=FOLDER says where it lies"
        )


def _model(overrides: list[str]) -> tuple[str | None, dict[str, Any]]:
    """The preset that overrides name, and the fields of a model that they set, as YAML reads them."""
    names = [text_of(text) for text in overrides if text.startswith("model=")]
    fields = dict(text.removeprefix("model.").split("=", 1) for text in overrides if text.startswith("model."))
    return (names[-1] if names else None), {key: _value(value) for key, value in fields.items()}


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text  # which no field of another type takes


def _config(weights: released.Released, name: str, overrides: list[str]) -> Config:
    """The configuration of a run. Raises InputError if its sections do not fit together."""
    model, known = weights.net.config, preset_of(weights.net.config)
    goal = ObjectiveConfig(schedule=(known and known.schedule) or "linear")
    digest = runs.tensors_digest(weights.net.state_dict())
    config = Config(model, default_data(model), objective=goal, released=ReleasedConfig(name, digest))
    config = settled(config, overrides)
    _check_head(config)
    if not objective(config.objective).path(2).has_posterior:  # ancestral, the default, draws from one
        config = replace(config, sample=replace(config.sample, method="ddim"))
    # Label dropout is of the training, which is over.
    config = replace(config, train=replace(config.train, class_dropout=0.0))
    if not is_latent(config) or config.encoder.kind != "pixels":
        check_fit(config)
    return config


def _check_head(config: Config) -> None:
    """Raise InputError if the weights have a head of another objective."""
    head, channels = registry.out_channels(config.model), config.model.in_channels
    fit = {kind: objective(ObjectiveConfig(kind)).out_channels(channels) for kind in OBJECTIVES}
    if fit[kind := config.objective.kind] != head:
        names = ", ".join(f"objective.kind={name}" for name, count in fit.items() if count == head)
        raise InputError(
            f"the head of these weights has {head} channels, and objective {kind} needs {fit[kind]}; choices: "
            f"{names or 'none'}"
        )


def _about(config: Config, name: str) -> dict[str, Any]:
    """The entries of config.json beside the configuration."""
    known, family = preset_of(config.model), registry.family_of(config.model).name
    title = f"{known.title} ({name})" if known else name
    about = {"study": STUDY, "name": name, "variant": {}, "seed": config.seed}
    return about | {"model": known.name if known else name, "family": family, "title": title}


def _write(
    folder: Path, config: Config, about: dict[str, Any], source: dict[str, Any], weights: released.Released
) -> None:
    """Write what is missing of a run: its config.json, its weights, and the record that says where they come from."""
    info = {"kind": "training", "key": training_key(config), **about, "config": config_to_dict(config)}
    create(folder, {**info, "origin": source})
    with locked(folder):
        if runs.STEP not in moments(folder) or not _whole(folder, config):
            runs.keep_weights(folder, config, weights.net.state_dict())
        rows = [row.flat() for row in read_records(folder / "record.jsonl") if row.kind == "convert"]
        if not rows or any(rows[-1][key] != value for key, value in source.items()):
            write(folder, {"kind": "convert", "key": training_key(config), "provenance": provenance("cpu"), **source})


def _whole(folder: Path, config: Config) -> bool:
    try:
        load_weights(folder, runs.STEP, model=config.model)
    except InputError:  # damaged
        return False
    return True


def _show(args: argparse.Namespace, config: Config, link: Path, folder: Path, source: dict[str, Any]) -> None:
    model = registry.to_dict(config.model)
    if args.json:
        show([{"run": str(folder), "link": str(link), "model": model, **source}], {}, True)
        return
    settings = ", ".join(f"{key} {value}" for key, value in registry.describe(config.model).items() if key != "family")
    print(f"{folder}: {source['source']}, {source['file']}, SHA-256 {source['sha256'][:12]}")
    print(f"model: {model['family']} with {settings}")
    goal, data = config.objective, config.data
    schedule = f" ({goal.schedule})" if goal.kind in READERS["schedule"] else ""
    print(f"read as: objective {goal.kind}{schedule}, data {data.name or data.kind} at {data.size} px")
    for line in source["notes"]:
        print(f"note: {line}")
    try:
        check_decoded(config, link)
        print(f"next: {command('sample', link, 'sample.count=160', 'sample.method=ddim', 'sample.steps=25')}")
    except InputError as error:
        print(f"note: {error}")
        print(f"next: {command('bench', link)}")
