"""Folders below a root: trainings, models, samples, and the studies that name them. Only `open_run` imports torch.

    ROOT/trainings/FAMILY-DATA-KEY/   config.json, record.jsonl, metrics.jsonl, checkpoints/, weights/
                                      where asked for or needed: previews/, tensorboard/, wandb/, failures/
        samples/KEY/                  config.json, record.jsonl, shards/ (see shards.py)
    ROOT/weights/NAME-KEY/            config.json, record.jsonl, weights/, samples/: released weights (released.py)
    ROOT/models/FAMILY-KEY/           config.json, record.jsonl: cost and speed
    ROOT/foreign/NAME-KEY/            config.json, record.jsonl: scores of other people's samples (scoring/foreign.py)
    ROOT/STUDY/.study.json            the study's file, and the folders of each of its runs
    ROOT/STUDY/NAME                   a link to the training of a run, or to its model

The name of a folder follows from its key, so that studies share what they have in common. Each folder has one writer
at a time, which holds its lock.
"""

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import IO, TYPE_CHECKING, Any

from ..kernels.errors import InputError
from .disk import access, read_lines, write_atomically
from .record import Row, read_records

if TYPE_CHECKING:
    import numpy as np

    from ..models.registry import Backbone
    from .config import Config

LAYOUT = 2
STUDY = ".study.json"
GLANCE_S = 0.2  # `is_locked` holds a lock for less than this
LISTING_S = 30.0  # how long a command waits for another command that writes to the same study
# Entries and their types: those of every config.json, those that some have, those that a command wrote, and those of a
# run in .study.json.
INFO: dict[str, Any] = {"kind": str, "key": str}
MAYBE: dict[str, Any] = {"plugins": list, "weights": str, "training": str, "step": int, "origin": dict}
ABOUT: dict[str, Any] = {
    "study": str, "name": str, "variant": dict, "seed": int, "model": str, "family": str, "title": str,
}  # fmt: skip
ENTRY: dict[str, Any] = {name: kind for name, kind in ABOUT.items() if name != "study"} | {
    "training": (str, NoneType), "model_folder": str, "samples": list, "steps": (int, NoneType),
    "backend": (dict, NoneType),
}  # fmt: skip
# What a study is about, as its file says.
FACTS: dict[str, Any] = {"question": str, "claim": str, "answer": str, "budget": str, "axes": dict}
SIDES = {"better": dict, "worse": dict}  # of a pair of `verdicts`, which are among the facts where a file has some


class Busy(RuntimeError):
    """Another process works in the folder."""


