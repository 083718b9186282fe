"""Previews: pictures of a few images that a training draws by the way, always from the same noise."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from ...models.registry import Backbone
from ..config import Config
from ..grid import paste
from ..keys import sample_seed
from ..record import write_atomically

FOLDER = "previews"
SIDE = 4  # images in a row and in a column
STEPS = 50  # of DDIM, at most


def preview_settings(config: Config) -> Config:
    """`sample` of a configuration, but with DDIM, at most `STEPS` steps and SIDE × SIDE images of evenly spread
    classes."""
    steps = min(config.sample.steps, STEPS)
    fixed = {"count": SIDE**2, "method": "ddim", "timesteps": "even", "labels": "balanced", "weights": "ema"}
    return replace(config, sample=replace(config.sample, steps=steps, **fixed))


def write_preview(training: Path, step: int, net: Backbone, config: Config) -> Path:
    """Draw with a network and write previews/step-N.png of a training folder. Leaves torch's random state alone."""
    from ..sampling import draw, labels_of

    settings = preview_settings(config)
    labels = labels_of(settings, range(SIDE**2)).tolist()
    images = draw(net, settings, labels, sample_seed(settings))
    buffer = BytesIO()
    Image.fromarray(paste(images, np.split(np.arange(SIDE**2), SIDE))).save(buffer, "PNG")
    path = training / FOLDER / f"step-{step:08d}.png"
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, buffer.getvalue())
    return path
