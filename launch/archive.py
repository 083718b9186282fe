"""Records of finished runs as one file, for machines that are given back: `python -m lamabench.launch.archive`.

    pack ROOT FILE.tar.gz            records, metrics, configurations, distances to the nearest training images, and a
                                     grid of images of each training, no weights
    unpack ROOT FILE.tar.gz …        into ROOT, where `sweep plan` takes these runs for done and `report` reads them

A training is packed when it is done, with those sets of samples of the studies below ROOT that are scored. What is left
out is said, because without weights it cannot be done later. What ROOT has already is left as it is, except for the
listings of studies. A command that was killed can be given again: FILE.tar.gz is whole or absent, and what was unpacked
in part is unpacked again.
"""

import argparse
import gzip
import sys
import tarfile
import zlib
from io import BytesIO
from pathlib import Path

from ..harness.disk import write_atomically
from ..harness.record import newest, read_records
from ..harness.run import STUDY, read_info, read_study
from ..harness.shards import images_of, labels_at, open_samples
from ..kernels.errors import InputError
from .grid import write_grid

RECORD = "record.jsonl"
FILES = ("config.json", RECORD, "metrics.jsonl", "real.npz", "neighbours.json")
GRID = "grid.png"


def done(folder: Path, kind: str) -> bool:
    """Whether a folder has records of a kind, and none of them is a failure."""
    rows = [row for row in newest(read_records(folder / RECORD)).values() if row.kind == kind]
    return bool(rows) and all(row.state == "done" for row in rows)


def pack(root: Path, file: Path) -> list[str]:
    """Write the archive. Returns what is left out, trainings and sets of samples, and the trainings that have no grid
    of images, each with the reason."""
    listings = sorted(root.glob(f"*/{STUDY}"))
    if not listings:
        raise InputError(f"{root} has no study: give the run.root of lamabench sweep run")
    samples: dict[str, set[str]] = {}
    for run in (run for listing in listings for run in read_study(listing.parent)["runs"]):
        if run["training"]:
            samples.setdefault(run["training"], set()).update(run["samples"])
    left = {name: reason for name in sorted(samples) if (reason := unfinished(root / name, "train"))}
    folders = [root / name for name in sorted(samples) if name not in left]
    wanted = [one for name in sorted(samples) if name not in left for one in sorted(samples[name])]
    left |= {name: reason for name in wanted if (reason := unfinished(root / name, "score"))}
    sets = [root / name for name in wanted if name not in left]
    lines = [f"{name}: {reason}" for name, reason in left.items() if (root / name).exists() or name in wanted]
    for folder in folders:
        try:
            draw_grid([path for path in sets if folder in path.parents])
        except InputError as error:  # the images were deleted or damaged, and the scores remain
            lines.append(f"{folder.relative_to(root)}: has no grid of images: {error}")
    content = BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for folder in (*folders, *sets, *sorted(root.glob("models/*"))):
            for path in (folder / name for name in (*FILES, GRID)):
                if path.is_file():
                    archive.add(path, path.relative_to(root).as_posix())
        for path in listings:
            archive.add(path, path.relative_to(root).as_posix())
    write_atomically(file, content.getvalue())
    return lines


def unfinished(folder: Path, kind: str) -> str:
    """What is still to do of a training or a set of samples, or which record is damaged; empty if it is done."""
    try:
        return "" if done(folder, kind) else "is not trained" if kind == "train" else "has no scores"
    except InputError as error:
        return str(error)


def draw_grid(samples: list[Path]) -> None:
    """Write the grid of the last and largest of a training's sets of samples."""
    drawn = [path for path in samples if done(path, "sample")]
    if drawn:
        last = max(drawn, key=lambda path: ((info := read_info(path))["step"], info["config"]["sample"]["count"]))
        write_grid(last / GRID, open_samples(images_of(last)), labels_at(images_of(last)))


def unpack(root: Path, files: list[Path]) -> list[str]:
    """Unpack archives. Returns the trainings and models of which ROOT had records already; their sets of samples that
    ROOT has not are unpacked. Raises InputError for a file that is damaged or has anything for outside of ROOT; then
    nothing of it was written."""
    records = [path for level in ("*/*", "*/*/samples/*") for path in root.glob(f"{level}/{RECORD}")]
    known = {path.parent.relative_to(root).as_posix() for path in records}
    there: dict[str, None] = {}
    for file in files:
        content = read(root, file)
        for name in sorted(content, key=_is_record):  # a folder with a record is known, so that the record is last
            if (folder := _folder(name)) not in known:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(root / name, content[name])
            elif "/samples/" not in folder:
                there[folder] = None
        known |= {_folder(name) for name in content if _is_record(name)}
    return [f"{name}: left as it was" for name in there]


def read(root: Path, file: Path) -> dict[str, bytes]:
    """The files of an archive by their names below a root."""
    content = {}
    try:
        whole = BytesIO(gzip.decompress(file.read_bytes()))  # and its sum is checked
        with tarfile.open(fileobj=whole) as archive:
            for member in archive:
                data = archive.extractfile(tarfile.data_filter(member, str(root)))
                if data is not None:  # of a folder
                    content[member.name] = data.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise InputError(f"cannot unpack {file}: {error}") from None
    return content


def _is_record(name: str) -> bool:
    return Path(name).name == RECORD


def _folder(name: str) -> str:
    return Path(name).parent.as_posix()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lamabench.launch.archive", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("root", type=Path)
    parser.add_argument("file", type=Path, nargs="+")
    args = parser.parse_args()
    if args.action == "pack" and len(args.file) > 1:
        parser.error("pack writes one file")
    try:
        lines = pack(args.root, args.file[0]) if args.action == "pack" else unpack(args.root, args.file)
    except (InputError, OSError) as error:
        parser.exit(2, f"{error}\n")
    print("\n".join(lines), end="\n" if lines else "", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
