"""Benchmarks as tables and figures."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lamabench.kernels.errors import InputError
from lamabench.reports.queries import state_of
from lamabench.reports.report import build
from lamabench.reports.runs import read
from lamabench.reports.speed import bench, crossing, kernels
from lamabench.reports.speed_figures import crossover, speed_vs_flops
from lamabench.reports.speed_table import speed
from run_folders import H100, Line, line, markdown, parsed, summary_rows, summary_text, swept, timed, write


def write_sweep(root: Path) -> Path:
    """DiT-XL/2 and a model with a third of its FLOPs at 256 and 512 px; the second model also at 1024 px."""

    def full(mode: str, batch: int, **fields: Any) -> Line:
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
    lamamba = [
        swept("forward", 1000.0, 8, peak_memory_gib=2.0, input_size=32, flops=80_000),
        swept("forward", 1200.0, 128, peak_memory_gib=9.0, compile="compile", input_size=32, flops=80_000),
        swept("forward", 1250.0, 256, peak_memory_gib=17.0, compile="compile", input_size=32, flops=80_000),
        swept("forward", 999.0, 256, compile="compile", input_size=32, flops=80_000, time="2025-05-31T10:00:00+00:00"),
        swept("forward", 500.0, 8, input_size=64, flops=320_000, disturbed="others kept 9 of 16 cores busy"),
        swept("forward", 100.0, 8, input_size=128, flops=1_280_000),
        {**full("train", 8, input_size=32), "state": "wrong", "error": "gradient off by 1e-1"},
    ]
    latents = {"in_channels": 4}
    write(root, "dit_xl_2", dit, "dit", "DiT-XL/2", {"model": "dit_xl_2"}, study="bench", model=latents, trains=False)
    about = ("lamamba", "LaMamba-Diff-XL", {"model": "lamamba_xl"})
    write(root, "lamamba_xl", lamamba, *about, study="bench", model=latents, trains=False)
    return root


def test_bench_table_by_hand(tmp_path: Path) -> None:
    (table,) = bench(read([write_sweep(tmp_path / "runs")]))
    rows = {(r["model"], r["input_size"], r["mode"], r["compile"]): r for r in table.rows}
    assert len(rows) == len(table.rows) == 9
    eager, compiled = rows["dit_xl_2", 32, "forward", "eager"], rows["dit_xl_2", 32, "forward", "compile"]
    assert (eager["batch_size"], eager["images_per_s"], eager["oom_batch"], eager["px"]) == (64, 1000.0, 128, 256)
    assert eager["ms_per_image"] == 1.0 and eager.get("speed_up") is None and eager["memory_ratio"] == 1.0
    assert (compiled["speed_up"], compiled["flops_ratio"], compiled["realised"]) == (1.0, 1.0, 1.0)
    fast = rows["lamamba_xl", 32, "forward", "compile"]
    assert (fast["batch_size"], fast["images_per_s"]) == (256, 1250.0)  # 999.0 is the older line
    assert (fast["speed_up"], fast["flops_ratio"]) == (0.625, 3.0) and fast["realised"] == pytest.approx(0.625 / 3)
    assert fast.get("memory_ratio") is None  # no batch in common
    plain = rows["lamamba_xl", 32, "forward", "eager"]
    assert (plain["memory_ratio"], plain["memory_batch"], plain.get("speed_up")) == (0.5, 8, None)
    assert rows["lamamba_xl", 64, "forward", "eager"]["realised"] == pytest.approx(2 / 3)
    assert rows["lamamba_xl", 128, "forward", "eager"].get("speed_up") is None
    full = rows["dit_xl_2", 64, "train", "eager"]
    assert (full["state"], full["oom_batch"], full["batch_size"], full["ms_per_image"]) == ("oom", 1, None, None)
    assert rows["lamamba_xl", 32, "train", "eager"]["status"] == "wrong (gradient off by 1e-1)"
    assert rows["lamamba_xl", 64, "forward", "eager"]["status"] == "done, disturbed"
    assert plain["status"] == "done" and table.caption == (
        "Speed and memory on NVIDIA H100 80GB HBM3, bfloat16, each row at its best batch."
    )
    assert table.notes[-1] == "‡: disturbed, so that the time may be too long (others kept 9 of 16 cores busy)."
    assert "others kept 9 of 16 cores busy" in table.csv()
    people = markdown(table.markdown())
    assert [row["Pixels"] for row in people] == sorted(
        (row["Pixels"] for row in people), key=lambda px: int(px.replace(",", ""))
    )
    assert people[0]["Model"] == "DiT-XL/2" and {"MFU (%)", "Realised", "Peak (GiB)", "Backend"} <= people[0].keys()
    assert {row["MFU (%)"] for row in people[:2]} == {"30.0", "50.0"}
    disturbed = next(row for row in people if row["State"] == "done, disturbed")
    assert (disturbed["Images/s"], disturbed["Speed-up"], disturbed["Realised"]) == ("500.0 ‡", "2.00 ‡", "0.667 ‡")
    assert {row["Images/s"] for row in people if row["State"].startswith(("oom", "wrong"))} == {"oom", "wrong"}
    assert "1 where all saved FLOPs became time" in table.notes[0]


def test_speed_table_by_hand(tmp_path: Path) -> None:
    """Forward and training side by side; the numbers of the sweep above, each model at its best."""
    (table,) = speed(read([write_sweep(tmp_path / "runs")]))
    assert table.name == "speed" and table.caption == "Speed and memory of models on NVIDIA H100 80GB HBM3, bfloat16."
    people = [
        {key: row[key] for key in row if key not in ("State", "Forward MFU (%)")} for row in markdown(table.markdown())
    ]
    names = "Model", "Pixels", "FLOPs (G)", "FLOPs saved, ×"
    names += "Forward (images/s)", "Forward speed-up", "Forward realised", "Training (images/s)"
    assert [tuple(row.values()) for row in people] == [
        ("DiT-XL/2", "256", "0.0002400", "1.00", "2,000", "1.00", "1.00", "-"),
        ("LaMamba-Diff-XL", "256", "8.000e-05", "3.00", "1,250", "0.625", "0.208", "wrong"),
        ("DiT-XL/2", "512", "0.0009600", "1.00", "250.0", "1.00", "1.00", "oom"),
        ("LaMamba-Diff-XL", "512", "0.0003200", "3.00", "500.0 ‡", "2.00 ‡", "0.667 ‡", "-"),
        ("LaMamba-Diff-XL", "1,024", "0.001280", "-", "100.0", "-", "-", "-"),
    ]
    assert tuple(people[0]) == names
    rows = {(row["model"], row["px"]): row for row in table.rows}
    assert rows["lamamba_xl", 256]["status"] == "wrong (gradient off by 1e-1)"
    assert rows["lamamba_xl", 256]["forward_batch_size"] == 256 and rows["dit_xl_2", 512]["state"] == "oom"
    # log-log: 0.625 at 256 px, 2 at 512 px
    px = 256 * 2 ** (np.log(1 / 0.625) / np.log(2 / 0.625))
    assert f"Forward: LaMamba-Diff-XL overtakes DiT-XL/2 at {px:.0f} px (interpolated)." in table.notes
    assert r"$\mathsection$ & 256 &" in table.latex() and r"500.0 $\ddagger$" in table.latex()
    assert 'title="commit aaaaaaaaaaaa, NVIDIA H100 80GB HBM3, 2025-06-01">1,250</td>' in table.html()


def test_hardware_precision_and_processes_are_tables_of_their_own(tmp_path: Path) -> None:
    lines = [swept("train", 100.0), swept("train", 90.0, checkpointing=True), swept("train", 180.0, 128, processes=2)]
    lines += [{**swept("train", 300.0), "provenance": {**H100, "device": "H200"}}, swept("train", 50.0, compile="x")]
    lines += [timed("train", 7.0), timed("train", 9.0, threads=8)]
    runs = read([write(tmp_path, "one", lines, trains=False)])
    h100, eager = "nvidia_h100_80gb_hbm3_bfloat16_gpu", "not_checkpointed"
    speeds = {table.name: [row["train_images_per_s"] for row in table.rows] for table in speed(runs)}
    assert speeds == {
        f"speed_{h100}_one_gpu_{eager}": [100.0], f"speed_{h100}_one_gpu_checkpointed": [90.0],
        f"speed_{h100}_2_gpus_{eager}": [180.0], f"speed_h200_bfloat16_gpu_one_gpu_{eager}": [300.0],
        f"speed_a_cpu_float32_2_threads_one_gpu_{eager}": [7.0],
        f"speed_a_cpu_float32_8_threads_one_gpu_{eager}": [9.0],
    }  # fmt: skip
    assert len(bench(runs)) == 4 and len({table.name for table in bench(runs)}) == 4


def test_memory_of_the_table_of_speed_is_at_one_batch(tmp_path: Path) -> None:
    peaks = {"one": {8: 1.0, 16: 2.0, 32: 4.0}, "two": {8: 3.0, 16: 6.0}, "three": {64: 9.0}}
    for name, batches in peaks.items():
        lines = [swept("train", 10.0, batch, peak_memory_gib=peak) for batch, peak in batches.items()]
        write(tmp_path, name, lines, title=name, variant={"model": name})
    (table,) = speed(read([tmp_path]))
    rows = {row["label"]: (row.get("train_memory_gib"), row.get("memory_batch")) for row in table.rows}
    assert rows == {"one": (2.0, 16), "two": (6.0, 16), "three": (None, None)}


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
    runs = read([write_sweep(tmp_path / "runs")])
    dit = next(row for row in bench(runs, "lamamba_xl")[0].rows if row.get("speed_up") and row["model"] == "dit_xl_2")
    assert (dit["speed_up"], dit["flops_ratio"]) == (2000 / 1250, 1 / 3)
    with pytest.raises(InputError, match=r"the baseline 'dit_b_2' was not measured; choices: dit_xl_2, lamamba_xl"):
        build([tmp_path / "runs"], tmp_path / "out", "dit_b_2")
    assert not (tmp_path / "out").exists()
    lone = read([tmp_path / "runs" / "bench" / "lamamba_xl"])
    assert not any("speed_up" in row for row in bench(lone)[0].rows) and "overtakes" not in str(speed(lone)[0].notes)


def test_other_devices_are_not_compared(tmp_path: Path) -> None:
    root = write_sweep(tmp_path / "runs")
    path = root / "bench" / "lamamba_xl" / "record.jsonl"
    path.write_text(path.read_text().replace("H100", "H200"))
    tables = bench(read([root]))
    assert {row["speed_up"] for table in tables for row in table.rows if row.get("speed_up")} == {1.0}
    assert sorted(table.name for table in tables) == ["bench_nvidia_h100_80gb_hbm3", "bench_nvidia_h200_80gb_hbm3"]


def test_several_gpus_are_compared_with_one_that_has_the_same_batch(tmp_path: Path) -> None:
    """Two GPUs are 0.9 times as fast as twice one. Without a row of one GPU there is no efficiency."""
    lines = [swept("train", 100.0, 64), swept("train", 180.0, 128, processes=2), swept("train", 110.0, 128)]
    lines += [swept("train", 500.0, 1024, processes=4)]
    runs = read([write(tmp_path, "one", lines)])
    (table,) = bench(runs)
    rows = {row["processes"]: row for row in table.rows}
    assert {number: row["efficiency"] for number, row in rows.items()} == {None: None, 2: 0.9, 4: None}
    assert {number: row["images_per_s"] for number, row in rows.items()} == {None: 110.0, 2: 180.0, 4: 500.0}
    assert table.notes == [
        "Efficiency: images per second of a GPU over those of one alone, with the same batch for each."
    ]
    assert speed_vs_flops(runs).axes[0].get_ylim()[1] < 400  # figures are of one GPU


def test_sweeps_stay_out_of_the_summary(tmp_path: Path) -> None:
    root = write_sweep(tmp_path / "runs")
    assert not any("images_per_s" in name for row in summary_rows([root]) for name in row)
    text = summary_text([root])
    assert "Realised" in text and max(map(len, text.splitlines())) <= 120 and "overtakes DiT-XL/2" in text
    assert state_of(read([root / "bench" / "lamamba_xl"])[0]) == ("wrong", "bench train: gradient off by 1e-1")


def test_one_swept_pass_is_enough_for_the_table_of_benchmarks(tmp_path: Path) -> None:
    lines = [swept("train", 5.0), swept("forward", 9.0), swept("forward", 12.0, 128)]
    text = summary_text([write(tmp_path, "one", lines)])
    assert re.search(r"^DiT-demo .* 12\.00 .* 5\.000 .*done$", text, re.MULTILINE)


def test_speed_figures_show_the_best_and_the_memory(tmp_path: Path) -> None:
    runs = read([write_sweep(tmp_path / "runs")])
    figure = crossover(runs)
    assert not isinstance(figure, str)
    panels: list[Any] = figure.axes
    speed, memory = panels
    dit, _, disturbed, lamamba, _, ring = speed.lines  # each model has a line and crosses
    assert list(disturbed.get_data()) == [[512], [500.0]] and disturbed.get_markerfacecolor() == "white"
    assert "Empty markers: something else" in figure.get_supxlabel()
    assert (list(dit.get_xdata()), list(dit.get_ydata())) == ([256, 512], [2000.0, 250.0])
    assert (list(lamamba.get_xdata()), list(lamamba.get_ydata())) == ([256, 512, 1024], [1250.0, 500.0, 100.0])
    share = np.log(1.6) / (np.log(1.6) + np.log(2))  # of the way from 256 to 512 px, from 0.625 to 2 times as fast
    np.testing.assert_allclose(ring.get_data(), [[256 * 2**share], [2000 * 8**-share]])
    assert [text.get_text() for text in speed.texts] == [f"{256 * 2**share:.0f} px"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["DiT-XL/2", "LaMamba-Diff-XL"]
    assert memory.get_ylabel() == "Peak memory (GiB), batch 8"
    assert list(memory.lines[0].get_ydata()) == [4.0, 9.0]
    assert "overtakes DiT-XL/2" in figure.get_supxlabel()
    figure = speed_vs_flops(runs)
    assert not isinstance(figure, str)
    lines = figure.axes[0].lines
    assert list(np.asarray(lines[0].get_xdata()) * 1e9) == [240_000, 960_000]
    (rate,) = [line for line in lines if line.get_linestyle() == ":"]
    ends, heights = (np.asarray(values) for values in rate.get_data())
    np.testing.assert_allclose(ends * heights, 2000 * 240_000 / 1e9)  # along it, FLOPs per second are those of DiT


def test_memory_is_compared_at_a_batch_that_all_have(tmp_path: Path) -> None:
    """At one batch for all sides where there is one; else at the largest batch of each side, and without a line."""

    def drawn(where: Path, models: dict[str, dict[int, list[int]]]) -> tuple[Any, list[list[float]]]:
        for name, sizes in models.items():
            measured = [(size, batch) for size, batches in sizes.items() for batch in batches]
            lines = [swept("forward", 10.0, batch, input_size=size) for size, batch in measured]
            lines = [{**line, "peak_memory_gib": 1.0 * line["batch_size"]} for line in lines]
            write(where, name, lines, title=name, variant={"model": name})
        figure = crossover(read([where]))
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
    figure = crossover(read([tmp_path]))
    assert not isinstance(figure, str)
    assert [list(line.get_xdata()) for line in figure.axes[0].lines] == [[8, 16], [32]]


def test_kernel_table(tmp_path: Path) -> None:
    same: Line = {"operator": "selective_scan", "shape": "x 64×1024×640", "pass": "forward", "batch_size": 64}
    same |= {"input_size": 32, "precision": "bfloat16", "threads": 2}
    floor = {"floor_ms": 0.1, "floor": "bytes", "backend": {"selective_scan": "triton"}}
    rows = [
        line("operator_speed", p50_ms=0.4, times_floor=4.0, **floor, **same),
        line("operator_speed", p50_ms=0.3, times_floor=3.0, disturbed="others", **floor, **same),
        line("operator_speed", "wrong", error="dt off by 1e-1", backend={"selective_scan": "mamba_ssm"}, **same),
    ]
    write(tmp_path, "one", rows)
    runs = read([tmp_path])
    (whole,) = kernels(runs)
    table = markdown(whole.markdown())
    assert [(row["Median (ms)"], row["Time ÷ floor"], row["State"]) for row in table] == [
        ("0.300 ‡", "3.00 ‡", "done"), ("wrong", "wrong", "wrong (dt off by 1e-1)")
    ]  # fmt: skip
    assert parsed(whole.csv())[0]["backend"] == "selective_scan=triton"
    assert whole.notes[1] == "‡: disturbed, so that the time may be too long (others)."
    assert table[0]["Backend"] == "triton" and table[0]["Shape"] == "x 64×1024×640"
    assert bench(runs) == speed(runs) == [] and r"64$\times$1024" in whole.latex()
    assert state_of(runs[0]) == ("wrong", "bench selective_scan: dt off by 1e-1")


def test_a_table_says_how_the_gpu_ran_and_which_calls_measured(tmp_path: Path) -> None:
    """Floors are derived from what the calls need; a record that has floors and no needs keeps them."""
    same: Line = {"operator": "attention", "pass": "forward", "batch_size": 8, "input_size": 32, "threads": 2}
    same |= {"precision": "bfloat16", "backend": {"attention": "sdpa"}, "p50_ms": 0.5}
    needs: Line = {"call_bytes": 10**9, "call_exponentials": 0, "call_flops": 2 * 10**11}
    needs |= {"bytes_per_s": 4e12, "exponentials_per_s": None, "flops_per_s": 1e15}
    new: Line = {**same, **needs, "clock_mhz": 1755.0, "power_w": 650.4, "began": "2026-11-29T10:00:00+00:00"}
    rows = [
        line("operator_speed", shape="a", throttled="power cap, heat", **new),
        line("operator_speed", shape="b", throttled="power cap", **new | {"clock_mhz": 1410.0}),
        line("operator_speed", shape="c", floor="flops", floor_ms=0.125, times_floor=4.0, **same),
    ]
    write(tmp_path, "one", rows)
    (table,) = kernels(read([tmp_path]))
    floors = [(row["shape"], row["floor"], row["floor_ms"], row["times_floor"]) for row in table.rows]
    assert floors == [("a", "bytes", 0.25, 2.0), ("b", "bytes", 0.25, 2.0), ("c", "flops", 0.125, 4.0)]
    assert (table.rows[0]["flops_floor_ms"], table.rows[0]["exponentials_floor_ms"]) == (0.2, None)
    assert table.notes[1:] == [
        "The GPU ran at 1,410 to 1,755 MHz, 650 W; held down by power cap in 2, heat in 1 of 3 measurements.",
        "Measured by 2 calls of the command: 2026-11-29T10:00:00+00:00 (2), not on record (1).",
    ]
    assert parsed(table.csv())[1]["clock_mhz"] == "1410.0"


def test_backends_asked_for_by_name_are_rows_of_their_own(tmp_path: Path) -> None:
    """One folder of a model has the measurements of all backends that were asked for."""
    lines = [swept("train", 100.0), swept("train", 50.0, asked={"attention": "torch"}, backend={"attention": "torch"})]
    write(tmp_path, "one", lines, trains=False)
    rows = bench(read([tmp_path / "models"]))[0].rows
    assert [(row["label"], row["images_per_s"], row["backend"]) for row in rows] == [
        ("DiT-demo", 100.0, "attention=sdpa"), ("DiT-demo, attention torch", 50.0, "attention=torch")
    ]  # fmt: skip
