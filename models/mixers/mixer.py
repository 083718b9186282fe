"""A kind of mixer is a dataclass with its settings, derived from `Mixer` and registered by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, TypeVar

from torch import nn

from ...kernels.errors import InputError
from ..fields import declared


@dataclass
class Mixer:
    """A kind of mixer with its settings.

    A setting takes the model's value, unless an entry sets it, if the model shares a field of the same name with its
    mixers. The metadata `model` of a setting names a shared field of another name, or None: never the model's value.
    """

    kind: ClassVar[str]

    def check(self, dims: Sequence[int], sides: Sequence[int]) -> None:
        """Raise InputError where the settings do not fit the widths and sides of the stages that have the mixer."""

    def build(self, dim: int, side: int, shift: bool) -> nn.Module:
        """The module for `dim` channels on a `side` × `side` grid; `shift` is True in every second block.

        The module's attribute `part` is the part of a cost that it belongs to ("rest" if there is none). Its
        `own_macs(x)` are the multiply-adds outside of its child modules.
        """
        raise NotImplementedError

    def described(self) -> dict[str, Any]:
        """The kind and every setting as plain data: an entry that makes the same mixer."""
        return {"kind": self.kind, **declared(self)}


def check_positive(mixer: Mixer, *names: str) -> None:
    for name in names:
        if getattr(mixer, name) < 1:
            raise InputError(f"{name} must be 1 or more, not {getattr(mixer, name)}")


def check_heads(heads: int, dims: Sequence[int]) -> None:
    for dim in dims:
        if dim % heads:
            choices = [n for n in range(1, dim + 1) if all(other % n == 0 for other in dims)]
            raise InputError(f"num_heads {heads} does not divide dim {dim}; choices: {choices}")


MixerType = TypeVar("MixerType", bound=type[Mixer])
MIXERS: dict[str, type[Mixer]] = {}
EMPTY = "none"  # an entry without a mixer


def register_mixer(kind: str) -> Callable[[MixerType], MixerType]:
    """Decorate a dataclass derived from `Mixer`, which entries of `mixers` then name as `kind`.

    Raises InputError where another class has the kind, or where the class is not such a dataclass.
    """

    def add(mixer_type: MixerType) -> MixerType:
        place = f"{mixer_type.__module__}.{mixer_type.__qualname__}"
        if not issubclass(mixer_type, Mixer) or not is_dataclass(mixer_type):
            raise InputError(f"mixer {kind!r}: {place} must be a dataclass derived from lamabench.models.mixers.Mixer")
        if "kind" in [f.name for f in fields(mixer_type)]:
            raise InputError(f"mixer {kind!r}: {place} has a setting named kind, the word for the mixer in an entry")
        other = MIXERS.get(kind, mixer_type)
        owner = f"{other.__module__}.{other.__qualname__}"
        if kind == EMPTY or owner != place:  # the same class again is a notebook cell that ran twice
            raise InputError(f"mixer {kind!r} is registered already" + (f", by {owner}" if kind != EMPTY else ""))
        mixer_type.kind = kind
        MIXERS[kind] = mixer_type
        return mixer_type

    return add
