"""The tables of published models of ImageNet: what stands in them, and which scores of ours do."""

from pathlib import Path

import pytest
import yaml
from lamabench.reports import published
from lamabench.reports.evidence import Evidence
from lamabench.reports.published import FILE
from lamabench.reports.runs import read
from lamabench.reports.state_of_the_art import state_of_the_art
from run_folders import Line, cost, markdown, parsed, scored, trained, write

MODEL = {"num_classes": 1000, "in_channels": 4, "input_size": 32}
WAY = {"sampler": "ddim", "steps": 50, "guidance": 1.5, "guidance_channels": 3, "labels": "balanced"}
FID = {
    "metric": "FID", "count": 50_000, "reference": "imagenet", "generation": WAY, "generation_protocol": "g",
    "evaluation": {"images": [256, 256, 3]},
}  # fmt: skip


def scores(fid: float, **more: Line) -> list[Line]:
    values = {"FID": fid, "sFID": 5.5, "IS": 240.0, "precision-Inception-50k": 0.8, "recall-Inception-50k": 0.5}
    fields = {**FID, **more}
    return [cost(500_000_000, 30_000_000), trained()] + [
        {**scored(value, protocol=f"p-{metric}"), **fields, "metric": metric} for metric, value in values.items()
    ]


def test_every_published_row_is_there_as_its_paper_prints_it(tmp_path: Path) -> None:
    write(tmp_path, "dit", [cost()], model=MODEL)
    (table,) = state_of_the_art(Evidence(read([tmp_path])), 256)
    rows, expected = parsed(table.csv()), yaml.safe_load(FILE.read_text())["imagenet_256"]
    assert len(rows) == len(expected) == 17
    for entry in expected:
        guidance = entry.get("guidance", "none") + (f", {entry['guidance_scale']}" if "guidance_scale" in entry else "")
        (row,) = (row for row in rows if (row["label"], row["guidance"]) == (entry["model"], guidance))
        assert row["source"] == entry["source"] + " *" * (not entry.get("checked", True)) and row["origin"] == "paper"
        for name in ("fid", "sfid", "is", "precision", "recall"):
            assert row[name] == (str(float(entry[name])) if name in entry else "")
        assert row["printed"] == (str(float(entry["macs_g"])) if "macs_g" in entry else "")
        assert bool(row["macs"]) == (entry.get("convention") == "macs")
    people = markdown(table.markdown())
    assert people[0] == {
        "Model": "ADM", "From": "paper", "Params (M)": "554", "MACs (G)": "1,120", "Printed (G)": "1,120.0",
        "What is printed": "MACs", "FID": "10.94", "sFID": "6.02", "IS": "100.98", "Precision": "0.69",
        "Recall": "0.63", "Guidance": "none", "Source": "arXiv 2105.05233",
    }  # fmt: skip
    assert [row["Guidance"] for row in people[:4]] == ["none"] * 4 and "**" not in table.markdown()
    assert "LaMamba-Diff-XL: its paper prints -57.6 % of DiT-XL/2's Gflops." in table.notes
    assert table.caption.endswith("None of these runs has a FID of that kind.")
    assert next(row["FID"] for row in people if row["Model"] == "DiT-XL/2") == "9.62"
    unchecked = [row["Model"] for row in people if row["Source"].endswith("\\*")]
    assert unchecked == ["U-ViT-L/2", "U-ViT-H/2", "DiM-H", "DiS-H/2"]  # from memory, or from tables of other papers
    assert any("not compared with the source" in note for note in table.notes)


def test_scores_of_the_same_metric_stand_between(tmp_path: Path) -> None:
    for seed, fid in enumerate((2.9, 3.0, 3.1)):
        write(tmp_path, f"dit-s{seed}", scores(fid), title="DiT-Mine", seed=seed, model=MODEL)
    (table,) = state_of_the_art(Evidence(read([tmp_path])), 256)
    rows = markdown(table.markdown())
    place = next(place for place, row in enumerate(rows) if row["Model"] == "DiT-Mine")
    assert (rows[place - 1]["Model"], rows[place + 1]["Model"]) == ("U-ViT-L/2", "U-ViT-H/2")  # 3.40 and 2.29
    row = rows[place]
    assert row["FID"] == "3.00 ± 0.25"  # t(0.975, 2) · 0.1 / √3 = 0.248
    assert (row["From"], row["Seeds"], row["Guidance"]) == ("these runs", "3", "classifier-free, 1.5 on 3 channels")
    assert (row["MACs (G)"], row["What is printed"], row["Source"]) == ("0.5000", "MACs, norms", "study demo")
    assert (row["sFID"], row["IS"], row["Precision"]) == ("5.50 ± 0.00", "240.00 ± 0.00", "0.80 ± 0.00")
    assert len(rows) == 18 and "**" not in table.markdown() and table.caption.endswith("and of these runs.")
    assert any(note.startswith("Samples: 50 ddim steps, guidance 1.5 on 3 channels") for note in table.notes)


