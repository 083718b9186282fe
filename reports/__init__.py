"""Tables and figures: pure functions of records. Nothing here imports torch.

import lamabench.reports as reports
frame = reports.load("runs/demo")  # pandas, one row per score, speed or cost
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .frame import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from .frame import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
