"""`lamabench report`: tables and figures from records. Imports no torch."""

import argparse
import json
import sys
from functools import partial

from ...reports.report import build, summary_rows, summary_text


def run(args: argparse.Namespace) -> int:
    files = build(args.paths, args.out, args.baseline, partial(print, file=sys.stderr), args.published)
    if args.json:
        print(json.dumps(summary_rows(args.paths), indent=1))
    else:
        print(summary_text(args.paths, args.baseline))
        print(f"\n{len(files)} files in {args.out}")
    return 0
