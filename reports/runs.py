"""Runs as tables show them: each variant and seed of a study with all its records, from whichever folders have them."""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..harness.disk import read_lines
from ..harness.measure.gpus import derived
from ..harness.record import read_records
from ..harness.run import STUDY, read_info, read_study
from ..harness.run import Run as Folder
from ..kernels.errors import InputError
from .progress import over

Line = dict[str, Any]  # of a record or a table; a field that does not apply is None
SEEDS = ("seed", "sample.seed")  # axes along which nothing differs but the random numbers
NAMED = ("study", "name", "model", "family", "title")  # what every config.json must have
# What a damaged or foreign file raises, one that this user may not read, and a link to itself (RuntimeError).
UNREADABLE = (InputError, OSError, RuntimeError)
STEP = {"train": "steps", "score": "checkpoint_step"}  # the field that says how long a training was
# Types of entries of config.json and .study.json that may be missing or null.
LATER = {"labels": "balanced", "timesteps": "even"}
OPTIONAL = {"variant": dict, "backend": dict, "training": str, "steps": int, "samples": list, "config": dict}
OPTIONAL |= {"config.train.batch_size": int, "config.train.steps": int, "config.train.precision": str}
OPTIONAL |= {"studies": list} | {
    f"config.{name}": dict for name in ("model", "data", "encoder", "objective", "train", "sample", "backend")
}


@dataclass(frozen=True, eq=False)
class Run:
    """A variant and seed of a study, or a single folder.

    info      `study`, `name`, `id` (the key of the training, or of the model where there is no training), `variant`
              (axis values), `seed`, `model` (preset), `family`, `title`, `config`, `about` (what its study is about:
              `question`, `claim`, `answer`, `budget`, `axes` {axis: [values]}, and `verdicts` if it has some; {} if
              that is not on record), `folder` (of its training or model); of a study also `place` (in its list of
              runs), `of_file` (whether it has a file), `by_hand` (samples were added to those of the study) and
              `to_do` (how many of its sets of samples have no record)
    group     equal for runs that differ only in their seeds
    rows      records of its model, its training, and its samples at the furthest step; oldest first within each
    earlier   records of its samples at earlier steps
    metrics   the log of its training
    samples   the folder of its samples
    way       how they were drawn, as axis values
    damage    why it cannot be read, with the name of the file; then it has no records
    """

    info: dict[str, Any]
    group: str
    rows: list[Line] = field(default_factory=list)
    earlier: list[Line] = field(default_factory=list)
    metrics: list[Line] = field(default_factory=list)
    samples: Path | None = None
    way: dict[str, Any] = field(default_factory=dict)
    damage: str = ""

    def last(self, kind: str, state: str | None = None) -> Line | None:
        """The newest record of a kind, or of a kind and a state."""
        rows = (row for row in reversed(self.rows) if row["kind"] == kind and state in (None, row["state"]))
        return next(rows, None)


def read(paths: Iterable[Path], damaged: bool = False) -> list[Run]:
    """The runs at or below folders, sorted by study and name, each once.

    A folder is that of a study, of one training, model or set of samples, a root, or a folder of roots. A root stands
    for all its studies and for the folders that no study names. Links are followed. A run with a file that this version
    cannot read has no records, and its `damage` says why. Raises InputError, one line, for a folder that does not exist
    or holds no run, and if no run at all can be read, unless all may be `damaged`.
    """
    runs: dict[tuple[Any, ...], Run] = {}
    start = time.monotonic()
    try:
        for path in paths:
            if not path.is_dir():
                reason = f"{path} is a file: name folders of runs" if path.exists() else f"no such folder: {path}"
                raise InputError(reason)
            below = list(_below(path, start))
            if not below:
                raise InputError(f"{path} holds no run: expected a study, trainings/ or models/ at or below it")
            for place, run in below:
                runs.setdefault((run.info["study"], run.info["name"], place, run.samples), run)
    finally:
        for function in (_info, _read, _rows, _models):  # the next call reads the files again
            function.cache_clear()
    if not runs:
        raise InputError("no run folder was given")
    if not damaged and all(run.damage for run in runs.values()):
        raise InputError(next(run.damage for run in runs.values()))
    apart = _apart(_by_way(list(runs.values())))
    return sorted(apart, key=lambda run: (run.info["study"], run.info["name"], run.info["id"]))


