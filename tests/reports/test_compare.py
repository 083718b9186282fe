"""Comparisons of runs, variants, studies and roots."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lamabench.kernels.errors import InputError
from lamabench.launch.cli import main
from lamabench.reports.compare import FIELDS, compare
from run_folders import Line, made, scored, write
from scipy import stats

FD = "FD-EffNetLite0-512"
BASE, NEAR, FAR = [60.0, 62.0, 67.0], [59.0, 63.0, 66.9], [50.0, 52.5, 57.0]


def fill(root: Path, name: str, values: list[float], study: str = "demo", **more: Any) -> None:
    for seed, value in enumerate(values):
        lines = [made(scored(value)), made(scored(value / 100, "p2", "Precision-X"))]
        write(root, f"{name}-s{seed}", lines, variant={"variant": name}, seed=seed, study=study, **more)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    for name, values in {"z": BASE, "a": NEAR, "b": FAR}.items():
        fill(tmp_path / "runs", name, values)
    return tmp_path / "runs" / "demo"


def verdicts(rows: list[Line]) -> dict[tuple[str, str], str]:
    return {(row["b"], row["metric"]): row["verdict"] for row in rows}


def test_two_variants_over_their_seeds(study: Path) -> None:
    row, other = compare(study / "z", study / "b").rows
    interval = stats.ttest_rel(FAR, BASE).confidence_interval(0.95)
    assert (row["a"], row["b"], row["metric"]) == ("z", "b", FD)
    assert (row["a_mean"], row["b_mean"], row["a_n"], row["pairs"]) == (63.0, pytest.approx(159.5 / 3), 3, 3)
    assert row["difference"] - row["difference_ci95"] == pytest.approx(interval.low)
    assert row["difference"] + row["difference_ci95"] == pytest.approx(interval.high)
    assert row["a_ci95"] == pytest.approx(4.302653 * stats.tstd(BASE) / 3**0.5, rel=1e-6)
    assert (row["verdict"], other["verdict"], other["metric"]) == ("better", "worse", "Precision-X")
    back = compare(study / "b", study / "z").rows  # the verdict is on the second
    assert [row["verdict"] for row in back] == ["worse", "better"]
    (one,) = compare(study / "z", study / "a", FD).rows
    assert (one["verdict"], one["reason"]) == ("inconclusive", "the interval includes 0")


def test_a_study_is_compared_with_its_first_variant(study: Path) -> None:
    rows = compare(study, metric=FD).rows
    assert {row["a"] for row in rows} == {"z"}
    assert verdicts(rows) == {
        ("a", FD): "inconclusive",
        ("b", FD): "better",
    }
    table = compare(study)
    assert table.caption == f"A: z [{study}]"
    assert max(map(len, table.terminal().splitlines())) <= 120
    text = " ".join(table.terminal().split())
    assert "63.0 ± 9.0" in text and "-9.83 ± 0.72" in text and "which share data order, t and noise" in text
    assert "Samples: 50 ddim steps, clipped (protocol g50)." in text and "‡" not in text


def test_a_variant_and_a_study(study: Path) -> None:
    rows = compare(study / "a", study, FD).rows
    assert [row["b"] for row in rows] == ["z", "b"]  # not with itself
    turned = compare(study, study / "a", FD).rows
    assert [row["a"] for row in turned] == ["z", "b"]


def test_roots_and_studies_have_variants_in_common(study: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for name, values in {"a": [value - 10 for value in NEAR], "c": FAR}.items():
        fill(other, name, values, model={"depth": 2})
    fill(other, "z", FAR, study="second")
    (row,) = compare(study, other / "demo", FD).rows
    assert (row["a"], row["b"], row["verdict"]) == ("a", "a", "better")
    table = compare(study.parent, other, FD)  # a root has several studies, and demo/z is not second/z
    assert [row["a"] for row in table.rows] == ["a"]
    assert table.caption == f"A: {study.parent}\nB: {other}"
    rows = compare(study, other / "second", FD).rows  # its only variant is compared with all
    assert [row["verdict"] for row in rows] == ["better", "better", "inconclusive"]


def test_single_runs_and_few_seeds_are_inconclusive(study: Path) -> None:
    (row,) = compare(study / "z-s0", study / "b-s0", FD).rows
    assert (row["a_mean"], row["a_ci95"], row["difference"], row["difference_ci95"]) == (60.0, None, -10.0, None)
    assert (row["verdict"], row["reason"]) == ("inconclusive", "1 common seed, and 3 are needed")
    (row,) = compare(study / "z-s0", study / "b-s1", FD).rows
    assert (row["pairs"], row["difference"], row["reason"]) == (0, None, "no common seed")
    assert "60.00  52.50" in " ".join(compare(study / "z-s0", study / "b-s1", FD).terminal().split("\n"))


def test_other_ways_of_sampling_are_marked(tmp_path: Path) -> None:
    for name, way in (("one", {"steps": 50}), ("two", {"steps": 2}), ("old", None)):
        for seed, value in enumerate(BASE):
            line = scored(value - 10 * (name == "two"))
            write(tmp_path, f"{name}-s{seed}", [made(line, **way) if way else line], variant={"v": name}, seed=seed)
    table = compare(tmp_path / "demo" / "one", tmp_path / "demo" / "two")
    (row,) = table.rows
    assert (row["same_generation"], row["a_generation"], row["b_generation"]) == (False, "g50", "g2")
    text = table.terminal()
    assert "better ‡" in text and "made in different ways" in text
    assert "Samples of v two: 2 ddim steps, clipped (protocol g2)." in text
    table = compare(tmp_path / "demo" / "one", tmp_path / "demo" / "old")
    assert table.rows[0]["same_generation"] is None and "inconclusive ‡" in table.terminal()


def test_a_damaged_run_is_left_out_by_name(study: Path) -> None:
    (study / "z-s0").resolve().joinpath("record.jsonl").write_text("junk\n")
    table = compare(study / "z", study / "b", FD)
    assert table.rows[0]["a_n"] == 2 and any(note.startswith("z-s0 is left out: ") for note in table.notes)


def test_what_differs_is_said(tmp_path: Path) -> None:
    for name, data, step in (("one", {"size": 8}, 600), ("two", {"size": 16}, 900)):
        for seed, value in enumerate(BASE):
            run = write(tmp_path, f"{name}-s{seed}", [scored(value)], variant={"v": name}, seed=seed, step=step)
            config = run.resolve() / "config.json"
            info = json.loads(config.read_text())
            info["config"]["data"] = {**data, "path": name}
            config.write_text(json.dumps(info))
    notes = compare(tmp_path / "demo" / "one", tmp_path / "demo" / "two").notes
    assert "Equal seeds do not share data order, t and noise: data.size differs." in notes
    assert "The weights are of different steps: 600 (A) and 900 (B)." in notes


def test_two_protocols_are_not_compared(study: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    write(there, "one", [{**scored(1.0, "p9"), "evaluation": {"layer": "pooled", "count": 3}}])
    write(there, "two", [{**scored(1.0, "p8"), "evaluation": {"layer": "spatial", "count": 3}}], variant={"v": 2})
    write(there, "three", [scored(1.0, metric="KID-X")], variant={"v": 3})
    demo = there / "demo"
    for a, b, words in (
        (demo / "one", demo / "two", f"share no evaluation protocol: {FD} differs in layer"),
        (demo / "one", study / "z", f"share no evaluation protocol: {FD} differs \\(p9 and p1\\)"),
        (demo / "one", demo / "three", f"share no score: .*one has {FD}; .*three has KID-X"),
        (study / "nope", study / "z", "unknown variant of .*demo 'nope'; choices: a, b, z"),
        (study / "z-s0", None, "is no study with several variants"),
        (demo, None, "no variant of .*demo has a score that its first variant has too"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            compare(a, b)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=rf"unknown --metric 'FID'.*; choices: {FD}, Precision-X"):
        compare(study, metric="FID")


def test_the_command(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(study / "z"), str(study / "b"), "--json", "--metric", FD]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert tuple(row) == FIELDS and row["verdict"] == "better" and row["same_generation"] is True
    assert main(["compare", str(study)]) == 0
    assert "inconclusive" in capsys.readouterr().out


def test_no_torch(study: Path) -> None:
    code = "import sys; from lamabench.reports.compare import compare; from pathlib import Path\n"
    code += f"compare(Path({str(study)!r})); assert not {{'torch', 'matplotlib'}} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True)
