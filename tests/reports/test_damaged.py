"""A damaged or foreign file leaves its run out of a report, by name, and the other runs stay."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from lamabench.kernels.errors import InputError
from lamabench.reports.contents import TABLES
from lamabench.reports.frame import load
from lamabench.reports.queries import state_of
from lamabench.reports.report import build, evidence_of, tables_of
from lamabench.reports.runs import read
from lamabench.reports.samples import mosaic
from run_folders import cost, samples_of, scored, summary_rows, summary_text, timed, write

JUNK = [b"", b"{", b"\xff\xfe", b"[]", b"null", b"{}", b'{"a": 1}', b'{"layout": 2, "config": []}']
JUNK += [b'{"layout": 2, "kind": "x", "key": "k", "config": {"train": {"batch_size": "64"}}}']
JUNK += [b'{"layout": 2, "config": {"model": 3}, "kind": [], "key": {}}']
LINES = [b"junk\n", b"[]\n", b"null\n", b"{}\n", b'{"a": 1}\n', b'{"schema": 2, "kind": []}\n', b"\xff\n"]
LOGS = [b"junk\n", b"[]\n", b"null\n", b'{"step": "x"}\n', b'{"loss": {}}\n']
FILES = [("config.json", text) for text in JUNK] + [("record.jsonl", text) for text in LINES]
FILES += [("metrics.jsonl", text) for text in LOGS]


def states(root: Path) -> dict[str, tuple[str, str]]:
    return {run.info["name"]: state_of(run) for run in read([root])}


@pytest.mark.parametrize("study", [True, False])
def test_a_damaged_file_of_a_training_leaves_out_its_run(three: Path, study: bool) -> None:
    folder = (three / "demo" / "dit").resolve()
    if not study:
        (three / "demo" / ".study.json").unlink()
    before = states(three)
    for name, content in FILES:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        after = states(three)
        if name == "config.json" and not study:  # it holds the name of the run; the model is no run's any more
            after["dit"] = after.pop(folder.name)
        state, error = after.pop("dit")
        assert state == "unreadable" and str(folder / name) in error and "\n" not in error, content
        assert after == {key: value for key, value in before.items() if key != "dit"}, content
        (folder / name).write_bytes(whole)
    assert states(three) == before


def test_so_does_one_of_its_model_or_samples(three: Path) -> None:
    for pattern in ("models/dit-*/*.json*", "demo/dit/samples/*/*.json*"):
        paths = list(three.glob(pattern))
        assert len(paths) == 2
        for path in paths:
            whole = path.read_bytes()
            path.write_bytes(b"[]\n")
            after = states(three)
            assert after["dit"][0] == "unreadable" and str(path.resolve()) in after["dit"][1]
            assert {key for key, (state, _) in after.items() if state == "unreadable"} == {"dit"}
            path.write_bytes(whole)


def test_without_its_listing_the_folders_of_a_study_are_read(three: Path) -> None:
    for content in (b"", b"{", b"\xff", b"[]", b"null", b"{}", b'{"runs": [{}, 3]}'):
        (three / "demo" / ".study.json").write_bytes(content)
        after = states(three)
        assert {name for name, (state, _) in after.items() if state == "unreadable"} == {"demo"}
        assert str(three / "demo" / ".study.json") in after["demo"][1]
        assert {"adm", "dit", "lamamba"} < {*after}
        with pytest.raises(InputError, match=r"\.study\.json"):
            read([three / "demo"])


def test_the_report_goes_on_and_names_the_file(three: Path, tmp_path: Path) -> None:
    path = (three / "demo" / "dit").resolve() / "record.jsonl"
    path.write_text("junk\n")
    rows = {row["name"]: row for row in summary_rows([three])}
    assert rows["dit"]["state"] == "unreadable" and rows["lamamba"]["state"] == "done"
    text = " ".join(summary_text([three]).split())
    assert "unreadable" in text and "record.jsonl line 1 is not JSON" in text
    build([three], tmp_path / "out")
    assert str(path) in (tmp_path / "out" / "summary.csv").read_text()
    assert "unreadable" in (tmp_path / "out" / "README.md").read_text()
    with pytest.warns(UserWarning, match=r"dit is left out: .*record\.jsonl line 1"):
        assert set(load(three)["name"]) == {"adm", "lamamba"}


def test_samples_that_cannot_be_read_are_left_out(three: Path, tmp_path: Path) -> None:
    """The numbers stay, and so do the samples of the other runs."""
    build([three], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    samples = samples_of((three / "demo/dit").resolve())
    images, labels = np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int64)
    np.savez(tmp_path / "float.npz", images=images.astype(np.float32), labels=labels)
    np.savez(tmp_path / "short.npz", images=images, labels=np.zeros(3, np.int64))
    np.savez(tmp_path / "bare.npz", images=images)
    np.save(tmp_path / "array.npy", labels)
    others = [(tmp_path / name).read_bytes() for name in ("float.npz", "short.npz", "bare.npz", "array.npy")]
    whole = samples.read_bytes()
    text = f"{samples} cannot be read as samples: "
    (run,) = (run for run in read([three]) if run.info["name"] == "dit")
    for content in (b"", *others, whole[: len(whole) // 2]):
        samples.write_bytes(content)
        with pytest.raises(InputError) as caught:
            mosaic(run)
        assert str(caught.value).startswith(text) and "\n" not in str(caught.value)
    lines: list[str] = []
    build([three], tmp_path / "out", say=lines.append)
    after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(lines) == 1 and lines[0].startswith(f"dit: {text}") and "\n" not in lines[0]
    pictures = {f"{name}.{end}" for name in ("samples", "samples_dit") for end in ("png", "pdf")}
    assert {*before} - {*after} == pictures
    changed = {name for name in before if before[name] != after.get(name)}
    assert changed == {"README.md", "index.html", "index.json", *pictures}
    assert f"- not included: samples_dit ({text}" in after["README.md"].decode()


def test_a_report_of_nothing_readable_is_refused(three: Path, tmp_path: Path) -> None:
    for name in ("adm", "dit", "lamamba"):
        ((three / "demo" / name).resolve() / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json was not written by lamabench"):
        build([three / "demo"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_whose_name_is_not_utf8_is_reported(three: Path, tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"d\xff")
    three.rename(root)
    config = (root / "demo" / "dit").resolve() / "config.json"
    config.write_text("{}")
    build([root], tmp_path / "out")
    assert "d\\udcff" in (tmp_path / "out" / "summary.csv").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "out" / "index.json").read_text())["kind"] == "lamabench report"


def test_a_link_to_itself_leaves_out_its_run(three: Path) -> None:
    (samples,) = (three / "demo" / "dit").resolve().glob("samples/*")
    shutil.rmtree(samples)
    samples.symlink_to(samples.name)
    after = states(three)
    assert after["dit"][0] == "unreadable" and str(samples) in after["dit"][1]
    assert {name for name, (state, _) in after.items() if state == "unreadable"} == {"dit"}


def test_counts_of_nothing_make_no_ratio(tmp_path: Path) -> None:
    """A model without products has no MACs, and a speed may be rounded to 0."""
    for width in (2, 4):
        lines = [cost(0, 0) | {"flops": 0}, scored(9.0), *(timed(mode, 1.0) for mode in ("forward", "train"))]
        lines = [one | {"images_per_s": 0.0} if one["kind"] == "speed" else one for one in lines]
        write(tmp_path, f"w{width}", lines, variant={"w": width}, model={"w": width})
    evidence = evidence_of([tmp_path])
    rows = {name: [row for table in tables_of(evidence, name) for row in table.rows] for name in TABLES}
    assert [row["macs_ratio"] for row in rows["ablation"]] == [None, None]
    assert {row["ms_per_image"] for row in rows["bench"]} == {None}
