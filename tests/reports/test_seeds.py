"""The table and the figure over training seeds: intervals, the base, the best, and what is no seed."""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lamabench.reports.evidence import Evidence
from lamabench.reports.quality import quality_vs_flops
from lamabench.reports.report import build
from lamabench.reports.runs import read
from lamabench.reports.seeds import base_groups, seeds
from lamabench.reports.summary import summary
from lamabench.reports.table import Table
from run_folders import (
    Line,
    cost,
    drawn,
    made,
    markdown,
    parsed,
    put,
    scored,
    summary_rows,
    summary_text,
    trained,
    write,
)

FD = "FD-EffNetLite0-512"


def fill(root: Path, name: str, values: list[float], **more: Any) -> None:
    """A variant with a seed for each value."""
    for seed, value in enumerate(values):
        write(root, f"{name}-s{seed}", [made(scored(value))], variant={"variant": name}, seed=seed, **more)


def table(root: Path) -> Table:
    return seeds(summary(read([root])))


def rows(root: Path) -> dict[str, dict[str, str]]:
    return {row["label"]: row for row in parsed(table(root).csv())}


def test_seeds(tmp_path: Path) -> None:
    root, values = tmp_path / "runs", [60.0, 62.0, 67.0]
    for seed, value in enumerate(values):
        records = [cost(), scored(value), *([trained(0.5)] if seed else [])]
        write(root, f"scan-s{seed}", records, variant={"scan": "cross"}, seed=seed)
    write(root, "alone", [cost(20_000_000), scored(70.0)], variant={"scan": "none"}, seed=7)
    row, alone = parsed(table(root).csv())
    assert row["label"] == "scan cross (base)" and row["n"] == "3"
    half = 4.302653 * statistics.stdev(values) / 3**0.5  # t with 2 degrees of freedom, 0.975
    assert float(row[f"{FD}_mean"]) == 63.0
    assert float(row[f"{FD}_ci95"]) == pytest.approx(half, rel=1e-6)
    assert (row[f"{FD}_n"], row["final_loss_n"], row["final_loss_ci95"]) == ("3", "2", "0.0")
    assert (alone["n"], alone[f"{FD}_mean"], alone[f"{FD}_ci95"], alone[f"{FD}_n"]) == ("1", "70.0", "", "1")
    assert (alone[f"{FD}_verdict"], alone[f"{FD}_difference_n"]) == ("inconclusive", "0")
    people, other = markdown(table(root).markdown())
    assert people[FD] == "63.00 ± 8.96" and people["Final loss"] == "0.5000 ± 0.0000 (n=2)"
    assert other[FD] == "70.00 †" and other["Final loss"] == "-"  # one seed has no ±
    labels = [row["label"] for row in summary_rows([root])]
    assert labels == [*(f"scan cross, seed {seed}" for seed in range(3)), "no scan"]
    figure = quality_vs_flops(Evidence(read([root])))
    assert not isinstance(figure, str)
    axes: Any = figure.axes[0]
    middle, lone = axes.containers
    low, high = middle.lines[2][0].get_segments()[0][:, 1]
    assert middle.lines[0].get_ydata()[0] == 63.0 and lone.lines[0].get_xdata()[0] == 0.041  # FLOPs, not MACs
    assert (high - low) / 2 == pytest.approx(half, rel=1e-6) and not lone.has_yerr
    words = " ".join(axes.get_ylabel().split())
    assert "lower is better" in words and "512 samples against 1797 digits" in words
    assert "FLOPs" in axes.get_xlabel() and "95 % intervals" in " ".join(figure.get_supxlabel().split())
    texts = {" ".join(text.get_text().split()) for text in axes.texts}
    assert texts == {"scan cross (3 seeds)", "no scan"}


def test_one_seed_shows_its_sampling_error_and_several_their_interval(tmp_path: Path) -> None:
    for seed, value in enumerate([60.0, 62.0, 67.0]):
        score = {**scored(value), "sampling_error": 0.5}
        write(tmp_path, f"a-s{seed}", [score], variant={"variant": "a"}, seed=seed)
    write(tmp_path, "b-s0", [{**scored(70.0), "sampling_error": 0.25}], variant={"variant": "b"})
    several, one = markdown(table(tmp_path).markdown())
    title = f"{FD}, sampling s.e. of one seed"
    assert (several[FD], several[title]) == ("63.00 ± 8.96", "-")
    assert (one[FD], one[title]) == ("70.00 †", "0.25")
    assert any("says nothing about other trainings" in note for note in table(tmp_path).notes)


