"""What can be known of a study before anything is written: disk space, data, scores, devices, similar trainings."""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..ablations.study import Study
from ..harness.checks import power_name
from ..harness.config import Config, needs_test_split
from ..harness.data import images
from ..harness.data.encoder import encoder
from ..harness.data.files import few
from ..harness.data.splits import held_out
from ..harness.keys import config_from_dict, training_folder
from ..harness.moments import asked_moments, reached
from ..harness.record import read_records
from ..harness.scoring.counts import shortage
from ..harness.sections import HELDOUT, DataConfig, EncoderConfig
from ..harness.shards import features_of
from ..harness.stages import missing, missing_metrics
from ..harness.tasks import Task
from ..harness.training import checkpoint
from ..harness.training.checkpoint import KEEP, moments
from ..harness.training.ema import fit_of
from ..harness.training.resume import unreached
from ..kernels.errors import InputError, unknown
from ..models import registry
from . import local
from .plan import Piece, Planned, pieces

GROUPS = 4  # tensors per parameter in a full checkpoint: the weight, its average, two moments of AdamW
GIB = 2**30


def parameters(task: Task) -> int:
    """The parameters of a task's model."""
    return _parameters(json.dumps(task.config["model"]))


@cache
def _parameters(model: str) -> int:
    with torch.device("meta"):
        net = registry.build(registry.from_dict(json.loads(model)))
    return sum(value.numel() for value in net.parameters())


def gib(task: Task) -> float:
    """The disk space of a training in GiB: its newest checkpoints, and the weights of every moment."""
    steps = {*task.moments, *moments(task.path)}
    others = sum(len(task.config["train"].get(name, [])) for name in ("ema_decays", "ema_powers"))
    return 4 * parameters(task) * ((GROUPS + others) * KEEP + (1 + others) * len(steps)) / GIB


def room(runs: Sequence[Planned]) -> dict[str, float]:
    """The disk space of each training in GiB, by the name of the first run that asks for it."""
    return {piece.run: gib(piece.task) for piece in pieces(runs) if piece.task.kind == "training"}


def hints(study: Study, runs: Sequence[Planned]) -> Iterator[str]:
    """Snapshots beyond the end of a training, samples that are drawn anew or have no weights, scores whose network has
    no weights here, and axes over a setting that is a list: `model.mixers: [ssm, window]` gives two runs with one mixer
    each."""
    late: dict[str, list[str]] = {}
    for run in runs:
        if run.training is not None and (text := unreached(run.config)):
            late.setdefault(text, []).append(run.name)
    for run in runs:
        for task in run.tasks:
            with suppress(InputError):  # of a damaged record, which the plan says elsewhere
                if text := drawn_anew(task) or without_weights(task):
                    late.setdefault(text, []).append(run.name)
    yield from (f"{few(names)}: {text}" for text, names in late.items())
    yield from without_networks(runs)
    for key, values in study.axes.items():
        if len(values) > 1 and not any(isinstance(value, list) for value in values):
            node: Any = runs[0].config
            for word in key.split("."):
                node = getattr(node, word, None)
            if isinstance(node, list):
                inner = ", ".join(map(str, values))
                yield f"axis {key} takes its {len(values)} values one at a time; write [[{inner}]] to combine them"


def without_networks(runs: Sequence[Planned]) -> Iterator[str]:
    """A line about the scores whose network has no weights on this machine, and about the samples of latents whose
    autoencoder is not there. Jobs may find them on theirs."""
    lines: dict[str, list[str]] = {}
    for name, text in (*_weights(runs), *_decoders(runs)):
        lines.setdefault(text, []).append(name)
    yield from (f"{few(names)}: {text}" for text, names in lines.items())


def drawn_anew(task: Task) -> str:
    """Text about samples that exist and do not have what is asked for, empty if there is none."""
    if task.kind == "samples" and (network := features_of(task.path)) and "sample" in missing(task):
        return f"samples at step {task.step} are drawn anew, because only features of {network} are kept of them"
    return ""


