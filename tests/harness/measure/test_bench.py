"""The commands `bench` and `bench-kernels`, the stage `bench` of a run, and the lock of the GPU."""

import json
import re
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
from lamabench.ablations.study import load
from lamabench.harness.disk import read_lines
from lamabench.harness.measure import models, operators, timing
from lamabench.harness.measure.models import WrongOutput
from lamabench.harness.progress import Progress
from lamabench.harness.run import read_run
from lamabench.harness.sections import RunConfig
from lamabench.harness.stages import execute, missing
from lamabench.harness.tasks import tasks
from lamabench.launch.cli import main
from lamabench.launch.plan import plan
from lamabench.reports.report import build as build_report
from measuring import NANO, make, operator_rows_of, out_of_memory_above, planted, rows_of


@pytest.mark.parametrize("command", ["bench", "bench-kernels"])
def test_both_benchmarks_hold_the_gpu(command, monkeypatch):
    held = []

    @contextmanager
    def watched(device, say, ahead=False):
        held.append(device)
        yield
        held.append("free")

    place, config = (models, make()) if command == "bench" else (operators, make(NANO))
    monkeypatch.setattr(place, "one_at_a_time", watched)
    rows = rows_of(config) if command == "bench" else operator_rows_of(config)
    assert held == [] and next(iter(rows))["state"] == "done" and held == ["cpu"]
    assert all(held == ["cpu"] for _ in rows) and held == ["cpu", "free"]


WORDS = ["depth=1", "hidden_size=16", "num_heads=2", "bench.batch_size=[1,2]", "bench.repeats=2", "bench.seconds=0.05",
         "bench.precision=float32", "run.device=cpu"]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def records(folder):
    (path,) = folder.glob("runs/bench*/*/record.jsonl")
    return read_lines(path)


def test_what_compiles_ahead_is_checked_and_neither_timed_nor_recorded(folder, monkeypatch, capsys):
    shared = []
    monkeypatch.setattr(models, "one_at_a_time", lambda *args: nullcontext(shared.append(args[2])))
    monkeypatch.setattr(models, "time_calls", None)
    assert main(["bench", "--ahead", "dit_nano", *WORDS]) == 0
    captured = capsys.readouterr()
    assert len(re.findall(r"compiled and checked in \d+ s", captured.err)) == 4 and captured.out == ""
    assert not (folder / "runs").exists() and shared == [True]
    planted(monkeypatch, lambda right: lambda *args: right(*args) * 1.01)
    assert main(["bench", "--ahead", "dit_nano", *WORDS, "--json"]) == 1
    captured = capsys.readouterr()
    assert "4 measurements without a number" in captured.err and captured.out == "[]\n"
    assert not (folder / "runs").exists()


def test_what_could_not_compile_ahead_for_lack_of_memory_fails(folder, monkeypatch, capsys):
    out_of_memory_above(monkeypatch, 1)
    assert main(["bench", "--ahead", "dit_nano", *WORDS]) == 1
    assert "dit_nano: memory ran out in 2 of 4, which are not compiled" in capsys.readouterr().err


def test_a_killed_sweep_continues(folder, monkeypatch, capsys):
    timed, calls = models.time_calls, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return timed(*args)

    monkeypatch.setattr(models, "time_calls", killed)
    assert main(["bench", "dit_nano", *WORDS]) == 130
    before = records(folder)
    assert [(row["mode"], row["batch_size"]) for row in before] == [("forward", 1), ("forward", 2)]
    capsys.readouterr()
    assert main(["bench", "dit_nano", *WORDS, "--json"]) == 0
    captured = capsys.readouterr()
    after = records(folder)
    assert after[:2] == before and [(row["mode"], row["batch_size"]) for row in after[2:]] == [
        ("train", 1),
        ("train", 2),
    ]
    assert len(json.loads(captured.out)) == 4 and "2 measurements are in" in captured.err
    assert main(["bench", "dit_nano", *WORDS]) == 0 and records(folder) == after
    assert main(["bench", "dit_nano", *WORDS, "--again"]) == 0 and len(records(folder)) == 8
    assert "next: lamabench report runs/bench" in capsys.readouterr().out


