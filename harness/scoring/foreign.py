"""Other people's samples: an .npz or a folder of images of any origin, and the record of their scores.

ROOT/foreign/NAME-KEY has record.jsonl, and in config.json also `digest` (the SHA-256 of the images' file; of a folder,
16 hex digits over names and contents of its files), `source` (where they were), `count`, `generation` (how they were
drawn, as protocol.py has it) and `studies`, those in whose tables they are a row. Studies do not have to name such a
folder, so that nothing deletes it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...kernels.errors import InputError, unknown
from ..config import Config
from ..data import files
from ..data.folder import HIDDEN, SUFFIXES, everything
from ..device import pick_device
from ..disk import access, append, write_atomically
from ..keys import foreign_folder, score_key
from ..progress import Progress
from ..provenance import provenance
from ..record import Row, ScoreRow, newest, read_records, row
from ..run import LAYOUT, STUDY, locked, plain_name, read_info
from ..shards import Samples, open_samples
from .networks import check_weights
from .protocol import UNKNOWN, Generation, fields_of
from .reference import Reference, reference_of, was_against
from .score import Unscored, evaluate

MOST_NAME = 100  # characters
PIECE = 2**20  # bytes that are hashed at once


class Pictures:
    """The images at any depth below a folder, in the order of their paths: uint8 [N, H, W, C], decoded as they are
    read. C is 1 if all are grey, else 3. `digest` is 16 hex digits over their names and contents.

    Raises InputError for a folder without images, and for images that are damaged or have several sizes.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, folder: Path, say: files.Say | None = None) -> None:
        content = everything(folder)
        self.files, name = content.files, files.line_of(folder)
        if not self.files:
            raise InputError(f"{name} holds no images; supported are {', '.join(SUFFIXES)}")
        entries = files.whole(files.entries(folder, self.files, say))
        first = entries[0]
        for file, entry in zip(self.files, entries, strict=True):
            if (entry.width, entry.height) != (first.width, first.height):
                one, other = (files.line_of(path.relative_to(folder)) for path in (self.files[0], file))
                raise InputError(
                    f"the images of {name} have several sizes: {one} has {first.width} × {first.height} pixels, "
                    f"{other} has {entry.width} × {entry.height}; give them one size first"
                )
        self.mode = "L" if all(entry.mode in ("1", "L") for entry in entries) else "RGB"
        self.shape = (len(self.files), first.height, first.width, 1 if self.mode == "L" else 3)
        self.digest = files.fingerprint_of(folder, self.files, entries)
        content.left_out.pop(HIDDEN, None)
        if say is not None and (text := content.omissions(folder)):
            say(f"{name}: left out are {text}")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, part: slice) -> NDArray[np.uint8]:
        images = [self._read(file) for file in self.files[part]]
        return np.stack(images) if images else np.empty((0, *self.shape[1:]), np.uint8)

    def _read(self, file: Path) -> NDArray[np.uint8]:
        try:
            image = files.read_image(file)[0].convert(self.mode)
        except files.UNREADABLE as error:
            raise files.unreadable(file, error) from None
        if (image.height, image.width) != self.shape[1:3]:
            raise InputError(f"{files.line_of(file)} was changed while it was in use")
        return np.asarray(image, np.uint8).reshape(self.shape[1:])


def open_foreign(path: Path, say: files.Say | None = None) -> tuple[Samples, str]:
    """The images of an .npz or of a folder, and the digest of their contents. Raises InputError if there are none."""
    if path.is_dir():
        pictures = Pictures(path, say)
        return pictures, pictures.digest
    if path.suffix != ".npz":
        problem = "is neither an .npz nor a folder" if path.exists() else "does not exist"
        raise InputError(f"{files.line_of(path)} {problem}: name an .npz of images, or a folder of them")
    samples, digest = open_samples(path), hashlib.sha256()
    with access("read", path, missing=True), open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return samples, digest.hexdigest()


def check_name(name: str) -> None:
    """Raise InputError for a name that cannot be part of a folder's name."""
    if not name or plain_name(name) != name or name.startswith(".") or len(name.encode()) > MOST_NAME:
        raise InputError(
            f"--as takes a name of letters, digits and ._+=-, at most {MOST_NAME} bytes and not beginning with a dot, "
            f"not {name[:40]!r}"
        )