def _by_way(runs: list[Run]) -> list[Run]:
    """The runs, with groups and axis values that say how samples were drawn if those of one group were drawn in several
    ways, of one training or of several: a mean over seeds has one generation protocol."""
    ways: dict[str, list[Line]] = {}
    for run in runs:
        if run.way:
            ways.setdefault(run.group, []).append(run.way)
    result = []
    for run in runs:
        others = ways.get(run.group, [])
        apart = {key: value for key, value in run.way.items() if any(other.get(key) != value for other in others)}
        axes = _axes(apart)
        info = {**run.info, "variant": {**(run.info.get("variant") or {}), **apart}, "by_hand": bool(axes)}
        result.append(replace(run, info=info, group=f"{run.group} {axes}" if axes else run.group))
    return result


def _apart(runs: list[Run]) -> list[Run]:
    """The runs, with groups that depend on the settings of training where one group has different trainings of one
    seed: a study may have been run with other settings below another root."""
    trainings: dict[tuple[str, Any], set[str]] = {}
    for run in runs:
        if run.info.get("trains", True):
            trainings.setdefault((run.group, run.info.get("seed")), set()).add(run.info["id"])
    mixed = {group for (group, _), ids in trainings.items() if len(ids) > 1}
    return [
        replace(run, group=_group(run.info, _of_training(run.info["config"]))) if run.group in mixed else run
        for run in runs
    ]


def _below(path: Path, start: float) -> Iterator[tuple[Path, Run]]:
    """The runs at or below one folder, each with the folder of its training or model. `start` is when reading began."""
    if (path / STUDY).is_file():
        yield from _of_study(path, start)[0]
        return
    if path.is_symlink() and (path.parent / STUDY).is_file():
        runs = _of_study(path.parent, start)[0]
        yield from (one for one in runs if one[1].info["name"] == path.name or one[0] == path.parent)
        return
    if (path / "config.json").is_file():
        yield from _alone(path.resolve())[0]
        return
    named: set[Path] = set()
    studies = sorted(path.glob(f"*/{STUDY}"))
    for study in studies:
        runs, folders = _of_study(study.parent, start)
        yield from runs
        named |= folders
    below = [config.parent for pattern in ("*", "*/*") for config in sorted(path.glob(f"{pattern}/config.json"))]
    rest = [folder.resolve() for folder in below if not (folder.parent / STUDY).is_file()]
    homes = [folder for folder in dict.fromkeys(rest) if folder not in named]
    for folder in over(sorted(homes, key=lambda folder: folder.parent.name != "trainings"), "reading", start):
        if folder not in named:
            runs, model = _alone(folder)
            yield from runs
            if model:
                named.add(model)
    if not studies and not homes:
        for root in sorted({place.parent for name in ("trainings", "models") for place in path.glob(f"*/{name}")}):
            yield from _below(root, start)


def _of_study(folder: Path, start: float) -> tuple[list[tuple[Path, Run]], set[Path]]:
    """All runs of a study, done or not, and the folders of trainings and models that it names."""
    root = folder.resolve().parent
    runs, named = [], set()
    try:
        listing = read_study(folder)
    except UNREADABLE as error:
        return [(folder, _unreadable(folder, error, {"study": folder.resolve().name}))], named
    facts: Line = listing.get("about") or {}
    for place, entry in enumerate(over(listing["runs"], f"reading {folder.name}", start)):
        about: Line = {"about": facts}
        try:
            _check(entry, folder / STUDY)
            about |= {key: entry.get(key) for key in (*NAMED, "variant", "seed", "steps", "backend")}
            training = root / entry["training"] if entry.get("training") else None
            model = root / entry["model_folder"]
            named |= {one.resolve() for one in (training, model) if one}
            home = training or model
            about |= {"trains": training is not None, "id": home.name.rsplit("-", 1)[-1]}
            about |= {"place": place, "of_file": bool(listing.get("file")), "folder": str(home.resolve())}
            info = {**about, "config": _config(training) or _config(model)}
            settings = {} if listing.get("file") else _of_training(info["config"])  # one file has one base
            samples = [(root / str(name)).resolve() for name in entry.get("samples") or ()]
            info["to_do"] = sum(not (place / "record.jsonl").exists() for place in samples)
            runs += [(home.resolve(), run) for run in _runs(info, settings, training, model, samples)]
        except UNREADABLE as error:
            runs.append((folder, _unreadable(folder, error, about)))
    theirs = list(_foreign(root, folder.resolve().name, facts))
    return runs + theirs, named | {place for place, _ in theirs}


