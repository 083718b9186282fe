"""Keys and the folders that follow from them. A key is a hash, in 12 hex digits, of what a stage reads, as asked for.

No key contains paths, `run.*`, workers, micro-batches, batch sizes of sampling and scoring, or anything that was
resolved from `auto`. Only the keys of measurements contain the name of the device.
"""

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..kernels.errors import InputError
from ..models import registry
from ..models.fields import declared, typed
from .config import SECTIONS, Config
from .run import plain_name
from .sections import HELDOUT, EncoderConfig

SEEDED = ("kid", "isc")  # metrics that draw subsets


def config_to_dict(config: Config) -> dict[str, Any]:
    """A configuration as plain data, with the model's family."""
    plain = {f.name: getattr(config, f.name) for f in fields(config)}
    return {
        name: registry.to_dict(value) if name == "model" else value if isinstance(value, int) else asdict(value)
        for name, value in plain.items()
    }


def config_from_dict(data: dict[str, Any]) -> Config:
    """The configuration that `config_to_dict` wrote. A field that was added later and is missing gets its `since`
    value, or its default if it has none. Raises InputError for anything else."""
    try:
        sections = {
            name: _section(SECTIONS[name], value) if name in SECTIONS else value for name, value in data.items()
        }
        return Config(**sections | {"model": registry.from_dict(data["model"])})
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"not a configuration of lamabench: {type(error).__name__}: {error}") from None


def config_of(folder: Path, info: dict[str, Any]) -> Config:
    """The configuration in config.json of a folder. Raises InputError, with the file, for anything else."""
    try:
        return config_from_dict(info["config"])
    except InputError as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from None


def _section(kind: type, values: dict[str, Any]) -> Any:
    since = {f.name: f.metadata["since"] for f in fields(kind) if "since" in f.metadata}
    typed(kind.__name__, kind, values)
    return kind(**since | values)


def digest(*content: Any) -> str:
    """The first 12 hex digits of the SHA-256 of plain data, independent of the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def model_key(model: Any) -> str:
    """The key of a model's cost: its family and composed fields."""
    return digest("model", registry.describe(model))


def training_key(config: Config) -> str:
    """The key of a training: model, data as declared, encoder, objective, backends as asked for, seed, and `train`
    without `steps` and `snapshots`, because a longer training continues a shorter one. That of released weights has the
    model and their tensors alone."""
    if config.released.tensors:
        return digest("weights", registry.describe(config.model), config.released.tensors)
    data, train = declared(config.data), declared(config.train)
    for section, names in ((data, ("path",)), (train, ("steps", "snapshots"))):
        for name in names:
            section.pop(name, None)
    parts = [encoder_facts(config.encoder), *(declared(section) for section in (config.objective, config.backend))]
    return digest("training", registry.describe(config.model), data, *parts, train, config.seed)


def encoder_facts(encoder: EncoderConfig) -> dict[str, Any]:
    """The section `encoder` without its paths: what determines what the network sees."""
    return {name: value for name, value in declared(encoder).items() if name not in ("path", "decoder")}


def sample_seed(config: Config) -> int:
    """The seed of the noise of samples: `sample.seed`, or the training's seed if that is None."""
    return config.seed if config.sample.seed is None else config.sample.seed


def label_rule(config: Config) -> str:
    """How the classes of samples follow from their indices: `cyclic` (index modulo classes), `spread` (evenly over all
    classes, in order) or `random`. Balanced labels are cyclic, and spread if there are fewer images than classes."""
    labels, classes = config.sample.labels, config.model.num_classes
    if classes < 2:
        return "cyclic"
    if labels == "balanced":
        return "spread" if config.sample.count < classes else "cyclic"
    return labels


def samples_key(config: Config, step: int) -> str:
    """The key of samples: the weights (training, step, ema or live), `sample` without its batch size and what is kept,
    and the seed. Of the labels it has their rule, unless that is cyclic; of a guide its key, step and weights."""
    sample = declared(config.sample)
    for name in ("batch_size", "at", "curve_count", "weights", "seed", "labels", "keep", "guide"):
        sample.pop(name, None)
    if (rule := label_rule(config)) != "cyclic":
        sample["labels"] = rule
    weights = [training_key(config), step, config.sample.weights]
    if config.released.tensors:  # a training's key has these sections
        weights += [encoder_facts(config.encoder), declared(config.objective), declared(config.backend)]
    return digest("samples", weights, sample, sample_seed(config))


def score_key(config: Config, samples: str, request: str) -> str:
    """The key of a score: the samples (their key, or the SHA-256 of a foreign file), one metric and what it reads, and
    the reference as declared: the data, or the name of a file without its folder. Precision and recall have their
    number of reference images, unless there are no more."""
    metric, settings = config.evaluate.of(request)
    data = declared(config.data)
    for name in ("path", "flip"):
        data.pop(name, None)
    reads, whole = declared(settings), settings.reference_count
    for name in (
        "metrics",
        "batch_size",
        "features_path",
        "download",
        "heldout_count",
        *(() if metric in SEEDED else ("seed",)),
    ):
        reads.pop(name, None)
    if settings.reference is not None:  # in place of the data
        reads["reference"], data = Path(settings.reference).name, {}
    if metric != "prc" or (whole is not None and whole <= (settings.prc_reference_count or whole)):
        reads.pop("prc_reference_count", None)
    if metric == HELDOUT:
        reads = {"heldout_count": settings.heldout_count}
    return digest("score", samples, metric, reads, data)


def speed_key(model: Any, row: dict[str, Any], backend: Any, device: str) -> str:
    """The key of one measurement: model, input size, mode, compile, checkpointing, precision, batch size and
    processes (fields of `row`), backends as asked for, and the name of the device."""
    names = ("input_size", "mode", "compile", "checkpointing", "precision", "batch_size")
    values = [row[name] for name in names]
    if (processes := row.get("processes") or 1) > 1:  # rows of one process had no such field at first
        values.append(processes)
    return digest("speed", registry.describe(model), values, declared(backend), device)


def operator_speed_key(model: Any, row: dict[str, Any], device: str) -> str:
    """The key of one measurement of an operator: model, operator, backend, shape, pass, input size, batch size,
    precision, and the name of the device."""
    names = ("operator", "backend", "shape", "pass", "input_size", "batch_size", "precision")
    return digest("operator_speed", registry.describe(model), [row[name] for name in names], device)


def asked(backend: Any) -> dict[str, str] | None:
    """The implementations that a section `backend` asks for by name; None if all are `auto`."""
    return {name: value for name, value in asdict(backend).items() if value != "auto"} or None


def model_folder(root: Path, model: Any) -> Path:
    """ROOT/models/FAMILY-KEY."""
    return root / "models" / f"{registry.family_of(model).name}-{model_key(model)}"


def foreign_folder(root: Path, name: str, samples: str) -> Path:
    """ROOT/foreign/NAME-KEY, of other people's samples with the SHA-256 `samples`."""
    return root / "foreign" / f"{name}-{digest('foreign', samples)}"


def training_folder(root: Path, config: Config) -> Path:
    """ROOT/trainings/FAMILY-DATA-KEY, or ROOT/weights/NAME-KEY of released weights."""
    if config.released.tensors:
        return root / "weights" / f"{plain_name(config.released.name)}-{training_key(config)}"
    data = plain_name(config.data.name or config.data.kind)
    return root / "trainings" / f"{registry.family_of(config.model).name}-{data}-{training_key(config)}"
