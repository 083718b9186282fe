"""GPU-hours of a study, which come only from measurements."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from lamabench.ablations.study import Study, load
from lamabench.harness.disk import append
from lamabench.harness.keys import model_key
from lamabench.harness.record import row
from lamabench.harness.run import create, read_run
from lamabench.kernels.errors import InputError
from lamabench.launch import gpu_hours, set_hours
from lamabench.launch.cli import main
from lamabench.launch.plan import plan
from lamabench.models.registry import preset, to_dict


def write_records(folder: Path, *rows):
    """Write records of benchmarks, of DiT-S/2 at 100 images/s unless a row says otherwise, and read them."""
    line = {"mode": "train", "input_size": 32, "precision": "bfloat16", "checkpointing": False, "compile": "eager"}
    line |= {"images_per_s": 100.0, "batch_size": 8, "provenance": {"device": "GPU A"}}
    for one in rows:
        name, fields = one.get("model", "dit_s_2"), {key: value for key, value in one.items() if key != "model"}
        model = replace(preset(name).config, **fields.pop("overrides", {}))
        place = folder / "bench" / "models" / f"x-{model_key(model)}"
        create(place, {"kind": "model", "key": model_key(model), "config": {"model": to_dict(model)}})
        append(place / "record.jsonl", row("speed", key="k", **{**line, **fields}).as_dict())
    return gpu_hours.committed_speeds(folder)


def test_hours_come_only_from_records(tmp_path):
    base = {"data": "cifar10", "train.steps": 3600, "train.batch_size": 100}

    def cost(values, rows):
        (run,) = plan(Study("s", "?", base={**base, **values}, variants={"a": {}}))
        return gpu_hours.of_runs([run], rows)[0][0]

    plain, deeper = {"model": "dit_s_2"}, {"model": "dit_s_2", "model.depth": 14}
    nothing = gpu_hours.committed_speeds(tmp_path / "nowhere")
    assert cost(plain, nothing) == "unknown (no training and no bench record of dit_s_2 at side 32, bfloat16, eager)"
    rows = write_records(
        tmp_path,
        {},
        {"images_per_s": 200.0, "batch_size": 64},
        {"images_per_s": 50.0, "provenance": {"device": "GPU B"}},
        {"images_per_s": 9e9, "batch_size": 101},  # more than a step passes
        {"images_per_s": 9e9, "mode": "forward"},
        {"images_per_s": 9e9, "compile": "compile"},
        {"images_per_s": 9e9, "precision": "float32"},
        {"images_per_s": 9e9, "input_size": 16},
        {"images_per_s": 9e9, "processes": 2},
        {"images_per_s": 9e9, "model": "dit_b_2"},
        {"state": "oom", "error": "x"},
        {"images_per_s": 400.0, "overrides": {"depth": 14}},
    )
    # 3600 steps of 100 images at 200 images/s are 1800 s.
    assert cost(plain, rows) == {"GPU A": pytest.approx(0.5), "GPU B": pytest.approx(2.0)}
    assert cost(deeper, rows) == {"GPU A": pytest.approx(0.25)}
    assert cost({**plain, "run.micro_batch": 50}, rows) == {"GPU A": pytest.approx(1.0), "GPU B": pytest.approx(2.0)}
    without = {"GPU A, without dropout": pytest.approx(0.5), "GPU B, without dropout": pytest.approx(2.0)}
    assert cost({**plain, "model.dropout": 0.1}, rows) == without
    assert cost({**deeper, "run.micro_batch": 4}, rows) == {"GPU A": pytest.approx(0.25)}  # measured only at 8
    assert cost(deeper | {"model.depth": 15}, rows) == (
        "unknown (no training and no bench record of dit_s_2 (model.depth=15) at side 32, bfloat16, eager)"
    )
    hours = [cost(plain, rows), cost(deeper, rows), cost({"model": "unet_s"}, rows), {}]
    assert gpu_hours.cell(hours[0]) == "0.5 (GPU A), 2 (GPU B)" and gpu_hours.cell({}) == "none: no training"
    lack = "unknown for 1 run (no training and no bench record)"
    assert gpu_hours.total(hours) == f"0.75 on GPU A (2 runs); 2 on GPU B (1 run); {lack}"
    rows = write_records(tmp_path / "dropout", {}, {"images_per_s": 50.0, "overrides": {"dropout": 0.1}})
    assert cost({**plain, "model.dropout": 0.1}, rows) == {"GPU A": pytest.approx(2.0)}
    assert cost(plain, rows) == {"GPU A": pytest.approx(1.0)}
    # A disturbed measurement is marked, and an undisturbed one takes precedence.
    rows = write_records(
        tmp_path / "busy", {"disturbed": "x"}, {"images_per_s": 50.0, "provenance": {"device": "GPU B"}}
    )
    assert cost(plain, rows) == {"GPU A, busy host": pytest.approx(1.0), "GPU B": pytest.approx(2.0)}
    assert gpu_hours.total([cost(plain, rows)]) == (
        "2 on GPU B (1 run); 1 on GPU A, busy host (1 run); busy host: measured while other "
        "processes kept it busy, so it may take fewer hours"
    )
    rows = write_records(tmp_path / "quiet", {"images_per_s": 400.0, "disturbed": "x"}, {}, {"disturbed": None})
    assert cost(plain, rows) == {"GPU A": pytest.approx(1.0)}
    (tmp_path / "models" / "old").mkdir(parents=True)
    (tmp_path / "models" / "old" / "config.json").write_text('{"config": {}}')
    with pytest.raises(InputError, match="was written by an earlier version of lamabench"):
        gpu_hours.committed_speeds(tmp_path)


STRETCH = {"from_step": 0, "backend": {}, "device": "GPU A", "compile": "eager"}


def write_training(root: Path, name: str, speeds, **fields):
    """Write a training of DiT-S/2 without weights, whose lines of metrics have these speeds."""
    folder = root / "trainings" / f"dit-cifar10-{name}"
    create(folder, {"kind": "training", "key": name, "config": {"model": to_dict(preset("dit_s_2").config)}})
    line = {"steps": 9, "images": 900, "seconds": 9e9, "final_loss": 1.0, "precision": "bfloat16", "compile": "eager"}
    line |= {"checkpointing": False, "batch_size": 100, "micro_batch": 50, "provenance": {"device": "GPU A"}}
    line |= {"stretches": [STRETCH]}
    append(folder / "record.jsonl", row("train", key=name, **{**line, **fields}).as_dict())
    for step, speed in enumerate(speeds):
        append(folder / "metrics.jsonl", {"step": step, "loss": 1.0, "images_per_s": speed})
    return folder


def test_trainings_tell_hours_without_their_pauses(tmp_path):
    """The median of lines is 200 images/s, of which the first has compilation in it."""
    study = Study("s", "?", base={"model": "dit_s_2", "data": "cifar10", "train.steps": 3600, "train.batch_size": 100},
                  variants={"a": {}})  # fmt: skip
    (run,) = plan(study)
    # The newest row, of a moment that was kept later, is of another machine than the steps.
    write_training(tmp_path, "a", [3.0, 190.0, 200.0, 201.0, 202.0], provenance={"device": "a laptop"})
    write_training(tmp_path, "b", [9e9] * 4)  # too short
    write_training(tmp_path, "c", [9e9] * 9, stretches=[{**STRETCH, "processes": 2}])
    write_training(tmp_path, "d", [9e9] * 9, stretches=[STRETCH, {**STRETCH, "device": "GPU B"}])
    write_training(tmp_path, "e", [9e9] * 9, stretches=[{**STRETCH, "processes": 4}, STRETCH])
    write_training(tmp_path, "f", [9e9] * 9, stretches=[{**STRETCH, "compile": "compile"}, STRETCH])
    write_training(tmp_path, "g", [9e9] * 9, state="failed", error="x")
    write_training(tmp_path, "h", [9e9] * 9, precision="float32")
    (write_training(tmp_path, "i", [9e9] * 9) / "config.json").write_text("{")
    write_training(tmp_path, "j", ["fast"] * 9)
    write_training(tmp_path, "k", [0.0] * 9)
    rows = gpu_hours.trained([tmp_path], [run.config])
    assert gpu_hours.of_runs([run], rows)[0] == [{"GPU A": pytest.approx(0.5)}]
    (other,) = plan(replace(study, base={**study.base, "model": "dit_b_2"}))
    assert gpu_hours.trained([tmp_path], [other.config]) == []


def test_of_many_trainings_alike_only_some_are_read(tmp_path, monkeypatch):
    for number in range(gpu_hours.ENOUGH + 2):
        write_training(tmp_path, f"a{number}", [200.0] * 5)
    read = []
    lines = gpu_hours.read_lines
    monkeypatch.setattr(gpu_hours, "read_lines", lambda path: (read.append(path), lines(path))[1])
    (run,) = plan(Study("s", "?", base={"model": "dit_s_2", "data": "cifar10"}, variants={"a": {}}))
    assert len(gpu_hours.trained([tmp_path], [run.config])) == len(read) == gpu_hours.ENOUGH


def test_a_plan_knows_what_was_trained(tmp_path, capsys, monkeypatch):
    """Below the root, and in what is committed of GPUs."""
    base = {"model": "dit_s_2", "data": "cifar10", "train.steps": 3600, "train.batch_size": 100}
    path, records = tmp_path / "mine.yaml", tmp_path / "records"
    path.write_text(yaml.safe_dump({"question": "?", "base": base, "variants": {"a": {}}}))
    write_training(tmp_path / "runs", "a", [200.0] * 5)
    gpu, cpu = ({**STRETCH, "device": f"{kind} B"} for kind in ("GPU", "CPU"))
    write_training(records / "mine", "b", [400.0] * 5, stretches=[gpu], provenance={"driver": "580"})
    write_training(records / "other", "c", [9e9] * 5, stretches=[cpu], provenance={"driver": None})
    monkeypatch.setattr(gpu_hours, "committed_roots", lambda: sorted(records.iterdir()))
    monkeypatch.setattr(gpu_hours, "committed_speeds", lambda mode="train": [])
    assert main(["sweep", "plan", str(path), f"run.root={tmp_path / 'runs'}", "--json"]) == 0
    (planned,) = json.loads(capsys.readouterr().out)
    assert planned["gpu_hours"] == {"GPU A": pytest.approx(0.5), "GPU B": pytest.approx(0.25)}


def test_hours_of_sets_are_those_of_as_many_images():
    """2,000 images take as long as 10,000 where most of it is the start."""
    where = {"provenance": {"device": "GPU A"}}
    rows = [{"count": 2000, "images_per_s": 100.0 + more, **where} for more in (0, 1, 50)]
    rows += [{"count": 10_000, "images_per_s": 500.0, **where}]
    speeds = [gpu_hours.of_device(rows, count) for count in (2000, 10_000, 50_000)]
    assert speeds == [{"GPU A": 101.0}, {"GPU A": 500.0}, {"GPU A": 125.5}]


def test_hours_of_one_training_are_counted_once():
    runs = plan(replace(load("guidance"), seeds=[0]))
    hours, shared = gpu_hours.of_runs(runs, [])
    assert [isinstance(cost, str) for cost in hours] == [True] + [False] * (len(runs) - 1)
    assert shared == [""] + ["1.0"] * (len(runs) - 1) and gpu_hours.cell({}, shared[1]) == "with 1.0"


def test_hours_count_to_the_furthest_step_of_all_runs(tmp_path):
    base = {"model": "dit_s_2", "data": "cifar10", "train.batch_size": 100}
    runs = plan(Study("s", "?", base=base, axes={"train.steps": [1800, 3600]}))
    hours, shared = gpu_hours.of_runs(runs, write_records(tmp_path, {}))  # 100 images/s
    assert hours == [{"GPU A": pytest.approx(1.0)}, {}] and shared == ["", "1800"]


def test_records_of_the_command_are_read(tmp_path, monkeypatch):
    """`bench` writes every field from which hours are computed."""
    monkeypatch.chdir(tmp_path)
    small = ["depth=1", "hidden_size=16", "num_heads=2", "bench.batch_size=2", "bench.repeats=1", "run.device=cpu"]
    assert main(["bench", "dit_nano", *small, "bench.precision=float32", "bench.seconds=0.01"]) == 0
    (folder,) = tmp_path.glob("runs/models/*")
    run = read_run(folder)
    base = {"model": "dit_nano", "train.precision": "float32", "train.steps": 10, "train.batch_size": 36}
    base |= {"model.depth": 1, "model.hidden_size": 16, "model.num_heads": 2}
    (planned,) = plan(Study("s", "?", base=base, variants={"a": {}}))
    (speed,) = (one.images_per_s for one in run.records if one.mode == "train")
    (hours,), _ = gpu_hours.of_runs([planned], gpu_hours.committed_speeds(tmp_path / "runs"))
    assert list(hours.values()) == [pytest.approx(0.1 / speed)]


def test_a_study_that_measures_first_knows_its_cost(tmp_path, monkeypatch, capsys, jobs):
    monkeypatch.chdir(tmp_path)
    base = {"model": "dit_nano", "model.depth": 1, "data": "digits", "train.precision": "float32", "train.steps": 10}
    base |= {"train.batch_size": 36, "bench.batch_size": 2, "bench.repeats": 1, "bench.precision": "float32"}
    base |= {"bench.seconds": 0.01, "run.device": "cpu"}
    path = str(tmp_path / "mine.yaml")
    mine = {"question": "Is it measured?", "base": base, "axes": {"model.hidden_size": [24, 48]}}
    Path(path).write_text(yaml.safe_dump(mine))
    assert main(["sweep", "plan", path]) == 0 and "unknown for 2 runs" in capsys.readouterr().out
    assert main(["sweep", "run", path, "--stages", "bench"]) == 0
    folders = sorted(tmp_path.glob("runs/models/*/record.jsonl"))
    records = [read_run(folder.parent).records for folder in folders]
    assert len(records) == 2 and {line.kind for lines in records for line in lines} == {"speed"}
    capsys.readouterr()
    assert main(["sweep", "plan", path, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    speeds = [line.images_per_s for lines in records for line in lines if line.mode == "train"]
    hours = [cost for row in rows for cost in row["gpu_hours"].values()]
    assert sorted(hours) == pytest.approx(sorted(0.1 / speed for speed in speeds))
    assert all("train" in row["to do"] and row["state"] == "planned" for row in rows)
    assert main(["sweep", "prune", path, "--stages", "bench"]) == 2
    assert "--stages is for plan, run, submit, retry and status, not for prune" in capsys.readouterr().err


def test_hours_of_sampling_come_from_forward_passes_and_earlier_samples(tmp_path, finish):
    base = {"model": "dit_s_2", "data": "cifar10", "run.root": str(tmp_path), "sample.count": 3600, "sample.steps": 10}

    def hours(forward=(), **more):
        runs = plan(Study("s", "?", base={**base, **more}, axes={"train.lr": [1e-4, 2e-4]}))
        return set_hours.of_sampling(runs, forward)

    text = "unknown (no samples and no bench record of forward passes of dit_s_2 at side 32, float32, eager)"
    assert hours() == [text, text]
    write_records(
        tmp_path / "records",
        {"mode": "forward", "precision": "float32", "images_per_s": 100.0},
        {"mode": "forward", "precision": "float32", "images_per_s": 50.0, "batch_size": 1},
        {"mode": "forward", "precision": "bfloat16", "images_per_s": 9e9},
        {"mode": "train", "precision": "float32", "images_per_s": 9e9},
    )
    forward = gpu_hours.committed_speeds(tmp_path / "records", "forward")
    # 3600 images of 10 steps at 100 passes/s are 360 s; guidance takes two passes a step.
    assert hours(forward) == [{"GPU A": pytest.approx(0.1)}] * 2
    assert hours(forward, **{"sample.guidance": 1.5}) == [{"GPU A": pytest.approx(0.2)}] * 2
    # A step of Heun's method is two passes, but the last step is one.
    assert hours(forward, **{"sample.method": "heun"}) == [{"GPU A": pytest.approx(0.19)}] * 2
    assert hours(forward, **{"sample.at": [10, 20], "train.steps": 20}) == [{"GPU A": pytest.approx(0.2)}] * 2

    # Two processes drew 100 images of 5 steps in 50 s each: 5 passes a second each, of the same network elsewhere too.
    (run, _) = plan(Study("s", "?", base=base, axes={"train.lr": [1e-4, 2e-4]}))
    task = next(task for task in run.tasks if task.kind == "samples")
    finish(replace(task, stages=()))
    fields = {"count": 100, "method": "ddim", "steps": 5, "guidance": 1.0, "seconds": 50.0, "process_seconds": 100.0}
    fields |= {"precision": "float32", "compile": "eager", "provenance": {"device": "GPU B"}}
    append(task.path / "record.jsonl", row("sample", key="k", **fields).as_dict())
    assert hours(forward) == [{"GPU A": pytest.approx(0.1), "GPU B": pytest.approx(2.0)}] * 2
    assert hours(**{"sample.precision": "bfloat16"})[0].startswith("unknown")


def test_hours_of_scoring_come_from_earlier_scores_with_the_same_network(tmp_path, finish):
    base = {"model": "dit_s_2", "data": "cifar10", "run.root": str(tmp_path), "sample.count": 7200}

    def hours(**more):
        runs = plan(Study("s", "?", base={**base, **more}, axes={"train.lr": [1e-4, 2e-4]}))
        return set_hours.of_scoring(runs)

    assert hours() == ["unknown (no score with efficientnet_lite0)"] * 2
    (run, _) = plan(Study("s", "?", base=base, axes={"train.lr": [1e-4, 2e-4]}))
    task = next(task for task in run.tasks if task.kind == "samples")
    finish(replace(task, stages=()))
    fields = {"value": 1.0, "count": 100, "protocol": "0" * 8, "provenance": {"device": "GPU"}}
    for metric, features, seconds in (
        ("a", "efficientnet_lite0", 40.0),
        ("b", "efficientnet_lite0", 50.0),
        ("c", "other", 1.0),
    ):
        line = row("score", key=metric, metric=metric, features=features, seconds=seconds, **fields)
        append(task.path / "record.jsonl", line.as_dict())
    # The second of two numbers came 50 s after the start, and with it all of 100 images: 7200 take an hour.
    assert hours() == [{"GPU": pytest.approx(1.0)}] * 2
    assert hours(**{"sample.at": [10, 20], "train.steps": 20}) == [{"GPU": pytest.approx(2.0)}] * 2
    assert hours(**{"evaluate.metrics": ["heldout"]}) == [{}, {}]
    assert hours(**{"evaluate.features": "inception_v3"})[0].startswith("unknown")
