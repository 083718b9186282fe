"""Tables of runs: the summary, seeds, costs and origins."""

import json
import re
from pathlib import Path

import pytest
from lamabench.reports.costs import costs
from lamabench.reports.origins import origins
from lamabench.reports.runs import read
from lamabench.reports.summary import summary
from run_folders import WHERE, cost, drawn, markdown, parsed, scored, summary_rows, timed, trained, write


def test_summary_cell_by_cell(three: Path, report: Path) -> None:
    adm, dit, lamamba = parsed((report / "summary.csv").read_text())  # by family, then MACs
    key = (three / "demo" / "lamamba").resolve().name[-12:]
    assert lamamba == {
        "study": "demo", "name": "lamamba", "id": key, "family": "lamamba", "model": "lamamba_demo",
        "title": "LaMamba_demo", "variant": "model=lamamba_demo", "seed": "0", "label": "LaMamba_demo",
        "params": "1000000", "macs": "10000000", "flops": "21000000", "paper_gflops": "0.01", "final_loss": "0.0625",
        "forward_images_per_s": "600.0", "forward_p20_ms": repr(16000 / 600 * 0.8), "forward_p50_ms": repr(16000 / 600),
        "forward_p80_ms": repr(16000 / 600 * 1.25), "forward_backend": "attention=sdpa",
        "train_images_per_s": "150.0", "train_p20_ms": repr(16000 / 150 * 0.8),
        "train_p50_ms": repr(16000 / 150), "train_p80_ms": repr(16000 / 150 * 1.25),
        "train_backend": "attention=sdpa", "sample_images_per_s": "12.5",
        "FD-EffNetLite0-512": "60.0", "state": "done", "error": "",
    }  # fmt: skip
    assert (adm["state"], adm["FD-EffNetLite0-512"], adm["macs"], adm["final_loss"]) == ("oom", "", "30000000", "")
    assert adm["error"] == "train: tried 50% of {0} & a_b | #1 $x ~^\\ <y>"
    assert dit["macs"] == "20000000"
    people = markdown((report / "summary.md").read_text())
    assert people[2] == {
        "Model": "LaMamba_demo", "Params (M)": "1.000", "MACs (G)": "0.01000", "FLOPs (G)": "0.02100",
        "Paper Gflops": "0.01000", "Final loss": "0.06250", "Forward (images/s)": "600.0", "Train (images/s)": "150.0",
        "Sampling, start included (images/s)": "12.50", "FD-EffNetLite0-512": "60.00", "State": "done",
    }  # fmt: skip
    assert people[1]["FD-EffNetLite0-512"] == "75.50" and people[1]["Forward (images/s)"] == "1,200"
    assert people[0]["State"].startswith("oom (train: tried 50% of {0} & a_b \\| #1")
    assert people[0]["FD-EffNetLite0-512"] == people[0]["Final loss"] == "-"
    sides = (report / "summary.md").read_text().splitlines()[1].strip("|").split("|")
    assert [side.endswith(":") for side in sides] == [False] + [True] * 9 + [False]
    assert people == markdown((report / "README.md").read_text())
    rows = summary_rows([three])
    assert rows[2]["params"] == 1_000_000 and rows[0]["FD-EffNetLite0-512"] is None and json.dumps(rows)