def test_a_disturbed_measurement_is_reported_and_recorded(folder, monkeypatch, capsys):
    monkeypatch.setattr(timing, "others_busy", lambda: lambda: "other processes kept 3.0 of 4 cores busy")
    assert main(["bench", "dit_nano", *WORDS]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("(disturbed: other processes kept 3.0 of 4 cores busy)") == 4
    assert "other processes kept the host busy during 4 of 4: these times may be too long" in captured.out
    assert {row["disturbed"] for row in records(folder)} == {"other processes kept 3.0 of 4 cores busy"}


def test_wrong_rows_are_recorded_and_the_command_fails(folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        planted(patch, lambda right: lambda *args: right(*args) * 1.01)
        assert main(["bench", "dit_nano", "lamamba_nano", "bench.modes=[forward]", *WORDS[3:]]) == 1
    captured = capsys.readouterr()
    assert "dit_nano: 2 measurements without a number" in captured.err and "wrong" in captured.out
    (lamamba,) = folder.glob("runs/bench/lamamba_nano-*")
    assert [row.state for row in read_run(lamamba).records] == ["done", "done"]  # the next model is measured
    assert main(["bench", "dit_nano", "bench.modes=[forward]", *WORDS[3:]]) == 0  # measured again
    (dit,) = folder.glob("runs/bench/dit_nano-*")
    assert [row.state for row in read_run(dit).records] == ["wrong", "wrong", "done", "done"]


def test_bench_kernels_command(folder, capsys):
    words = ["bench.batch_size=[2,1]", "bench.repeats=2", "bench.precision=float32", "run.device=cpu"]
    assert main(["bench-kernels", "dit_nano", "--operator", "attention", *words, "depth=1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["pass"] for row in rows] == ["forward", "forward+backward"] * 2 and rows[0]["backend"] == "sdpa"
    assert [row["batch_size"] for row in rows] == [2, 2, 1, 1]
    assert all(row["times_floor"] == row["p50_ms"] / row["floor_ms"] for row in rows)
    assert [row["p50_ms"] for row in records(folder)] == [row["p50_ms"] for row in rows]
    assert not any("floor_ms" in row for row in records(folder))  # reports derive floors
    build_report([folder / "runs"], folder / "out")
    assert "attention" in (folder / "out" / "kernels.md").read_text()


@pytest.mark.parametrize(
    "words",
    [
        ["bench", "dit_nano", "lamamba_nano", "bench.input_sizes=[6]"],
        ["bench", "dit_nano", "lamamba_nano", "bench.input_sizes=[6]", "--profile"],
        ["bench-kernels", "dit_nano", "lamamba_nano", "bench.input_sizes=[6]"],
        ["bench-kernels", "lamamba_nano", "dit_nano", "--operator", "gated_norm"],
    ],
)
def test_every_model_is_checked_before_the_first_is_measured(words, folder, capsys):
    settings = ["bench.batch_size=1", "bench.repeats=1", "bench.modes=[forward]", "run.device=cpu"]
    assert main([*words, *settings]) == 2
    captured = capsys.readouterr()
    assert "multiple of patch_size" in captured.err or "unknown operator of this model 'gated_norm'" in captured.err
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and not (folder / "runs").exists()


def model_task(folder, **settings):
    config = replace(make(**settings), run=RunConfig(root=str(folder), device="cpu"))
    about = {"study": "s", "name": "n", "variant": {}, "seed": 0, "model": "dit_nano", "family": "dit", "title": "DiT"}
    (task,) = tasks(config, about, ["bench"])
    return task


def test_a_stage_with_a_batch_that_is_too_large_is_done(tmp_path, monkeypatch):
    out_of_memory_above(monkeypatch, 10)
    task = model_task(tmp_path, batch_size=[16, 2], modes=["forward"])
    execute(task, Progress())
    assert [row.state for row in read_run(task.path).records] == ["oom", "done"]
    assert missing(task) == []
    execute(task, Progress())
    assert len(read_run(task.path).records) == 2


def test_a_stage_with_a_wrong_row_is_not_done(tmp_path, monkeypatch):
    task = model_task(tmp_path, modes=["forward"])
    with monkeypatch.context() as patch, pytest.raises(WrongOutput):
        planted(patch, lambda right: lambda *args: right(*args) * 1.01)
        execute(task, Progress())
    lines = read_run(task.path).records
    assert [row.state for row in lines] == ["wrong", "failed"] and "without a number" in str(lines[1].error)
    assert missing(task) == ["bench"]
    execute(task, Progress())
    assert missing(task) == []


def test_crossover_runs_to_its_figure(folder):
    planned = plan(load("crossover").debug_size(), ["run.device=cpu"])
    assert [run.name for run in planned] == ["dit_nano", "lamamba_nano"]
    for run in planned:
        for task in run.tasks:
            execute(task, Progress())
        assert run.state() == "done" and run.missing() == []
    build_report([run.folder for run in planned], folder / "out", "dit_nano")
    names = {path.name for path in (folder / "out").iterdir()}
    assert {"bench.md", "crossover.png", "crossover.pdf", "speed_vs_flops.png"} <= names
    assert "gradient_error,operator_error" in (folder / "out" / "bench.csv").read_text()
    assert "LaMamba-Diff-nano" in (folder / "out" / "README.md").read_text()


def test_crossover_asks_about_both_and_only_measures():
    study = load("crossover")
    assert study.stages == ["bench"] and study.axes == {"model": ["dit_xl_2", "lamamba_xl_release", "lamamba_xl"]}
    config = plan(study)[0].config
    assert [8 * side for side in config.bench.input_sizes or []] == [128, 256, 512, 1024, 2048]
    assert config.model.in_channels == 4 and config.bench.modes == ["forward", "train"]
