"""Folders of diffusers with a DiT (`DiTTransformer2DModel`), such as facebook/DiT-XL-2-256.

Each of diffusers' blocks has its own copy of the embedders of time and class, which are one in DiT. Its frequencies of
the timestep are 10000^(-i/127), and DiT's, with which the published weights were trained, are 10000^(-i/128).
"""

from typing import Any

import torch
from torch import Tensor

from ...kernels.errors import InputError
from ..layers import sincos_positions
from .files import Source

TITLE = "diffusers' DiT"
FAMILY = "dit"
TOLD = ("num_heads",)
SAME = ("hidden_size", "depth")
HINT = "its config.json should have num_attention_heads"
BLOCK = "transformer_blocks."
EMBEDDERS = "norm1.emb."
# Settings that change the function without a tensor, and their values in DiT, which are diffusers' defaults too.
FIXED = {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero", "norm_elementwise_affine": False}
EPS = 1e-6  # of DiT's norms
# A block's names in diffusers and in DiT.
NAMES = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
EMBEDDER_NAMES = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}
REST = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}


def fits(source: Source) -> bool:
    """Whether a file has the names of diffusers' DiT."""
    return f"{BLOCK}0.{EMBEDDERS}class_embedder.embedding_table.weight" in source.tensors


def known(source: Source) -> dict[str, Any]:
    """The fields of the configuration that the tensors and config.json tell."""
    for name, value in FIXED.items():
        if source.settings.get(name, value) != value:
            raise InputError(f"{source.path} has {name} {source.settings[name]!r}, and DiT has {value!r}")
    width, channels, patch, _ = source.shape("pos_embed.proj.weight", 4)
    heads = source.settings.get("num_attention_heads")
    return {
        "input_size": int(source.settings.get("sample_size", 32)),
        "in_channels": channels,
        "num_classes": source.shape(f"{BLOCK}0.{EMBEDDERS}class_embedder.embedding_table.weight", 2)[0] - 1,
        "patch_size": patch,
        "hidden_size": width,
        "depth": source.count(BLOCK),
        "out_channels": source.shape("proj_out_2.weight", 2)[0] // patch**2,
        **({} if heads is None else {"num_heads": int(heads)}),
    }


def state(source: Source) -> dict[str, Tensor]:
    """The tensors by DiT's names. Raises InputError if the embedders of two blocks differ."""
    sizes = known(source)
    side = sizes["input_size"] // sizes["patch_size"]
    positions = sincos_positions(sizes["hidden_size"], side).view(1, side**2, -1)
    renamed, parts = {"pos_embed": positions}, dict[str, dict[str, Tensor]]()
    for name, tensor in source.tensors.items():
        if name == "pos_embed.pos_embed":  # fixed, and only older versions have it
            continue
        stem, _, end = name.rpartition(".")
        if not name.startswith(BLOCK):
            renamed[f"{REST.get(stem, stem)}.{end}"] = tensor
            continue
        number, _, stem = stem.removeprefix(BLOCK).partition(".")
        if stem.startswith(EMBEDDERS):
            short = stem.removeprefix(EMBEDDERS)
            first = source.tensors[f"{BLOCK}0.{stem}.{end}"]
            if not torch.equal(tensor, first):
                raise InputError(f"{source.path}: blocks 0 and {number} differ in {short}, of which DiT has only one")
            renamed[f"{EMBEDDER_NAMES.get(short, short)}.{end}"] = first
        elif stem in ("attn1.to_q", "attn1.to_k", "attn1.to_v"):
            parts.setdefault(f"blocks.{number}.attn.qkv.{end}", {})[stem[-1]] = tensor
        else:
            renamed[f"blocks.{number}.{NAMES.get(stem, stem)}.{end}"] = tensor
    for name, part in parts.items():
        if len(part) < 3:
            raise InputError(f"{source.path} has no {' or '.join(sorted({*'qkv'} - {*part}))} for {name}")
        renamed[name] = torch.cat([part[letter] for letter in "qkv"])
    return renamed


def notes(source: Source) -> list[str]:
    """What a reader must know."""
    lines = [
        "the frequencies of the timestep are DiT's, 10000^(-i/128), with which facebook/DiT-XL-2-256 was trained; "
        "diffusers computes 10000^(-i/127), so that its outputs differ; weights that it trained itself do not fit"
    ]
    if (eps := float(source.settings.get("norm_eps", 1e-5))) != EPS:
        lines.append(f"the norms have DiT's epsilon {EPS:g}; diffusers has {eps:g} before the MLP")
    return lines
