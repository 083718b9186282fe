"""The report as a whole: its files, what it leaves out, what it refuses, and the table for a terminal."""

import errno
import json
import re
import resource
import shutil
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from lamabench.kernels.errors import InputError
from lamabench.reports import contents
from lamabench.reports import report as reports
from lamabench.reports.contents import FIGURES, TABLES
from lamabench.reports.report import _readme, build, evidence_of
from run_folders import drawn, everything, samples_of, scored, summary_rows, summary_text, trained, write, write_many

ALL = {*TABLES, *FIGURES} - {"samples_*"}


def test_the_same_records_give_the_same_bytes(three: Path, report: Path, tmp_path: Path) -> None:
    first, second = sorted(report.iterdir()), build([three], tmp_path / "again")
    assert [path.name for path in first] == [path.name for path in second] == sorted(path.name for path in first)
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name
    index = json.loads((report / "index.json").read_text())
    assert index["files"] == [path.name for path in first]
    tables = {path.stem for path in first if path.suffix == ".tex"}
    figures = {path.stem for path in first if path.suffix == ".png"}
    assert tables == {"ablation_demo", "summary", "speed", "bench", "cost", "runs", "scale"}
    absent = {name for name in ALL if not any(f"{stem}_".startswith(f"{name}_") for stem in tables | figures)}
    assert set(index["absent"]) == {"samples_adm", *absent}
    assert not list(tmp_path.glob(".*")) and not list(report.parent.glob(".*"))
    for path in first:
        if path.suffix in (".png", ".pdf"):
            assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"%PDF")
    assert figures == {path.stem for path in first if path.suffix == ".pdf"}
    samples = {"samples", "samples_dit", "samples_lamamba"}
    assert figures == {"axis_demo", "loss", "quality_vs_flops", "pareto", "throughput", "speed_vs_flops", *samples}


def test_tables_and_figures_without_content_are_named(tmp_path: Path) -> None:
    write(tmp_path / "runs", "bare", [])
    (tmp_path / "out").mkdir()  # an empty folder is accepted
    files = build([tmp_path / "runs"], tmp_path / "out")
    runs, summary = ([f"{name}.{ending}" for ending in ("csv", "md", "tex")] for name in ("runs", "summary"))
    records = ["records.csv", "records.parquet"][: 1 + (find_spec("pyarrow") is not None)]
    assert [path.name for path in files] == ["README.md", "index.html", "index.json", *records, *runs, *summary]
    absent = json.loads((tmp_path / "out/index.json").read_text())["absent"]
    assert set(absent) == {"samples_bare", *ALL} - {"summary", "runs"}
    readme = (tmp_path / "out/README.md").read_text()
    assert all(name in readme and reason in readme for name, reason in absent.items())


def test_the_readme_answers_the_question_of_a_study_and_lists_what_is_there(tmp_path: Path) -> None:
    evidence = evidence_of([write_many(tmp_path, families=2, sizes=2, seeds=1, snapshots=1)])
    about = {f"samples_{place}.png, .pdf": "samples of a run" for place in range(6)} | {"cost.md": "costs"}
    text = _readme(evidence, about, {"kernels": "no operator was timed alone"})
    parts = text.split("\n## ")
    assert [part.splitlines()[0] for part in parts[1:]] == ["Study scale", "Runs", "Files"]
    assert "*Does LaMamba-Diff stay ahead of DiT and of the U-Net from S to XL?*" in parts[1]
    assert "FD-EffNetLite0-10k" in parts[1] and "1 common seed, and 3 are needed" in parts[1]
    assert parts[3].splitlines()[2:] == [
        "- samples_0.png, .pdf and 5 more such files: samples of a run", "- cost.md: costs",
        "- not included: kernels (no operator was timed alone)",
    ]  # fmt: skip


