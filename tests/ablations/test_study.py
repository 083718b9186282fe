"""Studies: what a YAML file expands into, and what it must say."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_module
from lamabench.ablations import study as studies
from lamabench.ablations.study import Study, StudyError, load
from lamabench.harness.progress import Progress
from lamabench.harness.record import RecordError, append, entry, identity, read_run
from lamabench.harness.run import STAGES, config_from_dict, config_to_dict, create, execute
from lamabench.kernels.errors import InputError
from lamabench.launch import gpu_hours
from lamabench.launch.compose import compose, model_config
from lamabench.launch.plan import only, plan
from lamabench.models.registry import build, preset, to_dict
from omegaconf import OmegaConf

QUESTIONS = ["block_mix", "d_state", "guidance", "resolution", "scale", "scan", "unet", "window"]


def write(tmp_path, **data):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def test_axes_multiply_in_order():
    study = Study(
        "s", "?", base={"data": "digits"}, axes={"model": ["a", "b"], "model.shift": [True, False]}, seeds=[0, 7]
    )
    variants = study.expand()
    assert [v.name for v in variants] == [
        f"{model}-{shift}-s{seed}" for model in "ab" for shift in (True, False) for seed in (0, 7)
    ]
    assert variants[1].overrides == ("data=digits", "model=a", "model.shift=true", "seed=7")
    assert variants[1].values == {"model": "a", "model.shift": True}


def test_named_variants_and_literals():
    variants = {
        "x": {"model.mixers": ["ssm", "window"], "data.path": None, "train.lr": 1e-4},
        "y": {"model.mixers": []},
    }
    x, y = Study("s", "?", variants=variants).expand()
    assert x.overrides == ("model.mixers=[ssm,window]", "data.path=null", "train.lr=0.0001", "seed=0")
    assert y.overrides == ("model.mixers=[]", "seed=0") and y.values == {"variant": "y"}


@pytest.mark.parametrize("name", studies.names())
def test_committed_studies_plan(name):
    study = load(name)
    runs = plan(study)
    assert study.question.endswith("?")
    assert len({run.info["id"] for run in runs}) == len(runs) == len(study.expand())
    for model in {json.dumps(run.info["config"]["model"]): run for run in runs}.values():
        with torch.device("meta"):
            build(config_from_dict(model.info["config"]).model)


@pytest.mark.parametrize("name", QUESTIONS)
def test_debug_sizes_run_to_the_end(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Progress, "say", lambda *_: None)
    runs = plan(load(name).debug_size(), [f"run.root={tmp_path}", "run.device=cpu"])
    assert {run.info["study"] for run in runs} == {f"{name}-debug"}
    for run in sorted(runs, key=lambda run: "source" in run.info):
        assert run.ready()
        create(run.info)
        execute(run.folder, run.stages, Progress(run.folder))
    assert [run.state() for run in runs] == ["done"] * len(runs)


def test_debug_size_replaces_settings_and_axes(tmp_path):
    axes = {"model": ["dit_s_2"], "train.steps": [5, 6]}
    debug = {"model": ["dit_nano"], "train.lr": 0.5}
    study = load(write(tmp_path, question="?", base={"train.lr": 1}, axes=axes, seeds=[1, 2], debug=debug))
    small = study.debug_size()
    assert small.name == "mine-debug" and small.axes == axes | {"model": ["dit_nano"]} and small.seeds == [1]
    assert small.base["train.lr"] == 0.5 and small.base["data"] == "digits" and "train.steps" not in small.base
    variants = {"a": {"model.dim": 64, "model.shift": False}}
    assert Study("s", "?", variants=variants, debug={"model.dim": 8}).debug_size().variants == {
        "a": {"model.dim": 8, "model.shift": False}
    }
    with pytest.raises(StudyError, match="study s has no debug size"):
        Study("s", "?", variants=variants).debug_size()


def test_stages_are_those_of_a_run():
    assert studies.STAGES == STAGES


def test_unknown_study_lists_the_choices():
    with pytest.raises(StudyError, match=r"unknown study 'dmeo' \(did you mean 'demo'\?\); choices: .*demo"):
        load("dmeo")


AXES = {"model": ["dit_nano"]}
BAD = [
    ({"axes": AXES}, "states its question"),
    ({"question": "?", "axes": AXES, "variants": {"a": {}}}, "axes or variants, one of the two"),
    ({"question": "?"}, "axes or variants, one of the two"),
    ({"question": "?", "axes": {"model": "dit_nano"}}, "axis model must list its values"),
    ({"question": "?", "axes": AXES, "seed": [0]}, "unknown key 'seed'; choices: question, claim, base"),
    ({"question": "?", "axes": AXES, "seeds": ["a"]}, "seeds are whole numbers, not 'a'"),
    ({"question": "?", "axes": AXES, "seeds": []}, "seeds must list at least one"),
    ({"question": "?", "axes": AXES, "stages": ["fly"]}, "unknown stage 'fly'; choices: cost, train"),
    ({"question": "?", "axes": [1]}, "axes must be a dict"),
    ({"question": "?", "axes": AXES, "debug": {"model": "dit_s_2"}}, "axis model must list its values, not 'dit_s_2'"),
    ({"question": "?", "axes": AXES, "base": {"seed": 3}}, r"list it in seeds, such as seeds: \[0, 1\]"),
    ({"question": "?", "axes": {"seed": [1, 2]}}, "list it in seeds"),
    ({"question": "?", "variants": {"a": {"seed": 1}}}, "list it in seeds"),
    ({"question": "?", "variants": {"a/b": {}}}, "variant 'a/b' names a folder, and must have no / in it"),
]


@pytest.mark.parametrize(("data", "message"), BAD)
def test_bad_studies_are_one_line(tmp_path, data, message):
    with pytest.raises(StudyError, match=message) as caught:
        load(write(tmp_path, **data))
    assert "\n" not in str(caught.value)


def test_broken_yaml_is_one_line(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("question: [\n")
    with pytest.raises(StudyError, match="is not YAML") as caught:
        load(str(path))
    assert "\n" not in str(caught.value)


def test_two_variants_of_one_run_are_refused(tmp_path):
    same = {"a": {"model": "dit_nano"}, "b": {"model": "dit_nano", "train.batch_size": 256}}
    with pytest.raises(StudyError, match="b and a are the same run"):
        plan(load(write(tmp_path, question="?", variants=same)))


def slowly(overrides):
    """What Hydra itself makes of overrides: the configuration as plain data, and its identity."""
    with initialize_config_module("lamabench.launch.conf", version_base="1.3"):
        config = OmegaConf.to_object(hydra_compose("config", list(overrides)))
    plain = config_to_dict(config)
    return plain, identity(plain)


MIXED = Study(
    "mixed",
    "?",
    base={"data": "digits", "train.steps": 7, "bench.batch_size": "auto", "run.root": "elsewhere"},
    variants={
        "plain": {"model": "dit_nano"},
        "changed": {"model": "dit_nano", "model.depth": 3, "train.lr": 1e-3, "sample.guidance_channels": 1},
        "data": {"model": "unet_nano", "data": "cifar10", "data.path": "/some where", "data.size": 64},
        "mixers": {"model": "lamamba_nano", "model.mixers": ["window", "ssm"], "model.parallel": True},
        "empty": {"model": "lamamba_nano", "model.mixers": [], "evaluate.metrics": ["fd"], "data.channels": 3},
        "tied": {"model": "lamamba_nano", "model.dim": "${train.batch_size}", "train.batch_size": 64},
        "floats": {"model": "unet_nano", "model.channel_mult": [1, 2.0], "evaluate.reference_count": None},
    },
    seeds=[0, 5],
)


@pytest.mark.parametrize("study", [load("demo"), load("block_mix"), MIXED], ids=lambda study: study.name)
def test_ids_are_those_of_hydra(study):
    more = ["train.steps=9", "data.flip=true", "data.size=32"]
    for overrides in ([], more):
        for run, variant in zip(plan(study, overrides), study.expand(), strict=True):
            plain, name = slowly([*variant.overrides, *overrides])
            assert run.info["config"] == plain and run.info["id"] == name


def test_a_configuration_belongs_to_its_run_alone():
    first, _ = compose(["model=lamamba_nano"])
    first.model.mixers.append("conv")
    first.bench.modes.clear()
    again, _ = compose(["model=lamamba_nano"])
    assert again.model.mixers == ["ssm", "window"] and again.bench.modes == ["forward", "train"]


TYPOS = [
    (["model=dit"], "unknown model 'dit'"),
    (
        ["data=digit"],
        r"unknown data 'digit' \(did you mean 'digits'\?\); choices: cifar10, digits, folder, npz, synthetic",
    ),
    (["model=dit_nano", "model.skip=add"], "unknown key in model 'skip'; choices: input_size"),
    (["train.stesp=3"], r"unknown key in train 'stesp' \(did you mean 'steps'\?\)"),
    (["trian.steps=3"], r"unknown key 'trian' \(did you mean 'train'\?\)"),
    (["train.steps.x=3"], "unknown key in train.steps 'x'"),
    (["train={steps: 3}"], "train is a section; set one of its keys: steps"),
    (["seed=one"], "Value 'one'"),
    (["train.steps=1.5"], "train.steps: Value '1.5'"),
    (["train.ema_decay=2"], "train.ema_decay must be at least 0 and below 1, not 2.0"),
    (["train.steps=???"], "missing mandatory value: steps"),
    (["train.steps=1,2"], "'train.steps=1,2' gives several values"),
    (["+train.steps=1"], "'\\+train.steps=1' is not an override; write key=value"),
    (["~train.steps=1"], "is not an override"),
    (["data.size=${train.stesp}"], "stesp"),
]


@pytest.mark.parametrize(("overrides", "message"), TYPOS, ids=lambda value: str(value))
def test_typos_are_refused_in_one_line_again_and_again(overrides, message):
    compose([])
    for _ in range(2):  # what is kept between calls does not swallow errors
        with pytest.raises(InputError, match=message) as caught:
            compose(overrides)
        assert "\n" not in str(caught.value)


def test_one_value_for_a_list_is_a_list_of_one():
    one = ["bench.compile=compile", "bench.input_sizes=32", "bench.checkpointing=true", "model.mixers=ssm"]
    several = ["bench.compile=[compile]", "bench.input_sizes=[32]", "bench.checkpointing=[true]", "model.mixers=[ssm]"]
    more = ["model=lamamba_nano", "train.batch_size=2"]
    assert compose([*more, *one])[0] == compose([*more, *several])[0]
    assert compose([*more, "bench.input_sizes=null"])[0].bench.input_sizes is None
    assert model_config("lamamba_nano", ["mixers=ssm"]).mixers == ["ssm"]


def test_a_thousand_runs_are_planned_in_seconds(record_property):
    models, rates = ["dit_s_2", "lamamba_s", "unet_s", "lamamba_b"], [i * 1e-5 for i in range(1, 26)]
    axes = {"model": models, "train.lr": rates, "model.input_size": [32], "data.size": [32]}
    study = Study("large", "?", base={"data": "cifar10", "sample.clip": True}, axes=axes, seeds=list(range(10)))
    started = time.perf_counter()
    runs = plan(study)
    seconds = time.perf_counter() - started
    record_property("seconds", round(seconds, 2))
    print(f"planned {len(runs)} runs in {seconds:.2f} s")
    assert len(runs) == 1000
    assert seconds < 20, f"{seconds:.1f} s; 5 s on two cores is the aim, 300 s is what Hydra alone takes"


def test_what_training_does_not_see_is_trained_once(tmp_path):
    def study(scales):
        axes = {"model": ["dit_nano"], "sample.guidance": scales, "train.lr": [1e-4, 2e-4]}
        return Study("s", "?", base={"run.root": str(tmp_path)}, axes=axes)

    runs = {run.name: run for run in plan(study([1.0, 2.0, 3.0]))}
    trainers = [name for name, run in runs.items() if "train" in run.stages]
    assert trainers == ["dit_nano-1.0-0.0001", "dit_nano-1.0-0.0002"]
    third = runs["dit_nano-3.0-0.0002"]
    assert third.info["source"] == str(runs[trainers[1]].folder.resolve())
    assert third.stages == ("cost", "sample", "evaluate", "bench") and not third.ready()
    assert all("source" not in runs[name].info and runs[name].ready() for name in trainers)

    trained = create(runs[trainers[1]].info)
    append(trained / "record.jsonl", entry("train", "diverged", error="x"))
    assert not third.ready()
    append(trained / "record.jsonl", entry("train"))
    assert third.ready()
    (trained / "checkpoints").mkdir()
    runs = {run.name: run for run in plan(study([4.0, 1.0]))}  # another first scale does not train again
    assert runs["dit_nano-4.0-0.0002"].info["source"] == str(trained.resolve())
    assert "train" in runs["dit_nano-4.0-0.0001"].stages

    cost_only = plan(Study("s", "?", axes={"model": ["dit_nano"], "sample.guidance": [1.0, 2.0]}, stages=["cost"]))
    assert not any("source" in run.info for run in cost_only)


def planted(folder: Path, *rows):
    """Records of benchmarks: DiT-S/2 at 100 images/s, but for what each row says."""
    line = {"mode": "train", "input_size": 32, "precision": "bfloat16", "checkpointing": False, "compile": "eager"}
    line |= {"images_per_s": 100.0, "batch_size": 8, "provenance": {"device": "GPU A"}}
    for row in rows:
        model, fields = row.get("model", "dit_s_2"), {key: value for key, value in row.items() if key != "model"}
        config = {"model": to_dict(replace(preset(model).config, **fields.pop("overrides", {})))}
        run = folder / "bench" / f"{model}-{identity(config)}"
        run.mkdir(parents=True, exist_ok=True)
        info = {"id": identity(config), "study": "bench", "name": model, "config": config}
        (run / "config.json").write_text(json.dumps(info))
        append(run / "record.jsonl", entry("bench", fields.pop("state", "done"), **{**line, **fields}))
    return gpu_hours.measured(folder)


def test_hours_come_from_records_alone(tmp_path):
    base = {"data": "cifar10", "train.steps": 3600, "train.batch_size": 100}

    def cost(values, rows):
        (run,) = plan(Study("s", "?", base={**base, **values}, variants={"a": {}}))
        return gpu_hours.gpu_hours(run.info, run.stages, rows)

    plain, deeper = {"model": "dit_s_2"}, {"model": "dit_s_2", "model.depth": 14}
    nothing = gpu_hours.measured(tmp_path / "nowhere")
    assert cost(plain, nothing) == "unknown (no bench record of dit_s_2 at side 32, bfloat16, eager)"
    rows = planted(
        tmp_path,
        {},
        {"images_per_s": 200.0, "batch_size": 64},
        {"images_per_s": 50.0, "provenance": {"device": "GPU B"}},
        {"images_per_s": 9e9, "batch_size": 101},  # more than the training passes
        {"images_per_s": 9e9, "mode": "forward"},
        {"images_per_s": 9e9, "compile": "compile"},
        {"images_per_s": 9e9, "precision": "float32"},
        {"images_per_s": 9e9, "input_size": 16},
        {"images_per_s": 9e9, "model": "dit_b_2"},
        {"state": "oom", "error": "x"},
        {"images_per_s": 400.0, "overrides": {"depth": 14}},
    )
    # 3600 steps of 100 images at 200 images/s are 1800 s.
    assert cost(plain, rows) == {"GPU A": pytest.approx(0.5), "GPU B": pytest.approx(2.0)}
    assert cost(deeper, rows) == {"GPU A": pytest.approx(0.25)}
    assert cost({**plain, "run.micro_batch": 50}, rows) == {"GPU A": pytest.approx(1.0), "GPU B": pytest.approx(2.0)}
    assert cost({**deeper, "run.micro_batch": 4}, rows) == {"GPU A": pytest.approx(0.25)}  # measured at 8 alone
    assert cost(deeper | {"model.depth": 15}, rows) == (
        "unknown (no bench record of dit_s_2 (model.depth=15) at side 32, bfloat16, eager)"
    )
    found = [cost(plain, rows), cost(deeper, rows), cost({"model": "unet_s"}, rows), {}]
    assert gpu_hours.words(found[0]) == "0.5 (GPU A), 2 (GPU B)" and gpu_hours.words({}) == "none: no training"
    assert gpu_hours.total(found) == "0.75 on GPU A (2 runs); 2 on GPU B (1 runs); unknown for 1 runs (no bench record)"
    # What was measured beside others' work says so, and gives way to what was not.
    rows = planted(tmp_path / "busy", {"disturbed": "x"}, {"images_per_s": 50.0, "provenance": {"device": "GPU B"}})
    assert cost(plain, rows) == {"GPU A, busy host": pytest.approx(1.0), "GPU B": pytest.approx(2.0)}
    assert gpu_hours.total([cost(plain, rows)]) == (
        "2 on GPU B (1 runs); 1 on GPU A, busy host (1 runs); busy host: measured beside other work, fewer hours may do"
    )
    rows = planted(tmp_path / "quiet", {"images_per_s": 400.0, "disturbed": "x"}, {}, {"disturbed": None})
    assert cost(plain, rows) == {"GPU A": pytest.approx(1.0)}
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match=r"empty holds no run"):
        gpu_hours.measured(tmp_path / "empty")


def test_hours_of_one_training_are_counted_once():
    runs = plan(load("guidance"))
    found = [gpu_hours.gpu_hours(run.info, run.stages, []) for run in runs]
    assert [isinstance(cost, str) for cost in found] == [True] + [False] * (len(runs) - 1)


def test_a_measurement_of_the_command_is_understood(tmp_path, monkeypatch):
    """What `bench` writes today has every field that hours read."""
    from lamabench.launch.cli import main

    monkeypatch.chdir(tmp_path)
    small = ["depth=1", "hidden_size=16", "num_heads=2", "bench.batch_size=2", "bench.repeats=1", "run.device=cpu"]
    assert main(["bench", "dit_nano", *small, "bench.precision=float32", "bench.seconds=0.01"]) == 0
    (folder,) = tmp_path.glob("runs/bench/*")
    run = read_run(folder)
    base = {"model": "dit_nano", "train.precision": "float32", "train.steps": 10, "train.batch_size": 36}
    base |= {"model.depth": 1, "model.hidden_size": 16, "model.num_heads": 2}
    (planned,) = plan(Study("s", "?", base=base, variants={"a": {}}))
    speed = run.last("bench", mode="train")["images_per_s"]
    found = gpu_hours.gpu_hours(planned.info, planned.stages, gpu_hours.measured(tmp_path / "runs"))
    assert list(found.values()) == [pytest.approx(0.1 / speed)]


def test_some_stages_of_a_study():
    """Without those that want a checkpoint, no run waits for another's training."""
    study = load("guidance")
    runs = plan(study)
    counted = only(runs, ["cost"], study)
    assert {run.stages for run in counted} == {("cost",)} and all(run.ready() for run in counted)
    assert [run.stages for run in only(runs, ["train"], study)] == [("train",)]
    sampled = only(runs, ["sample", "cost"], study)
    assert {run.stages for run in sampled} == {("cost", "sample")}
    assert [run.ready() for run in sampled] == [True] + [False] * (len(runs) - 1)
    with pytest.raises(InputError, match=r"unknown stage of guidance .smaple. \(did you mean .sample.\?\)"):
        only(runs, ["smaple"], study)


