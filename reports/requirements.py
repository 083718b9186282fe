"""What reports need, of what pyproject.toml declares, so that a laptop can have them without torch:

pip install --no-deps lamabench && pip install $(python -m lamabench.reports.requirements)
"""

import re
from collections.abc import Iterable
from importlib import metadata


def requirements(declared: Iterable[str] | None = None) -> list[str]:
    """The requirements of the extra `reports`, such as `numpy>=1.26`, from those of the installed distribution."""
    lines = metadata.requires("lamabench") or [] if declared is None else declared
    extra = re.compile(r"""\s*;\s*extra\s*==\s*['"]reports['"]$""")
    return [extra.sub("", line) for line in lines if extra.search(line)]


if __name__ == "__main__":
    print(" ".join(requirements()))