def test_an_earlier_report_is_replaced(three: Path, report: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(report, out)
    (out / "notes.txt").write_text("of the user")
    assert (out / "samples_dit.png").exists()
    samples_of(three / "demo/dit").unlink()
    files = build([three], out)
    assert {path.name for path in out.iterdir()} == {path.name for path in files} | {"notes.txt"}
    assert not (out / "samples_dit.png").exists() and not (out / "samples.pdf").exists()


def test_of_two_reports_at_once_the_last_one_stays(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "one", "bare", [])
    write_files, out = reports._write, tmp_path / "out"

    def slowly(*args: Any) -> None:
        monkeypatch.setattr(reports, "_write", write_files)
        write_files(*args)
        build([three], out)  # another process begins later and ends earlier

    monkeypatch.setattr(reports, "_write", slowly)
    build([tmp_path / "one"], out)
    index = json.loads((out / "index.json").read_text())
    assert index["files"] == sorted(path.name for path in out.iterdir()) and len(index["runs"]) == 1


def test_a_foreign_folder_is_refused_and_untouched(three: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for content in ("not json", '{"files": []}', '["kind"]'):
        out.mkdir(exist_ok=True)
        (out / "index.json").write_text(content)
        with pytest.raises(InputError, match="neither empty nor an earlier report") as caught:
            build([three], out)
        assert "\n" not in str(caught.value) and [path.name for path in out.iterdir()] == ["index.json"]
        assert (out / "index.json").read_text() == content
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        build([three], tmp_path / "file")
    with pytest.raises(InputError, match="cannot write a report"):
        build([three], tmp_path / "file" / "below")


def test_bad_input_leaves_nothing(three: Path, report: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    empty, nowhere = tmp_path / "none", tmp_path / "nowhere"
    for paths, words in (([empty], "holds no run"), ([nowhere], "no such folder"), ([], "no run folder")):
        for function in (lambda paths: build(paths, tmp_path / "out"), summary_text, summary_rows):
            with pytest.raises(InputError, match=words):
                function(paths)
    shutil.copytree(report, tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    for out in ("old", "new"):
        with pytest.raises(InputError, match="nope"):
            build([three], tmp_path / out, "nope")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    config = (three / "demo/dit").resolve() / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "family": None}))
    with pytest.raises(InputError, match=r"config\.json lacks family"):
        summary_rows([config.parent])


@pytest.mark.parametrize("room", [100, 9_000, 14_000, 20_000])
def test_a_full_disk_is_an_error_of_the_system(three: Path, report: Path, tmp_path: Path, room: int) -> None:
    """In the middle of a figure too, and an earlier report stays. A limit of the size of files stands for the disk."""
    shutil.copytree(report, tmp_path / "old")
    before = {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    assert max(map(len, before.values())) > room
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError) as caught:
            build([three], tmp_path / "old")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG and caught.value.filename is None
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    assert not list(tmp_path.glob(".*"))


def test_letters_that_the_font_lacks_are_no_warning(tmp_path: Path) -> None:
    write(tmp_path / "runs", "one", everything(60.0, 600.0), title="漢字", curve=[1 / k for k in range(1, 31)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build([tmp_path / "runs"], tmp_path / "out")
    assert not caught and (tmp_path / "out" / "loss.png").is_file()


def test_of_many_runs_the_samples_of_the_first_seeds_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "ENTRIES", 3)
    for width in (2, 4):
        for seed in (0, 1):
            write(tmp_path, f"w{width}-s{seed}", [trained(), drawn()], variant={"w": width}, seed=seed, labels=[0, 1])
    grids = FIGURES["samples_*"].draw(evidence_of([tmp_path]))
    assert isinstance(grids, dict) and list(grids) == ["samples_w2-s0", "samples_w2-s1", "samples_w4-s0", "samples_*"]
    assert grids["samples_*"] == "a report draws the samples of 3 runs, and 1 more have some; name fewer runs"


def test_terminal_table_fits(three: Path, tmp_path: Path) -> None:
    text = summary_text([three])
    assert "600.0" in text and "oom" in text and "Train" not in text[text.index("Columns omitted") :]
    assert re.search(r"^ADM: train: tried 50% of", text, re.MULTILINE)
    for place, metric in enumerate(("KID", "Precision", "Recall", "Density")):
        more = [scored(1.5 + place, metric=f"{metric}-EffNetLite0-512-{k}") for k in range(2)]
        write(three, f"wide-{metric}", more, variant={"mixers": "ssm and window and global", "n": place}, seed=place)
    text = summary_text([three])
    assert max(map(len, text.splitlines())) <= 120
    notes = " ".join(text[text.index("Columns omitted to fit the terminal:") :].split())
    assert "FLOPs (G)" in notes and "Density" in notes
    head = text[: text.index("---")]
    assert all(title in head for title in ("Model", "MACs (G)", "State", "FD-"))


def test_no_torch(tmp_path: Path) -> None:
    run = write(tmp_path / "runs", "dit", everything(60.0, 600.0), curve=[1.0, 0.5], labels=[0, 1])
    code = (
        "import sys; from pathlib import Path; from lamabench.reports.report import build, evidence_of, overview_text\n"
        f"paths, out = [Path({str(run)!r})], Path({str(tmp_path / 'out')!r})\n"
        "build(paths, out); overview_text(evidence_of(paths))\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