@dataclass(frozen=True)
class Run:
    """A folder and its records. `info` is config.json: `kind` (training, model, samples or foreign), `key`, `study`,
    `name`, `variant` (axis values), `seed`, `model` (preset), `family`, `title`, `config`."""

    path: Path
    info: dict[str, Any]
    records: list[Row] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)

    def last(self, kind: str, state: str | None = None) -> Any:
        """The newest record of a kind, or of a kind and a state; None if there is none."""
        rows = (row for row in reversed(self.records) if row.kind == kind and state in (None, row.state))
        return next(rows, None)


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises InputError if it is not JSON or cannot be read, FileNotFoundError if it does
    not exist."""
    try:
        with access("read", path):
            return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not JSON: {error}") from None


def _check(path: Path, what: Any, shape: dict[str, Any], where: str = "") -> None:
    """Raise InputError if plain data of a file do not have the entries of `shape` {name: type or types}."""
    if not isinstance(what, dict):
        raise InputError(f"{path} was not written by lamabench:{where} it is no JSON object")
    for name, kind in shape.items():
        if not isinstance(what.get(name), kind):
            raise InputError(f"{path} was not written by lamabench:{where} its {name} is {what.get(name)!r}"[:300])


def read_info(folder: Path, *shapes: dict[str, Any]) -> dict[str, Any]:
    """config.json of a folder. Raises InputError, one line, if there is none, if it has another layout, or if it lacks
    an entry of `INFO` or `shapes` {name: type}."""
    try:
        info = read_json(folder / "config.json")
    except FileNotFoundError:
        raise InputError(f"{folder} is not a run folder: it has no config.json") from None
    _check(folder / "config.json", info, {"config": dict})
    if (layout := info.get("layout", 1)) != LAYOUT:
        if isinstance(layout, int) and layout > LAYOUT:
            raise InputError(f"{folder} was written by a newer version of lamabench: its layout is {layout}")
        raise InputError(
            f"{folder} was written by an earlier version of lamabench, whose runs had one id for all stages: read it "
            "with that version (its records name the commit), or train it again with this one"
        )
    for shape in (INFO, *shapes, {name: kind for name, kind in MAYBE.items() if name in info}):
        _check(folder / "config.json", info, shape)
    for plugin in info.get("plugins", ()):
        _check(folder / "config.json", plugin, dict.fromkeys(("name", "path", "sha256"), str), " in plugins,")
    return info


def read_run(folder: Path) -> Run:
    """A folder with its records. Raises InputError if there is no config.json or if a line cannot be read."""
    return Run(folder, read_info(folder), read_records(folder / "record.jsonl"), read_lines(folder / "metrics.jsonl"))


def create(folder: Path, info: dict[str, Any]) -> Path:
    """Create a folder with its config.json. An existing folder keeps its records. Its config.json changes only in the
    configuration, which may ask for more steps than before, and in the paths of plug-ins.

    Raises InputError for a folder that cannot be written.
    """
    path = folder / "config.json"
    with access("write", folder, missing=True):
        folder.mkdir(parents=True, exist_ok=True)
        known = path.is_file()
    if known:
        places = {row["name"]: row["path"] for row in info.get("plugins", ())}
        info = read_info(folder) | {"config": info["config"]}
        for row in info.get("plugins", ()):  # a file may have been moved; its first hash is kept
            row["path"] = places.get(row["name"], row["path"])
    text = json.dumps({"layout": LAYOUT, **info}, indent=1).encode()
    with access("write", path):
        if not known or path.read_bytes() != text:
            write_atomically(path, text)
    return folder


@contextmanager
def locked(folder: Path, wait_s: float = GLANCE_S, name: str = ".lock") -> Iterator[None]:
    """Hold the lock of a folder for this process. The lock ends with the process, however that ends. Raises Busy if
    another process holds it for longer than `wait_s` seconds, by default just longer than `is_locked` does. Raises
    InputError on a file system without locks, and for a folder that cannot be written."""
    with access("write", folder / name):
        file = open(folder / name, "a+", encoding="utf-8")  # noqa: SIM115
    with file:
        end = time.monotonic() + wait_s
        while not _lock(file, fcntl.LOCK_EX):
            if time.monotonic() > end:
                file.seek(0)
                raise Busy(f"{folder} is being worked on by process {file.read().strip() or '?'}")
            time.sleep(0.02)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process works in the folder now, or draws images for it. Raises InputError for a folder that cannot be
    read."""
    return is_held(folder / ".lock") or any(map(is_held, folder.glob("shards/*/*.lock")))


def is_held(path: Path) -> bool:
    """Whether a process holds the lock `path` now. Raises InputError for a file that cannot be read."""
    with access("read", path):
        try:
            file = open(path, encoding="utf-8")  # noqa: SIM115
        except (FileNotFoundError, NotADirectoryError):
            return False
        with file:
            return not _lock(file, fcntl.LOCK_SH)


def _lock(file: IO[str], kind: int) -> bool:
    """Lock an open file. Returns False if another process holds it."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        raise InputError(
            f"the file system of {file.name} has no locks ({error.strerror}), so a run could be done twice: "
            "give a run.root on one that has (Lustre: mounted with -o flock)"
        ) from None
    return True


def plain_name(text: str) -> str:
    """A text as part of a file's name: letters, digits and `._+=-` stay, and anything else becomes `_`."""
    return re.sub(r"[^\w.+=-]", "_", text) or "_"


