"""A plug-in of pytest for kernels in Triton on the CPU: triton.language is searched for built-in functions once.

Triton's interpreter replaces them at each call of a function in a kernel, and searching took a third of the time.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from triton.language.core import is_builtin
from triton.runtime import interpreter


@cache
def builtin_members(package: Any) -> list[tuple[str, Callable[..., Any]]]:
    return [(name, member) for name, member in inspect.getmembers(package) if is_builtin(member)]


def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
    """As Triton's: what is already replaced stays so."""
    for name, member in builtin_members(package):
        if getattr(package, name) is member:
            interpreter._patch_attr(package, name, member, builder, scope)


interpreter._patch_builtin = patch_builtin
