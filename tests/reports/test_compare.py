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
from lamabench.reports.contrast import CONFIGURATION, COST
from lamabench.reports.runs import read
from lamabench.reports.seeds import seeds
from lamabench.reports.summary import summary
from run_folders import H100, Line, cost, made, scored, swept, timed, trained, write
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
    row, other = compare(study / "z", study / "b").scores.rows
    interval = stats.ttest_rel(FAR, BASE).confidence_interval(0.95)
    assert (row["a"], row["b"], row["metric"]) == ("z", "b", FD)
    assert (row["a_mean"], row["b_mean"], row["a_n"], row["pairs"]) == (63.0, pytest.approx(159.5 / 3), 3, 3)
    assert row["difference"] - row["difference_ci95"] == pytest.approx(interval.low)
    assert row["difference"] + row["difference_ci95"] == pytest.approx(interval.high)
    assert row["a_ci95"] == pytest.approx(4.302653 * stats.tstd(BASE) / 3**0.5, rel=1e-6)
    assert (row["verdict"], other["verdict"], other["metric"]) == ("better", "worse", "Precision-X")
    back = compare(study / "b", study / "z").scores.rows  # the verdict is on the second
    assert [row["verdict"] for row in back] == ["worse", "better"]
    (one,) = compare(study / "z", study / "a", FD).scores.rows
    assert (one["verdict"], one["reason"]) == ("inconclusive", "the interval includes 0")


def test_a_study_is_compared_with_its_first_variant(study: Path) -> None:
    rows = compare(study, metric=FD).scores.rows
    assert {row["a"] for row in rows} == {"z"}
    assert verdicts(rows) == {
        ("a", FD): "inconclusive",
        ("b", FD): "better",
    }
    table = compare(study).scores
    assert table.caption == f"A: z [{study}]"
    assert max(map(len, table.terminal().splitlines())) <= 120
    text = " ".join(table.terminal().split())
    assert "63.0 ± 9.0" in text and "-9.83 ± 0.72" in text and "which share data order, t and noise" in text
    assert "Samples: 50 ddim steps, clipped (protocol g50)." in text and "‡" not in text


def test_a_variant_and_a_study(study: Path) -> None:
    rows = compare(study / "a", study, FD).scores.rows
    assert [row["b"] for row in rows] == ["z", "b"]  # not with itself
    turned = compare(study, study / "a", FD).scores.rows
    assert [row["a"] for row in turned] == ["z", "b"]


