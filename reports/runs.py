"""Runs as tables show them: each variant and seed of a study with all its records, from whichever folders have them."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..harness.run import STUDY, read_info, read_run, read_study
from ..harness.run import Run as Folder
from ..kernels.errors import InputError

Line = dict[str, Any]  # of a record or a table; a field that does not apply is None
NAMED = ("study", "name", "model", "family", "title")  # what every config.json must have


@dataclass(frozen=True, eq=False)
class Run:
    """A variant and seed of a study, or a single folder.

    info      `study`, `name`, `id` (the key of the training, or of the model where there is no training), `variant`
              (axis values), `seed`, `model` (preset), `family`, `title`, `config`
    group     equal for runs that differ only in their seed
    rows      records of its model, its training, and its samples at the furthest step; oldest first within each
    earlier   records of its samples at earlier steps
    metrics   the log of its training
    samples   the folder of its samples
    """

    info: dict[str, Any]
    group: str
    rows: list[Line] = field(default_factory=list)
    earlier: list[Line] = field(default_factory=list)
    metrics: list[Line] = field(default_factory=list)
    samples: Path | None = None

    def last(self, kind: str, state: str | None = None) -> Line | None:
        """The newest record of a kind, or of a kind and a state."""
        rows = (row for row in reversed(self.rows) if row["kind"] == kind and state in (None, row["state"]))
        return next(rows, None)


def read(paths: Iterable[Path]) -> list[Run]:
    """The runs at or below folders, sorted by study and name, each once.

    A folder is that of a study, of one training, model or set of samples, or a root. A root stands for all its studies
    and for the folders that no study names. Links are followed. Raises InputError, one line, for a folder that does not
    exist or holds no run, and for records that this version cannot read.
    """
    runs: dict[tuple[Any, ...], Run] = {}
    for path in paths:
        if not path.is_dir():
            raise InputError(f"{path} is a file: name folders of runs" if path.exists() else f"no such folder: {path}")
        below = list(_below(path))
        if not below:
            raise InputError(f"{path} holds no run: expected a study, trainings/ or models/ at or below it")
        for place, run in below:
            runs.setdefault((run.info["study"], run.info["name"], place, run.samples), run)
    if not runs:
        raise InputError("no run folder was given")
    return sorted(runs.values(), key=lambda run: (run.info["study"], run.info["name"], run.info["id"]))


def _below(path: Path) -> Iterator[tuple[Path, Run]]:
    """The runs at or below one folder, each with the folder of its training or model."""
    if (path / STUDY).is_file():
        yield from _of_study(path)[0]
        return
    if path.is_symlink() and (path.parent / STUDY).is_file():
        yield from (one for one in _of_study(path.parent)[0] if one[1].info["name"] == path.name)
        return
    if (path / "config.json").is_file():
        yield from _alone(path.resolve())
        return
    named: set[Path] = set()
    for study in sorted(path.glob(f"*/{STUDY}")):
        runs, folders = _of_study(study.parent)
        yield from runs
        named |= folders
    below = [config.parent for pattern in ("*", "*/*") for config in sorted(path.glob(f"{pattern}/config.json"))]
    rest = [folder.resolve() for folder in below if not (folder.parent / STUDY).is_file()]
    homes = [folder for folder in dict.fromkeys(rest) if folder not in named]
    for folder in sorted(homes, key=lambda folder: read_info(folder)["kind"] != "training"):
        if folder not in named:
            yield from _alone(folder)
            if model := _model_of(folder, read_info(folder)):
                named.add(model)


def _of_study(folder: Path) -> tuple[list[tuple[Path, Run]], set[Path]]:
    """All runs of a study, done or not, and the folders of trainings and models that it names."""
    listing, root = read_study(folder), folder.resolve().parent
    runs, named = [], set()
    for entry in listing["runs"]:
        _check(entry, folder / STUDY)
        training = root / entry["training"] if entry["training"] else None
        model = root / entry["model_folder"]
        named |= {one.resolve() for one in (training, model) if one}
        home = training or model
        info = {key: entry.get(key) for key in (*NAMED, "variant", "seed", "steps", "backend")}
        info["trains"] = training is not None
        info |= {"id": home.name.rsplit("-", 1)[-1], "config": _config(training) or _config(model)}
        settings = {} if listing.get("file") else _of_training(info["config"])  # one file has one base
        samples = [(root / name).resolve() for name in entry["samples"]]
        runs += [(home.resolve(), run) for run in _runs(info, settings, training, model, samples)]
    return runs, named


def _alone(folder: Path) -> Iterator[tuple[Path, Run]]:
    """The runs of one folder, read without a study."""
    info = read_info(folder)
    _check(info, folder / "config.json")
    training = {"training": folder, "samples": folder.parent.parent}.get(info["kind"])
    samples = [folder] if info["kind"] == "samples" else [one.parent for one in folder.glob("samples/*/config.json")]
    model = folder if training is None else _model_of(training, info)
    info = {**info, "id": info["key"] if training in (None, folder) else training.name.rsplit("-", 1)[-1]}
    settings = _of_training(info["config"])
    for run in _runs(info, settings, training, model, sorted(samples)):
        yield (training or folder).resolve(), run


def _check(info: Line, where: Path) -> None:
    if missing := [key for key in NAMED if not info.get(key)]:
        raise InputError(f"{where} lacks {', '.join(missing)}")


def _model_of(training: Path, info: Line) -> Path | None:
    """The folder of a training's model, below the same root; None where the model has no records."""
    if info["kind"] == "model":
        return None
    for config in sorted(training.parent.parent.glob(f"models/{info['family']}-*/config.json")):
        if read_info(config.parent)["config"]["model"] == info["config"].get("model"):
            return config.parent.resolve()
    return None


