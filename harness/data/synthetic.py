"""Smooth random images, which are the same on every machine."""

import numpy as np

from ..random import Stream, generator
from ..sections import DataConfig
from .arrays import Arrays, check_size

SYNTHETIC_IMAGES = 320


def synthetic(config: DataConfig) -> Arrays:
    """320 smooth images, or one per class if that is more. Each class has its own three waves, each image its own
    phases and colours. The images are the same in every call, and as many others of the same classes are the test
    split."""
    classes = max(1, config.num_classes)
    labels = np.arange(max(SYNTHETIC_IMAGES, classes)) % classes
    check_size(config, len(labels))
    across = np.arange(config.size) / config.size
    waves = [generator(0, Stream.INIT, label).uniform(-2, 2, size=(3, 2)) for label in range(classes)]
    images = np.zeros((len(labels), config.size, config.size, config.channels), dtype=np.uint8)
    first = classes + (len(labels) if config.split == "test" else 0)
    for i, label in enumerate(labels):
        rng = generator(0, Stream.INIT, first + i)
        phase, colour = rng.uniform(0, 1, size=3), rng.uniform(-1, 1, size=(3, config.channels))
        turns = (waves[label] @ np.stack(np.meshgrid(across, across)).reshape(2, -1)) + phase[:, None]
        picture = np.cos(2 * np.pi * turns).T @ colour
        images[i] = np.rint(127.5 + 42.5 * picture).reshape(config.size, config.size, -1)
    return Arrays(images, labels, [str(label) for label in range(classes)])
