"""One training, sampling, evaluation and measurement protocol for every backbone.

import lamabench.harness as harness
run = harness.open_run("runs/demo/dit_nano")  # .config .records .moments .model(at="last") .sample(labels)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .run import OpenRun, open_run

__all__ = ["OpenRun", "open_run"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
