"""Models that a command names: a preset, or the model of a run."""

from pathlib import Path
from typing import Any, NamedTuple

from ..harness.run import ABOUT, read_info
from ..models import plugins, registry


class Named(NamedTuple):
    """A model that a command names: a preset, or that of a run, whose `root` is its root folder."""

    model: str
    title: str
    config: Any
    root: Path | None = None


def named(name: str) -> Named:
    """The model of a preset or of a run's folder. Raises InputError if it is neither."""
    folder = Path(name).expanduser()
    if name in registry.presets() or not (folder / "config.json").is_file():
        entry = registry.preset(name)
        return Named(entry.name, entry.title, entry.config)
    info = read_info(folder, ABOUT)
    plugins.load_recorded(info.get("plugins", ()))
    return Named(info["model"], info["title"], registry.from_dict(info["config"]["model"]), folder.resolve().parents[1])
