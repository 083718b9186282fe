"""`sweep prune`: folders that no study below a root names, and full checkpoints of finished runs."""

import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..harness.disk import read_lines
from ..harness.moments import reached
from ..harness.record import read_records
from ..harness.run import STUDY, is_locked, read_study
from ..harness.training import storage
from .plan import Planned

GIB = 2**30


@dataclass(frozen=True)
class Leftover:
    """What may be deleted: a whole folder, or only some `files` in it (checkpoints, perhaps in shards); the hours of
    training that would be lost, and the size."""

    folder: Path
    files: tuple[Path, ...]
    hours: float
    gib: float

    def delete(self) -> None:
        for file in self.files:
            storage.remove(file)
        if not self.files:
            shutil.rmtree(self.folder)


def named_folders(root: Path, current: Mapping[str, Sequence[Mapping[str, Any]]] | None = None) -> set[Path]:
    """Every folder that a .study.json below a root names, and the trainings of named samples and guides. `current`
    holds the runs of studies, {name: runs}, that replace those in their .study.json.

    Raises InputError for a .study.json that cannot be read, because the folders that it names must be kept.
    """
    listings = dict(current or {})
    for path in root.glob(f"*/{STUDY}"):
        if path.parent.name not in listings:
            listings[path.parent.name] = read_study(path.parent)["runs"]
    folders: set[Path] = set()
    for runs in listings.values():
        for run in runs:
            names = (run["training"], run["model_folder"], run.get("guide"), *run["samples"])
            folders |= {root / name for name in names if name}
    return folders | {folder.parents[1] for folder in folders if folder.parent.name == "samples"}


def unnamed_folders(root: Path, named: Container[Path]) -> Iterator[Path]:
    """Folders of trainings, released weights, samples and models below a root that are not among `named`. An unnamed
    training includes its samples."""
    for folder in sorted([*(root / "trainings").glob("*"), *(root / "weights").glob("*")]):
        if folder not in named:
            yield folder
        else:
            yield from (one for one in sorted((folder / "samples").glob("*")) if one not in named)
    yield from (folder for folder in sorted((root / "models").glob("*")) if folder not in named)


def leftover(folder: Path) -> Leftover:
    """A folder as something to delete."""
    return Leftover(folder, (), hours(folder), _size(folder.rglob("*")))


def checkpoints(runs: Sequence[Planned]) -> Iterator[Leftover]:
    """Full checkpoints of finished trainings whose averaged weights at the end have a file of their own, and of which
    no other study asks for more."""
    trainings: dict[Path, list[Planned]] = {}
    for run in runs:
        if run.training is not None:
            trainings.setdefault(run.training.path, []).append(run)
    needed = {folder for root in {run.root for run in runs} for folder in _unfinished(root)}
    for folder, users in trainings.items():
        files = tuple(storage.files(folder / "checkpoints"))
        if not files or any(run.missing() for run in users) or folder in needed:
            continue
        end = max(map(storage.step_of, files))
        finished = reached(read_records(folder / "record.jsonl")) == end  # else a longer training is under way
        if finished and (folder / "weights" / storage.file_name(end)).is_file():
            yield Leftover(folder, files, 0.0, sum(map(storage.size, files)) / GIB)


def _unfinished(root: Path) -> Iterator[Path]:
    """The trainings of which a study below a root asks for more: steps that they did not reach, samples that are
    not drawn yet, or the held-out loss; and the guides of such samples."""
    for path in root.glob(f"*/{STUDY}"):
        for run in read_study(path.parent)["runs"]:
            if not run["training"]:
                continue
            folder = root / run["training"]
            further = (run.get("steps") or 0) > (reached(read_records(folder / "record.jsonl")) or 0)
            to_draw = run.get("to_draw", run["samples"])
            ends = {name: "sample" if name in to_draw else "score" for name in run["samples"]}
            done = [
                any(row.kind == kind and row.state == "done" for row in read_records(root / name / "record.jsonl"))
                for name, kind in ends.items()
            ]
            if further or not all(done):
                yield folder
                if run.get("guide"):  # whose `live` weights only full checkpoints have
                    yield root / run["guide"]


def busy(folder: Path, queued: Container[Path]) -> bool:
    """Whether a process works on a folder or on samples in it, or whether one of them is queued."""
    inside = [folder, *folder.glob("samples/*")]
    return any(is_locked(one) or one.resolve() in queued for one in inside)


def hours(folder: Path) -> float:
    """Hours of training in a folder; 0 for samples and models."""
    lines = read_lines(folder / "metrics.jsonl")
    return lines[-1].get("seconds", 0.0) / 3600 if lines else 0.0


def _size(files: Any) -> float:
    return sum(file.lstat().st_size for file in files if not file.is_dir()) / GIB
