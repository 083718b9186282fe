"""Random numbers that depend only on a seed and an index, not on batch size, order or the number of workers."""

from enum import IntEnum
from typing import Any

import numpy as np


class Stream(IntEnum):
    """The purpose of the numbers. Two streams of one seed never overlap."""

    ORDER = 0  # the order of an epoch; index: the epoch
    TRAIN = 1  # timestep, label drop, flip and noise of one training image; index: images seen before it
    SAMPLE = 2  # start and noise of one sampled image; index: the image
    INIT = 3  # synthetic data and weights; index: chosen by the caller
    DROPOUT = 4  # seeds of dropout in a step of one of several processes; index: RANKS · step + rank
    LABEL = 5  # the class of one sampled image, with sample.labels=random; index: the image
    HELD_OUT = 6  # the noise of one image of the test split; index: timesteps · image + timestep (scoring/heldout.py)
    POSTERIOR = 7  # the latent of one training image, from its posterior; index: as TRAIN


RANKS = 2**20  # more than a training has processes


def generator(seed: int, stream: Stream, index: int) -> np.random.Generator:
    """The generator of one item: Philox (Salmon et al., 2011), keyed by seed and stream, its counter set to index."""
    key = np.array([seed, stream], dtype=np.uint64)  # of a list with 2^63 or more, numpy makes float64
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, index]))


class Generators:
    """The generators of many items, one after the other: the numbers of `generator` at a twentieth of its cost, because
    one object takes on the state of each."""

    def __init__(self, seed: int, stream: Stream) -> None:
        self._rng = generator(seed, stream, 0)
        self._bits: Any = self._rng.bit_generator
        start = self._bits.state
        # Lists of plain numbers, from which numpy reads a state fastest.
        self._counter = start["state"]["counter"].tolist()
        inner = {"counter": self._counter, "key": start["state"]["key"].tolist()}
        self._start = {**start, "state": inner, "buffer": start["buffer"].tolist()}

    def at(self, index: int) -> np.random.Generator:
        """The generator of an item, until the next call."""
        self._counter[3] = index
        self._bits.state = self._start
        return self._rng
