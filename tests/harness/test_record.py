"""Records: typed rows that are checked when written and read, and files that survive a kill."""

import json
from pathlib import Path

import pytest
from lamabench.harness import record, record_page
from lamabench.harness.disk import append, read_lines, write_atomically
from lamabench.harness.record import read_records, row
from lamabench.kernels.errors import InputError

SCORE = {"key": "a" * 12, "metric": "FD", "value": 3.0, "count": 10, "protocol": "12345678"}


def test_a_row_survives_the_file(tmp_path):
    path = tmp_path / "record.jsonl"
    wanted = [
        row("score", **SCORE, std=None),
        row("operator_speed", key="b", operator="attention", shape="q 1×2", p50_ms=1, **{"pass": "forward"}),
        row("train", key="c", state="failed", error="no room"),
    ]
    for one in wanted:
        append(path, one.as_dict())
    assert read_records(path) == wanted
    lines = read_lines(path)
    assert lines[1]["pass"] == "forward" and lines[1]["schema"] == record.SCHEMA and "std" not in lines[0]
    assert wanted[0].flat()["std"] is None and wanted[0].flat()["kind"] == "score"


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        ("scores", {}, "no such kind of record: 'scores'; choices: convert, cost"),
        ("score", {**SCORE, "valeu": 1.0}, "a record of kind score has no field 'valeu'; it has key, "),
        ("score", {**SCORE, "value": "3"}, "field 'value' of a score record is '3', of type str"),
        ("score", {**SCORE, "count": True}, "field 'count' of a score record is True, of type bool"),
        ("score", {**SCORE, "protocol": None}, "a score record that is done lacks protocol"),
        ("score", {**SCORE, "provenance": {"device": 3}}, "field 'provenance' of a score record has device 3"),
        ("train", {"state": "failed", "stretches": [1]}, "'stretches' or 'moments' of a train record holds something"),
        ("train", {"state": "failed", "moments": ["1"]}, "'stretches' or 'moments' of a train record holds something"),
        (
            "train",
            {"state": "failed", "stretches": [{"processes": "2"}]},
            "'stretches' .* has processes '2'",
        ),
        ("score", {**SCORE, "state": "well"}, "unknown state 'well' of a score record; choices: done, failed"),
    ],
)
def test_a_row_is_checked(kind, values, message):
    with pytest.raises(InputError, match=message):
        row(kind, **values)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"schema": 99, "kind": "score"}, "line 1 has schema 99, of a newer version of lamabench; this one reads 2"),
        ({"schema": 1, "kind": "bench"}, "line 1 has schema 1, of an older version"),
        ({"kind": "score"}, "line 1 is not a record of lamabench"),
        ([1], "line 1 is not a record of lamabench: it is no JSON object"),
        (None, "line 1 is not a record of lamabench: it is no JSON object"),
        ({"schema": 2, "kind": "score", "key": "a"}, "line 1: a score record that is done lacks metric, value"),
    ],
)
def test_what_is_read_is_checked(tmp_path, line, message):
    (tmp_path / "record.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=message):
        read_records(tmp_path / "record.jsonl")


def test_the_newest_line_of_a_key_counts():
    first, second, other = (
        row("score", **SCORE | {"value": v, "metric": m}) for v, m in ((1, "P"), (2, "P"), (3, "R"))
    )
    assert list(record.newest([first, other, second]).values()) == [second, other]


def test_the_page_says_what_the_dataclasses_say():
    page = Path(record.__file__).with_name("RECORDS.md").read_text()
    assert page == record_page.page(), "make it again: python -m lamabench.harness.record_page > harness/RECORDS.md"
    assert "| `pass` | str | forward or forward+backward (always, if done) |" in page


def test_an_incomplete_last_line_is_removed(tmp_path):
    path = tmp_path / "record.jsonl"
    append(path, {"a": 1})
    with open(path, "a") as file:
        file.write('{"b": ')
    assert read_lines(path) == [{"a": 1}]
    append(path, {"c": 3})
    assert read_lines(path) == [{"a": 1}, {"c": 3}]


def test_damaged_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "record.jsonl"
    path.write_text('{"a": 1}\nnonsense\n{"b": 2}\n')
    with pytest.raises(InputError, match=r"record\.jsonl line 2 is not JSON"):
        read_lines(path)


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomically(path, b"old")
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_no_write_creates_the_folder_of_a_run_again(tmp_path):
    """If a shared folder disappears, perhaps for a moment, a run must not continue in a second folder."""
    away = tmp_path / "study" / "run"
    with pytest.raises(FileNotFoundError):
        append(away / "record.jsonl", {"a": 1})
    with pytest.raises(FileNotFoundError):
        write_atomically(away / "samples.npz", b"new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("metrics.jsonl", {"loss": 1.0}, "line 2 is no line of lamabench: its step is None"),
        ("metrics.jsonl", [], "line 2 is not a record of lamabench: it is no JSON object"),
        ("metrics.jsonl", {"step": 1, "seconds": "x"}, "line 2 is no line of lamabench: its seconds is 'x'"),
        ("metrics.jsonl", {"step": 1, "loss": {}}, "line 2 is no line of lamabench: its loss is {}"),
        ("attempts.jsonl", {"event": "end", "job": "7", "error": 3}, "line 2 is no line of lamabench: its error is 3"),
        ("attempts.jsonl", {"event": "start", "job": "7", "restart": 0, "records": "x"}, "its records is 'x'"),
        ("attempts.jsonl", {"event": "end"}, "line 2 is no line of lamabench: its job is None"),
        ("attempts.jsonl", {"event": 3, "job": "7"}, "line 2 is no line of lamabench: its event is 3"),
        ("attempts.jsonl", {"event": "start", "job": "7"}, "line 2 is no line of lamabench: its restart is None"),
        ("metrics.jsonl", {"step": 1, "loss": float("nan")}, "line 2 is not JSON: NaN is no number of JSON"),
        ("record.jsonl", {"parts": {"mlp": float("-inf")}}, "line 2 is not JSON: -Infinity is no number of JSON"),
        ("record.jsonl", {"value": 1e300}, r"line 2 is no line of lamabench: its value is 1e\+300"),
        ("record.jsonl", {"flops": -(10**400)}, "line 2 is no line of lamabench: its flops is -1000"),
        ("attempts.jsonl", None, "line 2 is not a record of lamabench: it is no JSON object"),
    ],
)
def test_lines_have_what_is_read_of_them(tmp_path, name, line, message):
    good = {"step": 1, "event": "end", "job": "7"}
    (tmp_path / name).write_text("".join(json.dumps(one) + "\n" for one in (good, line)))
    with pytest.raises(InputError, match=message):
        read_lines(tmp_path / name)
    (tmp_path / name).write_bytes(json.dumps(good).encode() + b'\n\xff{"step"')  # cut, and not UTF-8
    assert read_lines(tmp_path / name) == [good]
    (tmp_path / name).write_bytes(b"\xff\n")
    with pytest.raises(InputError, match="line 1 is not JSON"):
        read_lines(tmp_path / name)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, another_user):
    (tmp_path / "record.jsonl").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*record\.jsonl: Is a directory"):
        read_lines(tmp_path / "record.jsonl")
    with pytest.raises(InputError, match=r"cannot read .*: File name too long"):
        read_lines(tmp_path / ("x" * 300))
    assert read_lines(tmp_path / "none" / "record.jsonl") == []
    folder, acting = another_user
    (folder / "record.jsonl").write_text("")
    (folder / "record.jsonl").chmod(0)
    with acting(), pytest.raises(InputError, match=r"cannot read .*record\.jsonl: Permission denied"):
        read_records(folder / "record.jsonl")


@pytest.mark.parametrize("part", [None, 3, {}, {"params": 1, "macs": 2}, {"params": 1, "macs": "x", "flops": 3}])
def test_the_parts_of_a_cost_are_whole_numbers(part):
    whole = {"params": 1, "macs": 2, "flops": 3}
    counts = {"params": 1, "macs": 2, "flops": 3}
    assert row("cost", **counts, parts={"mlp": whole}).parts == {"mlp": whole}  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="field 'parts' of a cost record lacks params, macs or flops of head"):
        row("cost", **counts, parts={"mlp": whole, "head": part})
