"""Reports against synthetic run folders written by hand: every number is one that the test put there."""

import csv
import io
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lamabench.harness.record import RecordError
from lamabench.reports.figures import loss, quality_vs_macs, throughput
from lamabench.reports.queries import group_labels, load, state_of
from lamabench.reports.report import build, summary_rows, summary_text
from lamabench.reports.samples import mosaic
from lamabench.reports.speed import bench, crossing, kernels
from lamabench.reports.speed_figures import crossover, speed_vs_flops
from lamabench.reports.tables import costs, origins, seeds, summary

Row = dict[str, Any]
WHERE = {
    "commit": "a" * 40, "dirty": False, "host": "box", "device": "A CPU", "driver": None, "torch": "2.15.0",
    "python": "3.11.9", "lamabench": "0.1.0",
}  # fmt: skip
PARTS = {
    "ssm": {"params": 300_000, "macs": 6_000_000, "flops": 12_000_000},
    "scan": {"params": 0, "macs": 0, "flops": 1_000_000},
    "attention": {"params": 0, "macs": 0, "flops": 0},
    "mlp": {"params": 700_000, "macs": 4_000_000, "flops": 8_000_000},
}


def line(kind: str, state: str = "done", **fields: Any) -> Row:
    about = {"schema": 1, "kind": kind, "state": state, "time": "2025-06-01T10:00:00+00:00", "provenance": WHERE}
    return {**about, **fields}


def cost(macs: int = 10_000_000, params: int = 1_000_000) -> Row:
    return line("cost", params=params, macs=macs, flops=2 * macs + 1_000_000, paper_gflops=macs / 1e9, parts=PARTS)


def trained(final_loss: float = 0.0625) -> Row:
    return line(
        "train", steps=600, images=38400, seconds=96.0, images_per_s=400.0, final_loss=final_loss,
        backend={"selective_scan": "torch"}, precision="float32", batch_size=64,
    )  # fmt: skip


def drawn(steps: int = 50, speed: float = 12.5) -> Row:
    same = {"count": 512, "method": "ddim", "guidance": 1.0, "guidance_channels": None, "seconds": 41.0}
    return line("sample", steps=steps, images_per_s=speed, **same)


def evaluated(value: float, protocol: str = "p1", metric: str = "FD-EffNetLite0-512", std: float | None = None) -> Row:
    against = {"reference": "digits", "reference_count": 1797, "features": "efficientnet_lite0"}
    row = {"metric": metric, "value": value, "std": std, "count": 512, "protocol": protocol, **against}
    return line("evaluate", rows=[row])


def timed(mode: str, speed: float, batch: int = 16, **fields: Any) -> Row:
    middle = 1000 * batch / speed
    same = {
        "precision": "float32",
        "compile": "eager",
        "backend": {"attention": "sdpa"},
        "peak_memory_gib": None,
        "threads": 2,
        "input_size": 8,
        "checkpointing": False,
        "flops": 21_000_000,
    }
    steps = {"p20_ms": middle * 0.8, "p50_ms": middle, "p80_ms": middle * 1.25}
    return line("bench", mode=mode, batch_size=batch, images_per_s=speed, **{**same, **steps, **fields})


