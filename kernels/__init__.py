"""Tensors in, tensors out: the operators that the backbones are made of, each with its backends and its cost.

`OPERATORS` maps names to operators. It is built on first access, so that `kernels.errors` imports without torch.
"""

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .operator import Operator

    OPERATORS: dict[str, Operator]

# Every operator that backbones call. Each is a folder here.
NAMES = ("depthwise_conv", "selective_scan", "ssd", "gated_norm", "modulated_norm", "window_attention", "attention")


@cache
def _operators() -> "dict[str, Operator]":
    return {name: import_module(f".{name}", __name__).OPERATOR for name in NAMES}


def __getattr__(name: str) -> Any:
    if name == "OPERATORS":
        return _operators()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