def test_rows_say_what_is_inconclusive_against_the_base(tmp_path: Path) -> None:
    for name, values in {"z": [60.0, 62.0, 67.0], "a": [59.0, 63.0, 66.9], "b": [50.0, 52.5, 57.0]}.items():
        fill(tmp_path, name, values)  # the first variant is the base, whatever its name
    by_label = rows(tmp_path)
    better, close = by_label["b"], by_label["a"]
    assert "z (base)" in by_label
    assert (better[f"{FD}_verdict"], close[f"{FD}_verdict"]) == ("better", "inconclusive")
    assert float(better[f"{FD}_difference"]) == pytest.approx(-29.5 / 3)
    cells = {row["Model"]: row[FD] for row in markdown(table(tmp_path).markdown())}
    assert cells["a"].endswith(" †") and "†" not in cells["z (base)"]
    assert cells["b"].startswith("**53.17 ± ")  # it differs from the second too
    text = table(tmp_path).latex()
    assert r"$\dagger$" in text and r"\textbf{53.17 $\pm$ " in text and text.isascii()
    assert text.index(r"\end{tabular}") < text.index(r"Student's t") < text.index(r"\end{table}")
    assert "53.17 ± 8.81 *" in summary_text([tmp_path]) and "*: the best," in summary_text([tmp_path])


def test_the_best_is_bold_only_if_it_differs_from_the_second(tmp_path: Path) -> None:
    fill(tmp_path, "a", [60.0, 62.0, 67.0])
    fill(tmp_path, "b", [59.9, 62.1, 66.8])
    assert "**" not in table(tmp_path).markdown()
    (why,) = (note for note in table(tmp_path).notes if "bold" in note)
    assert why == f"No best is bold, because the two best are not distinguishable (the interval includes 0): {FD}."
    few = tmp_path / "few"
    fill(few, "a", [60.0, 62.0])
    fill(few, "b", [10.0, 12.0])
    assert "**" not in table(few).markdown() and "2 common seeds, and 3 are needed" in table(few).markdown()


def test_nothing_is_bold_across_ways_of_sampling_unless_the_study_asks_for_them(tmp_path: Path) -> None:
    def case(root: Path, ways: list[Line], **more: Any) -> Table:
        for name, way, start in zip("ab", ways, (60.0, 20.0), strict=True):
            for seed in range(3):
                row = scored(start + 2.0**seed)
                lines = [made(row, **way) if way else row]
                write(root, f"{name}-s{seed}", lines, variant={"variant": name}, seed=seed, **more)
        return table(root)

    assert case(tmp_path / "one", [{"steps": 50}, {"steps": 50}]).markdown().count("**") == 2
    design = case(tmp_path / "design", [{"steps": 50}, {"steps": 2}])  # a file of a study says so
    assert design.markdown().count("**") == 2
    assert sum(note.startswith(("Samples of a:", "Samples of b:")) for note in design.notes) == 2
    for name, ways, why in (
        ("ways", [{"steps": 50}, {"steps": 2}], "made in several ways"),
        ("old", [{}, {}], "not on"),
    ):
        root = tmp_path / name
        case(root, ways)
        listing = root / "demo" / ".study.json"
        listing.write_text(listing.read_text().replace('"file": "demo.yaml"', '"file": null'))
        assert "**" not in table(root).markdown() and why in table(root).markdown()


def test_samples_that_were_added_by_hand_have_no_best(tmp_path: Path) -> None:
    """One checkpoint: 25 steps, and 2 steps with guidance 4."""
    for seed in range(3):
        for value, way in ((268.5, {"steps": 25}), (261.9, {"steps": 2, "guidance": 4.0})):
            write(tmp_path, f"one-s{seed}", [made(scored(value + seed), **way)], seed=seed, **way)
    text = table(tmp_path).markdown()
    assert "**" not in text and "because the samples were made in several ways" in text
    assert {row[f"{FD}_verdict"] for row in rows(tmp_path).values()} == {"", "inconclusive"}