def read_study(folder: Path) -> dict[str, Any]:
    """The content of .study.json in ROOT/STUDY: `study`, `file` (None: no file) and `runs`, a list of dicts. Each has
    `name`, `variant`, `seed`, `model`, `family`, `title`, `steps` (of its training), `backend` (as asked for), and the
    folders `training` (None if it has none), `model_folder` and `samples` (a list), relative to ROOT; `to_draw` are
    those of `samples` that are not scored by the held-out loss alone (without it: all, of an earlier version).
    `guide` is the training that guides its samples, if it has one below ROOT.
    `about` is what the file says of the study: `question`, `claim`, `answer`, `budget`, `axes` {axis: [values]} and, if
    it has some, `per` (settings of single values, in words) and `verdicts` {claim: pairs, each {"better": {axis:
    value}, "worse": {axis: value}}}, all in the file's order; single commands and earlier versions write none.

    Raises InputError if there is no .study.json or if it cannot be read.
    """
    try:
        listing = read_json(folder / STUDY)
    except FileNotFoundError:
        raise InputError(f"{folder} is not the folder of a study: it has no {STUDY}") from None
    _check(folder / STUDY, listing, {"runs": list, "file": (str, NoneType)})
    if "about" in listing:
        _check(folder / STUDY, listing["about"], FACTS, " in about,")
        _check(folder / STUDY, listing["about"]["axes"], dict.fromkeys(listing["about"]["axes"], list), " in axes,")
        verdicts = listing["about"].get("verdicts", {})
        _check(folder / STUDY, {"verdicts": verdicts}, {"verdicts": dict}, " in about,")
        _check(folder / STUDY, verdicts, dict.fromkeys(verdicts, list), " in verdicts,")
        for pair in (pair for pairs in verdicts.values() for pair in pairs):
            _check(folder / STUDY, pair, SIDES, " in verdicts,")
    for number, run in enumerate(listing["runs"], start=1):
        _check(folder / STUDY, run, ENTRY, f" in run {number},")
        for name in run["samples"]:
            _check(folder / STUDY, {"samples": name}, {"samples": str}, f" in run {number},")
    return listing


def check_study(root: Path, study: str, file: str | None) -> None:
    """Raise InputError if ROOT/STUDY belongs to another study file, or if the name is reserved."""
    folder = root / study
    if study in ("trainings", "weights", "models", "foreign") or study.startswith("."):
        raise InputError(f"a study cannot be called {study!r}: {root / study} is taken; rename its file")
    with access("read", folder / STUDY):
        if not (folder / STUDY).exists():
            return
    other = read_study(folder)["file"]
    if other != file:
        raise InputError(
            f"{folder} belongs to the study {other or 'of single commands'}, not to {file or 'single commands'}: "
            f"rename the file or give another run.root (where the file was moved, delete {folder / STUDY})"
        )


def write_study(
    root: Path,
    study: str,
    file: str | None,
    runs: Sequence[dict[str, Any]],
    add: bool = False,
    about: dict[str, Any] | None = None,
) -> Path:
    """Write ROOT/STUDY/.study.json and a relative link for each run. With `add`, keep the runs that are listed already.
    Links of runs that are not listed are deleted.

    `runs` and `about` are as in `read_study`; with `add` and without `about`, that of the file stays. Raises InputError
    as `check_study` does, and if nothing can be written below ROOT.
    """
    check_study(root, study, file)
    folder = root / study
    with access("write below", root, "; run.root=FOLDER takes another one", missing=True):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, LISTING_S):
            _write_study(root, study, file, runs, add, about)
    return folder


