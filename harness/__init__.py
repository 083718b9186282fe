"""One training, sampling, evaluation and measurement protocol for every backbone.

`open_run("runs/demo/dit_nano")` opens a training for Python code.
"""

from .run import OpenRun, open_run

__all__ = ["OpenRun", "open_run"]