def test_protocols_and_settings_never_share_a_column(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    write(root, "one", [scored(60.0, "p1"), timed("forward", 100.0), drawn(50)])
    write(root, "two", [scored(50.0, "p2"), timed("forward", 300.0, batch=32), drawn(250)], title="DiT-two")
    one, two = summary_rows([root])
    assert one["FD-EffNetLite0-512@p1"] == 60.0 and one["FD-EffNetLite0-512@p2"] is None
    assert two["FD-EffNetLite0-512@p2"] == 50.0 and two["FD-EffNetLite0-512@p1"] is None
    assert "FD-EffNetLite0-512" not in one and "forward_images_per_s" not in one
    assert (one["forward_images_per_s_batch_16"], one["forward_images_per_s_batch_32"]) == (100.0, None)
    assert (two["forward_images_per_s_batch_16"], two["forward_images_per_s_batch_32"]) == (None, 300.0)
    assert (two["sample_images_per_s_50_steps"], two["sample_images_per_s_250_steps"]) == (None, 12.5)
    text = summary(read([root])).markdown()
    assert "Forward (images/s, batch 32)" in text and "**" not in text  # one value in a column is not marked


def test_threads_of_the_host_matter_on_a_cpu_only(tmp_path: Path) -> None:
    for driver, columns in ((None, 2), ("570.1", 1)):
        root = tmp_path / f"runs-{driver}"
        for name, threads in (("one", 2), ("two", 8)):
            write(root, name, [{**timed("forward", 10.0, threads=threads), "provenance": {**WHERE, "driver": driver}}])
        assert sum("forward_images_per_s" in name for name in summary_rows([root])[0]) == columns


def test_the_spread_of_a_metric_over_its_subsets_is_not_a_plus_minus(tmp_path: Path) -> None:
    spread = [scored(3.0, metric="KID-X", std=0.125), scored(4.0, metric="IS-X", std=0.5)]
    write(tmp_path, "one", spread, title="one")
    write(tmp_path, "two", [scored(2.0, metric="KID-X", std=0.25)], title="two")
    table = summary(read([tmp_path]))
    one, two = markdown(table.markdown())
    assert (one["KID-X"], one["KID-X, std over subsets"]) == ("3.000", "0.125")
    assert (one["IS-X"], one["IS-X, std over splits"], two["IS-X"]) == ("4.000", "0.500", "-")
    assert "±" not in table.markdown() and "pm" not in table.latex() and "**" not in table.markdown()
    assert table.notes[0].startswith("No score is bold: single runs do not tell models apart")
    row = parsed(table.csv())[1]
    assert (row["KID-X"], row["KID-X_subset_std"]) == ("2.0", "0.25") and "IS-X_split_std" in row


def test_the_sampling_error_of_a_score_has_a_column_and_is_no_plus_minus(tmp_path: Path) -> None:
    write(tmp_path, "one", [{**scored(60.0), "sampling_error": 0.123}], title="one")
    write(tmp_path, "two", [scored(50.0)], title="two")  # of an earlier version
    table = summary(read([tmp_path]))
    one, two = markdown(table.markdown())
    name = "FD-EffNetLite0-512"
    assert (one[name], one[f"{name}, sampling s.e."], two[f"{name}, sampling s.e."]) == ("60.00", "0.12", "-")
    assert "±" not in table.markdown() and parsed(table.csv())[0][f"{name}_sampling_error"] == "0.123"
    notes = [note for note in table.notes if "from the choice of its images alone" in note]
    assert len(notes) == 1 and "nothing about other trainings" in notes[0]
    write(tmp_path / "old", "two", [scored(50.0)], title="two")
    old = summary(read([tmp_path / "old"]))
    assert "sampling" not in old.markdown().lower() and "sampling" not in old.csv()


def test_latex_is_escaped_and_whole(report: Path) -> None:
    checked = {path.stem: path.read_text() for path in sorted(report.glob("*.tex"))}
    assert {"bench", "cost", "runs", "speed", "summary"} <= checked.keys()
    for text in checked.values():
        assert text.isascii()
        begun, ended = (re.findall(rf"\\{word}{{(\w+)}}", text) for word in ("begin", "end"))
        assert begun[:2] == ["table", "tabular"] and ended[-2:] == ["tabular", "table"]
        assert len(re.findall(r"(?<!\\){", text)) == len(re.findall(r"(?<!\\)}", text))
        lines = [row for row in text.splitlines() if row.endswith(r" \\")]
        assert len({len(re.findall(r"(?<!\\)&", row)) for row in lines}) == 1
    assert r"ADM: oom (train: tried 50\% of \{0\} \& a\_\penalty100{}b \textbar{} \#1 \$x" in checked["summary"]
    assert r"ADM $\mathsection$ &" in checked["summary"] and "State" not in checked["summary"]
    assert r"LaMamba\_demo" in checked["summary"]


def test_cost_by_part(tmp_path: Path) -> None:
    write(tmp_path / "runs", "one", [cost()], variant={"scan": "cross"})
    write(tmp_path / "runs", "two", [cost()], variant={"scan": "continuous"})
    table = costs(read([tmp_path / "runs"]))
    rows = parsed(table.csv())
    assert [row["part"] for row in rows] == [
        "ssm",
        "scan",
        "mlp",
        "total",
    ]  # attention is empty; one model
    assert {row["label"] for row in rows} == {"scan cross and 1 alike"}
    assert [float(row["macs_percent"]) for row in rows] == [60, 0, 40, 100]
    assert float(rows[1]["flops_percent"]) == pytest.approx(100 / 21) and rows[2]["params"] == "700000"
    assert markdown(table.markdown())[0]["MACs (%)"] == "60.0"


def test_the_count_of_fvcore_stands_beside_the_total(tmp_path: Path) -> None:
    count = {"fvcore": 9_000_000, "fvcore_skips": "10 selective_scan"}
    write(tmp_path / "runs", "one", [cost()], variant={"scan": "cross"})
    write(tmp_path / "runs", "two", [{**cost(), **count}], variant={"scan": "continuous"})
    table = costs(read([tmp_path / "runs"]))
    rows = {row["part"]: row for row in parsed(table.csv())}
    assert (rows["total"]["fvcore"], rows["total"]["fvcore_skips"]) == ("9000000", "10 selective_scan")
    assert rows["ssm"]["fvcore"] == "" and "It counts nothing for the operators that it skips." in table.notes[0]
    people = markdown(table.markdown())
    assert [row["fvcore (G)"] for row in people] == ["-", "-", "-", "0.009000"]
    assert "fvcore" not in str(costs(read([tmp_path / "runs" / "demo" / "one"])).markdown())


def test_origins(three: Path, report: Path) -> None:
    dirty = {**WHERE, "dirty": True}
    write(three, "extra", [{**trained(), "provenance": dirty}], title="DiT-extra", seed=3)
    table = origins(read([three]))
    rows = {row["name"]: row for row in parsed(table.csv())}
    assert rows["extra"]["dirty"] == "True" and rows["extra"]["steps"] == "600" and rows["extra"]["seed"] == "3"
    assert rows["extra"]["backend"] == "selective_scan=torch" and rows["extra"]["stages"] == "train"
    assert rows["adm"]["state"] == "oom" and rows["adm"]["steps"] == "9"  # as far as it got
    people = {row["Name"]: row for row in markdown(table.markdown())}
    assert people["extra"]["Commit"] == "a" * 12 + " + dirty" and people["dit"]["Commit"] == "a" * 12
    assert "A CPU. Recorded: 2025-06-01." in (report / "README.md").read_text()