def test_a_mean_over_seeds_has_one_generation_protocol(tmp_path: Path) -> None:
    """Trainings of which the samples of one were drawn in another way, or were drawn in another way too."""
    for seed, ways in enumerate([[50], [50, 5], [50], [5]]):
        for steps in ways:
            lines = [made(scored(60.0 + seed if steps == 50 else 200.0 + seed), steps=steps)]
            write(tmp_path, f"one-s{seed}", lines, seed=seed, steps=steps)
    means = {label: (row["n"], float(row[f"{FD}_mean"])) for label, row in rows(tmp_path).items()}
    assert means == {"50 sampling steps (base)": ("3", 61.0), "5 sampling steps": ("2", 202.0)}
    assert "**" not in table(tmp_path).markdown()


def test_what_is_kept_of_samples_makes_no_variant(tmp_path: Path) -> None:
    for seed, keep in enumerate(("images", "features", None)):
        for steps in (50, 5):
            more = {} if keep is None else {"keep": keep if steps == 50 else "images"}
            lines = [made(scored(60.0 + seed), steps=steps)]
            write(tmp_path, f"one-s{seed}", lines, seed=seed, steps=steps, **more)
    assert [row["n"] for row in rows(tmp_path).values()] == ["3", "3"]


def test_folders_and_sample_seeds_of_one_training_are_one_seed(tmp_path: Path) -> None:
    fill(tmp_path / "here", "a", [60.0, 62.0])
    fill(tmp_path / "there", "a", [64.0])
    runs = read([tmp_path / "here", tmp_path / "there"])
    (row,) = parsed(seeds(summary(runs)).csv())
    assert (row["n"], row[f"{FD}_n"], row[f"{FD}_mean"]) == ("2", "2", "62.0")  # the mean of (60 + 64) / 2 and 62
    root = tmp_path / "sampled"
    for seed, draw, value in ((0, 5, 1.0), (0, 6, 3.0), (1, 5, 4.0), (1, 6, 8.0)):
        variant = {"model": "dit_demo", "sample.seed": draw}
        write(root, f"d{draw}-s{seed}", [scored(value)], variant=variant, seed=seed)
    (row,) = parsed(table(root).csv())
    assert (row["label"], row["n"], row[f"{FD}_mean"]) == ("DiT-demo (base)", "2", "4.0")
    assert summary_rows([root])[0]["label"] == "DiT-demo, seed 0, sample seed 5"


def test_two_roots_of_one_study_with_other_settings_are_two_variants(tmp_path: Path) -> None:
    for root, depth in (("here", 1), ("there", 2)):
        fill(tmp_path / root, "a", [60.0, 62.0], model={"depth": depth})
    runs = read([tmp_path / "here", tmp_path / "there"])
    assert [row["n"] for row in parsed(seeds(summary(runs)).csv())] == ["2", "2"]


def test_words_stand_under_the_table(tmp_path: Path) -> None:
    row = {**made(scored(60.0)), "floor": 3.25, "note": "512 samples, fewer than twice the 1280 features"}
    row["evaluation"] = {"network": "efficientnet_lite0", "weights": "ab" * 32, "metric": "fd", "settings": {}}
    write(tmp_path, "one", [drawn(), row, {**row, "metric": "KD-X", "floor": None, "note": None, "protocol": "p2"}])
    loss = {"metric": "held-out loss", "features": None, "protocol": "p3", "evaluation": {"timesteps": [1, 2]}}
    write(tmp_path, "two", [{**scored(0.25), **loss, "samples": None}], title="DiT-two")
    said = {"generation": {"words": "Heun, 18 steps"}, "generation_protocol": "g1"}
    write(tmp_path, "three", [{**scored(60.0), **said}], title="DiT-three", variant={"v": 3})
    notes = summary(read([tmp_path])).notes
    assert f"{FD}: 512 samples, fewer than twice the 1280 features." in notes
    (fd,) = (note for note in notes if note.startswith(f"{FD}: 512 samples against"))
    assert "Floor (images of the reference against its others): 3.25." in fd and "weights abababababab." in fd
    assert not any("Scored: ." in note or "metric fd" in note for note in notes)
    assert any("timesteps 1 × 2" in note and note.startswith("held-out loss: 512 images ag") for note in notes)
    assert "Samples of DiT-three, v 3: Heun, 18 steps (protocol g1)." in notes
    assert "Samples of DiT-demo: 50 ddim steps, clipped (protocol g50)." in notes
    build([tmp_path], tmp_path / "out")
    assert all(note in (tmp_path / "out" / "README.md").read_text() for note in notes)


