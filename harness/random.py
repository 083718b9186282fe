"""Random numbers that depend only on a seed and an index, not on batch size, order or the number of workers."""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """The purpose of the numbers. Two streams of one seed never overlap."""

    ORDER = 0  # the order of an epoch; index: the epoch
    TRAIN = 1  # timestep, label drop, flip and noise of one training image; index: images seen before it
    SAMPLE = 2  # start and noise of one sampled image; index: the image
    INIT = 3  # synthetic data and weights; index: chosen by the caller
    LABEL = 5  # the class of one sampled image, with sample.labels=random; index: the image


def generator(seed: int, stream: Stream, index: int) -> np.random.Generator:
    """The generator of one item: Philox (Salmon et al., 2011), keyed by seed and stream, its counter set to index."""
    key = np.array([seed, stream], dtype=np.uint64)  # of a list with 2^63 or more, numpy makes float64
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, index]))
