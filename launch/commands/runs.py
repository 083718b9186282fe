"""`lamabench runs`: the runs of all studies that satisfy some conditions. Imports no torch."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ...kernels.errors import InputError
from ...reports.listing import Query, is_query, parsed, rows_of, runs_table, selected, values_of
from ...reports.runs import read
from ..output import number

ROOT = "runs"  # the default of run.root


def run(args: argparse.Namespace) -> int:
    folders, queries = split(args.words)
    runs = read(folders, damaged=True)
    rows = rows_of(runs)
    chosen = selected(rows, queries)
    if args.json:
        print(json.dumps(chosen, indent=1))
        return 0
    if not chosen:
        for query in queries:
            if query.field != "sort" and not selected(rows, [query]):
                print(f"no run has {query}; {values_of(rows, query)}", file=sys.stderr)
                return 0
    print(runs_table(chosen, runs, queries).terminal() if chosen else "no run satisfies all conditions")
    print(f"\n{number(len(chosen), 'run')}" + (f" of {len(rows)}" if len(chosen) < len(rows) else ""))
    return 0


def split(words: Sequence[str]) -> tuple[list[Path], list[Query]]:
    """The folders and the conditions among some words; without a folder, that of run.root. Raises InputError for a word
    that is neither."""
    folders, queries = [], []
    for word in words:
        if word.startswith("run.root="):
            folders.append(Path(os.path.expanduser(word.removeprefix("run.root="))))
        elif is_query(word) and not os.path.exists(word):
            queries.append(parsed(word))
        elif os.path.exists(os.path.expanduser(word)) or "/" in word:
            folders.append(Path(os.path.expanduser(word)))
        else:
            raise InputError(f"{word!r} is no folder and no condition: write field=value, field<value or sort=field")
    if not folders and not Path(ROOT).is_dir():
        raise InputError(f"no such folder: {ROOT}; name the root of your runs, such as run.root=FOLDER")
    return folders or [Path(ROOT)], queries
