"""Files of released weights: PyTorch's and safetensors files, and folders of diffusers. Only tensors and plain data are
read from them, never code."""

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ...kernels.errors import InputError

AVERAGED = "ema"  # where training files of DiT and LaMamba-Diff have the averaged weights
LIVE = ("model", "state_dict", "module", "net")  # where training files have others
PREFIXES = ("module.", "_orig_mod.")  # of names that DistributedDataParallel and torch.compile gave
CONFIG = "config.json"  # of a folder of diffusers
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
MOST_DIGITS = 10  # of a block's number
INDEX = "diffusion_pytorch_model.safetensors.index.json"


# What Python raises where data have another form than they should.
NO_DATA = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)


class Settings:
    """Stands for yacs' class of settings, which need not be installed: its data become a dictionary (ordered, because
    torch fills only that one)."""

    def __new__(cls) -> OrderedDict[str, Any]:  # type: ignore[misc]
        return OrderedDict()


# Classes in which training scripts keep their settings. Neither runs code.
HARMLESS = [(Settings, "yacs.config.CfgNode"), argparse.Namespace]


@dataclass(frozen=True)
class Source:
    """What a file or folder has. `tensors` are those of the averaged weights if it is a training file. `settings` are
    those of its training script or its config.json, and of a YAML file `settings_path` that belongs to it."""

    path: Path
    tensors: dict[str, Tensor]
    weights: str  # ema, or model for a bare state dict
    settings: dict[str, Any] = field(default_factory=dict)
    settings_path: Path | None = None

    def shape(self, name: str, sides: int) -> list[int]:
        """The shape of a tensor that has so many sides. Raises InputError if there is no such tensor."""
        if name not in self.tensors:
            raise InputError(f"{self.path} has no tensor {name}: it is incomplete, or of another model")
        shape = list(self.tensors[name].shape)
        if len(shape) != sides or not all(shape):
            raise InputError(f"{self.path} has {name} {shape}, not {sides} sides above 0: it is of another model")
        return shape

    def count(self, prefix: str) -> int:
        """The number of blocks `PREFIX0.…`, `PREFIX1.…` and so on."""
        heads = (name[len(prefix) :].split(".")[0] for name in self.tensors if name.startswith(prefix))
        return max((int(head) for head in heads if head.isdecimal() and len(head) < MOST_DIGITS), default=-1) + 1


def read(path: Path, settings_path: Path | None = None) -> Source:
    """The contents of a file of PyTorch or safetensors, or of a folder of diffusers, on the CPU.

    Raises InputError if it cannot be read, if it needs code to be read, and if it has no averaged weights though it is
    a training file.
    """
    if not path.is_file() and not path.is_dir():  # nor anything that would be waited for
        raise InputError(f"no such file or folder: {path}")
    extra = yaml_settings(settings_path) if settings_path is not None else {}
    if path.is_dir():
        tensors, own = _folder(path)
        return Source(path, plain(tensors, path), "model", own | extra, settings_path)
    safe = path.suffix.lower() == ".safetensors"
    content = _safetensors(path) if safe else _torch(path)
    if not safe and isinstance(content, Mapping) and AVERAGED in content:
        own = {name: content[name] for name in ("config", "args") if name in content}
        return Source(path, plain(content[AVERAGED], path), AVERAGED, _settings(own) | extra, settings_path)
    if isinstance(content, Mapping) and (live := [name for name in LIVE if isinstance(content.get(name), Mapping)]):
        raise InputError(
            f"{path} is a training file without averaged weights ({AVERAGED}): it has {', '.join(map(str, content))}; "
            f"if `{live[0]}` is what you want, save it alone, as a bare state dict, to a file of its own"
        )
    return Source(path, plain(content, path), "model", extra, settings_path)


def plain(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, float32, by their names in the network. Raises InputError for anything else."""
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{path} has no state dict: it has {type(content).__name__}")
    if wrong := [name for name, value in content.items() if not isinstance(value, Tensor)]:
        raise InputError(
            f"{path} is no state dict, and no training file with averaged weights ({AVERAGED}): its {wrong[0]!r} is "
            f"{type(content[wrong[0]]).__name__}"
        )
    names = {str(name): value for name, value in content.items()}
    for name, value in names.items():
        if fault := _fault(value):
            raise InputError(f"{path}: its {name!r} {fault}")
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in names):
            names = {name.removeprefix(prefix): value for name, value in names.items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in names.items()}


def _fault(value: Tensor) -> str:
    """Why a tensor cannot be one of a network, empty if it can."""
    if value.is_meta or value.layout != torch.strided or value.is_quantized or value.is_complex():
        return f"is no plain tensor of real numbers ({value.dtype}, {value.layout}, {value.device})"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"has the shape {list(value.shape)}, for which the file has too few numbers"
    if value.is_floating_point() and not torch.isfinite(value.float()).all():
        return "is not finite: the training diverged, or the file is damaged"
    return ""


def _torch(path: Path) -> Any:
    try:
        with open(path, "rb"):
            mapped = zipfile.is_zipfile(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    if mapped and _is_compressed(path):  # its bytes, mapped, would pass for numbers
        raise InputError(f"{path} is a compressed archive, not a file of torch.save: save it with that again")
    try:
        with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, pickle.UnpicklingError, EOFError, RuntimeError, *NO_DATA) as error:
        text = str(error)
        if code := re.search(r"GLOBAL (\S+)", text):
            raise InputError(
                f"{path} has {code[1]}, which only code can read, and lamabench runs no code of a file: save its state "
                "dict alone (torch.save of tensors by name, or safetensors)"
            ) from None
        raise InputError(f"{path} is no file that torch.save wrote, or is damaged") from None


def _is_compressed(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(one.compress_type != zipfile.ZIP_STORED for one in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False  # it is damaged, which torch says


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is truncated or damaged: {error}") from None


def _folder(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the settings of a folder of diffusers. A pipeline's model is in its folder `transformer`."""
    home = path / "transformer" if (path / "transformer" / CONFIG).is_file() else path
    if not (home / CONFIG).is_file():
        raise InputError(f"{path} is no folder of diffusers: it has no {CONFIG}, nor transformer/{CONFIG}")
    if (home / "record.jsonl").is_file():
        raise InputError(f"{path} is a run of lamabench, which needs no conversion")
    settings = json_settings(home / CONFIG)
    if (home / INDEX).is_file():
        files = json_settings(home / INDEX).get("weight_map")
        parts = list(dict.fromkeys(files.values())) if isinstance(files, dict) else []
        if not parts or any(not isinstance(part, str) or Path(part).name != part for part in parts):
            raise InputError(f"{home / INDEX} is damaged: its weight_map should name files of its folder")
        return {name: tensor for part in parts for name, tensor in _safetensors(home / part).items()}, settings
    for name in WEIGHTS:
        if (home / name).is_file():
            return (_safetensors if name.endswith("safetensors") else _torch)(home / name), settings
    raise InputError(f"{home} has no weights; it should have {' or '.join(WEIGHTS)}")


def json_settings(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises InputError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is no JSON object")
    return content


def yaml_settings(path: Path) -> dict[str, Any]:
    """A YAML mapping in a file. Raises InputError for anything else."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is no YAML mapping")
    return content


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a training script as plain data: sections of its `config`, and its arguments as `args`."""
    own = dict(content.get("config") or {}) if isinstance(content.get("config"), Mapping) else {}
    arguments = content.get("args")
    return own | ({"args": vars(arguments)} if isinstance(arguments, argparse.Namespace) else {})
