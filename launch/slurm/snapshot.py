"""The code that queued jobs import: a copy of the tree at submission, which later edits do not reach."""

import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ...harness.provenance import SNAPSHOT, code
from ...harness.record import write_atomically
from ...kernels.errors import InputError
from ...models import plugins
from ..plan import Piece

ROOT = Path(__file__).resolve().parents[2]
CODE = ("ablations", "baselines", "harness", "kernels", "launch", "models", "reports")
SUFFIXES = (".py", ".cu", ".cuh")


def _git(*words: str, index: Path | None = None, stdin: str | None = None) -> str:
    env = {**os.environ, **({"GIT_INDEX_FILE": str(index)} if index else {})}
    command = ["git", "-C", str(ROOT), *words]
    try:
        done = subprocess.run(command, env=env, input=stdin, capture_output=True, text=True)
    except FileNotFoundError:
        raise InputError(f"git is not installed on this machine, and {ROOT} is a checkout") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise InputError(f"git {words[0]} failed in {ROOT}: {lines[0]}")  # of many on a full disk
    return done.stdout


def changed() -> list[str]:
    """Files of the checkout that differ from the commit. New files count only if they are code."""
    entries = [line for line in _git("status", "--porcelain", "--untracked-files=all", "-z").split("\0") if line]
    tracked = [line[3:] for line in entries if line[:2] != "??" and line[2:3] == " "]
    new = [line[3:] for line in entries if line[:2] == "??"]
    return tracked + [name for name in new if name.split("/")[0] in CODE and name.endswith(SUFFIXES)]


def is_checkout() -> bool:
    """Whether the running code is a git checkout. Otherwise it is an installed package or a snapshot.

    Raises InputError for a checkout that git cannot describe, because edits would reach jobs that wait.
    """
    if (ROOT / SNAPSHOT).is_file():
        return False
    if code()["commit"] is not None:
        return True
    if (ROOT / ".git").exists():
        _git("rev-parse", "HEAD")  # raises with the reason, such as another user's folder that is no safe.directory
        raise InputError(f"{ROOT} is a git repository that does not track lamabench: which code would jobs import?")
    return False


def check(dirty: bool) -> None:
    """Raise InputError for a checkout with changes, unless `dirty`."""
    if is_checkout() and not dirty and (names := changed()):
        raise InputError(
            f"{ROOT} has changes that are not committed ({', '.join(names[:3])}{', …' if len(names) > 3 else ''}): "
            "commit them, or give --dirty to run them and keep the diff with the runs"
        )


def freeze(home: Path) -> dict[str, Any]:
    """Write the code that jobs import below `home`, once for each tree. Returns the entry of it in a manifest.

    `path` goes into PYTHONPATH. It is None if lamabench is not a checkout: then jobs import the installed package, and
    `version` is its version. `diff` is a file with the uncommitted changes, or None if there are none.
    """
    version, origin = metadata.version("lamabench"), code()
    if not is_checkout():
        return {"path": None, **origin, "version": version, "diff": None}
    names = changed()
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix=".new-") as temporary:
        index = Path(temporary, "index")
        _git("read-tree", "HEAD", index=index)
        if names:
            _git("add", "--update", index=index)
            _git("add", "--", *(name for name in CODE if (ROOT / name).is_dir()), index=index)
        tree = _git("write-tree", index=index).strip()
        target = home / tree[:12]
        if not target.exists():
            new = Path(temporary, "tree")
            listed = _git("ls-files", "-z", "--", *CODE, index=index)
            try:
                _git("checkout-index", "-z", "--stdin", f"--prefix={new}/lamabench/", index=index, stdin=listed)
            except InputError as error:  # git does not give the reason
                free = shutil.disk_usage(home).free / 2**20
                raise InputError(f"{error}; {free:.1f} MiB are free there: is the disk full, or a quota?") from None
            identity = {"commit": origin["commit"], "dirty": bool(names), "tree": tree, "version": version}
            write_atomically(new / "lamabench" / SNAPSHOT, json.dumps(identity, indent=1).encode())
            if names:
                write_atomically(new / "changes.diff", _git("diff", "--binary", "HEAD", tree, index=index).encode())
            try:
                new.rename(target)
            except OSError:  # another submit wrote it first
                if not target.is_dir():
                    raise
    diff = str(target / "changes.diff") if names else None
    return {
        "path": str(target),
        "commit": origin["commit"],
        "dirty": bool(names),
        "version": version,
        "diff": diff,
    }


def with_plugins(piece: Piece, home: Path) -> Piece:
    """A piece with copies of its plug-ins below `home`, so that edits do not reach jobs that wait. Each content has a
    folder of its own. Modules of installed packages are not copied."""
    copies = []
    for name in piece.plugins:
        if plugins.is_file(name):
            folder = home / "plugins" / plugins.source_hash(Path(name))[:12]
            folder.mkdir(parents=True, exist_ok=True)
            copy = folder / Path(name).name
            if not copy.exists():
                write_atomically(copy, Path(name).read_bytes())
            name = str(copy.resolve())
        copies.append(name)
    return replace(piece, plugins=tuple(copies))


def words(code: dict[str, Any]) -> str:
    """The code as one line for a person."""
    if code["path"] is None:
        return f"lamabench {code['version']} as installed"
    if code["dirty"]:
        return f"commit {code['commit'][:12]} with changes ({code['diff']})"
    return f"commit {code['commit'][:12]}"
