"""Every backbone of the suite, registered: import the registry from here."""

from ..baselines import adm, dit
from ..kernels import attention, depthwise_conv, gated_norm, selective_scan, window_attention
from ..models import lamamba
from ..models.registry import FAMILIES, Backbone, build, family_of, from_dict, preset, presets, to_dict

__all__ = ["FAMILIES", "Backbone", "build", "family_of", "from_dict", "preset", "presets", "to_dict"]

# A new family registers itself on import; it only has to be named here.
REGISTERED = (lamamba, dit, adm)


# Every operator that backbones call, by name.
OPERATORS = {
    op.OPERATOR.name: op.OPERATOR for op in (depthwise_conv, selective_scan, gated_norm, window_attention, attention)
}


def called_operators(net: Backbone) -> list[dict[str, str]]:
    """The operators that each module of `net` calls, {operator: backend}; changing one changes the module."""
    found = (getattr(module, "operators", None) for module in net.modules())
    return [operators for operators in found if isinstance(operators, dict)]


def select_backends(net: Backbone, request: dict[str, str], device_type: str) -> dict[str, str]:
    """Resolve the backend of every operator that `net` calls, once, and tell its modules.

    Returns {operator: resolved name}, for the record. Raises InputError where a named backend cannot run.
    """
    # Resolved whether called or not: a misspelt name is an error with every model.
    resolved = {name: op.resolve(request.get(name, "auto"), device_type).name for name, op in OPERATORS.items()}
    called = called_operators(net)
    for operators in called:
        operators.update({name: resolved[name] for name in operators})
    return {name: resolved[name] for name in resolved if any(name in operators for operators in called)}