def without_weights(task: Task) -> str:
    """Text about samples whose weights `power@WIDTH` the moments of their training will not give, else empty."""
    kind = task.config["sample"]["weights"]
    if task.kind != "samples" or not kind.startswith("power@") or "sample" not in missing(task):
        return ""
    config = config_from_dict(task.config)
    widths, steps = config.train.ema_powers, {*asked_moments(config), *moments(Path(task.training)), task.step}
    terms = [(step, power_name(width)) for step in sorted(steps) if step <= task.step for width in widths]
    try:
        if (task.step, kind) not in terms:
            fit_of(kind, task.step, terms)
    except InputError as error:
        return str(error)
    return ""


class Content(NamedTuple):
    """A set of data as far as it can be known without reading the images of a folder: its fingerprint and its number of
    images. If one is unknown, `reason` says why, and `wrong` whether the set cannot be used here at all."""

    fingerprint: str | None
    images: int | None
    reason: str = ""
    wrong: bool = False


def contents(runs: Sequence[Planned], read: bool = False) -> dict[str, Content]:
    """The sets of data that runs train on or are scored against, by their declaration (`str` of a DataConfig). With
    `read`, the images of a folder that runs need and nobody has read yet are read, once for all jobs."""
    needed = {str(one) for piece in _readers(runs) if read and _reads(piece) for one in _sets(piece)}
    sets = {str(one): one for piece in _readers(runs) for one in _sets(piece)}
    return {label: _content(one, label in needed) for label, one in sets.items()}


def _readers(runs: Sequence[Planned]) -> Iterator[Piece]:
    return (piece for piece in pieces(runs) if {"train", "evaluate"} & {*piece.task.stages})


class Cache(NamedTuple):
    """A cache of latents of the images `data`, or that of their test split."""

    encoder: EncoderConfig
    data: DataConfig
    test: bool = False


def _sets(piece: Piece) -> list[DataConfig | Cache]:
    """The data of a task, and the test split that belongs to them if the task reads it. Of latents, a training and a
    held-out loss read a cache, and other scores read images, unless they have a file as a reference."""
    config = config_from_dict(piece.task.config)
    if config.encoder.kind == "pixels":
        return [config.data, *([held_out(config.data)] if needs_test_split(config) else [])]
    heldout = "evaluate" in piece.task.stages and HELDOUT in piece.task.metrics
    sets: list[DataConfig | Cache] = []
    if "train" in piece.task.stages or heldout:
        sets = [Cache(config.encoder, config.data)]
        if heldout or config.run.heldout_every:
            sets.append(Cache(config.encoder, config.data, True))
    if {*piece.task.metrics} - {HELDOUT} and config.evaluate.reference is None:
        splits = {config.evaluate.of(metric)[1].split for metric in piece.task.metrics if metric != HELDOUT}
        sets += [config.data, *([held_out(config.data)] if "test" in splits else [])]
    return sets


def _reads(piece: Piece) -> bool:
    """Whether the task reads data for what is missing of it."""
    return bool({"train", "evaluate"} & {*piece.missing()})


def _content(config: DataConfig | Cache, read: bool) -> Content:
    try:
        if isinstance(config, Cache):
            coder = encoder(config.encoder)
            latents = coder.load(config.data)
            latents = coder.load_held_out(config.data, latents.class_names) if config.test else latents
            return Content(latents.fingerprint, len(latents))
        if config.kind in images.ON_DEMAND and not read:
            count, fingerprint = images.glance(config)
            reason = "" if fingerprint else f"{config.path} was not read yet, or changed since"
            return Content(fingerprint, count, reason)
        whole = images.load(config, partial(print, file=sys.stderr, flush=True) if read else None)
    except InputError as error:
        return Content(None, None, str(error), True)
    return Content(whole.fingerprint, len(whole))


