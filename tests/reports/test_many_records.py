"""Thousands of records are read, listed and made into tables in seconds, and a bar says how far that is."""

import io
import json
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import lamabench.reports as reports
import pytest
import run_folders
from lamabench.reports import progress
from lamabench.reports.contents import TABLES
from lamabench.reports.evidence import Evidence
from lamabench.reports.listing import rows_of, studies_of
from lamabench.reports.runs import read
from run_folders import cost, drawn, made, scored, swept, trained, write

METRICS = ("FD", "KID", "IS", "Precision")


def append(path: Path, line: dict[str, Any]) -> None:
    """As record.append, without waiting for the disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """3,000 records of 100 trainings in two studies, of which one model was timed in 500 ways."""
    monkeypatch.setattr(run_folders, "append", append)
    monkeypatch.setattr("os.fsync", lambda file: None)
    sweep = [
        swept(mode, 10.0 + batch, batch, input_size=size)
        for mode, batch, size in product(("forward", "train"), range(1, 26), range(8, 88, 8))
    ]
    for study, variant, seed in product("ab", range(10), range(5)):
        lines = [trained(), *([cost(10**6 * (variant + 1))] if seed == 0 else [])]
        lines += sweep if (study, variant, seed) == ("a", 0, 0) else []
        about = {"variant": {"model.window_size": variant}, "seed": seed, "study": study, "curve": [1.0] * 50}
        about["model"] = {"window_size": variant}
        for step in (200, 400, 600):
            scores = [made(scored(9.0 + variant + seed / 9, name, name)) for name in METRICS]
            write(tmp_path, f"v{variant}-s{seed}", [*lines, drawn(), *(scores * 2)], step=step, **about)
            lines = []
    return tmp_path


def test_three_thousand_records_take_seconds(root: Path) -> None:
    count = sum(len(path.read_text().splitlines()) for path in root.glob("*s/**/record.jsonl"))
    assert count > 3000
    start = time.process_time()
    runs = read([root])
    assert len(runs) == 100 and len(rows_of(runs)) == 100 and len(studies_of(runs, root)) == 2
    evidence = Evidence(runs)
    for item in TABLES.values():
        tables = item.make(evidence)
        for table in tables if isinstance(tables, list) else [tables]:
            if table.rows:
                assert table.markdown() and table.csv()
    # Repeated scores count once. The studies share ten models, and the rows of these appear in both.
    assert len(reports.load(root)) == 100 * 3 * len(METRICS) + 2 * (500 + 10)
    assert time.process_time() - start < 10, "seconds of CPU; it takes two"
    for listing in root.glob("*/.study.json"):
        listing.unlink()
    start = time.process_time()
    assert len(read([root])) == 100
    assert time.process_time() - start < 5, "seconds of CPU; without studies it takes a half"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_appears_on_a_terminal_after_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def take(seconds: float, stream: io.StringIO) -> str:
        monkeypatch.setattr(sys, "stderr", stream)
        for item in progress.over([1, 2, 3, 4], "reading x"):
            assert item in (1, 2, 3, 4)
            now[0] += seconds
        return stream.getvalue()

    assert take(0.3, Terminal()) == "" and take(5.0, io.StringIO()) == ""
    text = take(0.6, Terminal())
    half = "#" * 12 + " " * 12
    assert f"reading x [{half}] 2/4" in text and "0/4" not in text and "1/4" not in text
    assert text.endswith("\r\x1b[K"), "the bar is removed"
