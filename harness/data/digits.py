"""scikit-learn's handwritten digits."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ...kernels.errors import InputError
from ..sections import DataConfig
from .arrays import Arrays
from .splits import EIGHTH


def digits(config: DataConfig) -> Arrays:
    """scikit-learn's 1,797 handwritten digits, 8 × 8 at 17 grey levels, enlarged; of most and test, a part."""
    if config.size < 8:
        raise InputError(f"data.size must be 8 or more for digits, not {config.size}")
    package = find_spec("sklearn")  # its import takes a second, its file of digits does not
    assert package is not None and package.origin is not None
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    if config.split != "train":
        table = table[(np.arange(len(table)) % EIGHTH == 0) == (config.split == "test")]
    images = np.rint(table[:, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return Arrays(images, table[:, -1].astype(np.int64), [str(i) for i in range(10)])
