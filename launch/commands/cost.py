"""`lamabench cost`: parameters, MACs and FLOPs of models, by part."""

import argparse
from typing import Any

from ...harness.measure.cost import PARTS, cost, fvcore_count
from ...harness.sections import ObjectiveConfig
from ...kernels.errors import InputError
from ...models.registry import presets
from ..compose import compose, model_config
from ..named import named, with_head
from ..output import show, split_arguments


def cost_row(name: str, title: str, config: Any) -> dict[str, Any]:
    """The cost of a model as a row of a table or of JSON."""
    count = cost(config)
    return {
        "model": name,
        "title": title,
        "input_size": config.input_size,
        "in_channels": config.in_channels,
        **count.as_dict(),
        "params_m": count.params / 1e6,
        "macs_g": count.macs / 1e9,
        "flops_g": count.flops / 1e9,
    }


def run(args: argparse.Namespace) -> int:
    names, overrides = split_arguments(args.words)
    if not names:
        raise InputError(f"cost needs a model; choices: {', '.join(presets())}")
    words = [text for text in overrides if text.startswith("objective.")]
    goal = compose(words)[0].objective if words else ObjectiveConfig()
    shape = [text for text in overrides if text not in words]
    configs = [(name, with_head(model_config(name, shape), goal)) for name in names]
    rows = [cost_row(name, named(name).title, config) for name, config in configs]
    if args.fvcore:
        for row, (_, config) in zip(rows, configs, strict=True):
            count = fvcore_count(config)
            row |= {"fvcore": count.as_dict(), "fvcore_g": count.total / 1e9, "fvcore_skips": count.skips()}
    headings = {"model": "Model", "input_size": "Input", "params_m": "Params (M)", "macs_g": "MACs (G)"}
    headings |= {"flops_g": "FLOPs (G)", "paper_gflops": "Paper's Gflops"}
    if args.fvcore:
        headings |= {"fvcore_g": "fvcore (G)", "fvcore_skips": "fvcore skips"}
    show(rows, headings, args.json)
    if not args.json:
        print("\nMACs (G) by part; of the scan FLOPs (G), because it multiplies no matrices")
        parts = [
            {"model": row["model"]}
            | {part: row["parts"][part]["flops" if part == "scan" else "macs"] / 1e9 for part in PARTS}
            for row in rows
        ]
        show(parts, {"model": "Model"} | {part: part if part != "scan" else "scan (FLOPs)" for part in PARTS}, False)
    return 0
