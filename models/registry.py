"""The registry: families of backbones, their configuration types and their presets. It fills Hydra's group `model`."""

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels import OPERATORS
from ..kernels.errors import InputError, unknown
from . import plugins
from .fields import declared, typed


class PaperSum(NamedTuple):
    """The operations that a paper adds to its multiply-adds for the "Gflops" it prints (SPEC.md, section 5)."""

    affine_norm: int  # operations per element of an affine normalisation
    plain_norm: int  # the same without affine parameters
    scan: int  # 1 if the scan's operations are added


class Backbone(nn.Module):
    """A denoiser: `net(x, t, y) -> out`.

    x   [B, C, S, S]   noised images, float
    t   [B]            times, float, in the unit of the objective's paper: 0 … 999 for DDPM
    y   [B]            class labels, `null_class` for "no class"
    out [B, out_channels, S, S]  the objective's target: for DDPM the noise, then the variance interpolation

    Loss, schedule, guidance, label dropout, EMA and precision stay outside.
    """

    config: Any
    paper_sum: ClassVar[PaperSum] = PaperSum(affine_norm=0, plain_norm=0, scan=0)
    checkpointing = False  # in training, store only a block's inputs and run it again in the backward pass

    def run_block(self, block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`block(*inputs)`, checkpointed (Chen et al., arXiv 1604.06174) in training where `checkpointing` is set.

        Every family calls each of its blocks through this method. No block contains another, so that none is
        checkpointed twice.
        """
        if self.checkpointing and self.training:
            # Only dropout draws numbers, which the second run must repeat.
            out = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=self.draws)
            return cast(Tensor, out)
        return block(*inputs)

    @property
    def draws(self) -> bool:
        """Whether blocks draw random numbers in training: whether the configuration has a `dropout` above 0."""
        return getattr(self.config, "dropout", 0.0) > 0

    @property
    def null_class(self) -> int | None:
        """The label that stands for "no class", or None where the table has no such row."""
        return self.config.num_classes

    def check_input(self, x: Tensor) -> None:
        """Raises InputError for images of another shape than [B, config.in_channels, config.input_size, the same]."""
        shape = (self.config.in_channels, self.config.input_size, self.config.input_size)
        if tuple(x.shape[1:]) != shape:
            needed, given = (" × ".join(map(str, each)) for each in (shape, x.shape[1:]))
            raise InputError(f"the model takes images of {needed} (in_channels, input_size), not {given}")

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Preset:
    """One row of a preset table: the name on the command line, the name in a paper, a configuration and its source.

    `schedule` is the noise schedule without which the model is not that of its paper. None: any.
    """

    name: str
    title: str
    config: Any
    source: str
    schedule: str | None = None


@dataclass(frozen=True)
class Family:
    """A family of backbones: its name, its configuration type, its module type and its presets by name."""

    name: str
    config_type: type
    net_type: type[Backbone]
    presets: dict[str, Preset]


# The modules that register the families of the suite. They are imported when the registry is first used.
MODULES = (
    "lamabench.models.lamamba",
    "lamabench.baselines.dit",
    "lamabench.baselines.adm",
    "lamabench.baselines.uvit",
)
_FAMILIES: dict[str, Family] = {}
_REGISTERED: list[str] = []


def families() -> dict[str, Family]:
    """Every family by name: those of `MODULES` in this order, then all others, of installed packages too."""
    for module in MODULES:
        importlib.import_module(module)
    if not plugins.IMPORTING:
        plugins.entry_points()
    places = {module: place for place, module in enumerate(MODULES)}
    order = sorted(_FAMILIES.values(), key=lambda family: places.get(family.net_type.__module__, len(MODULES)))
    return {family.name: family for family in order}


# The fields of every configuration that the data and the objective set.
SHAPE = ("input_size", "in_channels", "num_classes", "out_channels")


def register(family: str, config_type: type, net_type: type[Backbone], presets: list[Preset]) -> None:
    """Add a family. Its presets become choices of `model=` in every command.

    Raises InputError where another family has a name, or where the configuration is not a dataclass with the fields of
    `SHAPE`.
    """
    others = _FAMILIES if net_type.__module__ in MODULES else families()
    config_fields = [f.name for f in fields(config_type)] if is_dataclass(config_type) else []
    if missing := [name for name in SHAPE if name not in config_fields]:
        raise InputError(f"{config_type.__name__} must be a dataclass with the fields {', '.join(missing)}")
    earlier = others[family].net_type if family in others else net_type
    if (earlier.__module__, earlier.__qualname__) != (net_type.__module__, net_type.__qualname__):
        raise InputError(f"family {family!r} is registered already, by {earlier.__module__}.{earlier.__qualname__}")
    owners = {name: other for other in others if other != family for name in others[other].presets}
    table: dict[str, Preset] = {}
    for preset in presets:
        if preset.name in table or preset.name in owners:
            raise InputError(f"model {preset.name!r} is registered already, by {owners.get(preset.name, family)}")
        table[preset.name] = preset
    _FAMILIES[family] = Family(family, config_type, net_type, table)
    _REGISTERED.append(family)


def revision() -> int:
    """The number of registrations in this process. A cache of presets is valid for one revision."""
    families()
    return len(_REGISTERED)


def presets() -> dict[str, Preset]:
    """Every preset by name, in the order of registration."""
    return {name: preset for family in families().values() for name, preset in family.presets.items()}


def preset(name: str) -> Preset:
    """The preset of that name. Its configuration is a copy that the caller may change."""
    table = presets()
    if name not in table:
        raise unknown("model", name, table)
    return replace(table[name], config=copy.deepcopy(table[name].config))


def family_of(config: Any) -> Family:
    """The family of a configuration, by its type."""
    for family in families().values():
        if type(config) is family.config_type:
            return family
    raise InputError(
        f"{type(config).__name__} is not the configuration of a registered family; families: {', '.join(families())}"
    )


def build(config: Any) -> Backbone:
    """The backbone of a configuration, initialised from torch's global generator. Raises InputError if one of its
    tensors is larger than a tensor can be."""
    try:
        return family_of(config).net_type(config)
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise InputError(f"the model is too large: {str(error).splitlines()[0]}") from None


Net = TypeVar("Net", bound=Backbone)


def load_reference(net: Net, state: Mapping[str, Tensor], reference_name: Callable[[str], str] = str) -> Net:
    """Fill `net` from a reference implementation's state dict. `reference_name` maps names of `net` to its names.

    Raises InputError, with the first few names, where a name is missing, unexpected, of another shape, or of integers
    where there should be real numbers.
    """
    own = {reference_name(name): value for name, value in net.state_dict().items()}
    mismatches = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "misshaped": [
            f"{name} {list(state[name].shape)} for {list(value.shape)}"
            for name, value in own.items()
            if name in state and state[name].shape != value.shape
        ],
        "not of real numbers": [
            name
            for name, value in own.items()
            if name in state and value.is_floating_point() and not state[name].is_floating_point()
        ],
    }
    faults = [
        f"{len(names)} {kind}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for kind, names in mismatches.items()
        if names
    ]
    if faults:
        raise InputError(f"the weights do not fit {type(net).__name__} as configured: {'; '.join(faults)}")
    net.load_state_dict({name: state[reference_name(name)] for name in net.state_dict()})
    return net


def out_channels(config: Any) -> int:
    """Channels of the head: the configuration's `out_channels`, or twice its `in_channels`."""
    return 2 * config.in_channels if config.out_channels is None else config.out_channels


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain data, unresolved, with its `family`. `from_dict` reads it back."""
    return {"family": family_of(config).name, **asdict(config)}


def from_dict(data: dict[str, Any]) -> Any:
    """The configuration that `to_dict` wrote. A missing field has its `since` value if it declares one."""
    settings = dict(data)
    family = settings.pop("family", None)
    if family not in families():
        raise unknown("model family", family, families())
    config_type = families()[family].config_type
    since = {f.name: f.metadata["since"] for f in fields(config_type) if "since" in f.metadata}
    return config_type(**since | settings)


def describe(config: Any) -> dict[str, Any]:
    """The network of a configuration as plain data. Keys hash it, and checkpoints are compared by it.

    It has the family, the fields without those at their `since` value, and the channels of the head. A configuration
    type with several spellings of one network has a method `resolved(plain) -> plain` that makes them equal.
    """
    plain = declared(config) | {"out_channels": out_channels(config)}
    if hasattr(config, "resolved"):
        plain = config.resolved(plain)
    return {"family": family_of(config).name, **plain}


def create_model(name: str, *, pretrained: str | PathLike[str] | None = None, **settings: Any) -> Backbone:
    """The backbone of a preset with changed fields of its configuration: create_model("lamamba_s", d_state=4).

    `pretrained` is a file or folder of released weights (released/), a folder of `lamabench export`, or
    `hf:owner/name`, which is downloaded (exported.py). Without it, weights are drawn from torch's global generator.
    Raises InputError for an unknown name or field, for a value of a wrong type or size, and for weights that do not
    fit.
    """
    if pretrained is not None:
        from . import exported, released

        if exported.is_exported(pretrained):
            return exported.load_exported(pretrained, name, settings)
        return released.load(Path(pretrained).expanduser(), name, settings).net
    config = preset(name).config
    names = [f.name for f in fields(config)]
    for setting in settings:
        if setting not in names:
            raise unknown(f"field of {name}", setting, names)
    return build(replace(config, **typed(name, type(config), settings)))


def list_models(pattern: str = "*") -> list[str]:
    """The names of the presets that match a pattern such as `dit_*`, in the order of registration."""
    return [name for name in presets() if fnmatchcase(name, pattern)]


def called_operators(net: Backbone) -> list[dict[str, str]]:
    """The dictionary {operator: backend} of each module of `net` that calls operators. A change in it changes the
    module."""
    by_module = (getattr(module, "operators", None) for module in net.modules())
    return [operators for operators in by_module if isinstance(operators, dict)]


def select_backends(net: Backbone, request: dict[str, str], device_type: str) -> dict[str, str]:
    """Resolve the backend of every operator that `net` calls, and set it in the modules.

    Returns {operator: resolved name} for the record. Raises InputError where a named backend cannot run.
    """
    # Resolve operators that `net` does not call too, so that a misspelt name is an error with every model.
    resolved = {name: op.resolve(request.get(name, "auto"), device_type).name for name, op in OPERATORS.items()}
    called = called_operators(net)
    for operators in called:
        operators.update({name: resolved[name] for name in operators})
    return {name: resolved[name] for name in resolved if any(name in operators for operators in called)}
