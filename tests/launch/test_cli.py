"""The command line: its output, and one clear line for every mistake."""

import json
import os
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import yaml
from lamabench.harness.run import open_run, read_run, read_study
from lamabench.harness.shards import images_of, open_samples
from lamabench.launch.cli import main
from PIL import Image

QUICK = [
    "data=digits", "data.size=8", "train.batch_size=4", "train.precision=float32", "run.log_every=2",
    "run.checkpoint_every=2", "run.device=cpu", "sample.method=ddim", "sample.steps=3", "sample.count=20",
    "evaluate.metrics=[fd]", "evaluate.reference_count=50",
]  # fmt: skip
DIT = ["model=dit_nano", "model.depth=1", "model.hidden_size=16", "model.num_heads=2"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *words):
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_memory_that_runs_out_is_one_line(capsys, monkeypatch):
    def fail(args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 102400000000 bytes.\nfoo")

    monkeypatch.setattr("lamabench.launch.commands.train.run", fail)
    code, out, err = run(capsys, "train", "model=dit_nano")
    assert code == 1 and not out and err.count("\n") == 1
    assert err.startswith("lamabench train: out of memory: RuntimeError: DefaultCPUAllocator: can't allocate memory")


def test_help_has_examples(capsys):
    for words in (["--help"], ["train", "--help"], ["sweep", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 0
        assert "lamabench " in capsys.readouterr().out.split("example", 1)[1]


def test_cost_json(capsys):
    code, out, _ = run(capsys, "cost", "lamamba_xl", "dit_xl_2", "input_size=64", "--json")
    lamamba, dit = json.loads(out)
    assert code == 0 and (lamamba["model"], dit["model"]) == ("lamamba_xl", "dit_xl_2")
    assert lamamba["params"] == pytest.approx(660.725e6, abs=500) and dit["macs"] == pytest.approx(524.538e9, abs=5e5)
    assert 100 * (lamamba["paper_gflops"] / dit["paper_gflops"] - 1) == pytest.approx(-61.6, abs=0.2)
    assert list(lamamba["parts"]) == ["ssm", "scan", "attention", "mlp", "conditioning", "rest"]
    assert lamamba["flops"] > 2 * lamamba["macs"]


def test_cost_table(capsys):
    code, out, _ = run(capsys, "cost", "dit_nano")
    assert code == 0 and "MACs (G)" in out and "dit_nano" in out and "attention" in out


def test_unread_output_is_no_traceback():
    script = "import sys; from lamabench.launch.cli import main; sys.exit(main(['sweep', 'plan', 'demo']))"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait() == 141 and process.stderr.read() == b""


def test_models_lists_the_registry(capsys, monkeypatch):
    """The small ones. tests/harness/measure/test_cost.py counts all."""
    from lamabench.models.registry import presets

    small = {name: preset for name, preset in presets().items() if name.endswith("_nano")}
    monkeypatch.setattr("lamabench.launch.commands.models.presets", lambda: small)
    _, out, _ = run(capsys, "models", "--json")
    rows = json.loads(out)
    assert [row["model"] for row in rows] == [*small] and len(rows) >= 3
    assert all(row["params"] > 0 and row["macs"] > 0 for row in rows)


def test_bench_table_and_record(capsys, tmp_path):
    small = ["hidden_size=16", "num_heads=2", "bench.batch_size=2", "bench.repeats=2", "bench.precision=float32"]
    code, out, _ = run(capsys, "bench", "dit_nano", *small, "run.device=cpu", "--json")
    rows = json.loads(out)
    assert code == 0 and [row["mode"] for row in rows] == ["forward", "train"]
    (folder,) = (tmp_path / "runs" / "models").iterdir()
    assert read_run(folder).last("speed").images_per_s == rows[1]["images_per_s"]
    (link,) = (tmp_path / "runs" / "bench").glob("dit_nano-*")
    assert link.resolve() == folder and [run["name"] for run in read_study(link.parent)["runs"]] == [link.name]


def test_train_sample_evaluate_report(capsys, tmp_path):
    code, out, err = run(capsys, "train", *DIT, *QUICK, "train.steps=4")
    assert code == 0 and "train 4/4" in err
    (folder,) = (tmp_path / "runs" / "train").glob("dit_nano-digits-*")
    assert folder.is_symlink() and f"next: lamabench sample {folder.relative_to(tmp_path)}" in out
    assert run(capsys, "train", *DIT, *QUICK, "train.steps=4")[0] == 0
    assert len(read_run(folder).records) == 1

    def sample_folders():
        return {read_run(one).last("sample").guidance: one for one in folder.glob("samples/*")}

    code, out, err = run(capsys, "evaluate", str(folder))
    assert code == 2 and f"has no samples to score; draw them first: lamabench sample {folder}" in err
    assert run(capsys, "sample", str(folder))[0] == 0
    images = open_samples(images_of(sample_folders()[1.0]))[:]
    assert images.shape == (20, 8, 8, 1)
    assert run(capsys, "sample", str(folder), "sample.guidance=2", "sample.count=10")[0] == 0
    assert set(sample_folders()) == {1.0, 2.0}

    small = ["evaluate.metrics=[fd]", "evaluate.reference_count=60"]
    code, out, err = run(capsys, "evaluate", str(folder), *small)
    assert code == 0 and "60" in out and "FD-EffNetLite0-20 " in out
    assert "Sampling s.e." in out.splitlines()[0] and "says nothing about other trainings" in out and "±" not in out
    code, out, err = run(capsys, "evaluate", str(folder), *small, "sample.guidance=2", "sample.count=10")
    assert code == 0 and "FD-EffNetLite0-10 " in out  # the other set of samples
    assert [row.metric for row in read_run(sample_folders()[1.0]).records if row.kind == "score"] == [
        "FD-EffNetLite0-20"
    ]
    code, _, err = run(capsys, "evaluate", str(folder), "train.lr=2")
    assert (
        code == 2
        and "would make another training of it; sections to set here: sample, evaluate, run, and data.path" in err
    )
    code, out, err = run(capsys, "sample", str(folder), "--to", "given/adm.npz")
    assert code == 0 and "given/adm.npz: all of them" in out
    with np.load("given/adm.npz") as file:
        assert np.array_equal(file["arr_0"], images) and file["arr_1"].tolist() == [*range(10)] * 2
    code, out, err = run(capsys, "evaluate", "given/adm.npz", *QUICK)
    assert code == 0 and "FD-EffNetLite0-20" in out
    code, out, _ = run(capsys, "report", "runs/train", "--out", "out")
    assert code == 0 and "dit" in out.lower()
    assert {"summary.md", "summary.csv", "summary.tex"} <= {p.name for p in (tmp_path / "out").rglob("*")}


def test_samples_of_a_training_elsewhere_lie_below_our_root(capsys, tmp_path):
    """With run.root, samples of a training go below that root, into a folder that says where the weights lie."""
    assert run(capsys, "train", *DIT, *QUICK, "train.steps=2")[0] == 0
    (training,) = (tmp_path / "runs" / "trainings").iterdir()
    before = sorted(training.rglob("*"))
    assert run(capsys, "sample", str(training), "run.root=mine", "sample.count=4")[0] == 0
    assert sorted(training.rglob("*")) == before
    copy = tmp_path / "mine" / "trainings" / training.name
    assert json.loads((copy / "config.json").read_text())["weights"] == str(training)
    assert len(list(copy.glob("samples/*/shards/*/labels.npy"))) == 1
    assert run(capsys, "sample", str(copy), "sample.count=5")[0] == 0  # the weights are still found from there
    assert len(list(copy.glob("samples/*/shards/*/labels.npy"))) == 2 and sorted(training.rglob("*")) == before
    assert open_run(copy).moments == [2] and open_run(copy).sample([1], steps=2).shape == (1, 8, 8, 1)


def test_train_without_a_model(capsys, tmp_path):
    code, out, err = run(capsys, "train")
    assert code == 2 and out.startswith("usage: lamabench train") and not err
    code, out, err = run(capsys, "train", "data=digits")
    assert code == 2 and "train needs a model: model=NAME; choices: lamamba_t" in err and not list(tmp_path.iterdir())


def _folder(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "a" / "fine.png")
    (tmp_path / "images" / "a" / "broken.png").write_bytes(b"\\x89PNG nothing")
    (tmp_path / "empty").mkdir()


BAD = [
    (["cost", "lamanba_xl"], r"unknown model 'lamanba_xl' \(did you mean 'lamamba_xl'\?\); choices: .*dit_s_2"),
    (["cost"], "cost needs a model"),
    (["cost", "dit_s_2", "inptu_size=3"], r"unknown key 'inptu_size' \(did you mean 'input_size'\?\)"),
    (["cost", "dit_s_2", "depth=x"], "depth: Value 'x' of type 'str' could not be converted to Integer"),
    (["cost", "lamamba_s", "window_size=7"], r"window_size 7 does not divide.*choices: \[1, 2, 4, 8"),
    (["cost", "lamamba_s", "num_heads=5"], "num_heads 5 does not divide dim 64"),
    (["cost", "dit_s_2", "num_heads=5"], "num_heads"),
    (["cost", "lamamba_s", "d_state=0"], "d_state must be 1 or more"),
    (["cost", "lamamba_s", "mixers=[sms]"], r"unknown mixer 'sms' \(did you mean 'ssm'\?\)"),
    (["cost", "lamamba_s", "scan=zigzag"], "unknown scan 'zigzag'"),
    (["train", "model=dit"], r"unknown model 'dit'"),
    (["train", "train.stesp=3"], r"unknown key in train 'stesp' \(did you mean 'steps'\?\)"),
    (["train", "train.steps=many"], "train.steps: Value 'many'"),
    (["train", "train.steps"], "is not an override"),
    (["train", "evaluate.metrics=fid"], r"unknown evaluate\.metrics 'fid' \(did you mean 'fd'\?\); choices: fd, kid"),
    (["bench", "dit_nano", "bench.compile=compil"], r"unknown bench\.compile 'compil' \(did you mean 'compile'\?\)"),
    (["train", "train.steps=[1"], "cannot read the override"),
    (["train", "data=folder", "model=dit_nano", "data.num_classes=1", "data.path=nowhere"], "nowhere"),
    (["train", "data=folder", "model=dit_nano", "data.num_classes=1"], r"data\.path"),
    (["train", "data=folder", "model=dit_nano", "data.num_classes=1", "data.path=empty"], "empty"),
    (["train", "data=folder", "model=dit_nano", "data.num_classes=1", "data.path=images"], r"broken\.png"),
    (["train", "data=cifar10", "model=dit_nano", "data.path=empty"], "cifar"),
    (["train", "data=npz", "model=dit_nano", "data.path=no.npz"], r"no\.npz"),
    (["train", "model=lamamba_nano", "backend.selective_scan=pallas"],
     "unknown selective_scan backend 'pallas'; choices: auto, cuda, cuda_kept, triton, torch, mamba_ssm, reference"),
    (["sample"], "name one run folder"),
    (["sample", "nowhere"], "nowhere is not a run folder"),
    (["evaluate", "nowhere.npz", "data=digits"], r"nowhere\.npz does not exist"),
    (["evaluate", "few.npz", "data=digits", "data.size=8"], r"fd|FD"),
    (["evaluate", "few.npz", "data=digits", "evaluate.metrics=[fid]"], "fid"),
    (["report", "nowhere", "--out", "out"], "no such folder: nowhere"),
    (["sweep", "run", "dmeo"], r"unknown study 'dmeo' \(did you mean 'demo'\?\)"),
    (["sweep", "plan", "demo", "train.lr=fast"], r"train\.lr"),
    (["bench", "dit_nano", "backend.attention=flash"], "unknown attention backend 'flash'"),
    (["bench", "dit_nano", "bench.modes=[fly]"], r"unknown bench.modes 'fly'; choices: forward, train"),
    (["bench", "dit_nano", "bench.batch_size=large"], r"bench.batch_size must be numbers above 0, or auto, not"),
    (["bench", "dit_nano", "bench.compile=[no]"], "unknown bench.compile 'no'; choices: eager, compile, reduce"),
    (["bench", "dit_nano", "bench.input_sizes=[16,7]"], "patch_size 2 does not divide model.input_size 7"),
    (["bench-kernels"], "bench-kernels needs a model; choices: .*dit_nano"),
    (["bench-kernels", "dit_nano", "backend.attention=flash"], "unknown attention backend 'flash'"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_every_mistake_is_one_line_and_leaves_nothing(words, message, capsys, tmp_path):

    _folder(tmp_path)
    np.savez(tmp_path / "few.npz", images=np.zeros((1, 8, 8, 1), np.uint8))
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(capsys, *words)
    assert code == 2 and not out
    line = err.strip().splitlines()[-1]
    assert err.count("error:") == 1 and line.startswith(f"lamabench {words[0]}: error: ")
    assert re.search(message, line), line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("words", [["fly"], ["sweep", "jump", "demo"], ["report"], []])
def test_usage_mistakes_are_one_line(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1 and "error:" in err


def study(tmp_path, steps, stages=("cost", "train", "sample")):
    path = tmp_path / "tiny.yaml"
    settings = dict(word.split("=", 1) for word in [*QUICK, "train.steps=" + str(steps), "bench.repeats=2"])
    settings["evaluate.metrics"] = ["fd"]
    small = {"model.depth": 1, "model.hidden_size": 16, "model.num_heads": 2}
    data = {
        "question": "?",
        "base": {k: yaml.safe_load(v) if isinstance(v, str) else v for k, v in settings.items()},
        "variants": {"one": {"model": "dit_nano", **small}, "two": {"model": "dit_nano", **small, "model.depth": 2}},
        "stages": list(stages),
    }
    path.write_text(yaml.safe_dump(data))
    return str(path)


def test_a_run_is_taken_over_when_its_process_dies(capsys, tmp_path, jobs):
    """Another process holds the run and is killed while the sweep watches it."""
    name = study(tmp_path, 2, ["train"])
    row, _ = json.loads(run(capsys, "sweep", "plan", name, "--json")[1])
    (folder := tmp_path / row["folder"]).mkdir(parents=True)
    hold = "import sys, time; from pathlib import Path; from lamabench.harness.run import locked\n"
    hold += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", hold, str(folder)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    timer = threading.Timer(3, process.kill)
    timer.start()
    code, _, err = run(capsys, "sweep", "run", name)
    process.communicate()
    assert "one (train): already running, watching it" in err and "one (train): whoever worked on it is gone" in err
    assert code == 0 and read_run(folder).last("train").state == "done"


def test_sweep_killed_with_all_its_jobs_continues(capsys, tmp_path, jobs, terminal):
    """The command and its jobs get SIGKILL in mid-training. The same command finishes; a third does nothing."""
    name = study(tmp_path, 60)
    code, out, _ = run(capsys, "sweep", "plan", name, "--json")
    assert code == 0 and [row["state"] for row in json.loads(out)] == ["planned"] * 2
    assert not (tmp_path / "runs").exists()

    command = terminal(tmp_path, "sweep", "run", name, "--parallel", "1")
    command.until(lambda: list(tmp_path.glob("runs/trainings/*/checkpoints/*")))
    os.killpg(command.pids[0], signal.SIGKILL)
    assert command.codes == [-signal.SIGKILL]
    (first,) = tmp_path.glob("runs/trainings/*")
    # submitit starts its jobs in the process group of the command, so that they are gone as well.
    assert json.loads(run(capsys, "sweep", "status", name, "--json")[1])[0]["state"] in ("stopped", "running")

    code, out, err = run(capsys, "sweep", "run", name)
    assert code == 0 and "tables and figures" in out
    folders = [tmp_path / "runs" / "tiny" / name for name in ("one", "two")]
    assert first.resolve() == folders[0].resolve()
    for folder in folders:
        assert [row.kind for row in read_run(folder).records] == ["train"]
        assert [line["step"] for line in read_run(folder).metrics] == list(range(2, 61, 2))
    records = [*tmp_path.glob("runs/models/*/record.jsonl"), *tmp_path.glob("runs/trainings/**/record.jsonl")]
    before = {path: path.read_bytes() for path in records}
    assert len(before) == 6
    code, _, err = run(capsys, "sweep", "run", name)
    assert code == 0 and err.count("already done") == 6
    assert before == {path: path.read_bytes() for path in records}


def test_a_run_that_fails_leaves_the_others_alone(capsys, tmp_path, jobs):
    name = study(tmp_path, 4, ["train", "sample"])
    text = (tmp_path / "tiny.yaml").read_text().replace("two:\n", "two:\n    train.lr: 1.0e+18\n    train.steps: 40\n")
    (tmp_path / "tiny.yaml").write_text(text)
    code, out, err = run(capsys, "sweep", "run", name)
    assert code == 1
    status = json.loads(run(capsys, "sweep", "status", name, "--json")[1])
    assert [row["state"] for row in status] == ["done", "diverged"]
    assert "not finite" in status[1]["error"] and "two (train): diverged" in err and "diverged" in out


def test_a_study_that_samples_one_checkpoint_often_trains_once(capsys, tmp_path, jobs):
    """At its debug size, from the plan to the report."""
    path = study(tmp_path, 4)
    data = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    one = data["variants"]["one"]
    data["variants"] = {f"scale-{scale}": one | {"sample.guidance": float(scale)} for scale in (1, 2, 3)}
    data["debug"] = {"model.depth": 2}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))

    code, out, _ = run(capsys, "sweep", "plan", path)
    assert code == 0 and not (tmp_path / "runs").exists()
    assert "3 runs; hours of training: unknown for 1 run (no training and no bench record)" in out
    rows = json.loads(run(capsys, "sweep", "plan", path, "--debug", "--json")[1])
    assert "no training and no bench record of dit_nano (model.depth=2, model" in rows[0]["gpu_hours"]
    assert [(row["gpu_hours"], row["trained_by"]) for row in rows[1:]] == [({}, "scale-1")] * 2
    assert run(capsys, "sweep", "plan", "demo", "--debug")[0] == 2

    code, out, err = run(capsys, "sweep", "run", path, "--debug")
    # A model, a training and three sets of samples.
    assert code == 0 and err.count(": done") == 5 and "tables and figures" in out
    (training,) = tmp_path.glob("runs/trainings/*")
    assert [row.kind for row in read_run(training).records] == ["train"]
    scales = [read_run(folder).last("sample").guidance for folder in training.glob("samples/*")]
    assert sorted(scales) == [1.0, 2.0, 3.0]
    links = [tmp_path / "runs" / "tiny-debug" / f"scale-{scale}" for scale in (1, 2, 3)]
    assert {link.resolve() for link in links} == {training.resolve()}
    code, _, err = run(capsys, "sweep", "run", path, "--debug")
    assert code == 0 and err.count("already done") == 5


def test_samples_of_a_training_that_diverged_are_not_started(capsys, tmp_path, jobs):
    path = study(tmp_path, 40, ["train", "sample"])
    data = yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    data["base"]["train.lr"] = 1e18
    data["variants"]["two"] = data["variants"]["one"] | {"sample.guidance": 2.0}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(data))
    code, _, err = run(capsys, "sweep", "run", path)
    assert code == 1 and "one (train): diverged" in err
    assert "two (sample at 40): not started, " in err and "has no weights of step 40" in err
    assert not list(tmp_path.glob("runs/trainings/*/samples/*"))
