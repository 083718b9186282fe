"""`lamabench studies`: the studies below a root, and those of the suite that were not run there. Imports no torch."""

import argparse
import json
import os
from pathlib import Path

from ...ablations import study as suite
from ...kernels.errors import InputError
from ...reports.listing import is_query, studies_of
from ...reports.runs import Line, read
from ...reports.table import Column, Table
from .runs import ROOT, split

COLUMNS = [
    Column("study", "Study"), Column("runs", "Runs", 1.0, 0), Column("status", "State", key="state", width=30),
    Column("changed", "Changed (UTC)", rank=1), Column("question", "Question", width=50),
]  # fmt: skip


def run(args: argparse.Namespace) -> int:
    for word in args.words:
        if not is_query(word) and not os.path.exists(os.path.expanduser(word)):
            raise InputError(f"{word!r} is no folder; name the root of your runs, such as run.root=FOLDER")
    roots, queries = split(args.words) if args.words or Path(ROOT).is_dir() else ([], [])
    if queries:
        raise InputError(
            f"studies takes folders and run.root=FOLDER, not {queries[0]}; lamabench runs takes conditions"
        )
    rows: list[Line] = []
    for root in roots:
        try:
            rows += studies_of(read([root], damaged=True), root)
        except InputError:  # the default root may be empty
            if args.words:
                raise
    names = {row["study"] for row in rows}
    for name in suite.names():
        if name not in names:
            study = suite.load(name)
            about = {"question": study.question, "claim": study.claim, "changed": "", "error": "", "folder": None}
            rows.append({"study": name, "runs": len(study.expand()), "state": "not run", **about})
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        rows = [row | {"question": " ".join(row["question"].split())} for row in rows]
        notes = [f"{row['study']}: {row['error']}" for row in rows if row["error"]]
        print(Table("studies", "", COLUMNS, rows, notes).terminal())
    return 0
