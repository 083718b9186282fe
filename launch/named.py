"""Models that a command names: a preset, or the model of a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..harness.diffusion.objective import objective
from ..harness.run import ABOUT, read_info
from ..harness.sections import ObjectiveConfig
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


def with_head(model: Any, settings: ObjectiveConfig) -> Any:
    """The model with the channels of the head that the objective needs, unless it names them itself. Raises InputError
    as `objective` does."""
    channels = objective(settings).out_channels(model.in_channels)
    if model.out_channels is not None or channels == registry.out_channels(model):
        return model
    return replace(model, out_channels=channels)
