"""`lamabench compare`: whether scores differ by more than training seeds do, and what else differs. No torch."""

import argparse
import json

from ...kernels.errors import InputError
from ...reports import contrast
from ...reports.compare import FIELDS, compare

KEYS = {
    "scores": FIELDS, "configuration": contrast.CONFIGURATION, "cost": contrast.COST, "speed": contrast.SPEED,
}  # fmt: skip


def run(args: argparse.Namespace) -> int:
    if len(args.paths) > 2:
        raise InputError(f"compare takes one study, or two runs, variants, studies or roots, not {len(args.paths)}")
    comparison = compare(*args.paths, metric=args.metric)
    tables = comparison._asdict()
    if args.json:
        data = {key: [{name: row.get(name) for name in KEYS[key]} for row in tables[key].rows] for key in KEYS}
        print(json.dumps(data, indent=1))
        return 0
    print(comparison.scores.caption)
    print(comparison.scores.terminal() if comparison.scores.rows else "\n".join(comparison.scores.notes))
    for table in comparison[1:]:
        if table.rows:
            print(f"\n{table.caption}\n{table.terminal()}")
    return 0
