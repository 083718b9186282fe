"""Models that `lamabench export` wrote, in a folder or on the Hugging Face hub.

    config.json         what the network is, what it learned, and where its weights come from
    model.safetensors   the tensors by their names in the network
    README.md, grid.png the model card

`harness/release.py` writes them. Reading them needs neither a run folder nor the harness.
"""

import hashlib
import json
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from ..kernels.errors import InputError, unknown
from . import registry
from .fields import typed
from .registry import Backbone

SCHEMA = 1
MARK = "lamabench_export"  # in config.json; its value is the schema
CONFIG, WEIGHTS, CARD, GRID = "config.json", "model.safetensors", "README.md", "grid.png"
HUB = "hf:"
PIECE = 2**24  # bytes that are hashed at once
_ENTRIES = {"preset": str, "config": dict, "weights": dict, "training": dict, "plugins": list}


def is_exported(source: str | PathLike[str]) -> bool:
    """Whether `source` is `hf:owner/name` or a folder that `lamabench export` wrote."""
    if str(source).startswith(HUB):
        return True
    try:
        content = json.loads((Path(source).expanduser() / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and MARK in content


def locate(source: str | PathLike[str]) -> Path:
    """The folder of `source`: itself or, of `hf:owner/name` or `hf:owner/name@REVISION`, the copy in huggingface-hub's
    cache, which is downloaded if it is not there. Raises InputError, one line, if that fails."""
    if not str(source).startswith(HUB):
        return Path(source).expanduser()
    name, _, revision = str(source).removeprefix(HUB).partition("@")
    hub = hub_module()
    try:
        return Path(hub.snapshot_download(name, revision=revision or None, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # of the network, of names and of access: the hub has a dozen kinds
        raise InputError(f"cannot get {source}: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from None


def hub_module() -> Any:
    """huggingface_hub. Raises InputError if it is not installed."""
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise InputError(f"{HUB}owner/name needs huggingface-hub: pip install 'lamabench[hf]'") from None
    return huggingface_hub


def read_export(folder: Path) -> dict[str, Any]:
    """config.json of an exported folder. Raises InputError if there is none, or if it is damaged or of a newer
    version."""
    path = folder / CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{folder} was not written by lamabench export: {path.name}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get(MARK), int):
        raise InputError(f"{path} was not written by lamabench export: it has no {MARK}")
    if content[MARK] > SCHEMA:
        raise InputError(f"{path} was written by a newer version of lamabench: its schema is {content[MARK]}")
    for name, kind in _ENTRIES.items():
        if not isinstance(content.get(name), kind):
            raise InputError(f"{path} is damaged: its {name} is {content.get(name)!r}"[:300])
    if not isinstance(content["config"].get("model"), dict):
        raise InputError(f"{path} is damaged: its config has no model")
    return content


def load_exported(
    source: str | PathLike[str], name: str | None = None, settings: dict[str, Any] | None = None
) -> Backbone:
    """The network of an exported folder or of `hf:owner/name`, with its weights, on the CPU in eval mode.

    The folder says what the network is. A preset `name` and `settings` of its configuration are compared with it.
    Raises InputError, one line, if they differ, if files are missing or damaged, or if plug-ins are needed that are not
    imported.
    """
    folder = locate(source)
    info = read_export(folder)
    config = model_config(folder, info)
    if name not in (None, info["preset"]):
        raise InputError(f"{source} is {info['preset']}, not {name}")
    names = [one.name for one in fields(config)]
    for field in settings or {}:
        if field not in names:
            raise unknown(f"field of {info['preset']}", field, names)
    for field, value in typed(info["preset"], type(config), settings or {}).items():
        if getattr(config, field) != value:
            raise InputError(f"{source} has {field} {getattr(config, field)!r}, not {value!r}")
    net = registry.build(config)
    state = read_weights(folder, info)
    try:
        return registry.load_reference(net, state).eval()
    except InputError as error:
        raise InputError(f"{folder / WEIGHTS}: {error}") from None


def model_config(folder: Path, info: dict[str, Any]) -> Any:
    """The configuration of the network, from config.json. Raises InputError if it cannot be read here."""
    try:
        return registry.from_dict(info["config"]["model"])
    except (InputError, TypeError) as error:
        names = ", ".join(str(one.get("name")) for one in info["plugins"] if isinstance(one, dict))
        cure = f"; it needs the plug-ins {names}: import them first" if names else ""
        raise InputError(f"{folder / CONFIG}: {error}{cure}") from None


def read_weights(folder: Path, info: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an exported folder by name. Raises InputError if the file is missing or has changed."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    try:
        if file_sha256(path) != info["weights"].get("sha256"):
            raise InputError(f"{path} is truncated or damaged: it is not the file that {CONFIG} names")
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
