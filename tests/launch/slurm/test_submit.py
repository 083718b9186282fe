"""Sweeps on SLURM as far as they need no SLURM: clusters, batch files, snapshots, stopping, and how runs stand."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from lamabench.ablations.study import Study
from lamabench.harness.record import append, entry, read_lines
from lamabench.harness.run import create
from lamabench.kernels.errors import InputError
from lamabench.launch.cli import main
from lamabench.launch.plan import plan
from lamabench.launch.slurm import cluster as clusters
from lamabench.launch.slurm import manifest as submissions
from lamabench.launch.slurm.cluster import ClusterConfig, load
from lamabench.launch.slurm.status import Look, Standing, rows, standings
from lamabench.launch.slurm.submit import drafts, load_over, queue_of

SMALL = {"model": "dit_nano", "model.depth": 1, "model.hidden_size": 16, "model.num_heads": 2, "data": "digits",
         "data.size": 8, "train.batch_size": 4, "train.precision": "float32", "run.device": "cpu"}  # fmt: skip


def study(root, axes, **more):
    return Study("s", "?", base={**SMALL, "run.root": str(root), **more}, axes=axes, stages=["train"])


@pytest.mark.parametrize("name", clusters.choices())
def test_committed_clusters_load(name):
    assert load(name).kind == ("local" if name == "local" else "slurm")


def test_the_example_explains_every_setting_but_those_of_several_gpus():
    text = (clusters.FOLDER / "example.yaml").read_text()
    assert {key for key in asdict(ClusterConfig()) if f"\n{key}:" not in text} == {"nodes", "tasks_per_node"}


BAD = [
    ("slrum", [], r"unknown cluster 'slrum' \(did you mean 'slurm'\?\); choices: example, local, slurm, or a path"),
    ("slurm", ["cluster.mem=4"], r"unknown key in cluster 'mem' \(did you mean 'mem_gb'\?\)"),
    ("slurm", ["cluster.cpus=many"], "'many'"),
    ("slurm", ["cluster.time_min=0"], "cluster.time_min must be above 0 and finite, not 0"),
    ("slurm", ["cluster.mem_gb=nan"], "cluster.mem_gb must be above 0 and finite, not nan"),
    ("slurm", ["cluster.mem_gb=.0001"], "cluster.mem_gb is in GiB: 0.0001 is less than a MiB"),
    ("slurm", ["cluster.signal_s=3600"], "cluster.signal_s 3600 is not before the end of cluster.time_min 60"),
    ("slurm", ["cluster.options=[exclude]"], "options of sbatch such as --exclude=node013"),
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
    assert [run.info for run in plain] == [run.info for run in asked]
    assert asked[0].cluster == ("cluster.time_min=7", "cluster.mem_gb=3")
    with pytest.raises(InputError, match="unknown key in cluster 'men_gb'"):
        plan(study(tmp_path, {"train.lr": [1e-4]}), ["cluster.men_gb=3"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["submit"], "name the cluster to submit to"),
        (["submit", "cluster=local"], "has no queue: lamabench sweep run"),
        (["submit", "cluster=slurm", "cluster.nodes=2"], "training takes one GPU today"),
        (["run", "cluster=slurm"], "sweep run works on this machine"),
        (["retry", "train.batch_size=2"], "would not repeat a run but make another one"),
        (["plan", "cluster=slrum"], "unknown cluster 'slrum'"),
        (["cancel", "cluster=slrum"], "unknown cluster 'slrum'"),
        (["cancel"], "no such folder: {here}/runs/demo; nothing of the study ran yet"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    action, *settings = words
    assert main(["sweep", action, "demo", "--dirty", *settings]) == 2
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
    data = {"question": "?", "base": base, "variants": {"a": {}, "b": {"model.depth": 2, "cluster.gpus": 2}}}
    Path("mine.yaml").write_text(yaml.safe_dump(data))
    assert main(["sweep", "plan", "mine.yaml", "cluster=slurm", "--parallel", "2", "cluster.gpus=1"]) == 0
    out = capsys.readouterr().out
    assert "asked for: 2 runs, 3 GPU-hours" in out and out.count("#!/bin/bash") == 1  # the command's word is the last
    assert "\n#SBATCH --array=0-1%2\n" in out
    assert main(["sweep", "plan", "mine.yaml", "cluster=slurm"]) == 0
    out = capsys.readouterr().out
    assert "asked for: 2 runs, 3 GPU-hours" in out and out.count("--gpus-per-node=2\n") == 1 == out.count("array 1:")
    assert not Path("runs").exists()


def test_arrays_are_of_one_request_and_no_longer_than_allowed(tmp_path):
    axes = {"train.lr": [1e-4, 2e-4, 3e-4], "sample.guidance": [1.0, 2.0]}
    runs = plan(replace(study(tmp_path, axes), stages=["train", "sample"]))
    found = [Standing(run, "planned") for run in runs]
    small, large = ClusterConfig(), ClusterConfig(mem_gb=9)
    asked = {run.info["id"]: large if "0.0003" in run.name else small for run in runs}

    def shape(most, parallel=None):
        requests = {key: replace(value, parallel=parallel) for key, value in asked.items()}
        return [
            (draft.cluster.mem_gb, [task["info"]["name"] for task in draft.tasks], draft.after)
            for draft in drafts(found, found, requests, most)
        ]

    assert shape(100) == [
        (None, ["0.0001-1.0", "0.0002-1.0"], ()),
        (9, ["0.0003-1.0"], ()),
        (None, ["0.0001-2.0", "0.0002-2.0"], (0,)),
        (9, ["0.0003-2.0"], (1,)),
    ]
    assert [after for *_, after in shape(1)] == [(), (), (), (0,), (1,), (2,)]
    assert [after for *_, after in shape(1, parallel=1)] == [(), (0,), (), (0,), (1, 3), (2,)]


def test_a_retry_keeps_what_was_asked_for():
    given = replace(load("example"), time_min=33)
    assert load_over(given, []) == given
    assert load_over(given, ["cluster.mem_gb=128", "cluster.setup=[]"]) == replace(given, mem_gb=128, setup=[])
    with pytest.raises(InputError, match="unknown key in cluster 'men'"):
        load_over(given, ["cluster.men=1"])
    with pytest.raises(InputError, match="training takes one GPU today"):
        load_over(given, ["cluster.nodes=2"])
    with pytest.raises(InputError, match="name the cluster"):
        queue_of(None, [], None)


def submitted(home, runs, job="7"):
    made = submissions.Draft(ClusterConfig(), [{"info": run.info, "stages": list(run.stages)} for run in runs])
    (array,) = submissions.write(home, "s", [made], {"path": None})
    submissions.job_file(array.folder, 0).write_text(f"{job}\n")
    return replace(array, job=job)


def test_what_was_submitted_is_read_back(tmp_path):
    runs = plan(study(tmp_path, {"train.lr": [1e-4, 2e-4]}))
    home = submissions.home_of(runs[0].folder)
    first, second = submitted(home, runs[:1]), submitted(home, runs[1:], "8")
    assert [(array.name, array.job, array.folder.name) for array in submissions.arrays(home)] == [
        (first.name, "7", "0001"),
        (second.name, "8", "0002"),
    ]
    assert first.name != second.name and next(submissions.arrays(home)).tasks == first.tasks
    assert submissions.remembered(home) == [] and not list(home.glob(".new*"))


def test_a_training_that_waits_in_the_queue_stays_that_of_its_run(tmp_path):
    """A study that is given another first variant before the first checkpoint does not train the same twice."""

    def planned(scales):
        axes = {"sample.guidance": scales}
        made = Study("s", "?", base={**SMALL, "run.root": str(tmp_path)}, axes=axes, stages=["train", "sample"])
        return {run.name: run for run in plan(made)}

    before = planned([1.0, 2.0])
    submitted(submissions.home_of(before["1.0"].folder), list(before.values()))
    after = planned([1.5, 1.0, 2.0])
    assert [name for name, run in after.items() if "train" in run.stages] == ["1.0"]
    assert after["1.5"].info["source"] == after["2.0"].info["source"] == str(before["1.0"].folder.resolve())


def test_states_agree_with_what_slurm_and_the_run_say(tmp_path, monkeypatch):
    """One run an outcome: what squeue and sacct gave, what the run wrote, and what is to come of it."""
    start, second, fourth = ({"event": "start", "records": 0, "restart": restart} for restart in (0, 1, 3))
    killed = ("failed", "killed (signal 9)")
    cases = [
        # squeue, sacct, lines of attempts, records, log; state, error, requeued
        (("PENDING", "Priority"), [("PENDING", "0:0")], [], [], "", "queued", "", 0),
        (("PENDING", "BeginTime"), [("REQUEUED", "0:0"), ("PENDING", "0:0")], [start], [], "", "preempted", "", 1),
        (("PENDING", "BeginTime"), [], [start, second], [], "", "preempted", "", 2),
        # A start that was ended before it could write a line is counted by SLURM alone.
        (("RUNNING", "None"), [], [start, second, fourth], [], "", "running", "", 3),
        (None, [], [start, fourth], ["done"], "", "done", "", 3),
        (("SIGNALING", "None"), [], [start], [], "", "running", "", 0),
        (("RESV_DEL_HOLD", "Reservation"), [], [], [], "", "queued", "", 0),
        (None, [("COMPLETED", "0:0")], [start], ["done"], "", "done", "", 0),
        (None, [("FAILED", "1:0")], [start], ["oom"], "x", "oom", "why oom", 0),
        (None, [("FAILED", "1:0")], [start], ["diverged"], "x", "diverged", "why diverged", 0),
        (None, [], [start], ["failed"], "x", "failed", "why failed", 0),
        (None, [("FAILED", "1:0")], [], [], "bash: module: not found", "failed", "bash: module: not found", 0),
        (None, [("FAILED", "1:0")], [], [], "No module named 'x'\nsrun: error: a: task 0: Exited with exit code 1",
         "failed", "No module named 'x'", 0),
        (None, [("FAILED", "0:9")], [start], [], "x", *killed, 0),
        (None, [("FAILED", "9:0")], [start], [], "x", *killed, 0),
        (None, [], [start], [], "task 0: Killed\nsrun: Force Terminated StepId=7.0", "failed", "task 0: Killed", 0),
        (None, [("OUT_OF_MEMORY", "0:125")], [start], [], "x", "oom", "SLURM killed it", 0),
        (None, [("TIMEOUT", "0:0")], [start], [], "x", "timeout", "the time limit", 0),
        (None, [("RUNNING", "0:0")], [start], [], "*** STEP DUE TO TIME LIMIT ***", "timeout", "the time limit", 0),
        (None, [], [start], [], "error: *** JOB 7 ON a CANCELLED AT 1 ***", "cancelled", "cancelled", 0),
        (None, [], [start], [], "*** JOB 7 CANCELLED AT 1 DUE TO JOB REQUEUE ***\n7_PLACE on a:\nSegmentation fault",
         "failed", "Segmentation fault", 0),
        (None, [], [], [], "", "cancelled", "left the queue without a start", 0),
        (None, [("PENDING", "0:0")], [], [], "", "cancelled", "left the queue without a start", 0),
        (None, [("RUNNING", "0:0")], [], [], "", "failed", "no word of it", 0),
        (None, [("NODE_FAIL", "1:0")], [start], [], "x", "failed", "its node was lost", 0),
        (None, [("FAILED", "28:0")], [start], [], "", "failed", "the disk of its folder is full", 0),
        # Retried: the old record is of another attempt.
        (None, [("TIMEOUT", "0:0")], [{**start, "records": 1}], ["failed"], "x", "timeout", "the time limit", 0),
    ]  # fmt: skip
    runs = plan(study(tmp_path, {"train.lr": [(1 + place) * 1e-4 for place in range(len(cases))]}))
    home = submissions.home_of(runs[0].folder)
    array = submitted(home, runs)
    live, accounted = {}, {}
    for place, (run, (queue, sacct, attempts, records, log, *_)) in enumerate(zip(runs, cases, strict=True)):
        if attempts or records:
            create(run.info)
        for line in attempts:
            append(run.folder / "attempts.jsonl", line | {"job": f"7_{place}"})
        for state in records:
            append(
                run.folder / "record.jsonl",
                entry("train", state, **({} if state == "done" else {"error": f"why {state}"})),
            )
        if log:
            text = f"train 1/5\n{log}\n\n".replace("PLACE", str(place))
            array.log(place).write_text(text)
        live |= {f"7_{place}": queue} if queue else {}
        accounted |= {f"7_{place}": sacct} if sacct else {}
    seen = Look(live, accounted)
    monkeypatch.setattr("lamabench.launch.slurm.status.look", lambda submitted, need_queue: (submitted, seen))
    found, _ = standings(runs, home)
    for one, (*_, state, error, requeued) in zip(found, cases, strict=True):
        assert (one.state, one.requeued) == (state, requeued), one
        assert one.error.startswith(error) and bool(one.error) == bool(error), one
    assert [row["shown"] for row in rows(found)][1:3] == ["preempted ×1", "preempted ×2"]


def test_states_where_slurm_does_not_answer(tmp_path, monkeypatch):
    """A run that left no word is not called cancelled where it began, nor ended where nobody says so."""
    (run,) = plan(study(tmp_path, {"train.lr": [1e-4]}))
    home = submissions.home_of(run.folder)
    log = submitted(home, [run]).log(0)

    def state(live, accounted):
        seen = Look(live, accounted)
        monkeypatch.setattr("lamabench.launch.slurm.status.look", lambda submitted, need_queue: (submitted, seen))
        ((one,), _) = standings([run], home)
        return one.state, one.error

    assert state(None, None) == ("queued", "") == state(None, {})
    log.touch()  # on a full disk its file is there, and empty
    assert state({}, None) == ("failed", f"no word of it: {log} is empty")
    late = "and sacct does not know its end yet: look again"
    assert state({}, {}) == ("failed", f"no word of it: {log} is empty, {late}")
    assert state({}, {"7_0": [("FAILED", "28:0")]})[0] == "failed"
    lines = ("start", "running"), ("stop", "preempted"), ("start", "running"), ("end", "failed")
    create(run.info)
    line = {"event": "start", "job": "7_0", "records": 0, "restart": 0}
    for event, wanted in lines:
        append(run.folder / "attempts.jsonl", {**line, "event": event, "signal": "SIGUSR2"})
        assert state(None, None)[0] == wanted
    append(run.folder / "attempts.jsonl", line)
    log.write_text("slurmstepd: error: *** JOB 7 ON a CANCELLED AT 1 DUE TO TIME LIMIT ***\n")
    assert state(None, None)[0] == "timeout"


def test_further_stages_of_a_run_that_is_done_are_planned(tmp_path, monkeypatch):
    """As of a study that was submitted with some stages, or got more: the next submit queues the rest."""
    mine = study(tmp_path, {"train.lr": [1e-4]})
    (run,) = plan(mine)
    home = submissions.home_of(run.folder)
    submitted(home, [run])
    append(create(run.info) / "record.jsonl", entry("train", "done"))
    append(run.folder / "attempts.jsonl", {"event": "start", "job": "7_0", "records": 0, "restart": 0})
    seen = Look({}, {"7_0": [("COMPLETED", "0:0")]})
    monkeypatch.setattr("lamabench.launch.slurm.status.look", lambda submitted, need_queue: (submitted, seen))
    (more,) = plan(replace(mine, stages=["cost", "train"]))
    assert run.stages == ("train",) and more.info["id"] == run.info["id"]
    for one, state, left in ((run, "done", []), (more, "planned", ["cost"])):
        ((found,), _) = standings([one], home)
        assert (found.state, found.error, found.run.missing()) == (state, "", left)


def test_a_long_error_keeps_the_table_readable(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = Path("mine.yaml")
    path.write_text(yaml.safe_dump({"question": "?", "base": SMALL, "axes": {"train.lr": [1e-4]}, "stages": ["train"]}))
    (run,) = plan(Study("mine", "?", base=SMALL, axes={"train.lr": [1e-4]}, stages=["train"]))
    append(create(run.info) / "record.jsonl", entry("train", "failed", error=f"words {'and more ' * 50}"))
    submitted(submissions.home_of(run.folder), [run])
    started = {"event": "start", "job": "7_0", "records": 0, "restart": 0}
    append(run.folder / "attempts.jsonl", started)
    live = {"7_0": ("RUNNING", "None")}
    for queue, wanted in ((live, "starting    7_0"), ({}, "7_0    words and more")):
        seen = Look(queue, {})
        monkeypatch.setattr(
            "lamabench.launch.slurm.status.look", lambda submitted, need_queue, seen=seen: (submitted, seen)
        )
        assert main(["sweep", "status", "mine.yaml"]) == 0
        out = capsys.readouterr().out
        assert wanted in out and max(map(len, out.splitlines())) < 170, out


def test_status_of_some_stages_calls_no_run_of_the_study_a_stray(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = {"question": "?", "base": SMALL, "axes": {"sample.guidance": [1.0, 2.0]}, "stages": ["train", "sample"]}
    Path("mine.yaml").write_text(yaml.safe_dump(made))
    for run in plan(Study("mine", "?", base=SMALL, axes=made["axes"], stages=made["stages"])):
        create(run.info)
    assert main(["sweep", "status", "mine.yaml", "--stages", "train"]) == 0  # the second one has none
    out = capsys.readouterr().out
    assert "1 runs: 1 planned" in out and "not in the study" not in out


def test_collect_and_prune_keep_to_the_study(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = Path("mine.yaml")
    path.write_text(yaml.safe_dump({"question": "?", "base": SMALL, "axes": {"train.lr": [1e-4]}}))
    assert main(["sweep", "collect", "mine.yaml"]) == 2
    assert "no such folder: runs/mine; nothing of the study ran yet" in capsys.readouterr().err

    def write(rates):
        path.write_text(
            yaml.safe_dump({"question": "?", "base": SMALL, "axes": {"train.lr": rates}, "stages": ["cost"]})
        )

    write([1e-4, 2e-4])
    for run in plan(Study("mine", "?", base=SMALL, axes={"train.lr": [1e-4, 2e-4]}, stages=["cost"])):
        append(create(run.info) / "record.jsonl", entry("cost", macs=1))
    assert main(["sweep", "collect", "mine.yaml", "--out", "both.jsonl"]) == 0
    assert [line["name"] for line in read_lines(Path("both.jsonl"))] == ["0.0001", "0.0002"]
    for out, message in ((".", ". is a folder"), ("/proc/both.jsonl", "cannot write /proc/both.jsonl: No such file")):
        assert main(["sweep", "collect", "mine.yaml", "--out", out]) == 2
        assert message in capsys.readouterr().err
    write([1e-4, 3e-4])
    capsys.readouterr()
    assert main(["sweep", "status", "mine.yaml"]) == 0
    assert "1 folders of runs that are not in the study" in capsys.readouterr().out
    assert main(["sweep", "collect", "mine.yaml"]) == 1  # one of them is not done
    (line,) = read_lines(Path("runs/mine/records.jsonl"))
    assert (line["name"], line["model"], line["kind"]) == ("0.0001", "dit_nano", "cost") and "overrides" in line
    capsys.readouterr()
    assert main(["sweep", "prune", "mine.yaml"]) == 2
    assert "0.0002" in capsys.readouterr().err and len(list(Path("runs/mine").glob("0*"))) == 2
    assert main(["sweep", "prune", "mine.yaml", "--yes"]) == 0
    assert [folder.name[:6] for folder in Path("runs/mine").glob("0*")] == ["0.0001"]