def _foreign(root: Path, study: str, facts: Line) -> Iterator[tuple[Path, Run]]:
    """Other people's samples that are a row of a study, each with its folder."""
    for config in sorted(root.glob("foreign/*/config.json")):
        with suppress(*UNREADABLE):  # it may be of another study, and is a run of the root
            info = _info(config.parent)
            if study in (info.get("studies") or ()):
                yield from _runs_alone(config.parent, {**info, "study": study, "about": facts})


def _unreadable(folder: Path, error: Exception, about: Line | None = None) -> Run:
    """A run that cannot be read, named after its folder unless it is known what it is called."""
    text = f"cannot read {error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    family, _, key = folder.name.partition("-")
    info: Line = {"study": folder.parent.name, "name": folder.name, "model": folder.name, "family": family}
    info |= {"title": folder.name, "id": key.rsplit("-", 1)[-1], "variant": {}, "config": {}, "about": {}}
    info["folder"] = str(folder.resolve())
    info |= about or {}
    info["variant"] = info["variant"] or {}
    return Run(info, f"unreadable {info['study']} {info['name']} {text}", damage=text)


def _alone(folder: Path) -> tuple[list[tuple[Path, Run]], Path | None]:
    """The runs of one folder, read without a study, and the folder of the model of a training."""
    about: Line = {}
    model = None
    try:
        info = _info(folder)
        about = {key: info.get(key) for key in (*NAMED, "variant", "seed")}
        model = _model_of(folder, info)
        return list(_runs_alone(folder, info)), model
    except UNREADABLE as error:
        return [(folder, _unreadable(folder, error, about))], model


def _runs_alone(folder: Path, info: Line) -> Iterator[tuple[Path, Run]]:
    training = {"training": folder, "samples": folder.parent.parent}.get(info["kind"])
    samples = [folder] if info["kind"] == "samples" else [one.parent for one in folder.glob("samples/*/config.json")]
    model = folder if training is None else _model_of(training, info)
    info = {"about": {}, **info, "id": info["key"] if training in (None, folder) else training.name.rsplit("-", 1)[-1]}
    info["folder"] = str((training or folder).resolve())
    # Two sets of other people's samples are no seeds of one variant, whatever their names.
    settings = {"samples": info["key"]} if info["kind"] == "foreign" else _of_training(info["config"])
    for run in _runs(info, settings, training, model, sorted(samples)):
        yield (training or folder).resolve(), run


@cache
def _info(folder: Path) -> Line:
    """The content of a config.json. Raises InputError if it was not written by lamabench."""
    info = read_info(folder)
    _check(info, folder / "config.json")
    return info


def _check(info: Any, where: Path) -> None:
    """Raise InputError for an entry that lacks something, or that has something of another type than reports read."""
    if not isinstance(info, dict):
        raise InputError(f"{where} was not written by lamabench")
    own = ("kind", "key", *(("step",) if info.get("kind") == "samples" else ()))
    needed = own if where.name == "config.json" else ("model_folder",)
    if missing := [key for key in (*NAMED, *needed) if info.get(key) in (None, "")]:
        raise InputError(f"{where} lacks {', '.join(missing)}")
    flat = dict(info)
    for section in ("config", "config.train"):
        if isinstance(entries := flat.get(section), dict):
            flat |= {f"{section}.{name}": value for name, value in entries.items()}
    types = OPTIONAL | {key: int if key == "step" else str for key in (*NAMED, *needed)}
    if wrong := [key for key, kind in types.items() if not isinstance(flat.get(key), kind | None)]:
        raise InputError(f"{where} was not written by lamabench: {', '.join(wrong)} has another type")


def _model_of(training: Path, info: Line) -> Path | None:
    """The folder of a training's model, below the same root; None where the model has no records."""
    if info["kind"] == "model":
        return None
    models = _models(training.parent.parent, info["family"])
    return next((folder for folder, model in models if model == info["config"].get("model")), None)


@cache
def _models(root: Path, family: str) -> list[tuple[Path, Any]]:
    """The folders of a family's models below a root, each with the model's configuration."""
    models = []
    for config in sorted(root.glob(f"models/{family}-*/config.json")):
        with suppress(*UNREADABLE):  # it may be that of another training, and is a run of its own otherwise
            models.append((config.parent.resolve(), _info(config.parent)["config"].get("model")))
    return models


def _config(folder: Path | None) -> Line:
    return _info(folder)["config"] if folder and (folder / "config.json").exists() else {}


