"""Sweeps on SLURM as far as they need no SLURM: clusters, what is queued after what, and what was submitted."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from lamabench.ablations.study import Setting, Study
from lamabench.harness.run import locked
from lamabench.kernels.errors import InputError
from lamabench.launch import plan as plans
from lamabench.launch.cli import main
from lamabench.launch.plan import pieces, plan
from lamabench.launch.slurm import client, manifest, submit
from lamabench.launch.slurm import cluster as clusters
from lamabench.launch.slurm.cluster import ClusterConfig, load
from lamabench.launch.slurm.jobs import choose, covers, drafts, entry
from lamabench.launch.slurm.requests import load_over, queue_of
from lamabench.launch.slurm.status import UNSEEN, survey

SMALL = {"model": "dit_nano", "model.depth": 1, "model.hidden_size": 16, "model.num_heads": 2, "data": "digits",
         "data.size": 8, "train.batch_size": 4, "train.precision": "float32", "run.device": "cpu"}  # fmt: skip


def study(root, axes, stages=("train",), name="s", **more):
    return Study(name, "?", base={**SMALL, "run.root": str(root), **more}, axes=axes, stages=list(stages))


@pytest.mark.parametrize("name", clusters.choices())
def test_committed_clusters_load(name):
    assert load(name).kind == ("local" if name == "local" else "slurm")


def test_the_example_explains_every_setting():
    text = (clusters.FOLDER / "example.yaml").read_text()
    assert not {key for key in asdict(ClusterConfig()) if f"\n{key}:" not in text}


BAD = [
    ("slrum", [], r"unknown cluster 'slrum' \(did you mean 'slurm'\?\); choices: example, local, slurm, or a path"),
    ("slurm", ["cluster.mem=4"], r"unknown key in cluster 'mem' \(did you mean 'mem_gb'\?\)"),
    ("slurm", ["cluster.cpus=many"], "'many'"),
    ("slurm", ["cluster.time_min=0"], "cluster.time_min must be above 0 and finite, not 0"),
    ("slurm", ["cluster.mem_gb=nan"], "cluster.mem_gb must be above 0 and finite, not nan"),
    ("slurm", ["cluster.mem_gb=.0001"], "cluster.mem_gb is in GiB: 0.0001 is less than a MiB"),
    ("slurm", ["cluster.signal_s=3600"], "cluster.signal_s 3600 is not before the end of cluster.time_min 60"),
    ("slurm", ["cluster.options=[exclude]"], "options of sbatch such as --exclude=node013"),
    ("slurm", ["cluster.options=['--comment=it\\'s']"], 'quotes in pairs, not "--comment=it\'s"'),
    ("slurm", ["cluster.options=['--x \\\\']"], "each one line with its quotes in pairs"),
    ("slurm", ["cluster.options=['--a\n#SBATCH --b']"], "options of sbatch such as --exclude=node013, each one line"),
    ("slurm", ["cluster.partition='a\n#SBATCH --b'"], r"cluster.partition is a name without line breaks, not 'a\\n#SB"),
    ("slurm", ["cluster.qos='a\r'"], r"cluster.qos is a name without line breaks, not 'a\\r'"),
    ("slurm", ["cluster.account=''"], "cluster.account is a name without line breaks, not ''"),
    ("slurm", ["cluster.setup=['a\0']"], "is not text in UTF-8"),
    ("slurm", ["cluster.queue_at_most=0"], "cluster.queue_at_most must be above 0 and finite, not 0"),
    ("bad.yaml", [], "bad.yaml: unknown key 'partitoin'"),
    ("list.yaml", [], "list.yaml: a cluster is a mapping"),
    ("type.yaml", [], "type.yaml: .*'x'"),
    ("setup.yaml", [], "cluster.setup .* are lines of text, not {'echo \"a': 'b\"'}: put it in quotes"),
    ("unread.yaml", [], "cannot read unread.yaml: "),
]


@pytest.mark.parametrize(("name", "settings", "message"), BAD)
def test_bad_clusters_are_one_line(name, settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("partitoin: a")
    Path("list.yaml").write_text("- a")
    Path("type.yaml").write_text("cpus: x")
    Path("setup.yaml").write_text('setup:\n  - echo "a: b"')
    Path("unread.yaml").symlink_to("/proc/self/mem")  # whose first page even root cannot read
    with pytest.raises(InputError, match=message) as caught:
        load(name, settings)
    assert "\n" not in str(caught.value)


def test_a_cluster_is_no_part_of_a_run(tmp_path):
    plain = plan(study(tmp_path, {"train.lr": [1e-4, 2e-4]}))
    asked = plan(study(tmp_path, {"train.lr": [1e-4, 2e-4]}, **{"cluster.time_min": 7}), ["cluster.mem_gb=3"])
    assert [run.tasks for run in plain] == [run.tasks for run in asked]
    assert asked[0].cluster == (Setting("cluster.time_min", 7), "cluster.mem_gb=3")
    with pytest.raises(InputError, match="unknown key in cluster 'men_gb'"):
        plan(study(tmp_path, {"train.lr": [1e-4]}), ["cluster.men_gb=3"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["submit"], "name the cluster to submit to"),
        (["submit", "cluster=local"], "has no queue: lamabench sweep run"),
        (["submit", "cluster=slurm", "cluster.nodes=3"], "is no multiple of the 3 processes"),
        (["plan", "cluster=slurm", "cluster.gpus=7", "cluster.nodes=2"], "is no multiple of the 14 processes"),
        (["plan", "cluster=slurm", "cluster.gpus=2", "cluster.tasks_per_node=4"], "each GPU has one process"),
        (
            ["submit", "cluster=slurm", 'cluster.options=["--comment=it\'s"]'],
            "each one line with its quotes in pairs",
        ),
        (["cancel", "run.rot=here"], "unknown key in run 'rot' (did you mean 'root'?)"),
        (["plan", "--stages", ""], "unknown stage of demo ''"),
        (["run", "--only", ""], "no variant is called ''"),
        (["run", "cluster=slurm"], "sweep run works on this machine"),
        (["retry", "train.batch_size=2"], "would not repeat a run but make another one"),
        (["plan", "cluster=slrum"], "unknown cluster 'slrum'"),
        (["cancel", "cluster=slrum"], "unknown cluster 'slrum'"),
        (["cancel"], "no such folder: {here}/runs/demo; nothing of the study ran yet"),
        (["run", "--watch"], "--watch is for status, not for run"),
        (["plan", "--dirty"], "--dirty is for submit and retry, not for plan"),
        (["run", "run.device=nothing"], "unknown run.device 'nothing'; choices: auto, cpu"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    action, *settings = words
    dirty = ["--dirty"] if action in ("submit", "retry") else []
    assert main(["sweep", action, "demo", *dirty, *settings]) == 2
    err = capsys.readouterr().err
    assert message.format(here=tmp_path) in err and err.count("\n") == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", ["0", "-1", "two"])
@pytest.mark.parametrize("action", ["submit", "run", "retry"])
def test_runs_at_a_time_are_one_or_more(action, number, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["sweep", action, "demo", "cluster=slurm", "--parallel", number])
    err = capsys.readouterr().err
    assert caught.value.code == 2 and f"must be a whole number above 0, not '{number}'" in err and err.count("\n") == 1


def test_plan_prints_the_batch_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = {**SMALL, "cluster.time_min": 90}
    data = {"question": "?", "base": base, "variants": {"a": {}, "b": {"model.depth": 2, "cluster.gpus": 1}}}
    Path("mine.yaml").write_text(yaml.safe_dump(data | {"stages": ["train"]}))
    assert main(["sweep", "plan", "mine.yaml", "cluster=slurm", "--parallel", "2", "cluster.gpus=1"]) == 0
    out = capsys.readouterr().out
    assert "asked for: 2 jobs, 3 GPU-hours" in out and out.count("#!/bin/bash") == 1  # the command's word is the last
    assert "\n#SBATCH --array=0-1%2\n" in out
    assert main(["sweep", "plan", "mine.yaml", "cluster=slurm"]) == 0
    out = capsys.readouterr().out
    assert "asked for: 2 jobs, 1.5 GPU-hours" in out
    assert out.count("--gpus-per-node=1\n") == 1 == out.count("array 1:")
    assert main(["sweep", "plan", "mine.yaml", "cluster=slurm", "cluster.gpus=2", "cluster.nodes=2"]) == 0
    out = capsys.readouterr().out
    assert "asked for: 2 jobs, 12 GPU-hours" in out and "--ntasks-per-node=2\n" in out
    assert not Path("runs").exists()


def chosen(runs, view=UNSEEN, states=("planned", "stopped"), requests=None):
    each = pieces(runs)
    requests = requests or {piece.id: ClusterConfig() for piece in each}
    stages = {piece.id: piece.task.stages for piece in each}
    return choose(each, view, states, {key: dict.fromkeys(stages[key], asked) for key, asked in requests.items()})


def test_a_task_a_model_and_a_training_then_one_for_each_set_of_samples(tmp_path, finish):
    axes = {"train.lr": [1e-4, 2e-4, 3e-4], "sample.guidance": [1.0, 2.0]}
    runs = plan(study(tmp_path, axes, stages=["cost", "train", "sample"]))
    small, large = ClusterConfig(), ClusterConfig(mem_gb=9)
    asked = {piece.id: large if "0.0003" in piece.run else small for piece in pieces(runs)}

    def shape(most, parallel=None):
        requests = {key: replace(value, parallel=parallel) for key, value in asked.items()}
        return [
            (draft.cluster.mem_gb, [(one["task"]["kind"], one["name"]) for one in draft.tasks], draft.after)
            for draft in drafts(chosen(runs, requests=requests), most)
        ]

    first = [("model", "0.0001-1.0"), ("training", "0.0001-1.0"), ("training", "0.0002-1.0")]
    samples = [("samples", f"{lr}-{scale}") for lr in ("0.0001", "0.0002", "0.0003") for scale in ("1.0", "2.0")]
    assert shape(100) == [
        (None, first, ()),
        (9, [("training", "0.0003-1.0")], ()),
        (None, samples[:4], (0,)),
        (9, samples[4:], (1,)),
    ]
    assert [after for *_, after in shape(2)] == [(), (), (), (0,), (1,), (2,)]
    assert [after for *_, after in shape(2, parallel=1)] == [(), (0,), (), (0,), (1, 3), (2,)]
    finish(runs[0].training)  # the samples of a training that is done wait for nothing
    assert [(len(tasks), after) for _, tasks, after in shape(100)] == [(2, ()), (1, ()), (2, ()), (2, (0,)), (2, (1,))]


def test_what_is_done_failed_or_cannot_be_is_not_queued(tmp_path, finish, fail):
    runs = plan(study(tmp_path, {"train.lr": [1e-4, 2e-4, 3e-4]}, stages=["train", "sample"], **{"train.steps": 4}))
    finish(runs[0].training)
    fail(runs[1].training, "train", "oom")

    def queued(*states):
        return [(one.piece.run, one.piece.task.kind) for one in chosen(runs, states=states)]

    third = [("0.0003", "training"), ("0.0003", "samples")]
    # Samples of a training that failed would find no weights.
    assert queued("planned", "stopped") == [third[0], ("0.0001", "samples"), third[1]]
    retried = [("0.0002", "training"), ("0.0002", "samples")]
    assert [one for one in queued("planned", "oom") if one[0] == "0.0002"] == retried
    with locked(runs[2].training.path if runs[2].training.path.mkdir() is None else None):
        assert queued("planned") == [("0.0001", "samples")]
    lost = plan(study(tmp_path, {"train.lr": [1e-4]}, stages=["train", "sample"], **{"train.steps": 3}))
    assert chosen(lost) == []


@pytest.fixture
def slurm(monkeypatch):
    """A queue of tasks `JOB_TASK` that are pending; sacct is not there."""
    live = {}

    def ask(names, *_):
        wanted = {*names}
        return {job: task for job, task in live.items() if task[2] in wanted}

    monkeypatch.setattr(client, "live", ask)

    def unknown(*_):
        raise client.SlurmError("no sacct")

    monkeypatch.setattr(client, "accounted", unknown)
    return live


def queue(live, mine, runs, job):
    """Queues what is chosen of a study, as `submit` does; its drafts."""
    home = plans.home(mine) / ".sweep"
    parts = drafts(chosen(runs, survey(runs, home)), 1000)
    arrays = manifest.write(home, mine.name, parts, {"path": None})
    for number, array in enumerate(arrays):
        manifest.job_file(array.folder, number).write_text(f"{job + number}\n")
        live |= {f"{job + number}_{task}": ("PENDING", "Priority", array.name) for task in range(len(array.tasks))}
    return parts


def test_a_training_that_another_study_queued_is_waited_for(tmp_path, slurm):
    first = study(tmp_path, {"sample.guidance": [1.0]}, ["train", "sample"], "first")
    second = study(tmp_path, {"sample.guidance": [1.0, 2.0]}, ["train", "sample"], "second")
    parts = queue(slurm, first, plan(first), 7)
    assert [(len(draft.tasks), draft.after, draft.after_jobs) for draft in parts] == [(1, (), ()), (1, (0,), ())]
    runs = plan(second)
    (draft,) = queue(slurm, second, runs, 10)  # its samples of guidance 1 are those of the first study
    assert [one["name"] for one in draft.tasks] == ["2.0"] and (draft.after, draft.after_jobs) == ((), ("7_0",))
    standings = survey(runs, tmp_path / "second" / ".sweep")
    assert [(standings.run(run).state, standings.run(run).main.job) for run in runs] == [("queued", "7_0")] * 2
    assert queue(slurm, second, runs, 20) == []


def test_more_than_was_queued_comes_after_it(tmp_path, slurm):
    first = study(tmp_path, {"train.steps": [2]}, ["train"], "first")
    longer = study(tmp_path, {"train.steps": [4]}, ["train", "sample"], "longer")
    queue(slurm, first, plan(first), 7)
    training, samples = queue(slurm, longer, plan(longer), 10)
    assert training.after_jobs == ("7_0",) and (samples.after, samples.after_jobs) == ((0,), ())
    assert training.tasks[0]["task"]["config"]["train"]["steps"] == 4


def test_the_job_that_runs_tells_of_a_training_that_a_longer_one_waits_for(tmp_path, slurm):
    first = study(tmp_path, {"train.lr": [1e-4]}, name="first", **{"train.steps": 4})
    second = study(tmp_path, {"train.lr": [1e-4]}, name="second", **{"train.steps": 8})
    queue(slurm, first, plan(first), 7)
    (draft,) = queue(slurm, second, plan(second), 10)
    assert draft.after_jobs == ("7_0",)
    for state, job in (("PENDING", "10_0"), ("RUNNING", "7_0")):
        slurm["7_0"] = (state, "None", slurm["7_0"][2])
        for mine in (first, second):
            (run,) = plan(mine)
            main = survey([run], plans.home(mine) / ".sweep").run(run).main
            assert (main.state, main.job) == ("running" if state == "RUNNING" else "queued", job)
            assert queue(slurm, mine, [run], 20) == []  # the longer one is queued, whatever runs


def test_samples_that_wait_come_again_after_a_training_that_is_done_again(tmp_path, slurm):
    """They may start before it, and find no weights."""
    mine = study(tmp_path, {"train.lr": [1e-4, 2e-4]}, ["train", "sample"])
    runs = plan(mine)
    queue(slurm, mine, runs, 7)
    del slurm["7_1"]
    view = survey(runs, plans.home(mine) / ".sweep")
    assert [view.run(run).state for run in runs] == ["queued", "queued"]
    training, samples = drafts(chosen(runs, view, ("cancelled",)), 1000)
    assert [[one["name"] for one in draft.tasks] for draft in (training, samples)] == [["0.0002"]] * 2
    assert (samples.after, samples.after_jobs) == ((0,), ("8_1",))


def test_a_task_covers_what_it_holds(tmp_path):
    base = {"train.steps": 4, "evaluate.metrics": ["fd", "kid"]}

    def tasks(**more):
        stages = ["cost", "bench", "train", "sample", "evaluate"]
        return plan(study(tmp_path, {"train.lr": [1e-4]}, stages, **base | more))[0].tasks

    ours = tasks()
    assert all(covers(task, task) for task in ours)
    for more in ({"train.snapshots": [1]}, {"train.steps": 8}, {"bench.batch_size": 3}):
        pairs = [(task, other) for task, other in zip(ours, tasks(**more), strict=True) if task.key == other.key]
        assert [covers(task, other) for task, other in pairs].count(False) == 1, more
    one = tasks(**{"evaluate.metrics": ["kid"]})[2]
    assert covers(ours[2], one) and not covers(one, ours[2])


def test_a_submission_is_whole_or_nothing(tmp_path, slurm, monkeypatch):
    """`submit` itself, up to sbatch."""
    mine = study(tmp_path, {"sample.guidance": [1.0, 2.0]}, ["train", "sample"])
    runs = plan(mine)
    asked = []

    def queued(written, parts, code):
        arrays = []
        for number, (array, draft) in enumerate(zip(written, parts, strict=True)):
            manifest.job_file(array.folder, array.index).write_text(f"{5 + number}\n")
            keys = {f"{5 + number}_{task}": ("PENDING", "None", array.name) for task in range(len(array.tasks))}
            slurm.update(keys)
            asked.append(draft.after)
            arrays.append((array, str(5 + number)))
        return manifest.Queued(arrays)

    monkeypatch.setattr(manifest, "queue", queued)
    monkeypatch.setattr(client, "check_here", lambda: None)
    monkeypatch.setattr(client, "largest_array", lambda: 100)
    monkeypatch.setattr(submit.snapshot, "freeze", lambda home: {"path": None, "version": "0"})
    done = submit.submit(runs[:1], mine, ["run.root=x"], "slurm", None, True, runs)
    assert [job for _, job in done.arrays] == ["5", "6"] and asked == [(), (0,)] and done.left == {}
    listing = json.loads((tmp_path / "s" / ".study.json").read_text())
    assert [run["name"] for run in listing["runs"]] == ["1.0", "2.0"]  # all runs, whichever were chosen
    assert manifest.remembered(tmp_path / "s" / ".sweep") == ["run.root=x"]
    done = submit.submit(runs, mine, [], "slurm", None, True)
    assert [[one["name"] for one in array.tasks] for array, _ in done.arrays] == [["2.0"]]
    assert done.left == {"queued": 1}


def test_a_retry_keeps_what_was_asked_for():
    given = replace(load("example"), time_min=33)
    assert load_over(given, []) == given
    assert load_over(given, ["cluster.mem_gb=128", "cluster.setup=[]"]) == replace(given, mem_gb=128, setup=[])
    with pytest.raises(InputError, match="unknown key in cluster 'men'"):
        load_over(given, ["cluster.men=1"])
    assert load_over(given, ["cluster.nodes=2"]).nodes == 2
    with pytest.raises(InputError, match="name the cluster"):
        queue_of(None, [], None)


def submitted(home, runs, job="7"):
    draft = manifest.Draft(ClusterConfig(), [entry(piece) for piece in pieces(runs)])
    (array,) = manifest.write(home, "s", [draft], {"path": None})
    manifest.job_file(array.folder, 0).write_text(f"{job}\n")
    return replace(array, job=job)


def test_what_was_submitted_is_read_back(tmp_path):
    runs = plan(study(tmp_path, {"train.lr": [1e-4, 2e-4]}))
    home = tmp_path / "s" / ".sweep"
    first, second = submitted(home, runs[:1]), submitted(home, runs[1:], "8")
    assert [(array.name, array.job, array.folder.name) for array in manifest.arrays(home)[0]] == [
        (first.name, "7", "0001"),
        (second.name, "8", "0002"),
    ]
    # A tuple of Python's is a list of JSON's.
    assert first.name != second.name and manifest.arrays(home)[0][0].tasks == json.loads(json.dumps(first.tasks))
    assert manifest.remembered(home) == [] and not list(home.glob(".new*"))


def test_cancel_ends_what_is_the_chosen_variants_own(tmp_path, slurm, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = {"question": "?", "base": SMALL, "axes": {"sample.guidance": [1.0, 2.0]}, "stages": ["train", "sample"]}
    Path("s.yaml").write_text(yaml.safe_dump(data))
    ended = []
    monkeypatch.setattr(client, "patiently", lambda *words: ended.append(words))
    mine = study("runs", data["axes"], data["stages"])
    queue(slurm, mine, plan(mine), 7)
    assert main(["sweep", "cancel", "s.yaml", "--only", "2*"]) == 0 and ended == [("scancel", "8_1")]
    assert main(["sweep", "cancel", "s.yaml"]) == 0 and ended[1] == ("scancel", "7", "8")
    capsys.readouterr()
    assert main(["sweep", "cancel", "s.yaml", "--only", "3*"]) == 2
    assert "no variant is called '3*'; variants: 1.0, 2.0" in capsys.readouterr().err
