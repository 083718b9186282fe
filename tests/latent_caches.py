"""Small caches of latents, of random numbers instead of an autoencoder's."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lamabench.harness.data.images import load
from lamabench.harness.data.latents import (
    DTYPES,
    FREE,
    EncoderFacts,
    Index,
    tensor_names,
    write_index,
    write_shard,
)
from lamabench.harness.sections import DataConfig, EncoderConfig
from lamabench.models.fields import declared
from torch import Tensor

FACTS = EncoderFacts("AutoencoderKL", "0123456789ab", 0.5, 0.25, 4, 4, "nowhere/autoencoder")


def write_cache(
    folder: Path,
    data: DataConfig,
    *,
    facts: EncoderFacts = FACTS,
    parts: Sequence[int] = (100, 37),
    logvar: bool = True,
    mirrored: bool = True,
    dtype: str = "float16",
) -> dict[str, Tensor]:
    """Write a cache of the images of `data`, whose first shards have so many images. Returns all tensors."""
    images = load(data)
    count, draw = len(images), torch.Generator().manual_seed(0)
    shape = (count, facts.channels, facts.side, facts.side)
    tensors = {name: torch.randn(shape, generator=draw).to(DTYPES[dtype][1]) for name in tensor_names(logvar, mirrored)}
    ends = [*np.cumsum(parts).tolist(), count]
    folder.mkdir(parents=True, exist_ok=True)
    shards = [
        write_shard(folder, a, {name: x[a:b] for name, x in tensors.items()}, images.labels[a:b])
        for a, b in zip([0, *ends[:-1]], ends, strict=True)
    ]
    plain = {name: value for name, value in declared(data).items() if name not in FREE}
    index = Index(
        plain, data.path, images.fingerprint, count, images.class_names, facts, logvar, mirrored, dtype, shards
    )
    write_index(folder, index)
    return tensors


def section(folder: Path, facts: EncoderFacts = FACTS) -> EncoderConfig:
    """The section `encoder` that belongs to a cache."""
    names = ("identity", "scale", "shift", "channels", "side")
    return EncoderConfig("latents", str(folder), **{name: getattr(facts, name) for name in names})
