"""Numbers follow from seed, purpose and index, and differ between all seeds of 64 bits."""

import numpy as np
import pytest
from lamabench.harness.random import Generators, Stream, generator


def first(seed, stream=Stream.SAMPLE, index=0):
    return int(generator(seed, stream, index).integers(0, 2**63))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**53 + 1, 2**63 - 1])
def test_numbers_of_smaller_seeds_stay(seed):
    """As numpy makes them of a list of Python integers below 2^63."""
    bits = np.random.Philox(key=[seed, 2], counter=[0, 0, 0, 5])
    assert first(seed, index=5) == int(np.random.Generator(bits).integers(0, 2**63))


def test_every_seed_is_its_own():
    """In float64, 2^63 is 2^63 + 1, and 2^64 - 1 is 2^64, which is 0."""
    seeds = [0, 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**63 + 1, 2**63 + 2, 2**64 - 2, 2**64 - 1]
    numbers = {first(seed, stream) for seed in seeds for stream in Stream}
    assert len(numbers) == len(seeds) * len(Stream)
    assert first(2**63 + 1) == int(
        np.random.Generator(np.random.Philox(key=(2 << 64) + 2**63 + 1, counter=0)).integers(0, 2**63)
    )


def test_one_object_has_the_numbers_of_many_generators():
    """Whatever was drawn of the item before: words of 32 bits leave half a word behind."""
    for seed in (0, 7, 2**64 - 1):
        several = Generators(seed, Stream.TRAIN)
        for index in (0, 5, 5, 2**40 + 3, 2**63 - 1, 1):
            own, other = several.at(index), generator(seed, Stream.TRAIN, index)
            for rng in (own, other):
                rng.standard_normal(index % 3, dtype=np.float32)
            assert own.random() == other.random() and own.integers(9) == other.integers(9)
            assert np.array_equal(own.standard_normal(7, dtype=np.float32), other.standard_normal(7, dtype=np.float32))