def _write_study(
    root: Path,
    study: str,
    file: str | None,
    runs: Sequence[dict[str, Any]],
    add: bool,
    about: dict[str, Any] | None,
) -> None:
    folder = root / study
    before: dict[str, Any] = read_study(folder) if add and (folder / STUDY).is_file() else {"runs": []}
    known = {run["name"]: run for run in before["runs"]}
    about = about or before.get("about")
    for run in runs:
        earlier = known.get(run["name"], {})
        samples = [*earlier.get("samples", []), *run["samples"]]
        known[run["name"]] = {**run, "samples": list(dict.fromkeys(samples))}
        if steps := max(run.get("steps") or 0, earlier.get("steps") or 0):
            known[run["name"]]["steps"] = steps
        link(folder / run["name"], root / (run["training"] or run["model_folder"]))
    for path in folder.iterdir():
        if path.is_symlink() and path.name not in known:
            path.unlink()
    listing: dict[str, Any] = {"layout": LAYOUT, "study": study, "file": file}
    listing |= {"about": about} if about else {}
    listing["runs"] = list(known.values())
    write_atomically(folder / STUDY, json.dumps(listing, indent=1).encode())


def link(path: Path, target: Path) -> None:
    """Make `path` a relative link to `target`, in place of an older link. Anything other than a link stays as it is."""
    text = os.path.relpath(target, path.parent)
    if path.is_symlink() and os.readlink(path) == text:
        return
    if path.is_symlink() or not path.exists():
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with suppress(FileNotFoundError):
            temporary.unlink()
        temporary.symlink_to(text)
        os.replace(temporary, path)


def weights_home(folder: Path, info: dict[str, Any]) -> Path:
    """The folder where the weights of a training lie: the folder itself or, if it holds only samples, the folder that
    its config.json names."""
    own = any((folder / name).is_dir() for name in ("weights", "checkpoints"))
    return folder if own or "weights" not in info else Path(info["weights"])


@dataclass(frozen=True)
class OpenRun:
    """A training, opened for use from Python. `home` is the folder where its weights lie."""

    path: Path
    config: "Config"
    home: Path

    @property
    def records(self) -> list[Row]:
        """Its records, including those of its samples, oldest first."""
        files = [self.path / "record.jsonl", *self.path.glob("samples/*/record.jsonl")]
        return sorted((row for file in files for row in read_records(file)), key=lambda row: row.time)

    @property
    def moments(self) -> list[int]:
        """The steps whose averaged weights are kept."""
        from .training.checkpoint import moments

        return moments(self.home)

    def model(self, weights: str = "ema", at: int | str = "last") -> "Backbone":
        """The network with the weights of a step, or of the last kept step, on the CPU, in eval mode.

        Raises InputError, with the nearest kept steps, if the weights are not kept.
        """
        from ..models.registry import build
        from .moments import step_of
        from .training.checkpoint import load_weights

        net = build(self.config.model)
        net.load_state_dict(load_weights(self.home, step_of(self.home, at), weights, self.config.model).tensors)
        return net.eval()

    def sample(
        self,
        labels: Sequence[int],
        steps: int = 50,
        method: str = "ddim",
        guidance: float = 1.0,
        seed: int = 0,
        at: int | str = "last",
        weights: str = "ema",
    ) -> "np.ndarray":
        """Images uint8 [N, H, W, C], one for each label. Image i is drawn from the noise of (seed, i).

        Raises InputError as `model` does, and for settings that do not fit.
        """
        from .sampling import draw

        settings = replace(self.config.sample, method=method, steps=steps, guidance=guidance, guide=None)
        return draw(self.model(weights, at), replace(self.config, sample=settings), labels, seed)


def open_run(path: str | Path) -> OpenRun:
    """A training by its folder, or by a study's link to it: `open_run("runs/demo/dit_nano")`.

    Raises InputError if there is none.
    """
    from ..models import plugins
    from .keys import config_of

    folder = Path(path)
    info = read_info(folder)
    plugins.load_recorded(info.get("plugins", ()))
    if info["kind"] != "training":
        raise InputError(f"{folder} is the folder of a {info['kind']}, not of a training")
    return OpenRun(folder, config_of(folder, info), weights_home(folder, info))