def test_a_study_measures_first_and_then_knows_its_cost(tmp_path, monkeypatch, capsys):
    from lamabench.launch.cli import main

    monkeypatch.chdir(tmp_path)
    base = {"model": "dit_nano", "model.depth": 1, "data": "digits", "train.precision": "float32", "train.steps": 10}
    base |= {"train.batch_size": 36, "bench.batch_size": 2, "bench.repeats": 1, "bench.precision": "float32"}
    base |= {"bench.seconds": 0.01, "run.device": "cpu"}
    path = write(tmp_path, question="Is it measured?", base=base, axes={"model.hidden_size": [24, 48]})
    assert main(["sweep", "plan", path]) == 0 and "unknown for 2 runs" in capsys.readouterr().out
    assert main(["sweep", "run", path, "--stages", "bench"]) == 0
    folders = sorted(tmp_path.glob("runs/mine/*/record.jsonl"))
    records = [read_run(folder.parent).records for folder in folders]
    assert len(records) == 2 and {line["kind"] for lines in records for line in lines} == {"bench"}
    capsys.readouterr()
    assert main(["sweep", "plan", path, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    speeds = [line["images_per_s"] for lines in records for line in lines if line["mode"] == "train"]
    found = [cost for row in rows for cost in row["gpu_hours"].values()]
    assert sorted(found) == pytest.approx(sorted(0.1 / speed for speed in speeds))
    assert all("train" in row["to do"] and row["state"] == "planned" for row in rows)
    assert main(["sweep", "prune", path, "--stages", "bench"]) == 2
    assert "--stages is for plan, run, submit, retry and status, not for prune" in capsys.readouterr().err
