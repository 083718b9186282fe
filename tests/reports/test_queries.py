"""States of runs, from their records."""

from pathlib import Path

import pytest
from lamabench.reports.queries import state_of
from lamabench.reports.runs import read
from run_folders import Line, cost, line, timed, trained, write


@pytest.mark.parametrize(
    ("records", "curve", "state"),
    [
        ([], [], ("not started", "")),
        ([cost()], [1.0], ("unfinished", "")),
        ([line("train", "failed", error="killed"), trained()], [1.0], ("done", "")),
        ([line("speed", "oom", mode="train", error="full"), timed("forward", 1.0)], [], ("oom", "bench train: full")),
        # Its model was measured, and no measurement counts as failed; the training itself did not begin.
        ([line("speed", "failed", error="no"), timed("forward", 1.0)], [], ("not started", "")),
        ([timed("train", 1.0), timed("train", 1.0, 64) | {"state": "oom", "error": "x"}], [], ("not started", "")),
        ([trained(), line("speed", "failed", error="no"), timed("forward", 1.0)], [], ("done", "")),
        (
            [
                timed("train", 1.0, compile=c) | s
                for c, s in (("eager", {}), ("compile", {"state": "wrong", "error": "x"}))
            ],
            [],
            ("wrong", "bench train: x"),
        ),
        ([line("sample", "failed", error="x"), line("train", "failed", error="a\n b")], [], ("failed", "train: a b")),
    ],
)
def test_state(records: list[Line], curve: list[float], state: tuple[str, str], tmp_path: Path) -> None:
    write(tmp_path, "run", records, curve=curve)
    assert state_of(read([tmp_path])[0]) == state
