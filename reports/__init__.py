"""Tables and figures: pure functions of records. Nothing here imports torch.

import lamabench.reports as reports
frame = reports.load("runs/demo")  # pandas, one row per score, speed or cost
reports.columns()  # its columns, with units and meanings
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dictionary import columns
    from .frame import load

__all__ = ["columns", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from .frame import load

        return load
    if name == "columns":
        from .dictionary import columns

        return columns
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