@pytest.mark.parametrize(
    "edit",
    [
        {"metric": "FID-10k", "count": 10_000},
        {"metric": "FD-EffNetLite0-50k"},
        {"reference": "cifar10"},
        {"evaluation": {"images": [512, 512, 3]}},
        {"evaluation": None},
    ],
)
def test_no_other_score_does(edit: Line, tmp_path: Path) -> None:
    write(tmp_path, "dit", [cost(), trained(), {**scored(3.0), **FID, **edit}], model=MODEL)
    (table,) = state_of_the_art(Evidence(read([tmp_path])), 256)
    assert {row["origin"] for row in table.rows} == {"paper"} and len(table.rows) == 17


def test_models_that_do_not_know_the_class_are_apart(tmp_path: Path) -> None:
    unconditional = scores(20.0, generation={**WAY, "guidance": 1.0, "labels": "none"})
    write(tmp_path / "runs", "dit", unconditional, title="DiT-Free", model=MODEL)
    mine = tmp_path / "mine.yaml"
    mine.write_text("imagenet_256: [{model: Theirs, source: draft, fid: 25.5, conditional: false, checked: false}]")
    evidence = Evidence(read([tmp_path / "runs"]), published=published.read(mine))
    conditional, apart = state_of_the_art(evidence, 256)
    assert {row["origin"] for row in conditional.rows} == {"paper"} and len(conditional.rows) == 17
    assert apart.name == "state_of_the_art_256_unconditional" and apart.caption.startswith("Unconditional models")
    rows = markdown(apart.markdown())
    assert [(row["Model"], row["FID"], row["Source"]) for row in rows] == [
        ("Theirs", "25.50", "draft \\*"), ("DiT-Free", "20.00", "study demo"),
    ]  # fmt: skip
    assert any("not compared with the source" in note for note in apart.notes)


def test_other_data_have_no_such_table(tmp_path: Path) -> None:
    write(tmp_path, "dit", [cost(), trained(), scored(3.0)], model={"num_classes": 10, "input_size": 32})
    for side in (256, 512):
        (table,) = state_of_the_art(Evidence(read([tmp_path])), side)
        assert (table.name, table.rows) == (f"state_of_the_art_{side}", [])
    write(tmp_path, "big", [cost()], model={**MODEL, "input_size": 64})
    assert [len(state_of_the_art(Evidence(read([tmp_path])), side)[0].rows) for side in (256, 512)] == [0, 12]


def test_weights_of_different_steps_are_never_averaged(tmp_path: Path) -> None:
    for seed, (fid, step) in enumerate(((9.0, 600), (9.5, 600), (20.0, 200))):
        write(tmp_path, f"dit-s{seed}", scores(fid), title="DiT-Mine", seed=seed, step=step, model=MODEL)
    (table,) = state_of_the_art(Evidence(read([tmp_path])), 256)
    rows = {row["Model"]: row for row in markdown(table.markdown()) if row["From"] == "these runs"}
    assert {name: (row["FID"][:5], row["Seeds"]) for name, row in rows.items()} == {
        "DiT-Mine, step 600": ("9.25 ", "2"), "DiT-Mine, step 200": ("20.00", "1"),
    }  # fmt: skip


def test_a_row_of_a_study_of_guidance_names_its_model(tmp_path: Path) -> None:
    for guidance in (1.0, 1.5):
        variant = {"model": "dit_x", "sample.guidance": guidance}
        way = {"generation": {**WAY, "guidance": guidance}, "generation_protocol": f"g{guidance}"}
        write(tmp_path, f"dit-{guidance}", scores(3.0, **way), title="DiT-Mine", variant=variant, model=MODEL)
    (table,) = state_of_the_art(Evidence(read([tmp_path])), 256)
    labels = [row["label"] for row in table.rows if row["origin"] != "paper"]
    assert len(set(labels)) == 2 and all(label.startswith("DiT-Mine") for label in labels)
