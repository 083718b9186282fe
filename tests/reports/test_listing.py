"""Lists of runs and studies: conditions on fields, order, states, and what a damaged run does."""

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
from lamabench.harness.config import RunConfig
from lamabench.kernels.errors import InputError
from lamabench.launch.cli import main
from lamabench.launch.commands.runs import ROOT
from lamabench.reports.listing import field_of, parsed, rows_of, selected, studies_of, values_of
from lamabench.reports.runs import read
from run_folders import cost, drawn, everything, line, scored, trained, write

FACTS = {"question": "q?", "claim": "c", "answer": "a", "budget": "b", "axes": {"model.window_size": [2, 4, 8]}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A study of windows whose runs are in every state, and one without a question."""
    for place, (size, value) in enumerate(((2, 30.0), (4, 20.0), (8, 25.0))):
        score = scored(value) | {"std": 0.25, "sampling_error": 0.5}
        lines = [cost(1000 * 10**place), trained(), drawn(), score, scored(value / 10, "p2", "KID-X")]
        write(tmp_path, f"w{size}", lines, "lamamba", "LaMamba", {"model.window_size": size}, facts=FACTS, study="win")
    write(tmp_path, "planned", [], "lamamba", variant={"model.window_size": 16}, study="win")
    write(tmp_path, "begun", [], "lamamba", variant={"model.window_size": 32}, study="win", curve=[1.0])
    write(tmp_path, "full", [line("train", "oom", error="no memory")], "lamamba", variant={"a": "b"}, study="win")
    write(tmp_path, "dit", [{**trained(0.5), "time": "2026-02-03T04:05:06+00:00"}], study="other")
    return tmp_path


def names(root: Path, *words: str) -> list[str]:
    return [row["run"] for row in selected(rows_of(read([root])), [parsed(word) for word in words])]


def test_runs_have_a_state_and_the_order_of_their_study(root: Path) -> None:
    rows = rows_of(read([root]))
    assert [(row["run"], row["state"]) for row in rows] == [
        ("dit", "done"), ("w2", "done"), ("w4", "done"), ("w8", "done"), ("planned", "planned"),
        ("begun", "unfinished"), ("full", "oom"),
    ]  # fmt: skip
    assert rows[1] | {"macs": 1000, "params": 1_000_000, "FD-EffNetLite0-512": 30.0, "steps": 600} == rows[1]
    assert rows[0]["changed"] == "2026-02-03 04:05" and rows[4]["changed"] == ""
    assert Path(rows[1]["folder"]) == (root / "win" / "w2").resolve() and json.dumps(rows)


def test_a_run_that_is_worked_on_is_running(root: Path) -> None:
    folder = (root / "win" / "begun").resolve()
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert names(root, "state=running") == ["begun"]
    assert names(root, "state=running") == []


def test_a_run_whose_study_asks_for_more_samples_is_unfinished(root: Path) -> None:
    listing = json.loads((root / "win" / ".study.json").read_text())
    listing["runs"][1]["samples"].append("trainings/x/samples/y")
    (root / "win" / ".study.json").write_text(json.dumps(listing))
    assert names(root, "state=unfinished") == ["w4", "begun"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["state=done"], ["dit", "w2", "w4", "w8"]),
        (["state!=done", "study=win"], ["planned", "begun", "full"]),
        (["run=w*"], ["w2", "w4", "w8"]),
        (["fd<26"], ["w4", "w8"]),
        (["fd>25"], ["w2"]),
        (["fd>=25", "sort=fd"], ["w8", "w2"]),
        (["window_size=4"], ["w4"]),
        (["model.window_size=4.0"], ["w4"]),
        (["window_size<=4"], ["w2", "w4"]),
        (["macs=1e5"], ["w8"]),
        (["family=lamamba", "sort=-fd"], ["w2", "w8", "w4", "planned", "begun", "full"]),
        (["state=done", "sort=FD-EffNetLite0-512"], ["w4", "w8", "w2", "dit"]),
        (["sort=kid", "kid>0"], ["w4", "w8", "w2"]),
        (["error=*memory*"], ["full"]),
        (["fd="], ["dit", "planned", "begun", "full"]),
        (["changed>2026-01-01", "state=done"], ["dit"]),
        (["changed<2026"], ["w2", "w4", "w8", "full"]),
    ],
)
def test_conditions_choose_and_sort(root: Path, words: list[str], expected: list[str]) -> None:
    assert names(root, *words) == expected


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("famliy=dit", r"unknown field of runs 'famliy' \(did you mean 'family'\?\); choices: study, run, model"),
        ("sort=losss", r"unknown field of runs 'losss' \(did you mean 'final_loss'\?\)|unknown field of runs 'losss'"),
        ("fd<few", r"fd<few: 'few' is no number; FD-EffNetLite0-512=PATTERN compares texts"),
        ("fd<nan", r"fd<nan: 'nan' is no number"),
        ("seed==0", r"'seed==0' is no condition: write field=value, field<value"),
        ("fd=>20", r"'fd=>20' is no condition: write field=value, field<value"),
        ("model", r"'model' is no condition: write field=value"),
    ],
)
def test_a_slip_is_one_line_with_choices(root: Path, word: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        names(root, word)


def test_a_name_that_means_several_fields_is_refused(root: Path) -> None:
    rows: list[dict[str, Any]] = [{"FD-A": 1, "FD-B": 2, "fd-b_std": 3}]
    with pytest.raises(InputError, match="'fd' could mean several fields: FD-A, FD-B"):
        field_of("fd", rows)
    assert field_of("fd-a", rows) == "FD-A"
    assert values_of(rows_of(read([root])), parsed("family=x")) == "family has dit, lamamba"


def test_studies_count_their_runs(root: Path) -> None:
    other, win = studies_of(read([root]), root)
    counts = {name: win[name] for name in ("runs", "done", "unfinished", "planned", "failed", "running")}
    assert counts == {"runs": 6, "done": 3, "unfinished": 1, "planned": 1, "failed": 1, "running": 0}
    assert win["state"] == "3 done, 1 unfinished, 1 planned, 1 failed" and win["error"] == "full: train: no memory"
    assert (win["question"], win["claim"], other["question"]) == ("q?", "c", "")
    assert (other["state"], other["changed"]) == ("done", "2026-02-03 04:05")


def test_the_commands_print_tables_and_json(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert RunConfig().root == ROOT
    assert main(["runs", f"run.root={root}", "family=lamamba", "state=done", "sort=fd"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [text.split()[:2] for text in out if text.startswith("win")] == [["win", "w4"], ["win", "w8"], ["win", "w2"]]
    assert out[-1] == "3 runs of 7"
    assert main(["runs", str(root), "state=oom", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["run"], row["error"]) == ("full", "train: no memory")
    assert main(["runs", str(root), "state=dnoe"]) == 0
    assert "no run has state=dnoe; state has done, planned, unfinished, oom" in capsys.readouterr().err
    assert main(["studies", str(root)]) == 0
    out = capsys.readouterr().out
    assert "3 done, 1 unfinished" in out and "scan" in out and "not run" in out and "win: full: train: no memory" in out
    assert main(["studies", str(root), "--json"]) == 0
    studies = {row["study"]: row for row in json.loads(capsys.readouterr().out)}
    assert studies["scan"]["state"] == "not run" and studies["scan"]["runs"] == 30 and studies["win"]["done"] == 3


def test_damaged_files_are_named_and_end_nothing(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ((root / "win" / "w4").resolve() / "record.jsonl").write_text("{\n")
    (root / "other" / ".study.json").write_text("[")
    assert main(["runs", str(root)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "win/w4: " in out and "record.jsonl line 1 is not JSON" in out and "w8" in out
    assert names(root, "state=unreadable") == ["other", "w4"]
    assert main(["studies", str(root)]) == 0
    out = capsys.readouterr().out
    assert "unreadable" in out and "other: other: " in out and "2 done, 1 unfinished" in out


def test_a_root_of_damaged_runs_alone_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link = write(tmp_path, "one", everything(1.0, 2.0))
    (link.resolve() / "config.json").write_text("{")
    assert main(["runs", str(tmp_path)]) == 0
    assert "unreadable" in capsys.readouterr().out
    assert main(["studies", str(tmp_path), "--json"]) == 0
    (demo, *_) = json.loads(capsys.readouterr().out)
    assert (demo["study"], demo["unreadable"], demo["state"]) == ("demo", 1, "unreadable")


def test_without_runs_the_studies_of_the_suite_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["studies", "--json"]) == 0
    assert {row["state"] for row in json.loads(capsys.readouterr().out)} == {"not run"}
    (tmp_path / "runs").mkdir()
    assert main(["studies", "--json"]) == 0
