"""The entry point: `create_model` and `list_models`; `register` and `register_mixer` add models and mixers of your own.

README.md explains how. A name is imported when it is first used, and families when a model is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .mixers import Mixer, register_mixer
    from .registry import Backbone, Preset, create_model, list_models, register

__all__ = ["Backbone", "Mixer", "Preset", "create_model", "list_models", "register", "register_mixer"]

_HOMES = {"Mixer": ".mixers", "register_mixer": ".mixers"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(_HOMES.get(name, ".registry"), __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
