"""`lamabench models`: every preset with its parameters and MACs."""

import argparse
import sys

from ...kernels.errors import InputError
from ...models.registry import presets
from ..compose import load_plugins
from ..output import show
from .cost import cost_row


def run(args: argparse.Namespace) -> int:
    if rest := [word for word in args.words if not word.startswith("plugins=")]:
        raise InputError(f"models takes nothing but plugins=[FILE.py,…], not {' '.join(rest)}")
    load_plugins(args.words)
    rows = []
    for index, (name, preset) in enumerate(presets().items(), start=1):
        if not args.json and sys.stderr.isatty():
            print(f"\rcounting {index}/{len(presets())} {name:20s}", end="", file=sys.stderr, flush=True)
        rows.append(cost_row(name, preset.title, preset.config) | {"source": preset.source})
    if not args.json and sys.stderr.isatty():
        print("\r" + " " * 50 + "\r", end="", file=sys.stderr)
    columns = {"model": "Model", "title": "Name", "input_size": "Input", "in_channels": "Channels"}
    show(rows, columns | {"params_m": "Params (M)", "macs_g": "MACs (G)", "source": "Source"}, args.json)
    return 0