def _of_training(config: Line) -> Line:
    """The settings that distinguish trainings, other than seed and length."""
    settings = {name: config[name] for name in ("model", "encoder", "objective") if name in config}
    settings["backend"] = _by_name(config.get("backend") or {})
    settings |= {"released": released} if any((released := config.get("released") or {}).values()) else {}
    for name, less in (("data", ("path",)), ("train", ("steps", "snapshots"))):
        if name in config:
            settings[name] = {key: value for key, value in config[name].items() if key not in less}
    return settings


def _runs(info: Line, settings: Line, training: Path | None, model: Path | None, samples: list[Path]) -> Iterator[Run]:
    """The runs of some folders: one for each way in which samples of the furthest step were drawn, or else one. Sets
    that differ in their number of images are of one run, the largest first, because a score's name has the number."""
    rows = [row for row in _rows(model) if row["kind"] != "speed" or _asked(info) in (None, row["asked"] or {})]
    trained = _read(training)
    if trained and (elsewhere := trained.info.get("weights")):  # only samples were written here
        trained = _read(Path(elsewhere)) or trained
    last = info.get("steps") or float("inf")
    rows += [row for row in _rows(trained and trained.path) if (row.get(STEP.get(row["kind"], "")) or 0) <= last]
    metrics = [line for line in trained.metrics if line["step"] <= last] if trained else []
    folders = [folder for folder in map(_read, samples) if folder]
    furthest = max((folder.info["step"] for folder in folders), default=None)
    newest = [folder for folder in folders if folder.info["step"] == furthest]
    earlier = [row for folder in folders if folder.info["step"] != furthest for row in _rows(folder.path)]
    run = Run(info, _group(info, settings), rows, earlier, metrics)
    ways: dict[str, list[Folder]] = {}
    for folder in newest:
        ways.setdefault(json.dumps(_way(folder.info["config"]), sort_keys=True), []).append(folder)
    for sets in ways.values():
        sets.sort(key=_count, reverse=True)
        own = [row for folder in sets for row in _rows(folder.path)]
        yield replace(run, rows=[*rows, *own], samples=sets[0].path, way=_way(sets[0].info["config"]))
    if not newest:
        yield run


def _group(info: Line, settings: Line) -> str:
    axes = _axes(info.get("variant") or {})
    return f"{info['study']} {info['model']} {axes} {json.dumps(settings, sort_keys=True)}"


def _axes(variant: Line) -> list[tuple[str, str]]:
    """Axis values in order, less those along which only random numbers differ."""
    return sorted((axis, str(value)) for axis, value in variant.items() if axis not in SEEDS)


@cache
def _read(folder: Path | None) -> Folder | None:
    if not folder or not (folder / "config.json").exists():
        return None
    return Folder(folder, _info(folder), read_records(folder / "record.jsonl"), read_lines(folder / "metrics.jsonl"))


@cache
def _rows(folder: Path | None) -> list[Line]:
    """The records of a folder, oldest first, with what follows from them. Runs that share it have the same dicts."""
    content = _read(folder)
    rows = [row.flat() for row in content.records] if content else []
    return [row | derived(row) for row in rows]


def _way(config: Line) -> Line:
    """The way in which samples were drawn, as axis values. A folder of an earlier version lacks the fields that joined
    later, whose values are those of `LATER` or None. A guide is one value: its name or key, step and weights."""
    # Of no image, or part of the guide, or part of a score's name.
    left_out = ("batch_size", "at", "keep", "guide_at", "guide_weights", "guide_key", "count", "curve_count")
    values = LATER | (config.get("sample") or {})
    values |= {key: None for key in ("guidance_interval", "guide") if key not in values}
    if values["guide"]:
        name, key = Path(values["guide"]).name, str(values.get("guide_key"))[:8]
        weights = f"at step {values.get('guide_at')} ({values.get('guide_weights')})"
        values["guide"] = " ".join(word for word in (name, "" if key in name else key, weights) if word)
    return {f"sample.{key}": value for key, value in values.items() if key not in left_out}


def _count(folder: Folder) -> int:
    return (folder.info["config"].get("sample") or {}).get("count") or 0


def _by_name(backend: Line) -> Line:
    """The implementations that a section `backend` asks for by name. Older ones do not name every operator."""
    return {name: value for name, value in backend.items() if value != "auto"}


def _asked(info: Line) -> Line | None:
    """The implementations that a run asks for by name; None for a single model, for which all timings count."""
    backend = info["config"].get("backend") if info.get("backend") is None else info["backend"]
    return None if backend is None else _by_name(backend)
