"""The table and the figure of scaling curves: their data against the law that the records follow."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lamabench.reports.evidence import Evidence
from lamabench.reports.moments import hours_notes, hours_of, pauses
from lamabench.reports.runs import Run, read
from lamabench.reports.scale import scale
from lamabench.reports.scaling import scaling_of, scaling_table
from lamabench.reports.scaling_figure import scaling
from matplotlib.figure import Figure
from run_folders import (
    FD,
    H100,
    HELDOUT,
    IMAGES,
    LAWS,
    PRESETS,
    Line,
    cost,
    law,
    made,
    parsed,
    scored,
    trained,
    write,
    write_many,
)

GFLOPS = {family: [gflops for _, gflops in sizes] for family, (_, _, sizes) in PRESETS.items()}


def evidence_of(root: Path) -> Evidence:
    return Evidence(read([root]))


def rows(root: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    table = scaling_table(evidence_of(root))
    return {(row["metric"], row["family"], row["against"]): row for row in parsed(table.csv())}


def drawn(root: Path, name: str = "scaling") -> Figure:
    figures: Any = scaling(evidence_of(root))
    assert isinstance(figures, dict)
    return figures[name]


def test_the_table_has_the_law_that_the_records_follow(tmp_path: Path) -> None:
    write_many(tmp_path, 2, 4, 1, noise=0.0)
    by_name = rows(tmp_path)
    assert len(by_name) == 2 * 2 * 4  # metrics, families and measures
    for label, family in (("LaMamba-Diff", "lamamba"), ("DiT", "dit")):
        a, b, c = LAWS[family]
        row = by_name[FD, label, "forward FLOPs (G)"]
        assert (float(row["a"]), float(row["b"]), float(row["c"])) == pytest.approx((a, b, c), rel=1e-5)
        largest = GFLOPS[family][-1]
        assert float(row["at"]) == pytest.approx(4 * largest)
        assert float(row["predicted"]) == pytest.approx(law(family, 4 * largest), rel=1e-6)
        assert float(row["check_predicted"]) == pytest.approx(law(family, largest), rel=1e-5)
        assert float(row["check_measured"]) == pytest.approx(law(family, largest))
        assert float(row["check_error"]) == pytest.approx(0, abs=1e-5)
        assert (row["sizes"], row["seeds"], row["check_law"]) == ("4", "1", "a + b·C^-c")
        training = by_name[FD, label, "training FLOPs (1e18)"]  # 3 forward passes of each image
        scale = 3e9 * IMAGES / 1e18
        assert float(training["c"]) == pytest.approx(c, rel=1e-5)
        assert float(training["b"]) == pytest.approx(b * scale**c, rel=1e-4)
        hours = by_name[FD, label, "GPU-hours (H100 80GB HBM3, bfloat16)"]
        assert float(hours["c"]) == pytest.approx(c, rel=1e-5)  # hours are proportional to FLOPs there
    assert "a_low" not in by_name[FD, "DiT", "forward FLOPs (G)"]  # one seed has no interval


def test_intervals_hold_the_law_and_stand_in_cells(tmp_path: Path) -> None:
    write_many(tmp_path, 2, 4, 3)
    row = rows(tmp_path)[FD, "DiT", "forward FLOPs (G)"]
    for name, true in zip("abc", LAWS["dit"], strict=True):
        assert float(row[f"{name}_low"]) <= true <= float(row[f"{name}_high"])
    table = scaling_table(evidence_of(tmp_path))
    (cells,) = (one for one in table.rows if (one["metric"], one["family"], one["at"]) == (FD, "DiT", 4 * 237.3))
    text = {column.title: column.cell(cells) for column in table.shown()}
    assert text["c"] == f"{cells['c']:.3f} [{cells['c_low']:.3f}, {cells['c_high']:.3f}]"
    assert text["Next C"] == "949.2" and text["Predicted there"].endswith(f"{cells['predicted_high']:.1f}]")
    assert text["Check: measured"] == f"{cells['check_measured']:.1f}"
    error = 100 * (cells["check_predicted"] / cells["check_measured"] - 1)
    assert float(text["Check: error (%)"]) == pytest.approx(error, abs=0.06)
    assert any("25,600,000 images" in note for note in table.notes)


def test_the_figure_shows_points_laws_bands_and_checks(tmp_path: Path) -> None:
    write_many(tmp_path, 2, 3, 2, noise=0.01)
    evidence = evidence_of(tmp_path)
    figure = drawn(tmp_path)
    panels: list[Any] = figure.axes
    assert [axes.get_xlabel().split()[0] for axes in panels] == ["FLOPs", "FLOPs", "GPU-hours", "Parameters"]
    assert figure.get_figwidth() == 6.9
    points = [container.lines[0].get_data() for container in panels[0].containers]
    curves = {curve.series.family: curve for curve in scaling_of(evidence)[0].curves["forward"]}
    for family, three in (("dit", points[:3]), ("lamamba", points[3:])):
        np.testing.assert_allclose([x[0] for x, _ in three], GFLOPS[family][:3])
        means = [np.mean(list(curves[family].values[group].values())) for group in curves[family].groups]
        np.testing.assert_allclose([y[0] for _, y in three], means)
        np.testing.assert_allclose(means, [law(family, gflops) for gflops in GFLOPS[family][:3]], rtol=0.03)
    assert len(panels[0].collections) >= 2  # bands
    text = " ".join(figure.get_supxlabel().split())
    assert "DiT: L/2 from S/2, B/2: " in text and "by b·C^-c, measured" in text and "next " in text
    assert [label.get_text() for label in figure.legends[0].get_texts()] == ["DiT", "LaMamba-Diff"]
    assert set(scaling(evidence)) == {"scaling", f"scaling_{HELDOUT}".replace(" ", "_")}


def test_two_sizes_predict_nothing_and_one_has_no_figure(tmp_path: Path) -> None:
    write_many(tmp_path / "two", 1, 2, 1)
    row = rows(tmp_path / "two")[FD, "LaMamba-Diff", "forward FLOPs (G)"]
    assert row["sizes"] == "2" and "predicted" not in row and "a" not in row and float(row["c"]) > 0
    assert "predicts nothing from two sizes" in " ".join(drawn(tmp_path / "two").get_supxlabel().split())
    write_many(tmp_path / "one", 2, 1, 2)
    assert scaling(evidence_of(tmp_path / "one")) == "no family has scores of two sizes"
    assert scaling_table(evidence_of(tmp_path / "one")).rows == []


def test_labels_of_ticks_stand_apart() -> None:
    """Four narrow panels of numbers with many digits: training FLOPs of CIFAR-10."""
    figure = drawn(Path(__file__).parents[2] / "reports" / "records" / "cifar10" / "cifar10_scale")
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [label.get_window_extent() for label in axes.get_xticklabels() if label.get_text()]
        assert boxes and not any(left.x1 + 4 > right.x0 for left, right in pairwise(boxes))


def sizes_of(root: Path, values: list[float], **more: Any) -> None:
    """A family of four sizes, of which those beyond the values have a cost and no score."""
    for place, size in enumerate(("S", "B", "L", "XL")):
        name, scores = f"dit_{size.lower()}", [made(scored(values[place], metric=FD))] if place < len(values) else []
        lines = [cost(10_000_000 * 4**place, 1_000_000 * 2**place), *scores]
        write(root, name, lines, title=f"DiT-{size}", variant={"model": name}, **more)


def test_the_next_size_is_that_on_record(tmp_path: Path) -> None:
    sizes_of(tmp_path, [60.0, 40.0, 30.0])
    by_name = rows(tmp_path)
    row = by_name[FD, "DiT", "forward FLOPs (G)"]
    assert float(row["at"]) == pytest.approx((2 * 640_000_000 + 1e6) / 1e9)
    assert float(by_name[FD, "DiT", "parameters (M)"]["at"]) == 8.0
    # No training is on record: no hours, and three forward passes for each of 600 steps of 64 images.
    training = float(by_name[FD, "DiT", "training FLOPs (1e18)"]["at"])
    assert training == pytest.approx(3 * 1.281e9 * 38_400 / 1e18)
    assert {against for _, _, against in by_name if "hours" in against} == set()
    table = scaling_table(evidence_of(tmp_path))
    assert "1.281 (DiT-XL)" in table.markdown() and " by b·C^-c" in table.markdown()


def test_values_without_a_law_have_a_reason(tmp_path: Path) -> None:
    sizes_of(tmp_path, [30.0, 40.0, 50.0])
    assert rows(tmp_path)[FD, "DiT", "forward FLOPs (G)"]["why"] == "the value does not fall with size"
    assert "DiT: no law, because the value does not fall with size" in drawn(tmp_path).get_supxlabel()


def test_classes_and_protocols_are_never_mixed(tmp_path: Path) -> None:
    write_some: dict[str, Line] = {"classes": {"num_classes": 10}, "none": {"num_classes": 0}}
    for name, model in write_some.items():
        for place, size in enumerate(("S", "B")):
            preset = f"dit_{size.lower()}"
            lines = [cost(10_000_000 * 4**place), scored(60.0 - 20 * place, metric=FD)]
            variant = {"model": preset, "model.num_classes": model["num_classes"]}
            write(tmp_path, f"{preset}-{name}", lines, title=f"DiT-{size}", variant=variant, model=model)
    names = {metric for metric, _, _ in rows(tmp_path)}
    assert names == {FD, f"{FD} (unconditional)"}
    sizes_of(tmp_path / "other", [60.0, 40.0])
    write(tmp_path / "other", "dit_l", [scored(30.0, "p2", FD)], title="DiT-L", variant={"model": "dit_l"})
    assert {metric for metric, _, _ in rows(tmp_path / "other")} == {f"{FD}@p1"}


def test_hours_are_of_one_device(tmp_path: Path) -> None:
    for place, size in enumerate(("S", "B", "L")):
        name, value = f"dit_{size.lower()}", 60.0 - 15 * place
        moment = {"training_seconds": 3600.0 * 2**place, "images_seen": 38_400}
        where = {"provenance": H100} if place < 2 else {}
        lines = [cost(10_000_000 * 4**place), trained() | where | {"processes": 2}, scored(value, metric=FD) | moment]
        write(tmp_path, name, lines, title=f"DiT-{size}", variant={"model": name})
    (hours,) = (row for (_, _, against), row in rows(tmp_path).items() if "hours" in against)
    assert hours["against"] == "GPU-hours (H100 80GB HBM3, float32)" and hours["sizes"] == "2"
    assert any(
        "another device or in another precision: dit_l." in note for note in scaling_table(evidence_of(tmp_path)).notes
    )
    (one,) = scaling_of(evidence_of(tmp_path))
    assert [one.curves["hours"][0].compute[group] for group in one.curves["hours"][0].groups] == [2.0, 4.0]  # 2 GPUs


def test_hours_are_of_one_precision_and_of_the_processes_of_each_stretch(tmp_path: Path) -> None:
    stretches = [{"processes": 1}, {"processes": 4, "from_seconds": 3600.0}, {"processes": 2, "from_seconds": 7200.0}]
    for place, size in enumerate(("S", "B", "L")):
        moment = {"training_seconds": 9000.0, "images_seen": 38_400}
        early = {"training_seconds": 5400.0, "images_seen": 19_200, "checkpoint_step": 300}
        more = {"stretches": stretches[: 3 - place], "precision": "bfloat16" if size == "L" else "float32"}
        name = f"dit_{size.lower()}"
        scores = [scored(60.0 - 15 * place, metric=FD) | moment, scored(70.0 - 15 * place, metric=FD) | early]
        write(tmp_path, name, [cost(10_000_000 * 4**place), trained() | more, *scores], title=f"DiT-{size}",
              variant={"model": name})  # fmt: skip
    (one,) = scaling_of(evidence_of(tmp_path))
    (curve,) = one.curves["hours"]
    # 1 h of 1, 1 h of 4 and half an hour of 2 processes; then 1 h of 1 and an hour and a half of 4
    assert [curve.compute[group] for group in curve.groups] == [1 + 4 + 1, 1 + 1.5 * 4]
    assert one.device == "A CPU, float32"
    assert any("in another precision: dit_l." in note for note in scaling_table(evidence_of(tmp_path)).notes)
    run = next(run for run in one.equal.rows if run.info["model"] == "dit_s")
    half = hours_of(run, {"training_seconds": 5400.0})
    assert half == (1 + 0.5 * 4, "A CPU, float32")


def log_of(spans: list[tuple[int, float, float]]) -> list[Line]:
    """Lines of a log {images, seconds} from spans: images, seconds that they took, and seconds of these for data."""
    ends = np.cumsum(np.array(spans), axis=0)
    return [{"images": int(i), "seconds": float(s), "waited": float(w)} for i, s, w in ends]


def test_hours_are_without_compilation() -> None:
    """Lines of 100 images. One process takes 1 s for a line after 30 s of compilation; four take 0.2 s each after 20 s.
    They start in the middle of a line. Lines that take 1.5 times as long, or wait for data, hold no pause."""
    one = [(100, 31.0, 0.0), (100, 1.0, 0.0), (100, 1.5, 0.0), (100, 1.0, 0.0), (100, 4.0, 3.0)]
    four = [(100, 0.5 + 20.1, 0.0), (100, 0.2, 0.0), (100, 0.2, 0.0), (100, 0.2, 0.0)]
    stretches = [{"processes": 1, "from_step": 0}, {"processes": 4, "from_step": 55, "from_seconds": 39.0}]
    done = trained() | {"stretches": stretches, "precision": "float32"}
    run = Run({"name": "one", "config": {"train": {"batch_size": 10}}}, "one", [done], metrics=log_of([*one, *four]))
    assert [(start, round(length, 6)) for start, length in pauses(run)] == [(0.0, 30.0), (39.0, 20.0)]
    hours = {seconds: hours_of(run, {"training_seconds": seconds}) for seconds in (20.0, 38.5, 39.0, 45.0, 59.7)}
    expected = {20.0: 0.0, 38.5: 8.5, 39.0: 9.0, 45.0: 9.0, 59.7: 9.0 + 4 * 0.7}
    assert {seconds: round(3600 * each[0], 6) for seconds, each in hours.items() if each} == expected
    assert hours_notes([run]) and not hours_notes([replace(run, rows=[trained()], metrics=run.metrics[:1])])


def test_half_of_the_lines_may_have_a_start() -> None:
    run = Run({"name": "one"}, "one", [trained()], metrics=log_of([(100, 11.0, 0.0), (100, 1.0, 0.0)]))
    assert pauses(run) == [(0.0, 10.0)]


def test_samples_that_were_made_in_several_ways_have_no_law(tmp_path: Path) -> None:
    for place, size in enumerate(("S", "B", "L")):
        name, score = f"dit_{size.lower()}", made(scored(60.0 - 15 * place, metric=FD), steps=250 if place else 50)
        write(tmp_path, name, [cost(10_000_000 * 4**place), score], title=f"DiT-{size}", variant={"model": name})
    why = {row["why"] for row in rows(tmp_path).values()}
    assert why == {"the samples were made in several ways"}


def test_the_table_of_models_and_the_curves_agree_about_the_same_runs(tmp_path: Path) -> None:
    """A finished training that was scored at other moments than all others holds nobody back."""
    write_many(tmp_path, 2, 3, 1, noise=0.0)
    for path in (tmp_path / "scale/lamamba_b-s0").resolve().glob("samples/*/record.jsonl"):
        lines = [json.loads(text) for text in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(one | {"images_seen": one["images_seen"] + 256}) + "\n" for one in lines))
    evidence = evidence_of(tmp_path)
    (table,) = scale(evidence)
    curves = {one.column: one for one in scaling_of(evidence)}
    assert " at 25.6 M images" in table.caption and curves[FD].equal.images == IMAGES
    means = {
        group: mean
        for curve in curves[FD].curves["forward"]
        for group, values in curve.values.items()
        for mean in values.values()
    }
    assert means == {row["group"]: row[f"{FD}_mean"] for row in table.rows if f"{FD}_mean" in row} and len(means) == 5
    assert "the largest number at which most runs have one" in " ".join(drawn(tmp_path).get_supxlabel().split())


def test_scores_at_unequal_images_have_no_law(tmp_path: Path) -> None:
    for place, size in enumerate(("S", "B", "L")):
        name, moment = f"dit_{size.lower()}", {"images_seen": 1000 * (place + 1)}
        lines = [cost(10_000_000 * 4**place), made(scored(60.0 - 15 * place, metric=FD)) | moment]
        write(tmp_path, name, lines, title=f"DiT-{size}", variant={"model": name})
    assert {row["why"] for row in rows(tmp_path).values()} == {"the sizes were not scored at the same number of images"}
    assert [table.rows for table in scale(evidence_of(tmp_path))] == [[]]


def test_a_failed_training_holds_nobody_back_and_is_named(tmp_path: Path) -> None:
    write_many(tmp_path, 1, 3, 1, noise=0.0)
    home = (tmp_path / "scale/lamamba_b-s0").resolve()
    (home / "record.jsonl").write_text("")  # it never reached its end
    last = max(
        home.glob("samples/*/config.json"), key=lambda path: int(path.read_text().split('"step": ')[1].split(",")[0])
    )
    (last.parent / "record.jsonl").unlink()
    (one, *_) = scaling_of(evidence_of(tmp_path))
    assert one.equal.images == IMAGES and [run.info["name"] for run in one.equal.left_out] == ["lamamba_b-s0"]
    notes = scaling_table(evidence_of(tmp_path)).notes
    assert any(note.endswith("no score at that number of images: lamamba_b-s0.") for note in notes)


def test_a_number_of_an_unfinished_run_is_marked(tmp_path: Path) -> None:
    write_many(tmp_path, 1, 3, 1, noise=0.0)
    (tmp_path / "scale/lamamba_b-s0").resolve().joinpath("record.jsonl").write_text("")
    assert all(
        "(a run failed or is unfinished)" in family for _, family, against in rows(tmp_path) if "FLOPs" in against
    )
    assert "Hollow" in drawn(tmp_path).get_supxlabel()