def _config(folder: Path | None) -> Line:
    return read_info(folder)["config"] if folder and (folder / "config.json").is_file() else {}


def _of_training(config: Line) -> Line:
    """The settings that distinguish trainings, other than seed and length."""
    settings = {name: config[name] for name in ("model", "encoder", "objective", "backend") if name in config}
    for name, less in (("data", ("path",)), ("train", ("steps", "snapshots"))):
        if name in config:
            settings[name] = {key: value for key, value in config[name].items() if key not in less}
    return settings


def _runs(info: Line, settings: Line, training: Path | None, model: Path | None, samples: list[Path]) -> Iterator[Run]:
    """The run of some folders; several runs where samples of the furthest step were drawn in several ways."""
    rows = [row for row in _rows(_read(model)) if row["kind"] != "speed" or _asked(info) in (None, row["asked"] or {})]
    trained = _read(training)
    if trained and (elsewhere := trained.info.get("weights")):  # only samples were written here
        trained = _read(Path(elsewhere)) or trained
    last = info.get("steps") or float("inf")
    rows += [row for row in _rows(trained) if row["kind"] != "train" or (row["steps"] or 0) <= last]
    metrics = [line for line in trained.metrics if line.get("step", 0) <= last] if trained else []
    folders = [folder for folder in map(_read, samples) if folder]
    furthest = max((folder.info["step"] for folder in folders), default=None)
    newest = [folder for folder in folders if folder.info["step"] == furthest]
    earlier = [row for folder in folders if folder.info["step"] != furthest for row in _rows(folder)]
    run = Run(info, "", rows, earlier, metrics)
    ways = [_way(folder.info["config"]) for folder in newest]
    for folder, way in zip(newest or [None], ways or [{}], strict=True):
        apart = {key: value for key, value in way.items() if any(other.get(key) != value for other in ways)}
        about = {**info, "variant": {**(info.get("variant") or {}), **apart}}
        path = folder.path if folder else None
        yield replace(run, info=about, group=_group(about, settings), rows=[*rows, *_rows(folder)], samples=path)


def _group(info: Line, settings: Line) -> str:
    axes = sorted((axis, str(value)) for axis, value in info["variant"].items() if axis != "seed")
    return f"{info['study']} {info['model']} {axes} {json.dumps(settings, sort_keys=True)}"


def _read(folder: Path | None) -> Folder | None:
    return read_run(folder) if folder and (folder / "config.json").is_file() else None


def _rows(folder: Folder | None) -> list[Line]:
    return [row.flat() for row in folder.records] if folder else []


def _way(config: Line) -> Line:
    """The way in which samples were drawn, as axis values."""
    left_out = ("batch_size", "at")
    return {f"sample.{key}": value for key, value in (config.get("sample") or {}).items() if key not in left_out}


def _asked(info: Line) -> Line | None:
    """The implementations that a run asks for by name; None for a single model, for which all timings count."""
    backend = info["config"].get("backend") if info.get("backend") is None else info["backend"]
    return None if backend is None else {name: value for name, value in backend.items() if value != "auto"}
