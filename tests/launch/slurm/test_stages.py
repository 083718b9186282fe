"""Stages that ask for resources of their own, as far as they need no SLURM: settings, jobs, and their order."""

import json
from dataclasses import replace

import pytest
from lamabench.ablations.study import Setting, Study
from lamabench.harness.scoring import networks
from lamabench.harness.tasks import Task
from lamabench.launch.cli import main
from lamabench.launch.plan import keys_of, pieces, plan
from lamabench.launch.slurm.cluster import ClusterConfig, load
from lamabench.launch.slurm.jobs import choose, drafts, entry
from lamabench.launch.slurm.requests import idle, load_over, requests_of
from lamabench.launch.slurm.status import UNSEEN

ALL = ("train", "sample", "evaluate")
CPU = {"cluster": {"gpus": 1, "stage": {"evaluate": {"gpus": 0, "mem_gb": 3}}}}
SMALL = {"model": "dit_nano", "model.depth": 1, "model.hidden_size": 16, "model.num_heads": 2, "data": "digits",
         "data.size": 8, "train.batch_size": 4}  # fmt: skip
SCORES = {"train.steps": 4, "sample.count": 12, "evaluate.metrics": ["fd"], "evaluate.reference_count": 12}


def of_stages(settings, *names, name="slurm"):
    return [load(name, settings, stage) for stage in names]


def test_the_settings_of_a_stage_go_before_the_others(tmp_path):
    words = [
        "cluster.stage.evaluate.gpus=0",
        "cluster.gpus=4",
        "cluster.mem_gb=9",
        "cluster.stage.evaluate.mem_gb=null",
    ]
    whole, train, evaluate = (load("slurm", words), *of_stages(words, "train", "evaluate"))
    assert whole == train and (train.gpus, train.mem_gb) == (4, 9)
    assert evaluate == replace(train, gpus=0, mem_gb=None)
    (tmp_path / "c.yaml").write_text("gpus: 2\nstage: {evaluate: {gpus: 0, partition: cpu}, sample: {gpus: 1}}\n")
    file = str(tmp_path / "c.yaml")
    assert [one.gpus for one in of_stages([], "train", "sample", "evaluate", name=file)] == [2, 1, 0]
    (sample, evaluate) = of_stages(["cluster.partition=a", "cluster.stage.sample.gpus=3"], *ALL[1:], name=file)
    assert (sample.gpus, sample.partition, evaluate.gpus, evaluate.partition) == (3, "a", 0, "cpu")
    for mapping in (
        Setting("cluster", {"stage": {"sample": {"gpus": 1}}}),
        Setting("cluster.stage.sample", {"gpus": 1}),
    ):
        assert [one.gpus for one in of_stages(["cluster.gpus=2", mapping], "train", "sample")] == [2, 1]


def test_other_gpus_have_other_processes():
    """The number of processes on a node is that of its GPUs, or one."""
    words = [
        "cluster.gpus=4",
        "cluster.tasks_per_node=4",
        "cluster.stage.sample.gpus=1",
        "cluster.stage.evaluate.gpus=0",
    ]
    assert [one.on_a_node for one in of_stages(words, *ALL)] == [4, 1, 1]
    assert load("slurm", [*words, "cluster.stage.evaluate.tasks_per_node=2"], "evaluate").on_a_node == 2


def test_a_retry_changes_what_a_stage_had():
    given = ClusterConfig(gpus=0, mem_gb=3)
    assert load_over(given, ["cluster.stage.sample.mem_gb=7"], "evaluate") == given
    assert load_over(given, ["cluster.mem_gb=7"], "evaluate") == replace(given, mem_gb=7)
    assert load_over(given, ["cluster.mem_gb=7", "cluster.stage.evaluate.mem_gb=8"], "evaluate").mem_gb == 8


def runs_of(root, axes, stages=ALL, **more):
    return plan(
        Study("s", "?", base={**SMALL, **SCORES, "run.root": str(root), **more}, axes=axes, stages=list(stages))
    )


def chosen(runs, states=("planned", "stopped")):
    return choose(pieces(runs), UNSEEN, states, requests_of(pieces(runs), "slurm", None))


def shape(parts):
    return [([(one["name"], *one["task"]["stages"]) for one in part.tasks], part.after, part.pair) for part in parts]