def score_foreign(
    path: Path, name: str, config: Config, drawn: Generation | None, study: str | None, progress: Progress
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Score the images at `path` by `config.evaluate` against `config.data`, and record the scores under a `name` below
    `run.root`, for the tables of a study too. Scores that are on record are not computed again.

    `drawn` says how the images were drawn; None is what was said before, or unknown. It holds for all scores of the
    images under this name. Returns the rows of what was asked for, and why some metrics could not be computed. Raises
    InputError, before anything is written, for a bad name, study or set of images, and Unscored if no metric can be
    computed.
    """
    check_name(name)
    if others := [request for request in config.evaluate.metrics if "@" in request]:
        raise InputError(
            f"evaluate.metrics {others[0]}: other people's samples are compared with one set of images at a time, "
            f"evaluate.split={others[0].partition('@')[2]} or evaluate.split={config.evaluate.split}"
        )
    root = Path(config.run.root)
    if study is not None and not (root / study / STUDY).is_file():
        raise unknown(f"study below {root}", study, sorted(one.parent.name for one in root.glob(f"*/{STUDY}")))
    samples, digest = open_foreign(path, progress.say)
    folder = foreign_folder(root, name, digest)
    there = (folder / "config.json").is_file()
    info = read_info(folder, {"generation": dict, "studies": list}) if there else {}
    drawn = drawn or info.get("generation", UNKNOWN)
    reference = reference_of(config, progress.say)
    keys = {metric: score_key(config, digest, metric) for metric in config.evaluate.metrics}
    scores = [one for one in _scores(folder, reference) if one.key in keys.values()]
    check_weights(config.evaluate, scores, "another name (--as) keeps both")
    done = {one.key for one in scores}
    missing = [metric for metric in keys if keys[metric] not in done]
    lines, reasons = _score(samples, reference, config, missing, progress) if missing else ([], {})
    if reasons and not lines and not done:
        raise Unscored(reasons)
    about = {
        "layout": LAYOUT, "kind": "foreign", "key": folder.name.rsplit("-", 1)[1], "study": "foreign", "name": name,
        "variant": {}, "seed": None, "model": name, "family": "foreign", "title": name,
        "config": {"data": asdict(config.data), "evaluate": asdict(config.evaluate)}, "digest": digest,
        "source": str(path.resolve()), "count": len(samples), "generation": drawn,
        "studies": sorted({*info.get("studies", []), *([study] if study else [])}),
    }  # fmt: skip
    if lines or about != info:
        facts = {"samples": digest, **fields_of(drawn)}
        rows = [row("score", key=keys[line.pop("request")], **line, **facts) for line in lines]
        _write(folder, about, rows, facts)
    return [one.flat() for one in _scores(folder, reference) if one.key in keys.values()], reasons


def _scores(folder: Path, reference: Reference) -> list[ScoreRow]:
    """The newest scores on record against the data as they are today, one for each number."""
    rows = newest(read_records(folder / "record.jsonl")).values()
    return [one for one in rows if isinstance(one, ScoreRow) and was_against(one, reference)]


def _score(
    samples: Samples, reference: Reference, config: Config, metrics: Sequence[str], progress: Progress
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows of `evaluate` with their provenance, and why some metrics could not be computed."""
    device, lines = pick_device(config.run.device), []
    origin = provenance(device)
    rows = evaluate(
        samples,
        reference,
        config.evaluate,
        metrics,
        cache=Path(config.run.root) / ".cache",
        device=device,
        progress=lambda done, total: progress.update("evaluate", done, total),
    )
    try:
        for line in rows:
            lines.append(line | {"provenance": origin})
    except Unscored as error:
        return lines, error.reasons
    return lines, {}


def _write(folder: Path, about: dict[str, Any], rows: Sequence[Row], facts: dict[str, Any]) -> None:
    """Write config.json, new rows, and again those rows that say otherwise how the samples were drawn."""
    with access("write below", folder.parent.parent, "; run.root=FOLDER takes another one", missing=True):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        write_atomically(folder / "config.json", json.dumps(about, indent=1).encode())
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        known = newest(read_records(folder / "record.jsonl")).values()
        stale = [one for one in known if isinstance(one, ScoreRow) and one.generation != facts["generation"]]
        for one in (*(replace(one, time=now, **facts) for one in stale), *rows):
            append(folder / "record.jsonl", one.as_dict())