def problems(runs: Sequence[Planned], known: Mapping[str, Content]) -> Iterator[str]:
    """What prevents runs from doing what is missing, and scores from being computed."""
    for run in runs:
        yield from (f"{run.name}: {text}" for text in (*run.problems(), *scoring(run, known)))


def scoring(run: Planned, known: Mapping[str, Content]) -> list[str]:
    """Why scores that a run lacks cannot be computed: too few images, or no weights of the network."""
    scores = {
        (metric, task.config["sample"]["count"]): None
        for task in run.tasks
        if "evaluate" in task.stages
        for metric in missing_metrics(task)
        if metric != HELDOUT
    }
    if not scores:
        return []
    metrics, settings, data = {metric for metric, _ in scores}, run.config.evaluate, run.config.data
    if settings.reference is not None and not Path(settings.reference).is_file():
        return [f"evaluate.reference {settings.reference} does not exist or is not a file"]
    texts: dict[str, None] = {}
    for request, samples in scores:
        metric, against = settings.of(request)
        content = known.get(str(held_out(data) if against.split == "test" else data))
        # Of a file in place of the data, the number of images is unknown.
        images = content.images if content is not None and settings.reference is None else None
        if images is not None and (settings.reference_count or 0) > images:
            reference = f"evaluate.reference_count {settings.reference_count}"
            texts[f"{reference} is more than the {images} images of the data"] = None
        if text := shortage(metric, samples, settings.reference_count or images):
            count = "sample.count" if samples == run.config.sample.count else "sample.curve_count"
            names = f"{count}, evaluate.reference_count and evaluate.metrics"
            texts[f"{text}; {names} say how many"] = None
    if settings.features_path is not None and (text := without_network(run.config)):
        texts[text] = None
    draws = any(task.kind == "samples" and "sample" in missing(task) for task in run.tasks)
    if any(settings.of(metric)[0] == "sfid" for metric in metrics) and run.config.sample.keep == "features" and draws:
        texts["sfid needs spatial features, which sample.keep=features does not keep: give sample.keep=images"] = None
    return [*texts]


def without_network(config: Config) -> str:
    """Why scores have no network for their features, with the command that fetches its weights; empty if they have."""
    from ..harness.scoring.networks import find_weights

    settings = config.evaluate
    try:
        find_weights(settings.features, settings.features_path)
    except InputError as error:
        missing = settings.features_path is None or Path(settings.features_path).is_dir()
        return "" if settings.download and missing else str(error)
    return ""


def _weights(runs: Sequence[Planned]) -> Iterator[tuple[str, str]]:
    """The runs that lack scores whose network has no weights on this machine, each with a line about it."""
    for run in runs:
        metrics = {metric for task in run.tasks if "evaluate" in task.stages for metric in missing_metrics(task)}
        lacking = bool(metrics - {HELDOUT})
        if lacking and run.config.evaluate.features != "efficientnet_lite0" and (text := without_network(run.config)):
            yield run.name, text


def _decoders(runs: Sequence[Planned]) -> Iterator[tuple[str, str]]:
    """The runs that lack samples or want previews which nothing on this machine decodes, each with a line about it."""
    for run in runs:
        training = run.training is not None and run.config.run.preview_every and "train" in missing(run.training)
        if training or any(task.kind == "samples" and "sample" in missing(task) for task in run.tasks):
            try:
                encoder(run.config.encoder).find_decoder()
            except InputError as error:
                yield run.name, str(error)


def data(runs: Sequence[Planned], known: Mapping[str, Content]) -> Iterator[str]:
    """Data that cannot be read here, and trainings of other data."""
    yield from dict(reversed([*_others(runs, known).values()])).values()  # one line for each training
    reasons = dict.fromkeys((content.reason, content.wrong) for content in known.values() if content.reason)
    yield from (f"data {'cannot be used' if wrong else 'not checked'}: {reason}" for reason, wrong in reasons)