def test_roots_and_studies_have_variants_in_common(study: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for name, values in {"a": [value - 10 for value in NEAR], "c": FAR}.items():
        fill(other, name, values, model={"depth": 2})
    fill(other, "z", FAR, study="second")
    (row,) = compare(study, other / "demo", FD).scores.rows
    assert (row["a"], row["b"], row["verdict"]) == ("a", "a", "better")
    table = compare(study.parent, other, FD).scores  # a root has several studies, and demo/z is not second/z
    assert [row["a"] for row in table.rows] == ["a"]
    assert table.caption == f"A: {study.parent}\nB: {other}"
    rows = compare(study, other / "second", FD).scores.rows  # its only variant is compared with all
    assert [row["verdict"] for row in rows] == ["better", "better", "inconclusive"]


def test_single_runs_and_few_seeds_are_inconclusive(study: Path) -> None:
    (row,) = compare(study / "z-s0", study / "b-s0", FD).scores.rows
    assert (row["a_mean"], row["a_ci95"], row["difference"], row["difference_ci95"]) == (60.0, None, -10.0, None)
    assert (row["verdict"], row["reason"]) == ("inconclusive", "1 common seed, and 3 are needed")
    (row,) = compare(study / "z-s0", study / "b-s1", FD).scores.rows
    assert (row["pairs"], row["difference"], row["reason"]) == (0, None, "no common seed")
    assert "60.00  52.50" in " ".join(compare(study / "z-s0", study / "b-s1", FD).scores.terminal().split("\n"))


def test_other_ways_of_sampling_are_marked(tmp_path: Path) -> None:
    for name, way in (("one", {"steps": 50}), ("two", {"steps": 2}), ("old", None)):
        for seed, value in enumerate(BASE):
            line = scored(value - 10 * (name == "two"))
            write(tmp_path, f"{name}-s{seed}", [made(line, **way) if way else line], variant={"v": name}, seed=seed)
    (row,) = compare(tmp_path / "demo" / "one", tmp_path / "demo" / "two").scores.rows
    assert (row["b_is"], row["same_generation"]) == ("better", False)  # a file of a study asks for both ways
    listing = tmp_path / "demo" / ".study.json"
    listing.write_text(listing.read_text().replace('"file": "demo.yaml"', '"file": null'))
    table = compare(tmp_path / "demo" / "one", tmp_path / "demo" / "two").scores
    (row,) = table.rows
    assert (row["same_generation"], row["a_generation"], row["b_generation"]) == (False, "g50", "g2")
    text = table.terminal()
    assert "inconclusive ‡" in text and "made in different ways" in text
    assert row["reason"] == "the samples were made in several ways" and row["difference"] == pytest.approx(-10)
    assert "Samples of v two: 2 ddim steps, clipped (protocol g2)." in text
    table = compare(tmp_path / "demo" / "one", tmp_path / "demo" / "old").scores
    assert table.rows[0]["same_generation"] is None and "inconclusive ‡" in table.terminal()


def test_a_damaged_run_is_left_out_by_name(study: Path) -> None:
    (study / "z-s0").resolve().joinpath("record.jsonl").write_text("junk\n")
    table = compare(study / "z", study / "b", FD).scores
    assert table.rows[0]["a_n"] == 2 and any(note.startswith("z-s0 is left out: ") for note in table.notes)


def test_what_differs_is_said(tmp_path: Path) -> None:
    for name, data, step in (("one", {"size": 8}, 600), ("two", {"size": 16}, 900)):
        for seed, value in enumerate(BASE):
            run = write(tmp_path, f"{name}-s{seed}", [scored(value)], variant={"v": name}, seed=seed, step=step)
            config = run.resolve() / "config.json"
            info = json.loads(config.read_text())
            info["config"]["data"] = {**data, "path": name}
            config.write_text(json.dumps(info))
    notes = compare(tmp_path / "demo" / "one", tmp_path / "demo" / "two").scores.notes
    assert "Equal seeds do not share data order, t and noise: data.size differs." in notes
    assert "The weights are of different steps: 600 (A) and 900 (B)." in notes


@pytest.mark.parametrize(
    ("one", "two", "name"),
    [
        ({"kind": "ddpm"}, {"kind": "v", "times": "uniform"}, None),
        ({"kind": "ddpm", "times": "uniform"}, {"kind": "flow", "times": "uniform"}, "kind"),
        ({"kind": "flow", "times": "uniform"}, {"kind": "flow", "times": "logit_normal"}, "times"),
    ],
)
def test_objectives_that_draw_other_times_are_said(tmp_path: Path, one, two, name) -> None:
    for variant, objective in (("one", one), ("two", two)):
        run = write(tmp_path, f"{variant}-s0", [scored(BASE[0])], variant={"v": variant}, seed=0)
        config = run.resolve() / "config.json"
        info = json.loads(config.read_text(encoding="utf-8"))
        info["config"]["objective"] = objective
        config.write_text(json.dumps(info), encoding="utf-8")
    notes = compare(tmp_path / "demo" / "one", tmp_path / "demo" / "two").scores.notes
    apart = [note for note in notes if note.startswith("Equal seeds")]
    text = f"Equal seeds do not share data order, t and noise: objective.{name} differs."
    assert apart == ([] if name is None else [text])


def test_compare_says_what_the_table_of_seeds_says(tmp_path: Path) -> None:
    """Variants of one study and samples that were added to it by hand, at the same steps and at different ones."""
    for seed in range(3):
        for name, shift, step in (("a", 0.0, 600), ("b", -10.0, 600), ("c", -20.0, 300)):
            entry = {"steps": 600}
            line = made(scored(60.0 + seed * seed + shift))
            write(tmp_path, f"{name}-s{seed}", [line], variant={"v": name}, seed=seed, step=step, entry=entry)
        write(tmp_path, f"b-s{seed}", [made(scored(1.0 + seed), steps=2)], variant={"v": "b"}, seed=seed, steps=2)
    table = {row["label"]: row for row in seeds(summary(read([tmp_path]))).rows}
    rows = compare(tmp_path / "demo").scores.rows
    assert {row["b"]: row["verdict"] for row in rows} == {
        label: row[f"{FD}_verdict"] for label, row in table.items() if "(base)" not in label
    }
    reasons = {row["b"]: row["reason"] for row in rows}
    assert reasons["v c"] == "the weights are of different steps"
    assert reasons["v b, 50 sampling steps"] is None
    assert reasons["v b, 2 sampling steps"] == "the samples were made in several ways"


def test_lengths_that_a_study_asks_for_are_no_reason(tmp_path: Path) -> None:
    for name, shift, steps in (("short", 0.0, 300), ("long", -10.0, 600)):
        for seed in range(3):
            line = made(scored(60.0 + seed * seed + shift))
            more: Line = {"step": steps, "entry": {"steps": steps}}
            write(tmp_path, f"{name}-s{seed}", [line], variant={"train.steps": steps}, seed=seed, **more)
    comparison = compare(tmp_path / "demo")
    assert [row["verdict"] for row in comparison.scores.rows] == ["better"]
    (row,) = comparison.configuration.rows
    assert (row["field"], row["a_value"], row["b_value"]) == ("train.steps", 300, 600)


def test_what_else_differs(tmp_path: Path) -> None:
    """Configuration without paths and seeds, costs, and speeds at equal circumstances only."""
    small = {"depth": 2, "window": 8, "mixers": ["ssm", "window"]}
    large = {"depth": 2, "window": 16, "mixers": [], "shift": True}
    speeds = {
        "one": [
            swept("train", 100.0, 32, peak_memory_gib=4.0), swept("train", 150.0, 64, peak_memory_gib=8.0),
            swept("train", 160.0, 128, peak_memory_gib=16.0), swept("forward", 900.0, 64), timed("train", 5.0, 64),
        ],
        "two": [
            swept("train", 90.0, 32, peak_memory_gib=5.0), swept("train", 120.0, 64, peak_memory_gib=10.0),
            {**swept("forward", 800.0, 64, disturbed="load 9"), "provenance": {**H100, "device": "A CPU"}},
            swept("train", 1.0, 128, compile="whole-step"),
        ],
    }  # fmt: skip
    for name, model in (("one", small), ("two", large)):
        for seed in range(3):
            counted = [cost(10_000_000, 1_000_000) if name == "one" else cost(25_000_000, 1_500_000)]
            lines = [*counted, *speeds[name], made(scored(BASE[seed]))]
            write(tmp_path, f"{name}-s{seed}", lines, variant={"v": name}, seed=seed, model=model, eta=len(model))
    comparison = compare(tmp_path / "demo")
    labels = ("v one", "v two")
    assert [tuple(row[key] for key in CONFIGURATION) for row in comparison.configuration.rows] == [
        (*labels, "model.window", 8, 16), (*labels, "model.mixers", ["ssm", "window"], []),
        (*labels, "model.shift", None, True), (*labels, "sample.eta", 3, 4),
    ]  # fmt: skip
    (row,) = comparison.cost.rows
    assert [row[key] for key in COST] == [
        *labels, 1_000_000, 1_500_000, 1.5, 10_000_000, 25_000_000, 2.5, 21_000_000, 51_000_000, 51 / 21,
    ]  # fmt: skip
    (row,) = comparison.speed.rows
    assert (row["mode"], row["batch_size"], row["images_per_s_ratio"], row["peak_memory_gib_ratio"]) == (
        "train", 64, 0.8, 1.25,
    )  # fmt: skip
    text = " ".join(comparison.configuration.terminal().split())
    assert "model.mixers ssm, window none" in text and "model.shift - yes" in text
    assert row["disturbed"] is False


def test_older_settings_lack_an_operator(tmp_path: Path) -> None:
    """A configuration from before an operator had a name asks for nothing else than `auto`, and its run is a seed of
    the same variant."""
    older, newer = {"attention": "auto"}, {"attention": "auto", "norm": "auto"}
    for name, backends in (("one", [older, older, newer]), ("two", [newer, {**older, "attention": "sdpa"}])):
        for seed, backend in enumerate(backends):
            lines = [trained(), made(scored(BASE[seed]))]
            run = write(tmp_path, f"{name}-s{seed}", lines, variant={"v": name}, seed=seed)
            for path in (run.resolve() / "config.json", *run.resolve().glob("samples/*/config.json")):
                info = json.loads(path.read_text())
                path.write_text(json.dumps(info | {"config": info["config"] | {"backend": backend}}))
    alone = read(sorted(path.resolve() for path in (tmp_path / "demo").iterdir() if path.is_symlink()))
    one, two = ([run for run in alone if run.info["variant"]["v"] == name] for name in ("one", "two"))
    assert len(one) == 3 and len({run.group for run in one}) == 1
    assert len(two) == 2 and len({run.group for run in two}) == 2  # another implementation by name
    assert compare(tmp_path / "demo/one-s0", tmp_path / "demo/one-s2").configuration.rows == []
    (row,) = compare(tmp_path / "demo/one-s2", tmp_path / "demo/two-s1").configuration.rows
    assert [row[key] for key in ("field", "a_value", "b_value")] == ["backend.attention", "auto", "sdpa"]


def test_a_disturbed_speed_is_marked(tmp_path: Path) -> None:
    for name, more in (("one", {}), ("two", {"disturbed": "load 9"})):
        write(tmp_path, name, [cost(), swept("train", 100.0, **more)], variant={"v": name})
    comparison = compare(tmp_path / "demo")
    assert [row["disturbed"] for row in comparison.speed.rows] == [True] and "disturbed" in comparison.speed.terminal()
    assert comparison.scores.rows == []
    assert comparison.scores.notes[0].startswith("No scores are compared: ")
    with pytest.raises(InputError, match="unknown --metric 'FID'"):
        compare(tmp_path / "demo", metric="FID")


def test_no_table_is_wider_than_a_terminal(tmp_path: Path) -> None:
    """Many variants, of which one was never sampled: that is no other way of sampling."""
    models = [{"depth": depth, "name": "a-model-with-a-long-name"} for depth in range(5)]
    for depth, model in enumerate(models):
        lines = [cost(10**12 * (depth + 1), 10**9), swept("train", 10.0 + depth), made(scored(60.0 + depth))]
        variant = {"model.depth": depth, "model.name": model["name"]}
        write(tmp_path, f"d{depth}", lines[: 2 if depth == 4 else 3], variant=variant, model=model)
    comparison = compare(tmp_path / "demo")
    assert [row["field"] for row in comparison.configuration.rows] == ["model.depth"] * 4
    for table in comparison:
        assert table.rows and max(map(len, table.terminal().splitlines())) <= 120, table.name


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
    data = json.loads(capsys.readouterr().out)
    assert tuple(data) == ("scores", "configuration", "cost", "speed")
    (row,) = data["scores"]
    assert tuple(row) == FIELDS and row["verdict"] == "better" and row["same_generation"] is True
    assert main(["compare", str(study)]) == 0
    assert "inconclusive" in capsys.readouterr().out


def test_no_torch(study: Path) -> None:
    code = "import sys; from lamabench.reports.compare import compare; from pathlib import Path\n"
    code += f"compare(Path({str(study)!r})); assert not {{'torch', 'matplotlib'}} & {{*sys.modules}}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_studies_with_other_batches_saw_other_numbers_of_images(study: Path) -> None:
    """600 steps of 64 images against 600 steps of 256."""
    fill(study.parent, "z", FAR, study="large")
    for link in study.parent.glob("large/z-s*"):
        path = link.resolve() / "config.json"
        path.write_text(path.read_text().replace('"batch_size": 64', '"batch_size": 256'))
    (row,) = compare(study / "z", study.parent / "large" / "z", FD).scores.rows
    assert (row["verdict"], row["reason"]) == ("inconclusive", "the weights have seen different numbers of images")
    assert row["difference"] == pytest.approx(159.5 / 3 - 63.0)


def test_a_mean_with_a_run_that_is_not_done_says_so(study: Path) -> None:
    home = (study / "b-s1").resolve()
    (home / "metrics.jsonl").write_text('{"step": 1, "images": 64, "loss": 0.5}\n')
    (row,) = compare(study / "z", study / "b", FD).scores.rows
    assert (row["a_text"], row["b_text"]) == ("63.0 ± 9.0", "53.2 ± 8.8 (1 unfinished)")