def test_stages_with_the_same_resources_share_a_job(tmp_path, finish):
    runs = runs_of(tmp_path, {"train.lr": [1e-4, 2e-4]}, **CPU)
    names = ["0.0001", "0.0002"]
    train, sample, evaluate = ([(name, stage) for name in names] for stage in ALL)
    assert shape(drafts(chosen(runs), 100)) == [(train, (), None), (sample, (0,), None), (evaluate, (), 1)]
    assert shape(drafts(chosen(runs), 1))[2:] == [
        ([sample[0]], (0,), None), ([sample[1]], (1,), None), ([evaluate[0]], (), 2), ([evaluate[1]], (), 3),
    ]  # fmt: skip
    same = runs_of(tmp_path, {"train.lr": [1e-4]}, **{"cluster.gpus": 1, "cluster.stage.evaluate": {"gpus": 1}})
    assert shape(drafts(chosen(same), 100))[1:] == [([("0.0001", "sample", "evaluate")], (0,), None)]
    training, samples = runs[0].tasks
    finish(training)
    finish(replace(samples, stages=("sample",)))  # only its scores are missing
    assert shape(drafts(chosen(runs), 100)) == [
        ([train[1]], (), None), ([evaluate[0]], (), None), ([sample[1]], (0,), None), ([evaluate[1]], (), 2),
    ]  # fmt: skip
    costs = runs_of(tmp_path, {"train.lr": [1e-4]}, ["cost", "bench"], **{"cluster.stage.bench": {"gpus": 1}})
    (model,) = [piece.task for piece in pieces(costs)]
    assert shape(drafts(chosen(costs), 9)) == [([("0.0001", "cost")], (), None), ([("0.0001", "bench")], (), 0)]
    parts = [Task.from_dict(draft.tasks[0]["task"]) for draft in drafts(chosen(costs), 9)]
    assert [part.plans for part in parts] == [(), model.plans] and {part.key for part in parts} == {model.key}


def test_tasks_that_are_not_in_the_same_order_wait_for_a_whole_array(tmp_path):
    """The first variant scores in the job that samples."""
    variants = {"a": {"cluster.gpus": 1}, "b": {"train.lr": 1e-3, **CPU}}
    base = {"model": "dit_nano", "data": "digits", "run.root": str(tmp_path), **SCORES}
    runs = plan(Study("s", "?", base=base, variants=variants, stages=list(ALL)))
    _, samples, scores = shape(drafts(chosen(runs), 100))
    assert samples == ([("a", "sample", "evaluate"), ("b", "sample")], (0,), None)
    assert scores == ([("b", "evaluate")], (1,), None)


def test_stages_that_work_in_one_process_are_told_of(tmp_path):
    runs = runs_of(tmp_path, {"train.lr": [1e-4, 2e-4]}, **{"cluster.gpus": 2})
    (line,) = idle(pieces(runs), requests_of(pieces(runs), "slurm", None))
    assert line.startswith("0.0001: stage evaluate works in one process and asks for 2; cluster.stage.evaluate.gpus")
    runs = runs_of(tmp_path, {"train.lr": [1e-4, 2e-4]}, **{**CPU, "cluster.nodes": 1})
    assert list(idle(pieces(runs), requests_of(pieces(runs), "slurm", None))) == []


@pytest.fixture
def staged(cluster):
    """A study of four runs on the cluster, whose scores are computed without a GPU."""
    return cluster.study(4, ALL, base={**SMALL, **SCORES, **CPU})


def dependencies(cluster):
    """What each array waits for, as sbatch got it."""
    lines = [[word for word in line.split() if word.startswith(("--dep", "--kill"))] for line in cluster.lines("words")]
    return [" ".join(words).replace("--dependency=", "") for words in lines]


def stages_of(cluster):
    return [(array.cluster.gpus, len(array.tasks), *array.tasks[0]["task"]["stages"]) for array in cluster.arrays()]


def test_a_submit_queues_each_stage_after_the_one_before(cluster, staged, capsys):
    assert cluster.submit(staged) == 0
    assert stages_of(cluster) == [(1, 4, "train"), (1, 4, "sample"), (0, 4, "evaluate")]
    assert dependencies(cluster) == ["", "afterany:1", "aftercorr:2 --kill-on-invalid-dep=yes"]
    out = capsys.readouterr().out
    assert "job 1: 4 × training, logs" in out and "job 2: 4 × samples (sample), logs" in out
    assert "job 3: 4 × samples (evaluate), logs" in out
    assert cluster.submit(staged) == 0 and len(cluster.arrays()) == 3
    # The jobs of two scores are ended; the same command queues these stages again, after those of their samples.
    cluster.set("queue", "".join(f"{line}\n" for line in cluster.lines("queue")[:-2]))
    capsys.readouterr()
    assert cluster.submit(staged) == 0
    assert stages_of(cluster)[3:] == [(0, 2, "evaluate")] and dependencies(cluster)[3:] == ["afterany:2_2:1_2:2_3:1_3"]


