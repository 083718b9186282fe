"""LaMamba-Diff's training files (yunxiangfu2001/LaMamba-Diff; arXiv 2408.02615).

Some options of its YAML change the function without a parameter. A training file has them inside; for bare weights the
YAML that lies beside them, or is named, tells them. Names and defaults are those of its config.py.
"""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from ...kernels.errors import InputError, unknown
from ..lamamba import LaMambaConfig
from .files import Source, yaml_settings

TITLE = "LaMamba-Diff"
FAMILY = "lamamba"
TOLD = ("scan",)
SAME = ()
HINT = "its YAML tells that (CONTINUOUS_SCAN): --config FILE.yaml"
# Scans of SSM_FORWARDTYPE without CONTINUOUS_SCAN, which replaces them all. The others differ in rounding alone.
SCANS = {"v31d": "unidirectional_4", "v32d": "bidirectional_4"}
SCANS |= dict.fromkeys(("v1", "v2", "v3", "v4", "v01", "v02", "v03", "v04", "v05"), "cross")
# Options that change the function: the default, and the values that lamabench has.
OPTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "SSM_ACT_LAYER": ("silu", ("silu",)),
    "MLP_ACT_LAYER": ("gelu", ("gelu",)),
    "SSM_FORWARDTYPE": ("v2", tuple(SCANS)),
    "CONTINUOUS_SCAN": (True, (True, False)),
    "SSM_CONV": (3, (3,)),
    "NORM_LAYER": ("ln", ("ln",)),
    "PATCH_NORM": (True, (True,)),
    "DOWNSAMPLE": ("v2", ("v1",)),
    "GMLP": (False, (False,)),
    "SD_UNET_DECODER_DESIGN": (True, (True,)),
}
SIZES = {
    "PATCH_SIZE": "patch_size",
    "IN_CHANS": "in_channels",
    "DEPTHS": "depths",
    "EMBED_DIM": "dim",
    "SSM_D_STATE": "d_state",
    "SSM_RATIO": "ssm_ratio",
    "SSM_CONV_BIAS": "conv_bias",
    "MLP_RATIO": "mlp_ratio",
    "WINDOW_SIZE": "window_size",
    "BOTTLENECK_DEPTH": "bottleneck_depth",
}
# Options that tensors show, and those of training alone.
OTHERS = ("SSM_RANK_RATIO", "SSM_DT_RANK", "SSM_DROP_RATE", "SSM_INIT", "MLP_DROP_RATE", "PATCHEMBED")


def fits(source: Source) -> bool:
    """Whether a file has the names of LaMamba-Diff."""
    return {"layers.0.blocks.0.op.A_logs", "layers.0.blocks.0.attn.qkv.weight"} <= source.tensors.keys()


def known(source: Source) -> dict[str, Any]:
    """The fields of the configuration that the tensors and the YAML tell."""
    block = "layers.0.blocks.0"
    dim, channels, patch, _ = source.shape("patch_embed.proj.weight", 4)
    side = source.shape("pos_embed", 4)[1]
    cells, heads = source.shape(f"{block}.attn.relative_position_bias_table", 2)
    window = (math.isqrt(cells) + 1) // 2  # at most the side, however large the window is
    fields = {
        "input_size": side * patch,
        "in_channels": channels,
        "num_classes": source.shape("y_embedder.embedding_table.weight", 2)[0] - 1,
        "dim": dim,
        "depths": [source.count(f"layers.{i}.blocks.") for i in range(source.count("layers."))],
        "bottleneck_depth": source.count("mid_layer.blocks."),
        "num_heads": heads,
        "d_state": source.shape(f"{block}.op.A_logs", 2)[1],
        "patch_size": patch,
        "ssm_ratio": source.shape(f"{block}.op.in_proj.weight", 2)[0] // (2 * dim),
        "mlp_ratio": source.shape(f"{block}.mlp.fc1.weight", 2)[0] // dim,
        "conv_bias": f"{block}.op.conv2d.bias" in source.tensors,
        "out_channels": source.shape("final_linear.weight", 2)[0],
    }
    if window < side or window > LaMambaConfig.window_size:
        fields["window_size"] = window
    if (options := options_of(source)) is None:
        return fields
    for name, field in SIZES.items():
        if name in options and field in fields and options[name] != fields[field]:
            raise InputError(
                f"{source.path} has {field} {fields[field]}, but {name} is {options[name]} in {yaml_of(source)}: it is "
                "of another training"
            )
    continuous = options.get("CONTINUOUS_SCAN", True)
    return fields | {"scan": "continuous" if continuous else SCANS[options.get("SSM_FORWARDTYPE", "v2")]}


def yaml_of(source: Source) -> Path:
    """Where the options are: the YAML that was named, the training file itself, or the one YAML beside the file."""
    if source.settings_path is not None or "MODEL" in source.settings:
        return source.settings_path or source.path
    home = source.path.parent
    names = sorted(one for one in home.iterdir() if one.suffix in (".yaml", ".yml"))
    own = [one for one in names if one.stem == source.path.stem] or names
    return own[0] if len(own) == 1 else source.path


def options_of(source: Source) -> dict[str, Any] | None:
    """The options below MODEL.VSSM, None if they are nowhere. Raises InputError, with its name, for an option that is
    unknown or whose value lamabench lacks."""
    place = yaml_of(source)
    inside = place in (source.path, source.settings_path)
    settings = source.settings if inside else yaml_settings(place)
    if "MODEL" not in settings:
        if source.settings_path is not None:
            raise InputError(f"{place} is no configuration of LaMamba-Diff: it has no section MODEL")
        return None
    if any(base for base in settings.get("BASE") or ()):
        raise InputError(f"{place} takes over settings of {settings['BASE']} (BASE): write them into one file")
    model = settings["MODEL"]
    options = model.get("VSSM", {}) if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(options, dict):
        raise InputError(f"{place} is no configuration of LaMamba-Diff: MODEL and MODEL.VSSM must be mappings")
    if model.get("TYPE", "LaMamba-Diff") != "LaMamba-Diff":
        raise InputError(f"{place}: MODEL.TYPE {model['TYPE']} is not LaMamba-Diff")
    if model.get("SKIP_CONCAT"):
        raise InputError(f"{place}: MODEL.SKIP_CONCAT true (a convolution and a BatchNorm) is not in lamabench")
    choices = (*OPTIONS, *SIZES, *OTHERS)
    for name in options:
        if name not in choices:
            raise unknown(f"option of MODEL.VSSM in {place}", name, choices)
    for name, (default, values) in OPTIONS.items():
        if (value := options.get(name, default)) not in values:
            left_out = "" if name in options else ", the default,"
            raise InputError(
                f"{place}: {name} {value}{left_out} is not in lamabench; choices: {', '.join(map(str, values))}"
            )
    return options


def state(source: Source) -> dict[str, Tensor]:
    """The tensors by the names of the released code."""
    return source.tensors


def notes(source: Source) -> list[str]:
    """What a reader must know."""
    return [f"options are those in {yaml_of(source)}"] if options_of(source) is not None else []
