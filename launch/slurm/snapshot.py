"""The code that queued jobs import: a copy of the tree at submission, which later edits do not reach."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ...harness.disk import write_atomically
from ...harness.provenance import CODE, ROOT, SNAPSHOT, SUFFIXES, code, code_sha256
from ...kernels.errors import InputError
from ...models import plugins
from ..plan import Piece

UNREAD = (":(exclude)reports/records", ":(exclude)reports/gallery")  # megabytes that no job reads


def _git(*words: str, scratch: Path | None = None, stdin: str | None = None) -> str:
    """The output of git in the checkout. With `scratch`, the index and what git adds to the repository are in that
    folder, because the repository may be of another user."""
    env = dict(os.environ)
    if scratch is not None:
        (scratch / "objects").mkdir(exist_ok=True)
        there = str((ROOT / _git("rev-parse", "--git-path", "objects").strip()).resolve())
        env |= {"GIT_INDEX_FILE": str(scratch / "index"), "GIT_OBJECT_DIRECTORY": str(scratch / "objects")}
        others = (there, env.get("GIT_ALTERNATE_OBJECT_DIRECTORIES", ""))
        env["GIT_ALTERNATE_OBJECT_DIRECTORIES"] = os.pathsep.join(filter(None, others))
    command = ["git", "-C", str(ROOT), *words]
    try:
        done = subprocess.run(command, env=env, input=os.fsencode(stdin or ""), capture_output=True)
    except FileNotFoundError:
        raise InputError(f"git is not installed on this machine, and {ROOT} is a checkout") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise InputError(f"git {words[0]} failed in {ROOT}: {lines[0]}")  # of many on a full disk
    return os.fsdecode(done.stdout)  # names and diffs have bytes in any encoding, and line ends of any kind


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
    `version` is its version. `diff` is a file with the uncommitted changes, or None if there are none. Jobs compare
    their own code with `sha256`.
    """
    version, origin = metadata.version("lamabench"), code()
    if not is_checkout():
        return {"path": None, **origin, "version": version, "diff": None, "sha256": code_sha256(ROOT)}
    names = changed()
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix=".new-") as temporary:
        scratch = Path(temporary)
        _git("read-tree", "HEAD", scratch=scratch)
        if names:
            _git("add", "--update", scratch=scratch)
            _git("add", "--", *(name for name in CODE if (ROOT / name).is_dir()), scratch=scratch)
        tree = _git("write-tree", scratch=scratch).strip()
        target = home / tree[:12]
        if not _is_whole(target):
            new = Path(temporary, "tree")
            listed = _git("ls-files", "-z", "--", *CODE, *UNREAD, scratch=scratch)
            try:
                _git("checkout-index", "-z", "--stdin", f"--prefix={new}/lamabench/", scratch=scratch, stdin=listed)
            except InputError as error:  # git does not give the reason
                free = shutil.disk_usage(home).free / 2**20
                raise InputError(f"{error}; {free:.1f} MiB are free there: is the disk full, or a quota?") from None
            identity = {"commit": origin["commit"], "dirty": bool(names), "tree": tree, "version": version}
            identity["sha256"] = code_sha256(new / "lamabench")
            write_atomically(new / "lamabench" / SNAPSHOT, json.dumps(identity, indent=1).encode())
            if names:
                diff = _git("diff", "--binary", "HEAD", tree, scratch=scratch)
                write_atomically(new / "changes.diff", os.fsencode(diff))
            if target.exists():
                target.rename(scratch / "damaged")
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
        "sha256": code_sha256(target / "lamabench"),
    }


def _is_whole(target: Path) -> bool:
    """Whether a snapshot exists and nothing of its code was changed or deleted."""
    try:
        identity = json.loads((target / "lamabench" / SNAPSHOT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return identity.get("sha256") == code_sha256(target / "lamabench")


def plugin_hashes(pieces: Iterable[Piece]) -> dict[str, str]:
    """The SHA-256 of each plug-in of some pieces, by its path or name."""
    names = dict.fromkeys(name for piece in pieces for name in piece.plugins)
    return {name: plugin.sha256 for name in names for plugin in plugins.load([name])}


def with_plugins(piece: Piece, home: Path) -> Piece:
    """A piece with copies of its plug-ins below `home`, so that edits do not reach jobs that wait. Each content has a
    folder of its own. Modules of installed packages are not copied."""
    copies = []
    for name in piece.plugins:
        if plugins.is_file(name):
            digest = plugins.source_hash(Path(name))
            folder = home / "plugins" / digest[:12]
            folder.mkdir(parents=True, exist_ok=True)
            copy = folder / Path(name).name
            if not copy.exists() or plugins.source_hash(copy) != digest:
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


def other_code(code: dict[str, Any], names: Sequence[str]) -> str | None:
    """What differs between the code of this process and the `code` of a manifest, in one line; None if nothing does.
    `names` are the plug-ins of the task. A file among them is compared before it is imported."""
    if (path := code.get("path")) is not None:
        package = Path(path, "lamabench")
        if not package.is_dir() or not package.samefile(ROOT):
            return f"{package} is gone, and Python imports {ROOT} in its place"
    if code.get("sha256") not in (None, code_sha256(ROOT)):
        return f"{ROOT} has changed since"
    for name in names:
        file = Path(name).expanduser()
        if plugins.is_file(name) and not file.is_file():
            return f"the plug-in {name} is gone"
        if (wanted := code.get("plugins", {}).get(name)) is not None:
            now = plugins.source_hash(file) if plugins.is_file(name) else plugins.load([name])[0].sha256
            if now != wanted:
                return f"the plug-in {name} has changed since"
    return None
