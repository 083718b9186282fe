"""guided-diffusion's files (openai/guided-diffusion; arXiv 2105.05233), whose names baselines/adm.py shares.

They tell no side of the image, no heads and no order of q, k and v. The published models are known by their sizes.
"""

from typing import Any

from torch import Tensor

from ...kernels.errors import InputError
from .files import Source

TITLE = "guided-diffusion"
FAMILY = "adm"
TOLD = ("input_size", "num_heads", "num_head_channels", "new_attention_order")
SAME = ("model_channels", "num_res_blocks", "channel_mult", "attention_ds", "resblock_updown")
HINT = "they are those of the flags with which it was trained"


def fits(source: Source) -> bool:
    """Whether a file has the names of guided-diffusion."""
    return {"time_embed.0.weight", "input_blocks.0.0.weight", "out.0.weight"} <= source.tensors.keys()


def known(source: Source) -> dict[str, Any]:
    """The fields of the configuration that the tensors tell. A level has `num_res_blocks` + 1 blocks in the decoder, of
    which the last one also upsamples, except in the level of full resolution."""
    blocks = source.count("output_blocks.")
    if not blocks:
        raise InputError(
            f"{source.path} is a classifier of guided-diffusion, which denoises nothing: it has no decoder"
        )
    last = {i: source.count(f"output_blocks.{i}.") - 1 for i in range(blocks)}
    ups = {i: f"output_blocks.{i}.{last[i]}" for i in range(blocks) if last[i] > 0}
    residual = [name for name in ups.values() if f"{name}.in_layers.0.weight" in source.tensors]
    plain = [name for name in ups.values() if f"{name}.conv.weight" in source.tensors]
    levels = len(residual) + len(plain) + 1
    depth = blocks // levels
    first = [f"input_blocks.{1 + level * depth}" for level in range(levels)]  # of the encoder's levels
    base, channels = source.shape("time_embed.0.weight", 2)[1], source.shape("input_blocks.0.0.weight", 4)[1]
    widths = [source.shape(f"{name}.0.out_layers.3.weight", 4)[0] for name in first]
    head = source.shape("out.2.weight", 4)[0]
    if channels == head == 6:
        raise InputError(f"{source.path} is an upsampler of guided-diffusion, whose network reads a small image too")
    if source.shape(f"{first[0]}.0.emb_layers.1.weight", 2)[0] != 2 * widths[0]:
        raise InputError(f"{source.path} was trained with use_scale_shift_norm False, which lamabench's U-Net lacks")
    return {
        "in_channels": channels,
        "num_classes": source.shape("label_emb.weight", 2)[0] if "label_emb.weight" in source.tensors else 0,
        "model_channels": base,
        "num_res_blocks": depth - 1,
        "channel_mult": [width / base for width in widths],
        "attention_ds": [2**i for i, name in enumerate(first) if f"{name}.1.qkv.weight" in source.tensors],
        "resblock_updown": bool(residual),
        "out_channels": head,
    }


def state(source: Source) -> dict[str, Tensor]:
    """The tensors by the names of the released code."""
    return source.tensors


def notes(source: Source) -> list[str]:
    """What a reader must know."""
    return []
