"""Tables at equal images, FLOPs and hours, against closed forms, and the published rows below them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lamabench.harness.run import STUDY
from lamabench.reports.budgets import Moment, at_amount, equal_budgets, interpolated, rising
from lamabench.reports.evidence import Evidence
from lamabench.reports.moments import equal_images
from lamabench.reports.runs import Run, read
from lamabench.reports.scale import scale, scale_flops, scale_hours
from lamabench.reports.scaling import scaling_of
from lamabench.reports.table import Table
from run_folders import H100, IMAGES, Line, cost, law, markdown, parsed, scored, trained, write, write_many
from scipy.stats import t as student

FD = "FD-EffNetLite0-10k"
GFLOPS = {"lamamba_s": 4.972, "lamamba_b": 21.31, "dit_s_2": 12.12, "dit_b_2": 46.03}


def evidence(root: Path) -> Evidence:
    return Evidence(read([root]))


def rows_of(table: Table) -> dict[str, dict[str, str]]:
    return {row["model"]: row for row in parsed(table.csv())}


def change(root: Path, pattern: str, edit: Callable[[Line], Line]) -> None:
    """Edit the lines of all records below a root."""
    for path in root.glob(pattern):
        lines = [edit(json.loads(text)) for text in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_power_law_is_interpolated_exactly() -> None:
    random = np.random.default_rng(0)
    places = np.sort(10 ** random.uniform(15, 21, 6))
    points = [(x, 300 * x**-0.37) for x in places]
    for x in np.exp(random.uniform(math.log(places[0]), math.log(places[-1]), 50)):
        assert interpolated(points, x) == pytest.approx(300 * x**-0.37, rel=1e-12)
    assert interpolated(points, places[0] * 0.999) is None and interpolated(points, places[-1] * 1.001) is None
    assert [interpolated(points, x) for x, _ in points] == [y for _, y in points]
    kinks = [(1.0, 8.0), (10.0, 2.0), (100.0, 1.0)]  # only the two neighbours count
    assert interpolated(kinks, 10**0.5) == pytest.approx(4.0) and interpolated(kinks, 10**1.5) == pytest.approx(2**0.5)
    assert interpolated([(1.0, -1.0), (100.0, 3.0)], 10.0) == pytest.approx(1.0)  # a kernel distance may be negative
    assert interpolated([], 1.0) is None and interpolated([(2.0, 5.0)], 2.0) == 5.0


def test_common_amounts() -> None:
    a, b, c = (Run({}, group) for group in "abc")
    assert equal_images({a: [1, 2, 3], b: [2, 3], c: [2, 3, 4]}) == 3
    assert equal_images({a: [1, 2], b: [2, 3], c: [3]}) == 3  # two runs each: the larger
    assert equal_images({a: [1], b: [2]}) is equal_images({}) is None
    assert equal_images({a: [1, 2], Run({}, "a"): [1, 3], b: []}) == 1  # one model alone
    assert equal_budgets({a: [1, 5], b: [3, 9], c: [4, 20]}) == [5]
    assert equal_budgets({a: [1, 5], b: [3, 9], c: [8, 20]}) == [5, 9]  # no amount lies in all three
    assert equal_budgets({a: [1, 5], b: [6, 9], c: [8, 20]}) == [9]  # a overlaps with nothing
    assert equal_budgets({a: [1, 5], b: [6, 9]}) == equal_budgets({a: [1, 5], Run({}, "a"): [1, 5], b: []}) == []


def test_a_clock_that_stood_still_or_went_back_is_no_division_by_zero() -> None:
    moments = [Moment({"value": value}, images, None, hours) for images, hours, value in MOMENTS]
    assert [x for x, _ in rising(moments, "hours")] == [1.0, 4.0] and rising(moments, "flops") == []
    at = at_amount(moments, "hours", 2.0)
    assert at is not None and at.row["value"] == pytest.approx(4.0) and at.images == 20  # 8 · 2^-1, 10 + (40 - 10) / 3
    assert at_amount(moments, "flops", 2.0) is None and at_amount(moments, "hours", 4.5) is None


MOMENTS = [(10, 1.0, 8.0), (20, 1.0, 7.0), (30, 0.5, 6.0), (40, 4.0, 2.0)]  # images, hours, value


def test_equal_images(tmp_path: Path) -> None:
    write_many(tmp_path, 2, 2, 3)
    (table,) = scale(evidence(tmp_path))
    rows = rows_of(table)
    assert list(rows) == ["dit_s_2", "dit_b_2", "lamamba_s", "lamamba_b"]
    for place, (model, row) in enumerate(rows.items()):
        family = model.partition("_")[0]
        # The numbers of write_many, from its closed form.
        luck = [np.random.default_rng([family == "dit", place % 2, seed]).standard_normal() for seed in range(3)]
        values = law(family, GFLOPS[model]) * np.exp(0.02 * np.array(luck))
        assert float(row[f"{FD}_mean"]) == pytest.approx(values.mean(), rel=1e-9)
        half = student.ppf(0.975, 2) * values.std(ddof=1) / 3**0.5
        assert float(row[f"{FD}_ci95"]) == pytest.approx(half, rel=1e-9)
        assert (row["n"], row[f"{FD}_n"]) == ("3", "3") and float(row["flops"]) == pytest.approx(1e9 * GFLOPS[model])
        assert float(row["at_flops"]) == pytest.approx(3e9 * GFLOPS[model] * IMAGES)
    first = markdown(table.markdown())[0]
    assert (first["Family"], first["Size"], first["Params (M)"]) == ("DiT", "S/2", "33.00") and " ± " in first[FD]
    assert first["Training FLOPs (1e18)"] == "0.9308" and "Source" not in first
    assert table.caption.startswith("Models of all families and sizes on cifar10 at 25.6 M images, the largest amount")
    assert table.caption.endswith("at which all runs have a score.")
    assert any(row[f"{FD}_bold"] for row in table.rows if f"{FD}_bold" in row)


def test_equal_flops_and_hours(tmp_path: Path) -> None:
    write_many(tmp_path, 2, 2, 1, noise=0.0)
    (table,) = scale_flops(evidence(tmp_path))
    # LaMamba-Diff-S ends at 3.82e17 FLOPs; DiT-B/2 is first scored at 7.1e17, and then LaMamba-Diff-B is there too.
    ends = {model: 3e9 * gflops * IMAGES for model, gflops in GFLOPS.items()}
    targets = [ends["lamamba_s"], ends["dit_s_2"]]
    names = [f"{FD} at {words} FLOPs" for words in ("3.82e17", "9.31e17")]
    assert [column.title for column in table.columns if column.title and FD in column.title] == names
    for model, row in rows_of(table).items():
        for target, name in zip(targets, names, strict=True):
            shares = np.arange(1, 6) / 5
            values = [law(model.partition("_")[0], GFLOPS[model], share) for share in shares]
            inside = shares[0] * ends[model] <= target <= ends[model] * (1 + 1e-9)
            assert bool(row[f"{name}_mean"]) == inside, (model, name)
            if inside:
                logs = np.interp(np.log(target), np.log(shares * ends[model]), np.log(values))
                assert float(row[f"{name}_mean"]) == pytest.approx(np.exp(logs), rel=1e-9)
    assert "First scored after 3.82e17 FLOPs of training: DiT-B/2." in table.notes
    assert "Not trained, or not scored, up to 9.31e17 FLOPs of training: LaMamba-Diff-S." in table.notes
    assert "Nothing is extrapolated." in table.markdown() and "in each column" in table.caption
    (hours,) = scale_hours(evidence(tmp_path))
    assert "hours of training (times processes) on NVIDIA H100 80GB HBM3, bfloat16" in hours.caption
    change(tmp_path, "trainings/*/record.jsonl", lambda line: {**line, "processes": 2})
    (doubled,) = scale_hours(evidence(tmp_path))
    once, twice = (float(one.caption.partition(" at ")[2].split()[0]) for one in (hours, doubled))
    assert twice == pytest.approx(2 * once, rel=5e-3)
    change(tmp_path, "trainings/dit-*/record.jsonl", lambda line: {**line, "provenance": {**H100, "device": "B200"}})
    names = [one.name for one in scale_hours(evidence(tmp_path))]
    assert names == ["scale_hours_B200__bfloat16", "scale_hours_NVIDIA_H100_80GB_HBM3__bfloat16"]
    stretches = [{"processes": 1}, {"processes": 2}]
    change(tmp_path, "trainings/*/record.jsonl", lambda line: {**line, "stretches": stretches})
    assert [one.rows for one in scale_hours(evidence(tmp_path))] == [[]]


def test_a_score_at_the_end_alone_has_no_column_at_equal_flops(tmp_path: Path) -> None:
    """Two studies have the same model as different variants, whose runs end at equal FLOPs. Curves are compared there,
    and ends are not."""
    for study in ("one", "two"):
        write_many(tmp_path / study, 2, 1, 1, study=study)
    listing = tmp_path / "two" / "two" / STUDY
    listing.write_text(listing.read_text().replace('"variant": {', '"variant": {"n": 1, '))

    def named_at_the_end(line: Line) -> Line:
        return line | {"metric": "FD-end"} if (line.get("metric"), line.get("images_seen")) == (FD, IMAGES) else line

    change(tmp_path, "*/trainings/*/samples/*/record.jsonl", named_at_the_end)
    both = Evidence(read([tmp_path / "one", tmp_path / "two"]))
    titles = [[column.title or "" for column in table.columns] for table in (*scale(both), *scale_flops(both))]
    assert [any(title.startswith("FD-end") for title in each) for each in titles] == [True, False]
    assert all(any(title.startswith(FD) for title in each) for each in titles)


def test_data_sets_and_ways_of_sampling_have_tables_of_their_own(tmp_path: Path) -> None:
    write_many(tmp_path, 2, 1, 1)
    for model in ("lamamba", "dit"):
        config = next(tmp_path.glob(f"trainings/{model}-*/config.json"))
        info: Any = json.loads(config.read_text())
        info["config"]["data"] = {"kind": "folder", "name": f"of-{model}", "size": 64}
        config.write_text(json.dumps(info))
    assert [table.rows for table in scale(evidence(tmp_path))] == [[]]  # no data set has two models
    both, other = tmp_path / "both", tmp_path / "other"
    write_many(both, 2, 1, 1)
    write_many(other, 2, 1, 1, study="again")

    def in_50_steps(line: Line) -> Line:
        way = {"generation": {"sampler": "ddim", "steps": 50}, "generation_protocol": "g50"}
        return line | way if "generation" in line else line

    change(other, "trainings/*/samples/*/record.jsonl", in_50_steps)
    tables = scale(Evidence(read([both, other])))
    assert [table.name for table in tables] == ["scale_g250", "scale_g50"]
    for table, words in zip(tables, ("250 ddim steps", "50 ddim steps"), strict=True):
        assert any(note.startswith(f"Samples: {words}") for note in table.notes)
        assert len(table.rows) == 2 and all(row[f"{FD}_n"] == row["held-out loss_n"] == 1 for row in table.rows)


def test_only_models_as_such_are_compared(tmp_path: Path) -> None:
    for window in (8, 4):
        for family in ("dit", "lamamba"):
            variant = {"model": f"{family}_demo", "model.window_size": window}
            lines = [cost(), trained(), scored(float(window))]
            write(tmp_path, f"{family}-{window}", lines, family, f"{family}-X", variant=variant, entry={"place": 0})
    write(tmp_path, "adm-2", [cost(), trained(), scored(2.0)], "adm", "ADM-2", variant={"model": "adm_demo", "n": 1})
    (table,) = scale(evidence(tmp_path))
    # All have the window of the base; of ADM there is no such variant, so that its first one stands for it.
    values = {row["model"]: float(row["FD-EffNetLite0-512_mean"]) for row in parsed(table.csv())}
    assert values == {"dit_demo": 8.0, "lamamba_demo": 8.0, "adm_demo": 2.0}
    assert table.notes[0] == (
        "Of demo, runs with window 8 stand here; the other variants are in the table of the study."
    )


def test_a_training_of_two_studies_is_there_once(tmp_path: Path) -> None:
    """The model `a` of `window` is a training of `scale` too, which has as many models and is first; `c` is new."""
    for place, model in enumerate(("a", "b")):
        who: Line = {
            "variant": {"model": model},
            "title": f"Model-{model}",
            "study": "scale",
            "entry": {"place": place},
        }
        write(tmp_path, model, [cost(), trained(), scored(1.0)], **who)
    write(tmp_path, "c", [cost(), trained(), scored(1.0)], variant={"model": "c", "n": 1}, title="C", study="window")
    scale_listing, listing = (json.loads((tmp_path / name / STUDY).read_text()) for name in ("scale", "window"))
    listing["runs"].append({**scale_listing["runs"][0], "study": "window", "variant": {"model": "a", "n": 1}})
    (tmp_path / "window" / STUDY).write_text(json.dumps(listing))
    (table,) = scale(evidence(tmp_path))
    assert [row["label"] for row in table.rows] == ["C, n 1", "Model-a", "Model-b"]


def test_runs_that_are_not_done_are_marked(tmp_path: Path) -> None:
    write_many(tmp_path, 2, 1, 2)
    change(tmp_path, "trainings/dit-*/record.jsonl", lambda line: {**line, "state": "diverged", "error": "loss is nan"})
    (table,) = scale(evidence(tmp_path))
    cells = {row["Family"]: row[FD] for row in markdown(table.markdown())}
    assert cells["DiT"].endswith(" §") and "§" not in cells["LaMamba-Diff"]
    assert any("§ with a run that is not done. diverged (train: loss is nan): DiT-S/2." in note for note in table.notes)


def test_a_training_that_is_unfinished_holds_nobody_back(tmp_path: Path) -> None:
    write_many(tmp_path, 2, 1, 2)
    home = sorted(tmp_path.glob("trainings/dit-*"))[0]
    (home / "record.jsonl").write_text("")
    change(home, "samples/*/record.jsonl", lambda line: line | {"images_seen": min(line["images_seen"], 20_480_000)})
    (table,) = scale(evidence(tmp_path))
    assert " at 25.6 M images" in table.caption and table.caption.endswith("at which most runs have a score.")
    seed = json.loads((home / "config.json").read_text())["seed"]
    assert f"Not trained, or not scored, up to 25.6 M images: DiT-S/2 (seed {seed})." in table.notes
    assert [row["n"] for row in table.rows] == [1, 2]


def test_one_model_makes_no_table(tmp_path: Path) -> None:
    write_many(tmp_path, 1, 1, 3)
    for make, name in ((scale, "scale"), (scale_flops, "scale_flops"), (scale_hours, "scale_hours")):
        assert [(table.name, table.rows) for table in make(evidence(tmp_path))] == [(name, [])]


WAY = {"sampler": "ancestral", "steps": 250, "guidance": 1.0, "labels": "random", "weights": "ema", "encoder": "sd-vae"}
FID = {
    "metric": "FID", "count": 50_000, "reference": "VIRTUAL_imagenet256_labeled.npz", "generation": WAY,
    "generation_protocol": "g", "evaluation": {"images": [256, 256, 3]}, "images_seen": 102_400_000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "shown"),
    [
        ({}, True),
        ({"images_seen": 51_200_000}, False),
        ({"metric": "FID-10k", "count": 10_000}, False),
        ({"reference": "cifar10"}, False),
        ({"evaluation": {"images": [512, 512, 3]}}, False),
        ({"generation": {**WAY, "guidance": 1.5}}, False),
        ({"generation": {**WAY, "steps": 50}}, False),
        ({"generation": {**WAY, "labels": "none"}}, False),
        ({"generation": {**WAY, "encoder": "pixels"}}, False),
        ({"generation": {**WAY, "objective": "ddpm", "schedule": "linear"}}, True),
        ({"generation": {**WAY, "objective": "v"}}, False),
        ({"generation": {**WAY, "objective": "ddpm", "schedule": "cosine"}}, False),
    ],
)
def test_published_rows_stand_below_scores_of_their_protocol(edit: Line, shown: bool, tmp_path: Path) -> None:
    for value, (family, title) in enumerate((("dit", "DiT-S/2"), ("lamamba", "LaMamba-Diff-S")), start=60):
        write(tmp_path, family, [cost(), trained(), {**scored(float(value)), **FID, **edit}], family, title)
    (table,) = scale(evidence(tmp_path))
    rows = markdown(table.markdown())
    assert [row["Size"] for row in rows[:2]] == ["S/2", "S"] and (len(rows) == 2 + 23) == shown == (len(rows) > 2)
    if shown:
        ours, paper = rows[0], next(row for row in rows[2:] if (row["Family"], row["Size"]) == ("DiCo", "XL"))
        assert (ours["Source"], ours["FID"]) == ("these runs", "60.00")
        assert (paper["FID"], paper["Printed (G)"], paper["MACs (G)"]) == ("11.67", "87.30", "-")
        assert paper["Source"] == "arXiv 2505.11196 \\*" and paper["Seeds"] == "-"
        assert rows[2]["Source"] == "arXiv 2212.09748"
        assert any("not compared with the source" in note for note in table.notes)


def test_settings_in_which_trainings_differ_are_named(tmp_path: Path) -> None:
    write_many(tmp_path / "a", 1, 1, 1, study="first")
    write_many(tmp_path / "b", 2, 1, 1, study="second")
    change(tmp_path / "b", "trainings/*/record.jsonl", lambda line: {**line, "precision": "float32"})
    for path in tmp_path.glob("b/trainings/*/config.json"):
        info = json.loads(path.read_text())
        info["config"]["train"] |= {"batch_size": 64, "steps": 7}
        path.write_text(json.dumps(info))
    (table,) = scale(Evidence(read([tmp_path / "a", tmp_path / "b"])))
    which = "(DiT-S/2, LaMamba-Diff-S [second])"
    assert [note for note in table.notes if note.startswith("Trainings differ")] == [
        f"Trainings differ in train.batch_size: 256 (LaMamba-Diff-S [first]); 64 {which}.",
        f"Trainings differ in train.precision: bfloat16 (LaMamba-Diff-S [first]); float32 {which}.",
    ]
    alone = scale(Evidence(read([tmp_path / "b"])))[0]
    assert not any(note.startswith("Trainings differ") for note in alone.notes)


def test_hours_name_the_seed_that_they_leave_out(tmp_path: Path) -> None:
    write_many(tmp_path, 2, 2, 3)
    (tmp_path / "scale/lamamba_b-s1").resolve().joinpath("record.jsonl").write_text("")
    (table,) = scale_hours(evidence(tmp_path))
    assert table.notes[-1].endswith("or they changed it: LaMamba-Diff-B (seed 1).")
    hours = next(one for one in scaling_of(evidence(tmp_path)) if one.column == FD).curves["hours"]
    counts = {group: sorted(values) for curve in hours for group, values in curve.values.items()}
    assert {tuple(seeds) for group, seeds in counts.items() if "lamamba_b" in group} == {(0, 2)} and len(counts) == 4