def write(
    root: Path,
    name: str,
    records: list[Row],
    family: str = "dit",
    title: str = "DiT-demo",
    variant: Row | None = None,
    seed: int = 0,
    curve: list[float] | None = None,
    labels: list[int] | None = None,
    study: str = "demo",
) -> Path:
    """A run folder. Image k of its samples, if it has labels, is 4 × 4 pixels of the value k."""
    folder = root / study / f"{name}-{seed:08x}"
    folder.mkdir(parents=True)
    variant = {"model": f"{family}_demo"} if variant is None else variant
    config = {"model": {"family": family}, "axes": variant, "seed": seed, "train": {"batch_size": 64}}
    info = {"id": f"{seed:08x}", "study": study, "name": name, "model": f"{family}_demo", "family": family}
    info |= {"title": title, "variant": variant, "seed": seed, "overrides": [], "config": config}
    (folder / "config.json").write_text(json.dumps(info))
    (folder / "record.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    steps = [{"step": k, "images": 64 * k, "loss": value} for k, value in enumerate(curve or [], start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    if labels is not None:
        images = np.broadcast_to(np.arange(len(labels), dtype=np.uint8)[:, None, None, None], (len(labels), 4, 4, 1))
        np.savez(folder / "samples.npz", images=images, labels=np.array(labels))
    return folder


def everything(value: float, speed: float, **more: Any) -> list[Row]:
    return [cost(**more), trained(), drawn(), evaluated(value), timed("forward", speed), timed("train", speed / 4)]


def write_three(root: Path) -> Path:
    """Three models: two that finished, one that ran out of memory with an error full of signs that need escaping."""
    curve = [1 / k for k in range(1, 31)]
    write(root, "lamamba", everything(60.0, 600.0), "lamamba", "LaMamba_demo", curve=curve, labels=[1, 0, 1, 0, 2])
    write(root, "dit", everything(75.5, 1200.0, macs=20_000_000), "dit", "DiT-demo", curve=curve, labels=[0, 1, 1])
    out_of_memory = line("train", "oom", error="tried 50% of {0} & a_b | #1 $x\n ~^\\ <y>")
    write(root, "adm", [cost(30_000_000), out_of_memory], "adm", "ADM", curve=curve[:9])
    return root


@pytest.fixture
def three(tmp_path: Path) -> Path:
    return write_three(tmp_path / "runs")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on the same three, to be looked at only."""
    folder = tmp_path_factory.mktemp("reports")
    build([write_three(folder / "runs")], folder / "out")
    return folder / "out"


def parsed(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def markdown(text: str) -> list[dict[str, str]]:
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in row] for row in rows]
    return [dict(zip(head, row, strict=True)) for row in body]


def test_summary_cell_by_cell(three: Path, report: Path) -> None:
    adm, dit, lamamba = parsed((report / "summary.csv").read_text())  # by family, then MACs
    assert lamamba == {
        "study": "demo", "name": "lamamba", "id": "00000000", "family": "lamamba", "model": "lamamba_demo",
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
        "Sampling (images/s)": "12.50", "FD-EffNetLite0-512": "**60.00**", "State": "done",
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
    write(root, "one", [evaluated(60.0, "p1"), timed("forward", 100.0), drawn(50)])
    write(root, "two", [evaluated(50.0, "p2"), timed("forward", 300.0, batch=32), drawn(250)], title="DiT-two")
    one, two = summary_rows([root])
    assert one["FD-EffNetLite0-512@p1"] == 60.0 and one["FD-EffNetLite0-512@p2"] is None
    assert two["FD-EffNetLite0-512@p2"] == 50.0 and two["FD-EffNetLite0-512@p1"] is None
    assert "FD-EffNetLite0-512" not in one and "forward_images_per_s" not in one
    assert (one["forward_images_per_s_batch_16"], one["forward_images_per_s_batch_32"]) == (100.0, None)
    assert (two["forward_images_per_s_batch_16"], two["forward_images_per_s_batch_32"]) == (None, 300.0)
    assert (two["sample_images_per_s_50_steps"], two["sample_images_per_s_250_steps"]) == (None, 12.5)
    text = summary(load([root])).markdown()
    assert "Forward (images/s, batch 32)" in text and "**" not in text  # alone in its column, nothing is the best


def test_threads_of_the_host_matter_on_a_cpu_only(tmp_path: Path) -> None:
    for driver, columns in ((None, 2), ("570.1", 1)):
        root = tmp_path / f"runs-{driver}"
        for name, threads in (("one", 2), ("two", 8)):
            write(root, name, [{**timed("forward", 10.0, threads=threads), "provenance": {**WHERE, "driver": driver}}])
        assert sum("forward_images_per_s" in name for name in summary_rows([root])[0]) == columns


def test_best_follows_the_metric(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    for name, fd, precision in (("one", 3.0, 0.5), ("two", 2.0, 0.25)):
        other = [evaluated(precision, metric="Precision-X"), evaluated(fd, metric="Oddity")]
        write(root, name, [evaluated(fd, metric="KID-X", std=0.125), *other], title=name)
    made = summary(load([root]))
    one, two = markdown(made.markdown())
    assert (one["KID-X"], two["KID-X"]) == ("3.000 ± 0.125", "**2.000 ± 0.125**")
    assert (one["Precision-X"], two["Precision-X"]) == ("**0.5000**", "0.2500")
    assert (one["Oddity"], two["Oddity"]) == ("3.000", "2.000")
    assert r"\textbf{2.000 $\pm$ 0.125}" in made.latex()


def test_latex_is_escaped_and_whole(report: Path) -> None:
    checked = [path.read_text() for path in sorted(report.glob("*.tex"))]
    assert len(checked) == 4  # bench, cost, runs, summary
    for text in checked:
        assert text.isascii()
        bare = re.sub(r"\\[\\&%$#_{}]", "", text)  # what is left after escaped signs must be commands and structure
        assert not re.search(r"[%#~^<>|]|(?<!tab:)_", bare.replace("|", "")) and bare.count("{") == bare.count("}")
        assert bare.count("$") % 2 == 0
        begun, ended = (re.findall(rf"\\{word}{{(\w+)}}", text) for word in ("begin", "end"))
        assert begun == ["table", "tabular"] and ended == ["tabular", "table"]
        sides = re.search(r"\\begin{tabular}{([lr]+)}", text)
        lines = [row for row in text.splitlines() if row.endswith(r" \\")]
        assert sides and {len(re.findall(r"(?<!\\)&", row)) for row in lines} == {len(sides[1]) - 1}
    assert r"tried 50\% of \{0\} \& a\_b | \#1 \$x \textasciitilde{}\textasciicircum{}\textbackslash{}" in checked[3]
    assert r"LaMamba\_demo" in checked[3]


def test_seeds(tmp_path: Path) -> None:
    root, values = tmp_path / "runs", [60.0, 62.0, 67.0]
    for seed, value in enumerate(values):
        records = [cost(), evaluated(value), *([trained(0.5)] if seed else [])]
        write(root, "scan", records, variant={"scan": "cross"}, seed=seed)
    write(root, "alone", [cost(20_000_000), evaluated(70.0)], variant={"scan": "none"}, seed=7)
    runs = load([root])
    made = seeds(summary(runs))
    (row,) = parsed(made.csv())
    assert row["label"] == "DiT-demo (scan=cross)" and row["n"] == "3"
    assert float(row["FD-EffNetLite0-512_mean"]) == 63.0
    assert float(row["FD-EffNetLite0-512_std"]) == pytest.approx(statistics.stdev(values), rel=1e-12)
    assert (row["FD-EffNetLite0-512_n"], row["final_loss_n"], row["final_loss_std"]) == ("3", "2", "0.0")
    (people,) = markdown(made.markdown())
    assert people["FD-EffNetLite0-512"] == "63.00 ± 3.61" and people["Final loss"] == "0.5000 ± 0.0000 (n=2)"
    labels = [row["label"] for row in summary_rows([root])]
    assert labels == [*(f"DiT-demo (scan=cross), seed {seed}" for seed in range(3)), "DiT-demo (scan=none)"]
    figure = quality_vs_macs(runs, summary(runs))
    assert not isinstance(figure, str)
    axes: Any = figure.axes[0]
    middle, lone = axes.containers
    low, high = middle.lines[2][0].get_segments()[0][:, 1]
    assert middle.lines[0].get_ydata()[0] == 63.0 and lone.lines[0].get_xdata()[0] == 0.02
    assert (high - low) / 2 == pytest.approx(statistics.stdev(values))
    assert "lower is better" in axes.get_ylabel() and "512 samples against 1797 digits" in axes.get_ylabel()
    assert {text.get_text() for text in axes.texts} == {"DiT-demo (scan=cross) (3\nseeds)", "DiT-demo (scan=none)"}


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    write(tmp_path, "a", [], study="first")
    write(tmp_path, "a", [], study="second")
    runs = load([tmp_path, tmp_path / "first"])  # a run named twice is one run
    assert sorted(group_labels(runs).values()) == ["DiT-demo [first]", "DiT-demo [second]"]


def test_cost_by_part(tmp_path: Path) -> None:
    write(tmp_path / "runs", "one", [cost()], variant={"scan": "cross"})
    write(tmp_path / "runs", "two", [cost()], variant={"scan": "continuous"})
    made = costs(load([tmp_path / "runs"]))
    rows = parsed(made.csv())
    assert [row["part"] for row in rows] == ["ssm", "scan", "mlp", "total"]  # attention is empty, the model there once
    assert {row["label"] for row in rows} == {"DiT-demo (scan=cross) and 1 alike"}
    assert [float(row["macs_percent"]) for row in rows] == [60, 0, 40, 100]
    assert float(rows[1]["flops_percent"]) == pytest.approx(100 / 21) and rows[2]["params"] == "700000"
    assert markdown(made.markdown())[0]["MACs (%)"] == "60.0"


def test_origins(three: Path, report: Path) -> None:
    dirty = {**WHERE, "dirty": True}
    write(three, "extra", [{**trained(), "provenance": dirty}], title="DiT-extra", seed=3)
    made = origins(load([three]))
    rows = {row["name"]: row for row in parsed(made.csv())}
    assert rows["extra"]["dirty"] == "True" and rows["extra"]["steps"] == "600" and rows["extra"]["seed"] == "3"
    assert rows["extra"]["backend"] == "selective_scan=torch" and rows["extra"]["stages"] == "train"
    assert rows["adm"]["state"] == "oom" and rows["adm"]["steps"] == "9"  # as far as it got
    people = {row["Name"]: row for row in markdown(made.markdown())}
    assert people["extra"]["Commit"] == "a" * 12 + " + dirty" and people["dit"]["Commit"] == "a" * 12
    assert "A CPU. Recorded: 2025-06-01." in (report / "README.md").read_text()


@pytest.mark.parametrize(
    ("records", "curve", "state"),
    [
        ([], [], ("not started", "")),
        ([cost()], [1.0], ("unfinished", "")),
        ([line("train", "failed", error="killed"), trained()], [1.0], ("done", "")),
        ([line("bench", "oom", mode="train", error="full"), timed("forward", 1.0)], [], ("oom", "bench train: full")),
        ([line("bench", "failed", error="no"), timed("forward", 1.0)], [], ("done", "")),
        ([timed("train", 1.0), timed("train", 1.0, 64) | {"state": "oom", "error": "x"}], [], ("done", "")),
        (
            [
                timed("train", 1.0, compile=c) | s
                for c, s in (("eager", {}), ("compile", {"state": "wrong", "error": "x"}))
            ],
            [],
            ("wrong", "bench train: x"),
        ),
        ([line("sample", "failed", error="x"), line("train", "failed", error="a\n b")], [], ("failed", "train: a b")),
    ],
)
def test_state(records: list[Row], curve: list[float], state: tuple[str, str], tmp_path: Path) -> None:
    write(tmp_path, "run", records, curve=curve)
    assert state_of(load([tmp_path])[0]) == state


def test_the_same_records_give_the_same_bytes(three: Path, report: Path, tmp_path: Path) -> None:
    first, second = sorted(report.iterdir()), build([three], tmp_path / "again")
    assert [path.name for path in first] == [path.name for path in second] == sorted(path.name for path in first)
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name
    index = json.loads((report / "index.json").read_text())
    assert index["files"] == [path.name for path in first]
    assert set(index["absent"]) == {"seeds", "samples_adm", "kernels", "crossover"}
    assert not list(tmp_path.glob(".*")) and not list(report.parent.glob(".*"))
    for path in first:
        if path.suffix in (".png", ".pdf"):
            assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"%PDF")
    figures = {path.stem for path in first if path.suffix == ".png"}
    assert figures == {path.stem for path in first if path.suffix == ".pdf"}
    samples = {"samples", "samples_dit", "samples_lamamba"}
    assert figures == {"loss", "quality_vs_macs", "throughput", "speed_vs_flops", *samples}


def test_what_there_is_nothing_to_show_of_is_named(tmp_path: Path) -> None:
    write(tmp_path / "runs", "bare", [])
    (tmp_path / "out").mkdir()  # an empty folder will do
    files = build([tmp_path / "runs"], tmp_path / "out")
    tables = [f"{name}.{ending}" for name in ("runs", "summary") for ending in ("csv", "md", "tex")]
    assert [path.name for path in files] == ["README.md", "index.json", *tables]
    absent = json.loads((tmp_path / "out/index.json").read_text())["absent"]
    speed = {"throughput", "bench", "kernels", "speed_vs_flops", "crossover"}
    assert set(absent) == {"cost", "seeds", "loss", "quality_vs_macs", "samples", "samples_bare", *speed}
    readme = (tmp_path / "out/README.md").read_text()
    assert all(name in readme and reason in readme for name, reason in absent.items())


def test_an_earlier_report_is_replaced(three: Path, report: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(report, out)
    (out / "notes.txt").write_text("mine")
    assert (out / "samples_dit.png").exists()
    (three / "demo/dit-00000000/samples.npz").unlink()
    files = build([three], out)
    assert {path.name for path in out.iterdir()} == {path.name for path in files} | {"notes.txt"}
    assert not (out / "samples_dit.png").exists() and not (out / "samples.pdf").exists()


def test_a_foreign_folder_is_refused_and_untouched(three: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for content in ("not json", '{"files": []}', '["kind"]'):
        out.mkdir(exist_ok=True)
        (out / "index.json").write_text(content)
        with pytest.raises(RecordError, match="neither empty nor an earlier report") as caught:
            build([three], out)
        assert "\n" not in str(caught.value) and [path.name for path in out.iterdir()] == ["index.json"]
        assert (out / "index.json").read_text() == content
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecordError, match="is a file"):
        build([three], tmp_path / "file")
    with pytest.raises(RecordError, match="cannot write a report"):
        build([three], tmp_path / "file" / "below")


def test_bad_input_leaves_nothing(three: Path, report: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    none, nowhere = tmp_path / "none", tmp_path / "nowhere"
    for paths, words in (([none], "holds no run"), ([nowhere], "no such folder"), ([], "no run folder")):
        for ask in (lambda paths: build(paths, tmp_path / "out"), summary_text, summary_rows):
            with pytest.raises(RecordError, match=words):
                ask(paths)
    samples = three / "demo/dit-00000000/samples.npz"
    whole = samples.read_bytes()
    shutil.copytree(report, tmp_path / "kept")
    before = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    pictures = {"images": np.zeros((2, 4, 4, 3), np.float32), "labels": np.zeros(2, np.int64)}
    np.savez(tmp_path / "float.npz", **pictures)
    np.savez(tmp_path / "short.npz", images=np.zeros((2, 4, 4, 3), np.uint8), labels=np.zeros(3, np.int64))
    np.savez(tmp_path / "bare.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    np.save(tmp_path / "array.npy", np.zeros(3))
    others = [(tmp_path / name).read_bytes() for name in ("float.npz", "short.npz", "bare.npz", "array.npy")]
    for content in (whole[: len(whole) // 2], b"", *others):
        samples.write_bytes(content)
        for out in ("kept", "new"):
            with pytest.raises(RecordError, match="cannot be read as samples") as caught:
                build([three], tmp_path / out)
            assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*"))
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    samples.write_bytes(whole)
    config = three / "demo/dit-00000000/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "family": None}))
    with pytest.raises(RecordError, match=r"config\.json lacks family"):
        summary_rows([three])


def test_terminal_table_fits(three: Path, tmp_path: Path) -> None:
    text = summary_text([three])
    assert "600.0" in text and "oom" in text and "Train" not in text[text.index("Left out") :]
    assert re.search(r"^ADM: train: tried 50% of", text, re.MULTILINE)
    for place, metric in enumerate(("KID", "Precision", "Recall", "Density")):
        more = [evaluated(1.5 + place, metric=f"{metric}-EffNetLite0-512-{k}") for k in range(2)]
        write(three, f"wide-{metric}", more, variant={"mixers": "ssm and window and global", "n": place}, seed=place)
    text = summary_text([three])
    assert max(map(len, text.splitlines())) <= 120
    notes = " ".join(text[text.index("Left out for want of room:") :].split())
    assert "FLOPs (G)" in notes and "Density" in notes
    head = text[: text.index("---")]
    assert all(title in head for title in ("Model", "MACs (G)", "State", "FD-"))


def test_loss_figure_shows_the_curve(three: Path) -> None:
    runs = load([three])
    figure = loss(runs, summary(runs))
    assert not isinstance(figure, str)
    axes: Any = figure.axes[0]
    raw, smooth = axes.lines[3], axes.lines[4]  # three artists a run: raw, smooth, the mark at the end
    np.testing.assert_array_equal(raw.get_xdata(), 64 * np.arange(1, 31))
    np.testing.assert_array_equal(raw.get_ydata(), [1 / k for k in range(1, 31)])
    np.testing.assert_allclose(smooth.get_ydata()[:-1], [1 / k for k in range(1, 30)])  # the median of a falling curve
    assert axes.get_yscale() == "log" and axes.get_xlabel() and axes.get_ylabel()
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said == ["ADM (oom)", "DiT-demo", "LaMamba_demo"]
    assert len({line.get_color() for line in axes.lines}) == 3


def test_throughput_figure_shows_bars_and_whiskers(three: Path) -> None:
    runs = load([three])
    figure = throughput(runs, summary(runs))
    assert not isinstance(figure, str)
    panels: list[Any] = figure.axes
    forward, train = panels
    assert [bar.get_width() for bar in forward.patches] == [1200.0, 600.0]
    assert [bar.get_width() for bar in train.patches] == [300.0, 150.0]
    whisker = forward.containers[1].lines[2][0].get_segments()[0]
    np.testing.assert_allclose(whisker[:, 0], [1200 / 1.25, 1200 / 0.8])
    assert [tick.get_text() for tick in forward.get_yticklabels()] == ["DiT-demo", "LaMamba_demo"]
    assert figure.get_supxlabel().startswith("batch 16, float32, eager mode, 2 threads, A CPU\n")


def test_a_grid_is_ordered_by_class_and_only_enlarged(tmp_path: Path) -> None:
    labels = [3, 1, 3, 2, 1] + [1] * 20
    folder = write(tmp_path, "run", [], labels=labels)
    grid = mosaic(load([folder])[0])
    assert not isinstance(grid, str) and grid.names == ["1", "2", "3"]
    pitch = 48 + 3
    assert grid.picture.shape == (3 * pitch - 3, 8 * pitch - 3, 3)
    for row, images in enumerate(([1, 4, 5, 6, 7, 8, 9, 10], [3], [0, 2])):
        for column, image in enumerate(images):
            cell = grid.picture[row * pitch :, column * pitch :][:48, :48]
            assert (cell == image).all()
    assert (grid.picture[pitch : 2 * pitch, pitch:] == 255).all()  # class 2 has one image
    many = mosaic(load([write(tmp_path, "many", [], labels=list(range(30)))])[0])
    assert not isinstance(many, str) and many.names == [str(k) for k in range(10)]
    plain = mosaic(load([write(tmp_path, "plain", [], labels=[0] * 12)])[0])
    assert not isinstance(plain, str) and plain.names == [] and plain.picture.shape == (2 * pitch - 3, 8 * pitch - 3, 3)


def test_no_torch(tmp_path: Path) -> None:
    run = write(tmp_path / "runs", "dit", everything(60.0, 600.0), curve=[1.0, 0.5], labels=[0, 1])
    code = (
        "import sys; from pathlib import Path; from lamabench.reports.report import build, summary_text\n"
        f"build([Path({str(run)!r})], Path({str(tmp_path / 'out')!r})); summary_text([Path({str(run)!r})])\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


H100 = {**WHERE, "device": "NVIDIA H100 80GB HBM3", "driver": "570.1"}


def swept(mode: str, speed: float, batch: int = 64, **fields: Any) -> Row:
    return {**timed(mode, speed, batch, precision="bfloat16", **fields), "provenance": H100}


def write_sweep(root: Path) -> Path:
    """DiT-XL/2 and a model of a third of its FLOPs at 256 and 512 px, and the latter at 1024 px."""

    def full(mode: str, batch: int, **fields: Any) -> Row:
        line = {**swept(mode, 1.0, batch, **fields), "state": "oom", "error": "CUDA out of memory"}
        return {key: value for key, value in line.items() if key not in ("images_per_s", "p50_ms", "peak_memory_gib")}

    small, large = {"input_size": 32, "flops": 240_000}, {"input_size": 64, "flops": 960_000}
    dit = [
        swept("forward", 900.0, 8, peak_memory_gib=4.0, mfu=0.25, **small),
        swept("forward", 1000.0, 64, peak_memory_gib=8.0, mfu=0.3, **small),
        full("forward", 128, **small),
        swept("forward", 2000.0, 64, peak_memory_gib=6.0, compile="compile", mfu=0.5, **small),
        swept("forward", 250.0, 8, peak_memory_gib=9.0, **large),
        full("train", 1, **large),
    ]
    ours = [
        swept("forward", 1000.0, 8, peak_memory_gib=2.0, input_size=32, flops=80_000),
        swept("forward", 1200.0, 128, peak_memory_gib=9.0, compile="compile", input_size=32, flops=80_000),
        swept("forward", 1250.0, 256, peak_memory_gib=17.0, compile="compile", input_size=32, flops=80_000),
        swept("forward", 999.0, 256, compile="compile", input_size=32, flops=80_000, time="2025-05-31T10:00:00+00:00"),
        swept("forward", 500.0, 8, input_size=64, flops=320_000, disturbed="others kept 9 of 16 cores busy"),
        swept("forward", 100.0, 8, input_size=128, flops=1_280_000),
        {**full("train", 8, input_size=32), "state": "wrong", "error": "gradient off by 1e-1"},
    ]
    for place, (name, family, title, records) in enumerate(
        (("dit_xl_2", "dit", "DiT-XL/2", dit), ("lamamba_xl", "lamamba", "LaMamba-Diff-XL", ours))
    ):
        folder = write(root, name, records, family, title, {"model": name}, seed=place, study="bench")
        info = json.loads((folder / "config.json").read_text()) | {"model": name}
        info["config"]["model"]["in_channels"] = 4
        (folder / "config.json").write_text(json.dumps(info))
    return root


def test_bench_table_by_hand(tmp_path: Path) -> None:
    table = bench(load([write_sweep(tmp_path / "runs")]))
    rows = {(r["model"], r["input_size"], r["mode"], r["compile"]): r for r in table.rows}
    assert len(rows) == len(table.rows) == 9
    eager, compiled = rows["dit_xl_2", 32, "forward", "eager"], rows["dit_xl_2", 32, "forward", "compile"]
    assert (eager["batch_size"], eager["images_per_s"], eager["oom_batch"], eager["px"]) == (64, 1000.0, 128, 256)
    assert eager["ms_per_image"] == 1.0 and eager.get("speed_up") is None and eager["memory_ratio"] == 1.0
    assert (compiled["speed_up"], compiled["flops_ratio"], compiled["realised"]) == (1.0, 1.0, 1.0)
    ours = rows["lamamba_xl", 32, "forward", "compile"]
    assert (ours["batch_size"], ours["images_per_s"]) == (256, 1250.0)  # 999.0 is the older line
    assert (ours["speed_up"], ours["flops_ratio"]) == (0.625, 3.0) and ours["realised"] == pytest.approx(0.625 / 3)
    assert ours.get("memory_ratio") is None  # no batch in common
    plain = rows["lamamba_xl", 32, "forward", "eager"]
    assert (plain["memory_ratio"], plain["memory_batch"], plain.get("speed_up")) == (0.5, 8, None)
    assert rows["lamamba_xl", 64, "forward", "eager"]["realised"] == pytest.approx(2 / 3)
    assert rows["lamamba_xl", 128, "forward", "eager"].get("speed_up") is None
    full = rows["dit_xl_2", 64, "train", "eager"]
    assert (full["state"], full["oom_batch"], full["batch_size"], full["ms_per_image"]) == ("oom", 1, None, None)
    assert rows["lamamba_xl", 32, "train", "eager"]["status"] == "wrong (gradient off by 1e-1)"
    assert rows["lamamba_xl", 64, "forward", "eager"]["status"] == "done, disturbed"
    assert plain["status"] == "done" and table.caption.endswith("the times may be too long.")
    assert "others kept 9 of 16 cores busy" in table.csv()
    people = markdown(table.markdown())
    assert [row["Pixels"] for row in people] == sorted(
        (row["Pixels"] for row in people), key=lambda px: int(px.replace(",", ""))
    )
    assert people[0]["Model"] == "DiT-XL/2" and {"MFU (%)", "Realised", "Peak (GiB)", "Backend"} <= people[0].keys()
    assert {row["MFU (%)"] for row in people[:2]} == {"30.0", "50.0"}
    # log-log: 0.625 at 256 px, 2 at 512 px
    px = 256 * 2 ** (np.log(1 / 0.625) / np.log(2 / 0.625))
    assert f"Forward: LaMamba-Diff-XL overtakes DiT-XL/2 at {px:.0f} px (interpolated)." in table.caption
    assert "1 where every FLOP that was saved became time" in table.caption


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ([0.5, 2.0], "overtakes X at 200 px (interpolated)"),
        ([0.5, 0.5, 1.0], "overtakes X at 400 px (interpolated)"),
        ([2.0, 0.5, 2.0], "falls behind X at 141 px and overtakes X at 283 px (interpolated)"),
        ([1.5, 2.0], "is faster than X from 100 to 400 px, no crossing in the measured range"),
        ([0.5, 0.9], "is slower than X from 100 to 400 px, no crossing in the measured range"),
    ],
)
def test_crossing(ratios: list[float], words: str) -> None:
    sizes = [100, 400] if len(ratios) == 2 else [100, 200, 400]
    assert crossing(sizes, ratios, "X") == words


def test_baseline_is_named_or_dit_xl_2(tmp_path: Path) -> None:
    runs = load([write_sweep(tmp_path / "runs")])
    ours = next(row for row in bench(runs, "lamamba_xl").rows if row.get("speed_up") and row["model"] == "dit_xl_2")
    assert (ours["speed_up"], ours["flops_ratio"]) == (2000 / 1250, 1 / 3)
    with pytest.raises(RecordError, match=r"the baseline 'dit_b_2' was not measured; choices: dit_xl_2, lamamba_xl"):
        build([tmp_path / "runs"], tmp_path / "out", "dit_b_2")
    assert not (tmp_path / "out").exists()
    lone = load([tmp_path / "runs" / "bench" / "lamamba_xl-00000001"])
    assert not any("speed_up" in row for row in bench(lone).rows) and "overtakes" not in bench(lone).caption


def test_other_devices_are_not_compared(tmp_path: Path) -> None:
    root = write_sweep(tmp_path / "runs")
    path = root / "bench" / "lamamba_xl-00000001" / "record.jsonl"
    path.write_text(path.read_text().replace("H100", "H200"))
    assert {row["speed_up"] for row in bench(load([root])).rows if row.get("speed_up")} == {1.0}


def test_sweeps_stay_out_of_the_summary(tmp_path: Path) -> None:
    root = write_sweep(tmp_path / "runs")
    assert not any("images_per_s" in name for row in summary_rows([root]) for name in row)
    text = summary_text([root])
    assert "Realised" in text and max(map(len, text.splitlines())) <= 120 and "overtakes DiT-XL/2" in text
    assert state_of(load([root / "bench" / "lamamba_xl-00000001"])[0]) == ("wrong", "bench train: gradient off by 1e-1")


def test_one_swept_pass_is_enough_for_the_table_of_benchmarks(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "bench" / "lamamba_xl-00000001"
    write_sweep(tmp_path / "runs")
    lines = [swept("train", 5.0), swept("forward", 9.0), swept("forward", 12.0, 128)]
    (folder / "record.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = summary_text([folder])
    assert [line.split() for line in text.splitlines() if " forward " in line and "12.0" in line]


def test_speed_figures_show_the_best_and_the_memory(tmp_path: Path) -> None:
    runs = load([write_sweep(tmp_path / "runs")])
    figure = crossover(runs)
    assert not isinstance(figure, str)
    panels: list[Any] = figure.axes
    speed, memory = panels
    dit, _, ours, _ = speed.lines  # for each model its line, then its crosses
    assert (list(dit.get_xdata()), list(dit.get_ydata())) == ([256, 512], [2000.0, 250.0])
    assert (list(ours.get_xdata()), list(ours.get_ydata())) == ([256, 512, 1024], [1250.0, 500.0, 100.0])
    assert memory.get_ylabel() == "Peak memory (GiB), batch 8"
    assert list(memory.lines[0].get_ydata()) == [4.0, 9.0]
    assert "overtakes DiT-XL/2" in figure.get_supxlabel()
    figure = speed_vs_flops(runs)
    assert not isinstance(figure, str)
    lines = figure.axes[0].lines
    assert list(np.asarray(lines[0].get_xdata()) * 1e9) == [240_000, 960_000]
    ends, heights = (np.asarray(values) for values in lines[2].get_data())
    np.testing.assert_allclose(ends * heights, 2000 * 240_000 / 1e9)  # along it, a FLOP takes what it takes DiT


def test_memory_is_compared_at_a_batch_that_all_have(tmp_path: Path) -> None:
    """One on every side where there is one, else the largest on each, and then no line through them."""

    def drawn(where: Path, batches: dict[str, dict[int, list[int]]]) -> tuple[Any, list[list[float]]]:
        for name, sizes in batches.items():
            lines = [swept("forward", 10.0, batch, input_size=size) for size, found in sizes.items() for batch in found]
            lines = [{**line, "peak_memory_gib": 1.0 * line["batch_size"]} for line in lines]
            write(where, name, lines, title=name, variant={"model": name})
        figure = crossover(load([where]))
        assert not isinstance(figure, str)
        memory = figure.axes[1]
        return memory, [list(map(float, line.get_ydata())) for line in memory.lines if len(line.get_ydata())]

    memory, peaks = drawn(tmp_path / "a", {"one": {8: [2, 4, 8], 16: [4, 8]}, "two": {8: [4, 16, 8], 16: [8, 4]}})
    assert memory.get_ylabel() == "Peak memory (GiB), batch 4" and peaks == [[4.0, 4.0]] * 2
    memory, peaks = drawn(tmp_path / "b", {"one": {8: [8, 16, 32], 16: [2, 4]}, "two": {8: [8, 16], 16: [4]}})
    assert peaks == [[16.0, 4.0]] * 2 and {line.get_linestyle() for line in memory.lines} == {"None"}
    assert [label.get_text() for label in memory.get_xticklabels()] == ["8\n×16", "16\n×4"]


def test_a_model_out_of_memory_is_marked(tmp_path: Path) -> None:
    lines = [swept("forward", 10.0, 1, input_size=size) for size in (8, 16)]
    full = {**swept("forward", 1.0, 1, input_size=32), "state": "oom", "error": "full"}
    del full["images_per_s"]
    write(tmp_path, "one", [*lines, full])
    figure = crossover(load([tmp_path]))
    assert not isinstance(figure, str)
    assert [list(line.get_xdata()) for line in figure.axes[0].lines] == [[8, 16], [32]]


def test_kernel_table(tmp_path: Path) -> None:
    same = {
        "operator": "selective_scan",
        "shape": "x 64×1024×640",
        "pass": "forward",
        "batch_size": 64,
        "input_size": 32,
    }
    same |= {"precision": "bfloat16", "threads": 2}
    rows = [
        line(
            "bench",
            p50_ms=0.4,
            floor_ms=0.1,
            floor="bytes",
            times_floor=4.0,
            backend={"selective_scan": "triton"},
            **same,
        ),
        line(
            "bench",
            p50_ms=0.3,
            floor_ms=0.1,
            floor="bytes",
            times_floor=3.0,
            backend={"selective_scan": "triton"},
            **same,
        ),
        line("bench", "wrong", error="dt off by 1e-1", backend={"selective_scan": "mamba_ssm"}, **same),
    ]
    write(tmp_path, "one", rows)
    runs = load([tmp_path])
    made = markdown(kernels(runs).markdown())
    assert [(row["Median (ms)"], row["Time ÷ floor"], row["State"]) for row in made] == [
        ("0.300", "3.00", "done"), ("-", "-", "wrong (dt off by 1e-1)")
    ]  # fmt: skip
    assert made[0]["Backend"] == "selective_scan=triton" and made[0]["Shape"] == "x 64×1024×640"
    assert bench(runs).rows == [] and r"64$\times$1024" in kernels(runs).latex()
    assert state_of(runs[0]) == ("wrong", "bench selective_scan: dt off by 1e-1")
