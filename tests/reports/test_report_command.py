"""`lamabench report`: one table, a report that is kept current, and nothing written if nothing was asked for."""

import json
import os
from pathlib import Path

import pytest
from lamabench.harness.disk import append
from lamabench.launch.cli import main
from lamabench.launch.commands import report as command
from run_folders import cost, markdown, parsed, trained, write


@pytest.mark.parametrize("form", ["terminal", "markdown", "csv", "latex", "html"])
def test_a_table_is_printed_and_nothing_written(
    three: Path, report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", str(three), "--table", "summary", "--format", form]) == 0
    text = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    if form == "csv":
        assert [row["name"] for row in parsed(text)] == ["adm", "dit", "lamamba"]
    if form == "markdown":
        assert markdown(text)[2]["FD-EffNetLite0-512"] == "60.00"
    if form in ("csv", "markdown", "latex"):  # byte for byte what a report has, but the ids of folders
        ending = {"csv": "csv", "markdown": "md", "latex": "tex"}[form]
        assert text.rstrip("\n") == (report / f"summary.{ending}").read_text().rstrip("\n")
    if form == "html":
        assert text.startswith('<table class="table" id="table-summary">') and '<tr class="oom">' in text
        assert 'data-sort="600.0">600.0</td>' in text and "tried 50% of {0} &amp; a_b" in text
    if form == "terminal":
        assert max(map(len, text.splitlines())) <= 120 and "600.0" in text


def test_a_table_as_json(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(three), "--table", "cost", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["part"] for row in rows} == {"ssm", "scan", "mlp", "total"} and rows[-1]["macs"] == 30_000_000


def test_watching_writes_what_has_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line for the first report and for a later record; none if a file is touched or the folder away for a moment."""
    root, out, away = tmp_path / "runs", tmp_path / "out", tmp_path / "away"
    path = write(root, "one", [cost(), trained(0.25)]).resolve() / "record.jsonl"
    (record,) = [json.loads(line) for line in path.read_text().splitlines()]
    times = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    looks = [
        lambda: times.append((out / "summary.csv").stat().st_mtime_ns),
        lambda: os.utime(path),
        lambda: times.append((out / "summary.csv").stat().st_mtime_ns),
        lambda: root.rename(away),
        lambda: away.rename(root),
        lambda: append(path, {**record, "final_loss": 0.5}),
        interrupt,
    ]
    monkeypatch.setattr(command.time, "sleep", lambda seconds: looks.pop(0)())
    assert main(["report", str(root), "--out", str(out), "--watch"]) == 130
    output = capsys.readouterr()
    files = f"{len(list(out.iterdir()))} files in {out}"
    assert [line.split("  ")[1] for line in output.out.splitlines()] == [
        f"1 run, 2 records: {files}", f"1 run, 3 records: {files}"
    ]  # fmt: skip
    assert output.err == f"no such folder: {root}\nlamabench report: interrupted; the same command continues\n"
    assert times[0] == times[1] and parsed((out / "summary.csv").read_text())[0]["final_loss"] == "0.5"
