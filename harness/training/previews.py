"""Previews: pictures of a few images that a training draws by the way, always from the same noise. Beside them stand a
few real images."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from ...models.registry import Backbone
from ..config import Config
from ..data.encoder import DataSet, Encoder, Pixels
from ..disk import write_atomically
from ..grid import CLASSES, REAL, paste
from ..keys import sample_seed

FOLDER = "previews"
SIDE = 4  # images in a row and in a column
STEPS = 20  # of DPM-Solver++ (2M), at most


def preview_settings(config: Config) -> Config:
    """`sample` of a configuration, but with DPM-Solver++ (2M), at most `STEPS` steps and SIDE × SIDE images of evenly
    spread classes, and without the guidance of another training."""
    steps = min(config.sample.steps, STEPS)
    fixed = {"count": SIDE**2, "method": "dpmpp_2m", "timesteps": "even", "labels": "balanced", "weights": "ema"}
    fixed |= {"guide": None, "guidance": 1.0} if config.sample.guide is not None else {}
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


def write_real(training: Path, data: DataSet, coder: Encoder | None = None, device: str = "cpu") -> None:
    """Write real.npz of a training folder, for figures that show samples: the first image of each of the first classes
    or, if there is one class, the first images, as `images` uint8 [N, S, S, C] and `labels` int64 [N]. Latents are
    decoded on the device. Raises InputError if that cannot be done here."""
    path = training / REAL
    if path.exists():
        return
    classes = np.unique(data.labels)[:CLASSES]
    indices = np.array([np.argmax(data.labels == label) for label in classes])
    indices = indices if len(classes) > 1 else np.arange(min(len(data), CLASSES))
    images = (coder or Pixels()).pictures(data, indices, device).permute(0, 2, 3, 1).cpu().numpy()
    buffer = BytesIO()
    np.savez_compressed(buffer, images=images, labels=data.labels[indices])
    training.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