def test_a_submit_tells_of_a_network_without_weights_here(cluster, staged, capsys, monkeypatch, tmp_path):
    """It queues nonetheless, because jobs may find them where they run."""
    monkeypatch.setattr(networks, "cache_folder", lambda: tmp_path / "cache")
    assert cluster.submit(staged, "evaluate.features=inception_v3", "--only", "0.0002") == 0
    assert stages_of(cluster) == [(1, 1, "train"), (1, 1, "sample"), (0, 1, "evaluate")]
    assert capsys.readouterr().err.startswith("0.0002: the weights of inception_v3 are missing: ")


def test_scores_alone_are_queued_only_after_samples(cluster, staged, capsys):
    """A job without samples to score could only fail."""
    assert cluster.submit(staged, "--stages", "evaluate") == 0 and cluster.arrays() == []
    assert "nothing to queue\nruns left as they are: 4 planned" in capsys.readouterr().out
    assert cluster.submit(staged, "--stages", "train,sample", "--only", "0.0002") == 0
    assert cluster.submit(staged, "--stages", "evaluate") == 0
    assert stages_of(cluster) == [(1, 1, "train"), (1, 1, "sample"), (0, 1, "evaluate")]
    assert dependencies(cluster)[2] == "afterany:2_0"


def test_cancel_and_status_take_the_stages_of_a_run_together(cluster, staged, capsys):
    assert cluster.submit(staged) == 0
    capsys.readouterr()
    assert main(["sweep", "status", staged, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["state"], row["job"]) for row in rows] == [("queued", f"1_{n}") for n in range(4)]
    assert main(["sweep", "cancel", staged, "--only", "0.0002"]) == 0
    assert cluster.lines("ended") == ["1_1 2_1 3_1"]


def test_an_array_that_was_cut_waits_for_the_whole_array_before_it(cluster, staged):
    cluster.set("room", 10)
    assert cluster.submit(staged) == 0
    assert stages_of(cluster) == [(1, 4, "train"), (1, 4, "sample"), (0, 2, "evaluate")]
    whole, half = dependencies(cluster)[2:4]
    assert whole == "aftercorr:2 --kill-on-invalid-dep=yes" and half == "afterany:2"  # the whole one found no room
    cluster.set("room", 100)
    assert cluster.submit(staged) == 0
    assert stages_of(cluster)[3:] == [(0, 2, "evaluate")] and dependencies(cluster)[-1] == "afterany:2_2:1_2:2_3:1_3"


def test_a_retry_asks_for_what_each_stage_had(cluster, staged):
    assert cluster.submit(staged, "cluster.stage.evaluate.mem_gb=5") == 0
    cluster.set("queue", "")
    assert main(["sweep", "retry", staged, "--dirty", "cluster.stage.sample.cpus=7"]) == 0
    asked = [(one.cluster.gpus, one.cluster.mem_gb, one.cluster.cpus) for one in cluster.arrays()]
    assert asked[3:] == [(1, None, 2), (1, None, 7), (0, 5, 2)]


def test_plan_shows_the_hours_of_each_stage(cluster, staged, capsys):
    assert main(["sweep", "plan", staged, "cluster=slurm", "cluster.stage.evaluate.cpus=3"]) == 0
    out = capsys.readouterr().out
    assert "asked for: 12 jobs, 8 GPU-hours and 12 CPU-hours" in out
    assert "  train: 4 jobs, 4 GPU-hours\n" in out and "  evaluate: 4 jobs, 0 GPU-hours and 12 CPU-hours\n" in out
    assert "array 2, each task after that of array 1:" in out and out.count("--gpus-per-node=1") == 2


def test_a_job_has_absolute_paths_of_what_it_reads(tmp_path, monkeypatch):
    """Its working folder may be gone. The key of a score has the name of its reference, which no link may change."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "target.npz").touch()
    (tmp_path / "ref.npz").symlink_to("target.npz")
    base = {**SMALL, **SCORES, "data": "npz", "data.path": "mine.npz", "data.channels": 1, "data.num_classes": 0}
    base |= {"evaluate.reference": "ref.npz", "evaluate.features": "inception_v3", "evaluate.features_path": "w.pth"}
    for piece in pieces(plan(Study("s", "?", base=base, axes={"train.lr": [1e-4]}, stages=list(ALL)))):
        task = Task.from_dict(entry(piece)["task"])
        evaluate, paths = task.config["evaluate"], [tmp_path / name for name in ("ref.npz", "w.pth", "mine.npz")]
        names = (evaluate["reference"], evaluate["features_path"], task.config["data"]["path"])
        assert [*map(str, paths)] == [*names] and task.config["run"]["root"] == str(tmp_path / "runs")
        assert keys_of(task) == keys_of(piece.task)
