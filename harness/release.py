"""A training as a folder for other people, which `create_model(…, pretrained=FOLDER)` reads (models/exported.py).

The folder appears whole or not at all; on the Hugging Face hub it is one commit.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..kernels.errors import InputError
from ..models.exported import (
    CARD,
    CONFIG,
    GRID,
    HUB,
    MARK,
    SCHEMA,
    WEIGHTS,
    file_sha256,
    hub_module,
    locate,
    read_export,
)
from .config import Config
from .data.latents import read_index
from .disk import access
from .keys import config_from_dict, config_of, config_to_dict
from .moments import kept_steps, not_kept, step_of
from .record import newest, read_records
from .run import locked, read_info, weights_home
from .training.checkpoint import Weights, load_weights
from .training.storage import write_tensors

# Sections of the configuration that a reader of the weights needs, and fields that say where something lies here.
SECTIONS = ("model", "data", "encoder", "objective", "train", "sample", "seed", "released")
PLACES = {"data": ("path",), "encoder": ("path", "decoder")}
GUIDE = ("guide", "guide_at", "guide_weights", "guide_key")
Card = Callable[[dict[str, Any]], str]
Picture = Callable[[Path, Path], object]  # draws some images of the set in a folder to a file


@dataclass(frozen=True)
class Export:
    """What is exported: the weights `kind` (such as `ema`) of a step, config.json as `info`, the newest score of each
    kind that these weights have, as `scores`, and the newest set of images that was drawn with them, as `samples`."""

    kind: str
    config: Config
    weights: Weights
    info: dict[str, Any]
    scores: list[dict[str, Any]]
    samples: Path | None
    samples_row: dict[str, Any] | None

    @property
    def identity(self) -> list[Any]:
        """What two exports of the same weights have in common."""
        return identity_of(self.info)


def identity_of(info: dict[str, Any]) -> list[Any]:
    """The training, the step and the kind of weights in an exported config.json."""
    weights = info["weights"]
    return [info["training"].get("key"), weights.get("step"), weights.get("kind")]


def collect(folder: Path, at: int | str = "last", kind: str = "ema") -> Export:
    """What a training folder has of the weights `kind` of a step.

    Raises InputError if it is the folder of something else, or if these weights are not kept or damaged.
    """
    info = read_info(folder)
    if info["kind"] in ("model", "samples", "foreign"):
        raise InputError(
            f"{folder} is the folder of a {info['kind']}; name that of a training, such as runs/train/NAME"
        )
    config, home = config_of(folder, info), weights_home(folder, info)
    step = step_of(home, at)
    if step not in (kept := kept_steps(home, kind)):
        raise InputError(f"{home}: {not_kept(step, kept)} ({kind} weights)")
    weights = load_weights(home, step, kind, config.model)
    scores, sets = [], []
    for path in sorted(folder.resolve().glob("samples/*/record.jsonl")):
        rows = [row.flat() for row in newest(read_records(path)).values() if row.state == "done"]
        own = [row for row in rows if (row.get("checkpoint_step"), row.get("weights")) == (step, kind)]
        scores += [row for row in own if row["kind"] == "score"]
        sets += [(row["time"], path.parent, row) for row in own if row["kind"] == "sample" and not row["features"]]
    scores.sort(key=lambda row: (row["metric"], row.get("generation_protocol") or "", row["time"]))
    _, samples, row = max(sets, default=(None, None, None), key=lambda one: str(one[0]))
    return Export(kind, config, weights, _info(info, config, weights, kind), scores, samples, row)


def _info(info: dict[str, Any], config: Config, weights: Weights, kind: str) -> dict[str, Any]:
    plain = {name: value for name, value in config_to_dict(config).items() if name in SECTIONS}
    for section, names in PLACES.items():
        plain[section] = {name: value for name, value in plain[section].items() if name not in names}
    if (source := _autoencoder(config)) is not None:
        plain["encoder"]["decoder"] = source
    if plain["sample"].get("guide") is not None:  # what it was guided by lies here
        plain["sample"]["guidance"] = 1.0
    plain["sample"] = {name: value for name, value in plain["sample"].items() if name not in GUIDE}
    last = weights.stretches[-1] if weights.stretches else {}
    trained = {"key": info["key"], "data_fingerprint": weights.fingerprint, "seconds": round(weights.seconds, 3)}
    trained |= {name: last.get(name) for name in ("commit", "dirty", "torch", "device")}
    return {
        MARK: SCHEMA,
        "lamabench": metadata.version("lamabench"),
        "preset": str(info.get("model", plain["model"]["family"])),
        "title": str(info.get("title") or info.get("model", plain["model"]["family"])),
        "config": plain,
        "weights": {"file": WEIGHTS, "kind": kind, "step": weights.step, "error": weights.error},
        "training": trained,
        "source": info.get("origin"),
        "plugins": [{"name": one["name"], "sha256": one["sha256"]} for one in info.get("plugins", ())],
    }


def _autoencoder(config: Config) -> str | None:
    """The id on the hub of the autoencoder of latents; None if it lies on this machine alone."""
    source = config.encoder.decoder
    if source is None and config.encoder.path is not None:
        with suppress(InputError, OSError):
            source = read_index(Path(config.encoder.path)).encoder.source
    known = source is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not Path(source).exists()
    return source if known else None


def config_of_export(source: str | Path) -> Config:
    """The configuration of an exported folder or of `hf:owner/name`: its model, objective, encoder and data as
    declared. Raises InputError as `create_model` does."""
    return config_from_dict(read_export(locate(source))["config"])


def check_folder(target: Path, export: Export) -> None:
    """Raise InputError if an export cannot be written to `target`: a place that cannot be written, a file, or a folder
    that is neither empty nor an earlier export of the same weights."""
    with access("write", target):
        if target.exists() and not target.is_dir():
            raise InputError(f"--to {target} is a file: give a new folder")
        names = sorted(one.name for one in target.iterdir()) if target.exists() else []
        if names:
            _check_same(f"--to {target}", names, target, export)
        there = next(one for one in target.absolute().parents if one.exists())
        if not there.is_dir():
            raise InputError(f"cannot write {target}: {there} is a file")
        if not os.access(there, os.W_OK):
            raise InputError(f"cannot write {target}: {there} is not writable")


def _check_same(what: str, names: list[str], folder: Path, export: Export) -> None:
    if others := {*names} - {CONFIG, WEIGHTS, CARD, GRID, ".gitattributes", ".cache"}:
        raise InputError(f"{what} holds {min(others)}, which is no part of an export: give a new folder")
    try:
        key, step, kind = identity_of(read_export(folder))
    except InputError as error:
        raise InputError(f"{what} is not an earlier export ({error}): give a new folder") from None
    if [key, step, kind] != export.identity:
        raise InputError(f"{what} has the {kind} weights of step {step} of {key}, not these: give a new folder")


def write_export(target: Path, export: Export, card: Card, picture: Picture) -> None:
    """Write an export to a folder, in place of an earlier one. It appears whole or not at all.

    `card(info)` is the text of the model card. Raises InputError as `check_folder` does, and Busy if another process
    writes there.
    """
    check_folder(target, export)
    place = target.absolute()
    hidden, old = (place.with_name(f".{target.name}.export.{end}") for end in ("tmp", "old.tmp"))
    lock = f".{target.name}.export.lock"
    with access("write", target, missing=True):
        place.parent.mkdir(parents=True, exist_ok=True)
        with locked(place.parent, name=lock):
            _restore(old, place)
            check_folder(target, export)
            try:
                for leftover in (hidden, old):  # of a call that was killed
                    shutil.rmtree(leftover, ignore_errors=True)
                hidden.mkdir()
                _write_files(hidden, export, card, picture)
                if place.exists():
                    os.replace(place, old)
                os.replace(hidden, place)
            finally:
                _restore(old, place)
                for leftover in (hidden, old):
                    shutil.rmtree(leftover, ignore_errors=True)
                (place.parent / lock).unlink(missing_ok=True)


def _restore(old: Path, place: Path) -> None:
    """Put an earlier export back that was moved aside for a new one, which did not come."""
    if old.exists() and not place.exists():
        os.replace(old, place)


def _write_files(folder: Path, export: Export, card: Card, picture: Picture) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in export.weights.tensors.items()}
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    info = {**export.info, "weights": {**export.info["weights"], "sha256": file_sha256(folder / WEIGHTS)}}
    if export.samples is not None:
        picture(export.samples, folder / GRID)
    (folder / CARD).write_text(card(info), encoding="utf-8")
    (folder / CONFIG).write_text(json.dumps(info, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def open_hub(name: str) -> Any:
    """The hub's interface for `hf:owner/name`. Raises InputError for another name, if huggingface-hub is not installed,
    and if nobody is logged in."""
    if len(parts := name.split("/")) != 2 or not all(parts) or "@" in name:
        raise InputError(f"--to {HUB}{name} is no repository: write {HUB}owner/name")
    hub = hub_module()
    if hub.get_token() is None:
        raise InputError(f"--to {HUB}{name} needs a login: hf auth login (or the environment's HF_TOKEN)")
    return hub.HfApi()


def check_repository(api: Any, name: str, export: Export) -> None:
    """Raise InputError if a repository of the hub exists that is neither empty nor an earlier export of the same
    weights."""
    if not _of_hub(name, lambda: api.repo_exists(name)):
        return
    names = sorted({one.split("/")[0] for one in _of_hub(name, lambda: api.list_repo_files(name))} - {".gitattributes"})
    if not names:
        return
    with tempfile.TemporaryDirectory() as folder:
        if CONFIG in names:
            _of_hub(name, lambda: api.hf_hub_download(name, CONFIG, local_dir=folder))
        _check_same(f"{HUB}{name}", names, Path(folder), export)


def upload(api: Any, name: str, folder: Path, export: Export) -> str:
    """Upload an exported folder as one commit. A new repository is private. Returns its address."""
    key, step, kind = export.identity
    _of_hub(name, lambda: api.create_repo(name, private=True, exist_ok=True))
    text = f"{export.info['title']}: {kind} weights of step {step} of {key}"
    return str(_of_hub(name, lambda: api.upload_folder(repo_id=name, folder_path=str(folder), commit_message=text)))


def _of_hub(name: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # of the network, of names and of access: the hub has a dozen kinds
        text = " ".join(str(error).split())[:200]
        raise InputError(f"{HUB}{name}: {type(error).__name__}: {text}") from None
