"""Plug-ins: modules of users, which register mixers and families when they are imported.

A study names them (`plugins: [my_mixer.py]`), or a command line does (`plugins=[my_mixer.py]`). An installed package
names its module in the entry points of the group `lamabench.plugins`.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

from ..kernels.errors import InputError

GROUP = "lamabench.plugins"
# The module of a file is named PREFIX + the file's stem, in every process and wherever a copy of the file lies.
PREFIX = "lamabench_plugin_"


@dataclass(frozen=True)
class Plugin:
    """A plug-in that this process imported: its name, its file or package folder, and the SHA-256 of its source."""

    name: str
    path: Path
    sha256: str


_LOADED: dict[str, Plugin] = {}
IMPORTING: list[str] = []  # not empty while the plug-ins of installed packages are imported


def load(names: Sequence[str], folder: Path | None = None) -> list[Plugin]:
    """Import plug-ins, each once a process. A name is a file's path (relative to `folder`) or a module's name.

    Raises InputError, one line, where there is no such file or module, where the import fails (with the line of the
    file), where two files have one name, or where a file has changed since this process imported it.
    """
    return [_load(name, folder or Path()) for name in names]


def is_file(name: str) -> bool:
    """Whether the name of a plug-in is a path, not a module's name."""
    return name.endswith(".py") or "/" in name


def _load(name: str, folder: Path) -> Plugin:
    if not isinstance(name, str) or not name:
        raise InputError(f"a plug-in must be the path of a .py file or the name of a module, not {name!r}")
    if not is_file(name):
        return _load_module(name, f"plug-in {name}")
    path = (folder / Path(name).expanduser()).resolve()
    if not path.is_file() or path.suffix != ".py":
        raise InputError(f"plug-in {path.name}: there is no .py file at {path}")
    plugin = Plugin(path.stem, path, source_hash(path))
    earlier = _LOADED.get(plugin.name)
    if earlier is None:
        _import(lambda: _execute(path), f"plug-in {name}", path)
        return _LOADED.setdefault(plugin.name, plugin)
    if earlier.sha256 == plugin.sha256:  # a copy of a file is the same plug-in
        return earlier
    if earlier.path == path:
        raise InputError(f"plug-in {name} has changed since this process imported it: start again")
    raise InputError(f"two plug-ins have the name {plugin.name}: {earlier.path} and {path}; rename one of them")


def _load_module(name: str, what: str) -> Plugin:
    if name in _LOADED:
        return _LOADED[name]
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # the parent package is missing, or the name is malformed
        spec = None
    if spec is None or spec.origin is None:
        raise InputError(f"{what}: there is no module {name}; give a file by its path, such as {name}.py")
    origin = Path(spec.origin)
    _import(lambda: importlib.import_module(name), what, origin)
    path = origin.parent if spec.submodule_search_locations else origin
    return _LOADED.setdefault(name, Plugin(name, path, source_hash(path)))


def source_hash(path: Path) -> str:
    """The SHA-256 of a file, or of the names and contents of all sources below a package's folder."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    sources = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*.py"))
    parts = [f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for name, file in sources]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


class _Source(SourceFileLoader):
    """Runs a file as it is. Python takes bytecode for current if size and second of the file are those of before, and
    then the recorded hash would be that of code which did not run."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _execute(path: Path) -> None:
    """Import a file. Whoever imports it by its own name, before or after, has the same module: it registers once."""
    name, own = PREFIX + path.stem, sys.modules.get(path.stem)
    if own is not None and _is_of(getattr(own, "__spec__", None), path):
        sys.modules[name] = own
        return
    spec = importlib.util.spec_from_file_location(name, path, loader=_Source(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses, pickle and torch.compile look for it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    if own is None and path.stem.isidentifier() and _is_of(importlib.util.find_spec(path.stem), path):
        sys.modules[path.stem] = module


def _is_of(spec: ModuleSpec | None, path: Path) -> bool:
    """Whether a module comes from a file."""
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == path


def _import(run: Callable[[], ModuleType | None], what: str, path: Path) -> None:
    """Run an import. An exception becomes an InputError, one line that names the line of `path`."""
    try:
        run()
    except (Exception, SystemExit) as error:
        frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            frames.append(error.lineno)
        where = f", line {frames[-1]}" if frames else ""
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        first = (message.strip().splitlines() or ["no message"])[0]
        raise InputError(f"{what}{where}: {type(error).__name__}: {first}") from error


def loaded() -> list[dict[str, str]]:
    """The plug-ins that this process imported, as plain data for config.json: `name`, `path` (of a file, or a module's
    name) and `sha256`."""
    return [
        {
            "name": plugin.name,
            "path": str(plugin.path) if PREFIX + plugin.name in sys.modules else plugin.name,
            "sha256": plugin.sha256,
        }
        for plugin in _LOADED.values()
    ]


def load_recorded(recorded: Sequence[dict[str, str]], say: Callable[[str], object] = lambda text: None) -> None:
    """Import the plug-ins that `loaded` listed in another process. `say` gets a line for each changed source.

    A plug-in of that name that this process has already is taken. Raises InputError as `load` does.
    """
    for row in recorded:
        plugin = _LOADED.get(row["name"]) or _find(row)
        if (now := plugin.sha256) != (then := row["sha256"]):
            say(f"plug-in {row['name']} has changed: {plugin.path} has SHA-256 {now[:12]}…, it had {then[:12]}…")


def _find(row: dict[str, str]) -> Plugin:
    """The plug-in that `loaded` listed: the module that this process imported by its own name, or that of the path."""
    name, path = row["name"], Path(row["path"])
    if is_file(row["path"]):
        own = getattr(sys.modules.get(name), "__file__", None)
        if own is not None and Path(own).name == path.name:
            path = Path(own)
        if not path.is_file():
            raise InputError(
                f"plug-in {name}: there is no .py file at {path} any more; name it with plugins=[FILE.py], or import "
                "it in Python before the run is opened"
            )
        return load([str(path)])[0]
    return load([name])[0]


@lru_cache(maxsize=1)
def entry_points() -> tuple[Plugin, ...]:
    """Import the plug-ins of installed packages. Raises InputError with the package's name where an import fails."""
    points = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: point.name)
    plugins = []
    IMPORTING.append(GROUP)
    try:
        for point in points:
            package = point.dist.name if point.dist is not None else "an installed package"
            plugins.append(_load_module(point.module, f"plug-in {point.name} of {package}"))
    finally:
        IMPORTING.clear()
    return tuple(plugins)
