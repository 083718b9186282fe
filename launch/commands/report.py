"""`lamabench report`: tables and figures from records. Imports no torch."""

import argparse
import json
import sys
import time
from functools import partial

from ...kernels.errors import InputError
from ...reports.evidence import Evidence
from ...reports.report import evidence_of, named_tables, overview_text, table_text, write
from ..output import number

EVERY_S = 10.0  # seconds between looks at the records with --watch


def run(args: argparse.Namespace) -> int:
    if args.table is None and args.out is None:
        raise InputError("name the folder to write with --out, or a table to print with --table")
    if args.table is not None and (args.out or args.watch):
        raise InputError(f"--table prints a table and writes nothing: leave out {'--out' if args.out else '--watch'}")
    if args.table is None and args.format != "terminal":
        raise InputError(f"--format {args.format} is for --table NAME; --out writes tables in every format")
    if args.watch and args.json:
        raise InputError("--watch prints a line for each report: leave out --json")
    evidence = _evidence(args)
    if args.table is not None:
        if args.json:
            rows = [row for table in named_tables(evidence, args.table) for row in table.records()]
            print(json.dumps(rows, indent=1))
        else:
            print(table_text(evidence, args.table, args.format))
        return 0
    if args.watch:
        return _watch(args, evidence)
    files = write(evidence, args.out)
    if args.json:
        print(json.dumps(evidence.overview.records(), indent=1))
    else:
        print(overview_text(evidence))
        print(f"\n{len(files)} files in {args.out}; open {args.out / 'index.html'}")
    return 0


def _evidence(args: argparse.Namespace) -> Evidence:
    return evidence_of(args.paths, args.baseline, partial(print, file=sys.stderr), args.published)


def _watch(args: argparse.Namespace, evidence: Evidence) -> int:
    """Write the report again whenever the records have changed, until Ctrl-C."""
    written = None
    while True:
        try:
            content = _content(evidence)
            if content != written:
                files = write(evidence, args.out)
                records = sum(len(run.rows) + len(run.earlier) for run in evidence.runs)
                print(
                    f"{time.strftime('%H:%M:%S')}  {number(len(evidence.runs), 'run')}, {number(records, 'record')}: "
                    f"{len(files)} files in {args.out}",
                    flush=True,
                )
                written = content
            time.sleep(EVERY_S)
            evidence = _evidence(args)
        except InputError as error:
            if written is None:
                raise
            print(error, file=sys.stderr)  # such as a folder that is being moved; the report stays as it was
            time.sleep(EVERY_S)


def _content(evidence: Evidence) -> list[object]:
    """What a report is made of, to be compared with what the last one was made of."""
    return [(run.info, run.rows, run.earlier, len(run.metrics), run.damage) for run in evidence.runs]
