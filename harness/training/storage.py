"""The files of checkpoints and weights: tensors and a JSON header in the safetensors format, never a pickle.

A state is one file, `step-00000020.safetensors`, or a folder of shards, `step-00000020/shard-1-of-4.safetensors` and so
on, one from each process. A shard has some rows of each large tensor, in the order of the shards, and the first shard
also has every tensor that is not sharded. Files and folders appear complete or not at all (write, fsync, rename). The
header of each file has the sum of its bytes.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...kernels.errors import InputError
from .. import parallel
from ..disk import access

_NAME = re.compile(r"step-(\d{8})(\.safetensors)?")
_SHARD = re.compile(r"shard-(\d+)-of-(\d+)\.safetensors")
_LEFTOVERS = ".step-*.tmp"


def file_name(step: int) -> str:
    """The name of the file of a step."""
    return f"step-{step:08d}.safetensors"


def step_of(path: Path) -> int:
    """The step of a file or of a folder of shards."""
    return int(path.stem.removeprefix("step-"))


def shard_name(number: int, count: int) -> str:
    """The name of the shard of a process of several, from 0."""
    return f"shard-{number + 1}-of-{count}.safetensors"


def files(folder: Path) -> list[Path]:
    """The files and folders of shards in `checkpoints/` or `weights/`, newest first. Raises InputError for a folder
    that cannot be read."""
    with access("read", folder):
        try:
            names = os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
    return [folder / name for name in sorted(names, reverse=True) if _NAME.fullmatch(name)]  # steps have leading zeros


def of_step(folder: Path, step: int) -> Path | None:
    """The file or the folder of shards of a step, None if there is none."""
    return next((path for path in files(folder) if step_of(path) == step), None)


def size(path: Path) -> int:
    """The bytes of a file or of all shards in a folder."""
    return sum(one.lstat().st_size for one in (path.iterdir() if path.is_dir() else [path]))


def link(path: Path, folder: Path) -> None:
    """Give a file or a folder of shards a second name in another folder of the same file system."""
    place = folder / path.name
    if not path.is_dir():
        place.unlink(missing_ok=True)
        os.link(path, place)
        return
    place.mkdir(exist_ok=True)
    for one in path.iterdir():
        link(one, place)


def remove(path: Path) -> None:
    """Remove a file or a folder of shards. A folder is renamed first, so that no part of it is ever taken for all."""
    if path.is_dir() and not path.is_symlink():
        hidden = path.with_name(f".{path.name}.old.tmp")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(path, hidden)
        shutil.rmtree(hidden)
    else:
        path.unlink()


def write(folder: Path, step: int, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Write one file atomically."""
    _clear(folder)
    path = folder / file_name(step)
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    try:
        _write_file(temporary, tensors, header)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_shards(folder: Path, step: int, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> Path:
    """Write a folder of shards atomically. All processes call this, each with its own rows of the tensors; the header
    is that of the first one. Raises in all of them if one of them fails."""
    first = parallel.rank() == 0
    path = folder / file_name(step).removesuffix(".safetensors")
    temporary = folder / f".{path.name}.tmp"
    same = parallel.gather(dict(header))[0]
    try:
        with parallel.agreeing():
            if first:
                _clear(folder)
                temporary.mkdir()
        with parallel.agreeing():
            own = temporary / shard_name(parallel.rank(), parallel.size())
            _write_file(own, tensors, same)
        with parallel.agreeing():
            if first:
                if path.exists():  # damaged, or training would have continued from it
                    remove(path)
                os.replace(temporary, path)
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
    return path


def _clear(folder: Path) -> None:
    """Make a folder, or remove what a kill left in it, perhaps on another machine: a training has one writer."""
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob(_LEFTOVERS):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _write_file(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    values = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_tensors(path, values, {"lamabench": json.dumps({**header, "sum": byte_sum(values)})})


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file of safetensors that lies on the disk when this returns. Raises OSError if it cannot be written."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # of a full disk too, which commands and jobs tell by its number
        if (number := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
    path.chmod(mode)  # safetensors lets only the owner read its files
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def byte_sum(tensors: Mapping[str, Tensor]) -> int:
    """The sum of all bytes. It is quick on any device and changes if a bit flips or a block is lost."""
    return sum(int(tensor.reshape(-1).view(torch.uint8).sum(dtype=torch.int64)) for tensor in tensors.values())


def read(path: Path, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a state, on the CPU. With `tensors` False, they are on the meta device, which has
    names and shapes only. Raises InputError for a file that is missing, truncated, changed or not one, and if a shard
    is missing."""
    header, parts = {}, {}
    for file in reversed(_paths(path)):
        header, own = _read_file(file, tensors)
        if file_name(header["step"]).removesuffix(".safetensors") != path.name.removesuffix(".safetensors"):
            raise InputError(f"{path} was renamed: it is of step {header['step']}")
        for name, tensor in own.items():
            parts.setdefault(name, []).insert(0, tensor)
    try:
        return header, {name: _joined(parts.pop(name)) for name in list(parts)}
    except RuntimeError as error:
        raise InputError(f"the shards of {path} do not fit together: {error}") from None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def read_rows(path: Path, rows: Mapping[str, range]) -> dict[str, Tensor]:
    """The tensors of a state, on the CPU; of those in `rows` only these rows, and nothing if there are none.

    Only these rows are read, so the sums are not checked: `read` does that.
    """
    parts: dict[str, list[Tensor]] = {}
    before = Counter()  # the rows of a tensor in the shards so far
    for one in _paths(path):
        with _opened(one) as file:
            for name in file.keys():  # noqa: SIM118
                if name not in rows:
                    parts[name] = [file.get_tensor(name).clone()]
                    continue
                there = file.get_slice(name)
                start, length = before[name], there.get_shape()[0]
                before[name] += length
                first, last = max(rows[name].start - start, 0), min(rows[name].stop - start, length)
                if first < last:
                    parts.setdefault(name, []).append(there[first:last].clone())
    return {name: _joined(parts.pop(name)) for name in list(parts)}


def _paths(path: Path) -> list[Path]:
    """The files of a state in their order: itself, or its shards."""
    if not path.is_dir():
        return [path]
    with access("read", path):
        names = os.listdir(path)
    count = max((int(name[2]) for name in map(_SHARD.fullmatch, names) if name), default=1)
    paths = [path / shard_name(number, count) for number in range(count)]
    lost = [one.name for one in paths if one.name not in names]
    if lost:
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise InputError(f"checkpoint {path} is damaged: {lost[0]} is missing{more}")
    return paths


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file, opened. Errors of reading it become InputError."""
    try:
        with access("read", path), open(path, "rb"):  # safetensors says of each error that there is no such file
            str(path).encode()
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"no such checkpoint: {path}") from None
    except UnicodeEncodeError:
        raise InputError(f"the path of {str(path)!a} is not UTF-8, which checkpoints need: rename the folder") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"checkpoint {path} is truncated or damaged: {error}") from None
    except InputError:
        raise
    except (KeyError, ValueError, RecursionError):
        raise InputError(f"{path} is a safetensors file, but not a lamabench checkpoint") from None


def _read_file(path: Path, tensors: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with _opened(path) as file:
        header = json.loads((file.metadata() or {})["lamabench"])
        names = file.keys()
        # Cloned, because safetensors returns a view of the file, which may be replaced or truncated while in use.
        values = {name: file.get_tensor(name).clone() for name in names} if tensors else {
            name: torch.empty(file.get_slice(name).get_shape(), device="meta") for name in names
        }  # fmt: skip
    _check_header(header, path)
    if tensors and header.get("sum") not in (None, byte_sum(values)):  # None: an old file without a sum
        raise InputError(f"checkpoint {path} is truncated or damaged: its bytes have changed")
    return header, values


_HEADER = {"step": int, "seconds": (int, float), "model": dict, "fingerprint": str}
_MORE = {"stretches": list, "window_start": int, "sum": (int, NoneType)}
_MORE |= dict.fromkeys(("loss", "waited"), (int, float, NoneType))
_STRETCH = {"from_step": int, "backend": dict, "commit": (str, NoneType)}


def _check_header(header: Any, path: Path) -> None:
    """Raise InputError if a header lacks a field or has one of another type."""
    if not isinstance(header, dict):
        raise InputError(f"the header of {path} is damaged: it is no JSON object")
    shapes = [(header, _HEADER | {name: types for name, types in _MORE.items() if name in header})]
    stretches = header.get("stretches", [])
    shapes += [(stretch, _STRETCH) for stretch in (stretches if isinstance(stretches, list) else [])]
    for fields_there, types_by_name in shapes:
        for name, types in types_by_name.items():
            value = fields_there.get(name) if isinstance(fields_there, dict) else None
            if not isinstance(value, types) or isinstance(value, bool):
                raise InputError(f"the header of {path} is damaged: its {name} is {value!r}"[:300])
