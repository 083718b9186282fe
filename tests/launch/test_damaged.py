"""A damaged or foreign file of a run leaves that run out of a sweep, by name, and the command goes on."""

import json

import pytest
from bad_inputs import BASE
from lamabench.ablations.study import load
from lamabench.launch.cli import main
from lamabench.launch.commands import sweep
from lamabench.launch.plan import pieces, plan
from lamabench.launch.slurm.submit import Submission

STUDY = BASE.replace(", sample, evaluate", "") + "variants: {a: {}, b: {train.lr: 0.1}}\n"
CONTENTS = (b"junk\n", b"[]\n", b"null\n", b"{}\n", b'{"a": 1}\n', b"\xff\n")


@pytest.fixture
def folders(tmp_path, monkeypatch, finish):
    """A finished study of two runs that share a model: the folders of its model and of the training of each run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "st.yaml").write_text(STUDY)
    runs = plan(load("st.yaml"))
    for piece in pieces(runs):
        finish(piece.task)
    return {"model": pieces(runs)[0].folder, **{run.name: run.training.path for run in runs}}


def run(capsys, *words):
    code = main(["sweep", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("name", ["record.jsonl", "config.json"])
def test_plan_shows_it_as_unreadable(folders, name, capsys):
    for content in CONTENTS:
        (folders["a"] / name).write_bytes(content)
        code, out, _ = run(capsys, "plan", "st.yaml", "--json")
        rows = {row["run"]: row for row in json.loads(out)}
        assert code == 0 and {run: row["state"] for run, row in rows.items()} == {"a": "unreadable", "b": "done"}
        assert str(folders["a"] / name) in rows["a"]["error"] and not rows["b"]["error"]
    code, out, err = run(capsys, "plan", "st.yaml")
    assert code == 0 and f"a: unreadable, left out: {folders['a'] / name}" in out and "\n1 run;" in out and not err


def test_a_damaged_model_leaves_out_every_run_of_it(folders, capsys):
    (folders["model"] / "config.json").write_text("{")
    code, out, _ = run(capsys, "plan", "st.yaml")
    assert code == 0 and out.count(f"unreadable, left out: {folders['model'] / 'config.json'} is not JSON") == 2
    for action in (["run"], ["collect"], ["submit", "cluster=slurm"], ["retry", "cluster=slurm"]):
        code, out, err = run(capsys, action[0], "st.yaml", *action[1:])
        assert (code, out) == (2, "") and err.count("\n") == 1 and "config.json is not JSON" in err
    assert not (folders["model"].parents[1] / "st").exists()


def test_collect_writes_the_records_of_the_others(folders, capsys):
    (folders["a"] / "record.jsonl").write_text("junk\n")
    code, out, err = run(capsys, "collect", "st.yaml", "--out", "all.jsonl")
    assert code == 1 and "not done: 1 (a)" in out
    assert err.startswith("a: unreadable, left out: ") and "record.jsonl line 1 is not JSON" in err
    with open("all.jsonl") as file:
        lines = [json.loads(line) for line in file]
    assert [(line["name"], line["kind"]) for line in lines] == [("b", "cost"), ("b", "train")]


def test_run_does_the_others_and_reports_all(folders, capsys, jobs):
    (folders["a"] / "record.jsonl").write_text("junk\n")
    (folders["b"] / "record.jsonl").unlink()
    for file in folders["b"].glob("*/step-*"):
        file.unlink()
    (folders["b"] / "metrics.jsonl").unlink()
    code, out, err = run(capsys, "run", "st.yaml")
    assert code == 1 and "a: unreadable, left out: " in err and "b (train): done" in err
    assert "unreadable" in out and "tables and figures" in out
    assert (folders["a"] / "record.jsonl").read_text() == "junk\n"


def test_submit_and_retry_queue_the_others(folders, capsys, monkeypatch):
    (folders["a"] / "record.jsonl").write_text("junk\n")
    names = []

    def queue(runs, *_):
        names.append([run.name for run in runs])
        return Submission([], {}, {"done": 1})

    for action in ("submit", "retry"):
        monkeypatch.setattr(sweep.submit, action, queue)
        code, out, err = run(capsys, action, "st.yaml", "cluster=slurm")
        assert code == 1 and "runs left as they are: 1 done, 1 unreadable" in out and "a: unreadable, left out" in err
    assert names == [["b"], ["b"]]


def test_plan_names_what_prevents_a_run(folders, capsys):
    words = ["run.device=tpu", "train.steps=3", "data=npz", "data.channels=1", "data.path=no.npz"]
    code, out, _ = run(capsys, "plan", "st.yaml", *words)
    assert (
        code == 0
        and "unknown run.device 'tpu'" in out
        and "data cannot be used: data.path no.npz does not exist" in out
    )
    code, out, _ = run(capsys, "plan", "st.yaml", "run.device=cuda:99", "cluster=slurm")
    assert code == 0 and "run.device" not in out  # the node may have it
