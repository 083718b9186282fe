"""DiT's released files (facebookresearch/DiT; arXiv 2212.09748), whose names baselines/dit.py shares."""

import math
from typing import Any

from torch import Tensor

from ...kernels.errors import InputError
from .files import Source

TITLE = "DiT"
FAMILY = "dit"
TOLD = ("num_heads",)  # what no tensor tells
SAME = ("hidden_size", "depth")  # by which a preset is recognised
HINT = "DiT's have heads that are 64 or 72 wide"


def fits(source: Source) -> bool:
    """Whether a file has the names of DiT."""
    return {"x_embedder.proj.weight", "final_layer.linear.weight"} <= source.tensors.keys()


def known(source: Source) -> dict[str, Any]:
    """The fields of the configuration that the tensors tell."""
    width, channels, patch, _ = source.shape("x_embedder.proj.weight", 4)
    side = math.isqrt(tokens := source.shape("pos_embed", 3)[1])
    if side**2 != tokens:
        raise InputError(f"{source.path} has {tokens} positions, which are no square")
    return {
        "input_size": side * patch,
        "in_channels": channels,
        "num_classes": source.shape("y_embedder.embedding_table.weight", 2)[0] - 1,
        "patch_size": patch,
        "hidden_size": width,
        "depth": source.count("blocks."),
        "out_channels": source.shape("final_layer.linear.weight", 2)[0] // patch**2,
    }


def state(source: Source) -> dict[str, Tensor]:
    """The tensors by the names of the released code."""
    return source.tensors


def notes(source: Source) -> list[str]:
    """What a reader must know."""
    lightning = "blocks.0.mlp.w12.weight" in source.tensors
    if not lightning and "sit" not in source.path.name.lower():
        return []
    name = "LightningDiT" if lightning else "SiT"
    return [f"{name}'s files have DiT's names, but t is 1 at the image and the velocity is reversed: no objective fits"]