def test_other_peoples_samples_have_no_training_seed(tmp_path: Path) -> None:
    for name, values in (("a", [60.0, 62.0, 67.0]), ("b", [50.0, 52.5, 57.0])):
        fill(tmp_path, name, values)
    row = {**scored(1.0), "generation": {"source": "unknown"}, "generation_protocol": "g0", "samples": "ab" * 32}
    info = {"kind": "model", "key": "c" * 12, "study": "foreign", "name": "edm", "family": "foreign", "model": "edm"}
    put(tmp_path / "models" / "edm", {**info, "title": "edm", "seed": None, "variant": {}, "config": {}}, [row])
    by_label = rows(tmp_path)
    edm = by_label["edm"]
    assert (edm["n"], edm[f"{FD}_n"], edm[f"{FD}_mean"]) == ("0", "0", "1.0")
    assert (edm[f"{FD}_ci95"], edm[f"{FD}_verdict"]) == ("", "")
    assert by_label["DiT-demo, b"][f"{FD}_verdict"] == "better"
    text = table(tmp_path).markdown()
    assert "**" not in text and "it is not on record how all samples were made" in text
    assert "Samples of edm: it is not on record how they were made." in text


def test_other_peoples_samples_of_a_study_are_held_against_its_base(tmp_path: Path) -> None:
    fill(tmp_path, "a", [60.0, 62.0, 67.0])
    runs = read([tmp_path])
    info = {key: value for key, value in runs[0].info.items() if key not in ("of_file", "place")}
    theirs = replace(runs[0], group="edm", info={**info, "name": "edm", "seed": None})
    assert base_groups([*runs, theirs])["edm"] == runs[0].group
    (_, line) = parsed(seeds(summary([*runs, theirs])).csv())
    assert (line[f"{FD}_verdict"], line[f"{FD}_difference_n"]) == ("inconclusive", "0"), "no seed in common"


def test_a_score_without_samples_has_a_best(tmp_path: Path) -> None:
    """A held-out loss, which the weights have at several steps: the furthest counts."""
    loss = {"metric": "held-out loss", "features": None, "protocol": "p3", "samples": None}
    for name, values in (("a", [0.5, 0.51, 0.52]), ("b", [0.4, 0.412, 0.421])):
        for seed, value in enumerate(values):
            early = {**scored(value + 1), **loss, "checkpoint_step": 200}
            lines = [{**scored(value), **loss, "checkpoint_step": 600}, early]
            write(tmp_path, f"{name}-s{seed}", lines, variant={"variant": name}, seed=seed)
    cells = [row["held-out loss"] for row in markdown(table(tmp_path).markdown())]
    assert cells == ["0.5100 ± 0.0248", "**0.4110 ± 0.0262**"]
    assert not any(note.startswith("Samples") for note in table(tmp_path).notes)


def test_seeds_at_different_steps_are_said(tmp_path: Path) -> None:
    for seed, step in enumerate((600, 600, 200)):
        write(tmp_path, f"a-s{seed}", [scored(1.0)], variant={"variant": "a"}, seed=seed, step=step)
    fill(tmp_path, "b", [0.5, 0.5, 0.5])
    line = "a (base): its seeds have weights of different steps (200, 600)."
    assert line in table(tmp_path).notes
    text = table(tmp_path).markdown()
    assert "**" not in text and "because seeds of one variant have weights of different steps" in text
    assert rows(tmp_path)["b"][f"{FD}_verdict"] == "inconclusive"


def test_an_interval_has_a_digit(tmp_path: Path) -> None:
    fill(tmp_path, "a", [12345.1, 12345.2, 12345.18])  # the deviation is 0.0529, t 4.303
    fill(tmp_path, "b", [12345.0, 12345.0, 12345.0])
    assert [row[FD] for row in markdown(table(tmp_path).markdown())] == ["12,345.2 ± 0.1", "**12,345 ± 0**"]


def test_a_mean_with_a_run_that_is_not_done_says_so(tmp_path: Path) -> None:
    for name, values in (("a", [60.0, 62.0, 67.0]), ("b", [50.0, 52.5, 57.0])):
        fill(tmp_path, name, values)
    (home,) = {path.resolve() for path in tmp_path.glob("*/b-s1")}
    (home / "metrics.jsonl").write_text('{"step": 1, "images": 64, "loss": 0.5}\n')
    (home / "record.jsonl").write_text("")
    cells = [row[FD] for row in markdown(table(tmp_path).markdown())]
    assert "unfinished" not in cells[0] and cells[1] == "**53.17 ± 8.81 (1 unfinished)**"
