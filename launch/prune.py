"""`sweep prune`: what no study below a root names any more, and full checkpoints of finished runs."""

import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..harness.record import read_lines, read_records
from ..harness.run import STUDY, is_locked, read_study
from ..harness.stages import reached
from .plan import Planned

GIB = 2**30


@dataclass(frozen=True)
class Leftover:
    """What may be deleted: a folder, or checkpoint files of a training; the hours of training in it (0 where none is
    lost), and its size."""

    folder: Path
    files: tuple[Path, ...]
    hours: float
    gib: float

    def delete(self) -> None:
        for file in self.files:
            file.unlink()
        if not self.files:
            shutil.rmtree(self.folder)


def named(root: Path, current: Mapping[str, Sequence[Mapping[str, Any]]] | None = None) -> set[Path]:
    """Every folder that the .study.json below a root name, with the trainings of samples; `current` has the runs of
    studies whose file says something else by now.

    Raises InputError for a .study.json that cannot be read: what it names must not be taken for unnamed.
    """
    listings = dict(current or {})
    for path in root.glob(f"*/{STUDY}"):
        if path.parent.name not in listings:
            listings[path.parent.name] = read_study(path.parent)["runs"]
    folders: set[Path] = set()
    for runs in listings.values():
        for run in runs:
            folders |= {root / name for name in (run["training"], run["model_folder"], *run["samples"]) if name}
    return folders | {folder.parents[1] for folder in folders if folder.parent.name == "samples"}


def unnamed(root: Path, kept: Container[Path]) -> Iterator[Path]:
    """Folders of trainings, samples and models below a root that are not among `kept`; samples of a training that is
    not are part of that."""
    for folder in sorted((root / "trainings").glob("*")):
        if folder not in kept:
            yield folder
        else:
            yield from (one for one in sorted((folder / "samples").glob("*")) if one not in kept)
    yield from (folder for folder in sorted((root / "models").glob("*")) if folder not in kept)


def leftover(folder: Path) -> Leftover:
    """A folder as something to delete."""
    return Leftover(folder, (), hours(folder), _size(folder.rglob("*")))


def checkpoints(runs: Sequence[Planned]) -> Iterator[Leftover]:
    """Full checkpoints of the trainings of finished runs, where the averaged weights of the end are kept apart; not of
    those of which another study asks for more."""
    trainings: dict[Path, list[Planned]] = {}
    for run in runs:
        if run.training is not None:
            trainings.setdefault(run.training.path, []).append(run)
    needed = {folder for root in {run.root for run in runs} for folder in _unfinished(root)}
    for folder, theirs in trainings.items():
        files = tuple(sorted((folder / "checkpoints").glob("step-*.safetensors")))
        if not files or any(run.missing() for run in theirs) or folder in needed:
            continue
        end = max(int(file.stem.removeprefix("step-")) for file in files)
        whole = reached(read_records(folder / "record.jsonl")) == end  # else a longer training is under way
        if whole and (folder / "weights" / f"step-{end:08d}.safetensors").is_file():
            yield Leftover(folder, files, 0.0, _size(files))


def _unfinished(root: Path) -> Iterator[Path]:
    """The trainings of which a study below a root asks for more: steps that they did not reach, or samples that are not
    drawn yet."""
    for path in root.glob(f"*/{STUDY}"):
        for run in read_study(path.parent)["runs"]:
            if not run["training"]:
                continue
            folder = root / run["training"]
            further = (run.get("steps") or 0) > (reached(read_records(folder / "record.jsonl")) or 0)
            samples = [read_records(root / name / "record.jsonl") for name in run["samples"]]
            drawn = [any(row.kind == "sample" and row.state == "done" for row in rows) for rows in samples]
            if further or not all(drawn):
                yield folder


def busy(folder: Path, queued: Container[Path]) -> bool:
    """Whether a folder, or one of the samples in it, is being worked on or is in the queue."""
    inside = [folder, *folder.glob("samples/*")]
    return any(is_locked(one) or one.resolve() in queued for one in inside)


def hours(folder: Path) -> float:
    """Hours of training in a folder; 0 for one of samples or of a model."""
    lines = read_lines(folder / "metrics.jsonl")
    return lines[-1].get("seconds", 0.0) / 3600 if lines else 0.0


def _size(files: Any) -> float:
    return sum(file.lstat().st_size for file in files if not file.is_dir()) / GIB