def _others(runs: Sequence[Planned], known: Mapping[str, Content]) -> dict[tuple[str, str], tuple[Path, str]]:
    """For each task of other data, its training and a line about it."""
    others: dict[tuple[str, str], tuple[Path, str]] = {}
    for piece in _readers(runs):
        folder = piece.folder if piece.task.kind == "training" else Path(piece.task.training)
        sets = _sets(piece)
        if sets and (ours := known[str(sets[0])].fingerprint) is not None:
            try:
                checkpoint.check_data(folder, ours)
            except InputError as error:
                others[piece.id] = folder, f"{piece.run}: {error}"
    return others


def devices(runs: Sequence[Planned], here: bool) -> None:
    """Raise InputError for a device that does not exist: on this machine if the runs work `here`, else on any."""
    every = pieces(runs)
    if here:
        local.check_devices(every, local.gpus())
    for piece in every:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device := local.device_of(piece), re.ASCII):
            raise unknown("run.device", device, ("auto", "cpu", "cuda", "cuda:N"))


def check(runs: Sequence[Planned], here: bool) -> None:
    """Raise InputError, before anything is written, for what would stop a run that has something to do: a device that
    does not exist (see `devices`), data that are missing, cannot be read or differ from those of its training, scores
    that cannot be computed, and, if the runs work `here`, weights of their network that are missing."""
    devices(runs, here)
    known = contents(runs, read=here)
    others = _others(runs, known)
    for piece in _readers(runs):
        if not _reads(piece):
            continue
        for one in _sets(piece):
            if (content := known[str(one)]).wrong:
                latents = piece.task.config["encoder"]["kind"] != "pixels" and isinstance(one, DataConfig)
                hint = "; scores need the images, or evaluate.reference=FILE" if latents else ""
                raise InputError(f"{piece.run}: {content.reason}{hint}")
        if piece.id in others:
            raise InputError(others[piece.id][1])
    for run in runs:
        for text in scoring(run, known):
            raise InputError(f"{run.name}: {text}")
    for name, text in (*_weights(runs), *_decoders(runs)) if here else ():
        raise InputError(f"{name}: {text}")


def earlier(runs: Sequence[Planned]) -> Iterator[str]:
    """Finished trainings that differ from a training of the study only in a field that was added later and whose
    default is not the value that means "as before" (`since`)."""
    trainings = {run.training.key: run for run in reversed(runs) if run.training is not None}
    for run in reversed(list(trainings.values())):
        if not reached(read_records(run.folder / "record.jsonl")):
            yield from (f"{run.name}: {line}" for line in similar(run.config))


def similar(wanted: Config) -> Iterator[str]:
    """A line about each finished training that `earlier` finds for one configuration."""
    for name, config in _earlier_configs(wanted):
        folder = training_folder(Path(config.run.root), config)
        try:
            steps = reached(read_records(folder / "record.jsonl"))
        except InputError as error:
            yield str(error)
            continue
        if steps:
            yield f"{folder}, finished to step {steps}, differs only in {name} ({_get(config, name)!r} there)"


def _earlier_configs(config: Config) -> Iterator[tuple[str, Config]]:
    """The configuration with each of the `_changed_defaults` set to its `since` value, and the name of that field."""
    for part in fields(config):
        section = getattr(config, part.name)
        for name, since in _changed_defaults(type(section)) if is_dataclass(section) else ():
            if getattr(section, name) != since:
                yield f"{part.name}.{name}", replace(config, **{part.name: replace(section, **{name: since})})  # type: ignore[type-var]


@cache
def _changed_defaults(section: type) -> list[tuple[str, Any]]:
    """The fields of a section whose default is not their `since` value, each with that value."""
    changed = []
    for one in fields(section):
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if "since" in one.metadata and default != one.metadata["since"]:
            changed.append((one.name, one.metadata["since"]))
    return changed


def _get(config: Config, name: str) -> Any:
    section, field = name.split(".")
    return getattr(getattr(config, section), field)
