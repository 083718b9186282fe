"""Tables of ablations: rows in the study's order, the base, differences as scipy has them, cost, speed, and a pivot."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lamabench.reports.ablation import ablations
from lamabench.reports.evidence import Evidence
from lamabench.reports.report import build
from lamabench.reports.runs import read
from lamabench.reports.table import Table
from run_folders import H100, Line, cost, line, made, markdown, parsed, scored, swept, timed, write, write_many
from scipy import stats

FD = "FD-EffNetLite0-512"
WINDOWS = {
    32: [20.0, 21.0, 19.5, 20.5, 22.0],
    4: [23.1, 24.3, 22.4, 23.8, 25.0],
    8: [21.2, 22.1, 20.9, 21.6, 23.4],
    16: [20.2, 20.9, 19.9, 20.1, 22.3],
}


def fill(root: Path, windows: dict[int, list[float]] = WINDOWS, study: str = "window") -> None:
    """A study of windows, the base first, with a Fréchet distance and a precision."""
    for window, values in windows.items():
        for seed, value in enumerate(values):
            lines = [cost(10_000_000 + 100_000 * window), timed("train", 100.0 - window), made(scored(value))]
            lines.append(made(scored(0.9 - value / 100, "p2", "Precision-X")))
            write(
                root, f"w{window}-s{seed}", lines, "lamamba", "LaMamba-Diff-S", {"model.window_size": window}, seed,
                study=study, model={"window_size": window},
            )  # fmt: skip


def tables(*roots: Path) -> dict[str, Table]:
    return {table.name: table for table in ablations(Evidence(read(roots)))}


def test_rows_are_in_the_order_of_the_study_with_differences_of_scipy(tmp_path: Path) -> None:
    fill(tmp_path)
    (table,) = tables(tmp_path).values()
    assert table.name == "ablation_window" and table.caption == "Study window (LaMamba-Diff-S)."
    rows = parsed(table.csv())
    assert [row["label"] for row in rows] == ["window 32 (base)", "window 4", "window 8", "window 16"]
    assert [row["base"] for row in rows] == ["True", "False", "False", "False"]
    verdicts = []
    for row, (window, values) in zip(rows, WINDOWS.items(), strict=True):
        assert (row["model.window_size"], row["n"], row["state"]) == (str(window), "5", "done")
        mean, half = np.mean(values), stats.t.ppf(0.975, 4) * stats.sem(values)
        assert float(row[f"{FD}_mean"]) == pytest.approx(mean) and float(row[f"{FD}_ci95"]) == pytest.approx(half)
        assert float(row["macs_ratio"]) == pytest.approx((10 + 0.1 * window) / 13.2)
        assert float(row["train_ratio"]) == pytest.approx((100 - window) / 68)
        if window == 32:
            assert row[f"{FD}_difference"] == row[f"{FD}_verdict"] == ""
            continue
        pairs = stats.ttest_rel(values, WINDOWS[32])
        low, high = pairs.confidence_interval(0.95)
        assert float(row[f"{FD}_difference"]) == pytest.approx((low + high) / 2)
        assert float(row[f"{FD}_difference_ci95"]) == pytest.approx((high - low) / 2)
        assert row[f"{FD}_difference_n"] == "5"
        assert (row[f"{FD}_verdict"] == "inconclusive") == (pairs.pvalue > 0.05)
        verdicts.append((row[f"{FD}_verdict"], row["Precision-X_verdict"], row[f"{FD}_reason"]))
    assert verdicts == [
        ("worse", "worse", ""), ("worse", "worse", ""), ("inconclusive", "inconclusive", "the interval includes 0"),
    ]  # fmt: skip


def test_cells_are_read_as_a_paper_has_them(tmp_path: Path) -> None:
    fill(tmp_path)
    (table,) = tables(tmp_path).values()
    base, four, *_, sixteen = markdown(table.markdown())
    assert (base["Variant"], base[FD], base[f"Δ {FD}"], base["Training, ×"]) == (
        "window 32 (base)", "20.60 ± 1.19", "base", "1.00",
    )  # fmt: skip
    assert (four[f"Δ {FD}"], four["MACs, ×"], four["State"]) == ("+3.12 ± 0.22 worse", "0.788", "done")
    assert sixteen[f"Δ {FD}"] == "+0.08 ± 0.41 inconclusive"
    assert "Inconclusive: the interval includes 0 (window 16)." in table.notes
    assert any(note.startswith("No best is bold, because the two best are not dist") for note in table.notes)
    assert "Samples: 50 ddim steps, clipped (protocol g50)." in table.notes
    text = table.latex()
    assert text.isascii() and r"$\Delta$" in text and "State" not in text


def test_differences_that_hold_together_pool_the_variance(tmp_path: Path) -> None:
    """A variant of one seed has no interval, and one whose seeds were drawn in several ways does not compare."""
    fill(tmp_path, {32: [20.0, 21.0, 20.2], 4: [24.0, 24.6], 8: [20.4, 21.3], 16: [21.0]})
    for seed in (0, 1):
        other, lines = {"model.window_size": 2}, [made(scored(30.0 + seed), steps=25 + seed)]
        write(tmp_path, f"w2-s{seed}", lines, "lamamba", "LaMamba-Diff-S", other, seed, study="window")
    (table,) = tables(tmp_path).values()
    pooled = np.sqrt((2 * np.var([20.0, 21.0, 20.2], ddof=1) + 0.6**2 / 2 + 0.9**2 / 2) / 4)
    half = stats.t.ppf(1 - 0.025 / 2, 4) * pooled * np.sqrt(1 / 2 + 1 / 3)
    cells = [row["Δ together"] for row in markdown(table.markdown())]
    assert cells == ["-", f"+3.9 ± {half:.1f}", f"+0.4 ± {half:.1f}", "-", "-"]
    row = parsed(table.csv())[1]
    assert float(row[f"{FD}_together"]) == pytest.approx(3.9) and row[f"{FD}_together_n"] == "2"
    assert float(row[f"{FD}_together_ci95"]) == pytest.approx(half)
    words = "all 2 variants of two seeds or more together (Bonferroni's correction)"
    assert any(words in note and f"{pooled:.3g}, 4 degrees of freedom" in note for note in table.notes)
    fill(tmp_path / "apart", {32: [20.0, 21.0, 20.2], 4: [24.0, 24.6, 24.1], 8: [20.0, 80.0, 150.0]})
    (apart,) = tables(tmp_path / "apart").values()
    assert "Δ together" not in apart.markdown() and "Bartlett's test: p = 9e-07)" in apart.markdown()


def test_a_base_that_cannot_be_read_leaves_the_others(tmp_path: Path) -> None:
    fill(tmp_path)
    for seed in range(5):
        (tmp_path / "window" / f"w32-s{seed}").resolve().joinpath("record.jsonl").write_text("junk\n")
    (table,) = tables(tmp_path).values()
    assert [row["label"] for row in table.rows] == ["window 4", "window 8", "window 16"]
    build([tmp_path], tmp_path / "out", pdf=False)
    assert "w32-s0 is left out" in (tmp_path / "out" / "ablation_window.md").read_text()


def test_what_is_not_done_is_shown_as_such(tmp_path: Path) -> None:
    fill(tmp_path)
    out_of_memory = line("train", "oom", error="tried 3 GiB")
    for seed, lines in enumerate(([made(scored(19.0)), out_of_memory], [cost()], [out_of_memory])):
        variant = {"model.window_size": 64}
        write(tmp_path, f"w64-s{seed}", lines, "lamamba", "LaMamba-Diff-S", variant, seed, study="window")
    (table,) = tables(tmp_path).values()
    row = table.rows[-1]
    assert (row["n"], row["state"], row["status"]) == (1, "incomplete", "2 oom, 1 not started")
    cells = markdown(table.markdown())[-1]
    assert cells[FD] == "19.00 (1 oom)" and cells[f"Δ {FD}"] == "-1.00 inconclusive"
    assert "Inconclusive: 1 common seed, and 3 are needed (window 64)." in table.notes
    assert "w64-s0, w64-s2 (oom): train: tried 3 GiB" in table.notes
    assert r"$\mathsection$ window 64: 2 oom, 1 not started." in table.latex()


def test_a_damaged_seed_of_the_base_leaves_the_base(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "window" / "w32-s0").resolve().joinpath("record.jsonl").write_text("junk\n")
    (table,) = tables(tmp_path).values()
    assert [(row["label"], row["n"]) for row in table.rows][:2] == [("window 32 (base)", 4), ("window 4", 5)]
    assert table.rows[1][f"{FD}_difference_n"] == 4
    assert any(note.startswith("w32-s0 is left out: ") for note in table.notes)


def test_speeds_are_compared_in_equal_circumstances_only(tmp_path: Path) -> None:
    """Sizes are columns, other devices are left out, and a disturbed one is marked."""
    a_cpu: Line = {"provenance": {**H100, "device": "A CPU"}}
    lines = {
        "one": [swept("train", 100.0, 32), swept("train", 150.0, 64), swept("train", 40.0, input_size=16)],
        "two": [swept("train", 120.0, 32, compile="whole-step"), {**swept("train", 9.0), **a_cpu}],
        "three": [swept("train", 20.0, input_size=16, disturbed="load 9"), swept("forward", 1.0)],
    }
    for name, timings in lines.items():
        write(tmp_path, name, [cost(), *timings], variant={"v": name})
    (table,) = tables(tmp_path).values()
    _, two, three = parsed(table.csv())
    assert float(two["train_ratio_8_px"]) == 0.8 and two["train_ratio_16_px"] == ""  # each at its best batch
    assert float(three["train_ratio_16_px"]) == 0.5 and three["train_ratio_8_px"] == ""
    assert not any("CPU" in name or name.startswith("forward") for name in two)
    cells = markdown(table.markdown())[2]
    assert cells["Training, × (16 px)"] == "0.500 (disturbed)" and cells["Training, × (8 px)"] == "-"


def test_two_axes_have_a_pivot(tmp_path: Path) -> None:
    values = {
        (5e-5, "dit_s"): 30.0, (5e-5, "unet_s"): 33.0, (1e-4, "dit_s"): 28.0, (1e-4, "unet_s"): 30.05,
        (2e-4, "dit_s"): 31.0,
    }  # fmt: skip
    for (lr, model), value in values.items():
        for seed, luck in enumerate((0.0, 0.3, -0.2)):
            lines = [cost(), made(scored(value + luck + (0.2 * (seed - 1) if value == 30.05 else 0.0)))]
            variant = {"train.lr": lr, "model": model}
            write(tmp_path, f"{model}-{lr}-s{seed}", lines, model[:-2], model.upper(), variant, seed, study="lr")
    failed = line("train", "diverged", error="the loss is nan")
    write(
        tmp_path, "unet_s-0.0002-s0", [failed], "unet", "UNET_S", {"train.lr": 2e-4, "model": "unet_s"}, study="lr"
    )  # fmt: skip
    both = tables(tmp_path)
    assert list(both) == ["ablation_lr", f"ablation_lr_{FD}"]
    pivot = both[f"ablation_lr_{FD}"]
    assert markdown(pivot.markdown()) == [
        {"lr": "5e-5", "DIT_S": "30.03 ± 0.63 (base)", "UNET_S": "33.03 ± 0.63"},
        {"lr": "1e-4", "DIT_S": "**28.03 ± 0.63**", "UNET_S": "30.08 ± 0.63 †"},
        {"lr": "2e-4", "DIT_S": "31.03 ± 0.63", "UNET_S": "diverged"},
    ]
    first = parsed(pivot.csv())[0]
    assert (first["train.lr"], first["UNET_S_verdict"], first["DIT_S_n"]) == ("5e-5", "worse", "3")
    labels = [row["label"] for row in both["ablation_lr"].rows]
    assert labels[:3] == ["DIT_S, lr 5e-5 (base)", "UNET_S, lr 5e-5", "DIT_S, lr 1e-4"]


def test_one_variant_single_commands_and_other_studies_have_none(tmp_path: Path) -> None:
    fill(tmp_path, {32: [1.0, 2.0]}, "one")
    assert tables(tmp_path) == {}
    fill(tmp_path, {32: [1.0], 8: [2.0]}, "commands")
    listing = tmp_path / "commands" / ".study.json"
    listing.write_text(listing.read_text().replace('"file": "commands.yaml"', '"file": null'))
    assert tables(tmp_path) == {}
    fill(tmp_path, {32: [1.0], 8: [2.0]}, "two words")
    assert list(tables(tmp_path)) == ["ablation_two_words"]


def test_many_variants_in_words_of_the_study(tmp_path: Path) -> None:
    folder = write_many(tmp_path, 2, 4, 2, snapshots=2)
    (table,) = tables(tmp_path).values()
    question = json.loads((folder / ".study.json").read_text())["about"]["question"]
    assert table.caption == f"Study scale: {question}"
    assert [row["label"] for row in table.rows][:2] == ["LaMamba-Diff-S (base)", "LaMamba-Diff-B"]
    assert any("Here are 7." in note for note in table.notes)
    verdicts: set[Any] = {row.get("held-out loss_verdict") for row in table.rows[1:]}
    assert verdicts == {"inconclusive"}  # two seeds


def test_published_variants_of_the_scan_have_a_table_of_their_own(tmp_path: Path) -> None:
    for scan in ("cross", "continuous"):
        write(tmp_path, scan, [cost(), scored(3.0)], study="scan", variant={"model.scan": scan})
    ours, theirs = ablations(Evidence(read([tmp_path])))
    assert (ours.name, theirs.name) == ("ablation_scan", "ablation_scan_published") and len(ours.rows) == 2
    rows = [(row["Variant"], row["FID"], row["Source"]) for row in markdown(theirs.markdown())]
    paper = "arXiv 2405.18428 \\*"
    assert rows == [
        ("causal", "175.84", paper), ("bidirectional", "69.28", paper), ("four directions", "62.06", paper),
    ]  # fmt: skip
    assert any("do not compare with" in note for note in theirs.notes) and "**" not in theirs.markdown()
