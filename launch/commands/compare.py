"""`lamabench compare`: whether scores differ by more than training seeds do. Imports no torch."""

import argparse
import json

from ...kernels.errors import InputError
from ...reports.compare import FIELDS, compare


def run(args: argparse.Namespace) -> int:
    if len(args.paths) > 2:
        raise InputError(f"compare takes one study, or two runs, variants, studies or roots, not {len(args.paths)}")
    table = compare(*args.paths, metric=args.metric)
    if args.json:
        print(json.dumps([{name: row.get(name) for name in FIELDS} for row in table.rows], indent=1))
    else:
        print(f"{table.caption}\n{table.terminal()}")
    return 0
