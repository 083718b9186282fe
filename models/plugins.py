"""Plug-ins: a user's own modules, which register mixers and families when they are imported.

They are named in a study (`plugins: [my_mixer.py]`) or on a command line (`plugins=[my_mixer.py]`), or belong to an
installed package that names its module in the entry points of the group `lamabench.plugins`.
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
from pathlib import Path
from types import ModuleType

from ..kernels.errors import InputError

GROUP = "lamabench.plugins"
# A file's module is called so, with the file's name: the same name in every process, wherever a copy of the file lies.
PREFIX = "lamabench_plugin_"


@dataclass(frozen=True)
class Plugin:
    """A plug-in that this process imported: a name, the file or the package's folder, and the SHA-256 of its source."""

    name: str
    path: Path
    sha256: str


_LOADED: dict[str, Plugin] = {}


def load(names: Sequence[str], folder: Path | None = None) -> list[Plugin]:
    """Import plug-ins, each once a process; a name is a file's path (below `folder` where relative) or a module's name.

    Raises InputError, one line, where there is no such file or module, where importing it fails (with the line of the
    file), where two files have one name, or where a file changed since this process imported it.
    """
    return [_load(name, folder or Path()) for name in names]


def is_file(name: str) -> bool:
    """Whether the name of a plug-in is a path, and not a module's name."""
    return name.endswith(".py") or "/" in name


def _load(name: str, folder: Path) -> Plugin:
    if not isinstance(name, str) or not name:
        raise InputError(f"a plug-in is the path of a .py file or the name of a module, not {name!r}")
    if not is_file(name):
        return _load_module(name, f"plug-in {name}")
    path = (folder / Path(name).expanduser()).resolve()
    if not path.is_file() or path.suffix != ".py":
        raise InputError(f"plug-in {name} is no .py file: there is none at {path}")
    plugin = Plugin(path.stem, path, source_hash(path))
    loaded = _LOADED.get(plugin.name)
    if loaded is None:
        _import(lambda: _execute(path), f"plug-in {name}", path)
        return _LOADED.setdefault(plugin.name, plugin)
    if loaded.sha256 == plugin.sha256:  # a copy of a file is the same plug-in
        return loaded
    if loaded.path == path:
        raise InputError(f"plug-in {name} changed since this process imported it: start again")
    raise InputError(f"two plug-ins are called {plugin.name}: {loaded.path} and {path}; rename one of them")


def _load_module(name: str, what: str) -> Plugin:
    if name in _LOADED:
        return _LOADED[name]
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # the package above it is not there, or it is no name
        spec = None
    if spec is None or spec.origin is None:
        raise InputError(f"{what}: there is no module {name}; a file is named by its path, such as {name}.py")
    origin = Path(spec.origin)
    _import(lambda: importlib.import_module(name), what, origin)
    path = origin.parent if spec.submodule_search_locations else origin
    return _LOADED.setdefault(name, Plugin(name, path, source_hash(path)))


def source_hash(path: Path) -> str:
    """The SHA-256 of a file, or of all sources below a package's folder with their names."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    sources = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*.py"))
    parts = [f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for name, file in sources]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _execute(path: Path) -> None:
    name = PREFIX + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses, pickle and torch.compile look for it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _import(run: Callable[[], ModuleType | None], what: str, path: Path) -> None:
    """Run an import; whatever it raises becomes one line that names the line of `path`."""
    try:
        run()
    except (Exception, SystemExit) as error:
        frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            frames.append(error.lineno)
        where = f", line {frames[-1]}" if frames else ""
        said = error.msg if isinstance(error, SyntaxError) else str(error)
        first = (said.strip().splitlines() or ["no message"])[0]
        raise InputError(f"{what}{where}: {type(error).__name__}: {first}") from error


def loaded() -> list[dict[str, str]]:
    """What this process imported, as plain data for config.json: `name`, `path` (a file's; a module's name) and
    `sha256`."""
    return [
        {
            "name": plugin.name,
            "path": str(plugin.path) if PREFIX + plugin.name in sys.modules else plugin.name,
            "sha256": plugin.sha256,
        }
        for plugin in _LOADED.values()
    ]


def load_recorded(recorded: Sequence[dict[str, str]], say: Callable[[str], object] = lambda text: None) -> None:
    """Import what `loaded` said in another process. A source that changed since then is a line of `say`.

    Raises InputError as `load` does.
    """
    for one in recorded:
        plugin = _LOADED.get(one["name"]) or load([one["path"]])[0]
        if (now := plugin.sha256) != (then := one["sha256"]):
            say(f"plug-in {one['name']} changed: {plugin.path} has SHA-256 {now[:12]}…, it had {then[:12]}…")


@lru_cache(maxsize=1)
def entry_points() -> tuple[Plugin, ...]:
    """Import the plug-ins of installed packages. Raises InputError where one fails, with the package's name."""
    points = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: point.name)
    plugins = []
    for point in points:
        package = point.dist.name if point.dist is not None else "an installed package"
        plugins.append(_load_module(point.module, f"plug-in {point.name} of {package}"))
    return tuple(plugins)
