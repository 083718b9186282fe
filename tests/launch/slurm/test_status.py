"""How runs stand by the queue, by sacct and by what they wrote; what status, collect and prune say of a study."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from lamabench.ablations.study import Study
from lamabench.harness import stages
from lamabench.harness.disk import append, read_lines
from lamabench.harness.run import locked
from lamabench.launch import plan as plans
from lamabench.launch.cli import main
from lamabench.launch.plan import pieces, plan
from lamabench.launch.slurm import manifest
from lamabench.launch.slurm.cluster import ClusterConfig
from lamabench.launch.slurm.jobs import entry
from lamabench.launch.slurm.status import Look, rows, standings

SMALL = {"model": "dit_nano", "model.depth": 1, "model.hidden_size": 16, "model.num_heads": 2, "data": "digits",
         "data.size": 8, "train.batch_size": 4, "train.precision": "float32", "run.device": "cpu"}  # fmt: skip


def study(root, axes, stages=("train",), name="s", **more):
    return Study(name, "?", base={**SMALL, "run.root": str(root), **more}, axes=axes, stages=list(stages))


def submitted(runs, job="7"):
    """An array of all tasks of some runs, of the study s; without the pickle and the batch file."""
    draft = manifest.Draft(ClusterConfig(), [entry(piece) for piece in pieces(runs)])
    (array,) = manifest.write(runs[0].root / "s" / ".sweep", "s", [draft], {"path": None})
    manifest.job_file(array.folder, 0).write_text(f"{job}\n")
    return replace(array, job=job)


@pytest.fixture
def seen(monkeypatch):
    """Sets what SLURM says."""

    def says(live, accounted):
        look = Look(live, accounted)
        monkeypatch.setattr(
            "lamabench.launch.slurm.status.look",
            lambda submitted, need_queue=False, damaged=(): (submitted, replace(look, notes=tuple(damaged))),
        )

    return says


def test_states_agree_with_what_slurm_and_the_run_say(tmp_path, seen, finish, fail):
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
        (None, [("FAILED", "137:0")], [start, {"event": "stop", "signal": "SIGTERM"}], [],
         "x\nsrun: error: a: task 1: Killed\nsrun: error: a: task 0: Terminated", "failed", "process 1 was killed", 0),
        (None, [("FAILED", "1:0")], [start], [], "srun: error: a: task 2: Exited with exit code 1", "failed",
         "process 2: Exited with exit code 1", 0),
        (None, [("FAILED", "1:0")], [{**start, "error": "one of the 2 processes of the run is gone without a word"}],
         [], "srun: error: b: task 1: Killed", "failed", "process 1 was killed", 0),
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
        (None, [("FAILED", "41:0")], [], [], "7_PLACE on a:\nnot the code that was submitted: /a is gone", "failed",
         "not the code that was submitted: /a is gone", 0),
        (None, [("FAILED", "41:0")], [], [], "", "failed", "not the code that was submitted: its snapshot is gone", 0),
        (None, [("FAILED", "58:0")], [], [], "cluster.setup failed with exit code 3: false", "failed",
         "cluster.setup failed with exit code 3: false", 0),
        (None, [("FAILED", "58:0")], [], [], "else", "failed", "cluster.setup failed with exit code that", 0),
        # Retried: the old record is of another attempt.
        (None, [("TIMEOUT", "0:0")], [{**start, "records": 1}], ["failed"], "x", "timeout", "the time limit", 0),
    ]  # fmt: skip
    runs = plan(study(tmp_path, {"train.lr": [(1 + place) * 1e-4 for place in range(len(cases))]}))
    array = submitted(runs)
    live, accounted = {}, {}
    for place, (run, (queue, sacct, attempts, records, log, *_)) in enumerate(zip(runs, cases, strict=True)):
        task = run.tasks[0]
        if attempts or records:
            stages.prepare(task)
        for line in attempts:
            append(task.path / "attempts.jsonl", line | {"job": f"7_{place}"})
        for state in records:
            finish(task) if state == "done" else fail(task, "train", state, f"why {state}")
        if log:
            text = f"train 1/5\n{log}\n\n".replace("PLACE", str(place))
            array.log(place).write_text(text)
        live |= {f"7_{place}": queue} if queue else {}
        accounted |= {f"7_{place}": sacct} if sacct else {}
    seen(live, accounted)
    view, _ = standings(runs, tmp_path / "s" / ".sweep")
    for one, (*_, state, error, requeued) in zip(view, cases, strict=True):
        assert (one.state, one.main.requeued) == (state, requeued), one
        assert one.main.error.startswith(error) and bool(one.main.error) == bool(error), one
    assert [row["shown"] for row in rows(view)][1:3] == ["preempted ×1", "preempted ×2"]


def test_states_where_slurm_does_not_answer(tmp_path, seen):
    """A run that left no word is not called cancelled where it began, nor ended where nobody says so."""
    (run,) = plan(study(tmp_path, {"train.lr": [1e-4]}))
    log = submitted([run]).log(0)

    def state(live, accounted):
        seen(live, accounted)
        ((one,), _) = standings([run], tmp_path / "s" / ".sweep")
        return one.state, one.main.error

    assert state(None, None) == ("queued", "") == state(None, {})
    log.touch()  # on a full disk its file is there, and empty
    assert state({}, None) == ("failed", f"no word of it: {log} is empty")
    late = "and sacct does not know its end yet: look again"
    assert state({}, {}) == ("failed", f"no word of it: {log} is empty, {late}")
    assert state({}, {"7_0": [("FAILED", "28:0")]})[0] == "failed"
    lines = ("start", "running"), ("stop", "preempted"), ("start", "running"), ("end", "failed")
    folder = stages.prepare(run.tasks[0])
    line = {"event": "start", "job": "7_0", "records": 0, "restart": 0}
    for event, wanted in lines:
        append(folder / "attempts.jsonl", {**line, "event": event, "signal": "SIGUSR2"})
        assert state(None, None)[0] == wanted
    append(folder / "attempts.jsonl", line)
    log.write_text("slurmstepd: error: *** JOB 7 ON a CANCELLED AT 1 DUE TO TIME LIMIT ***\n")
    assert state(None, None)[0] == "timeout"
    with locked(folder):  # by somebody who does without SLURM
        assert state({}, {}) == ("running", "")


def test_further_stages_of_a_run_that_is_done_are_planned(tmp_path, seen, finish):
    """As of a study that was submitted with some stages, or got more: the next submit queues the rest."""
    mine = study(tmp_path, {"train.lr": [1e-4]})
    (run,) = plan(mine)
    submitted([run])
    finish(run.tasks[0])
    append(run.folder / "attempts.jsonl", {"event": "start", "job": "7_0", "records": 0, "restart": 0})
    seen({}, {"7_0": [("COMPLETED", "0:0")]})
    (more,) = plan(replace(mine, stages=["cost", "train"]))
    (longer,) = plan(mine, ["train.steps=500000"])
    assert run.id == more.id == longer.id
    for one, state, left in ((run, "done", []), (more, "planned", ["cost"]), (longer, "planned", ["train"])):
        ((standing,), _) = standings([one], tmp_path / "s" / ".sweep")
        assert (standing.state, standing.main.error, standing.missing) == (state, "", left)


def test_a_metric_in_the_place_of_one_that_failed_is_planned(tmp_path, seen, finish, fail):
    """Scores that were not asked for then did not fail then."""
    mine = study(tmp_path, {"train.lr": [1e-4]}, ["train", "sample", "evaluate"], **{"evaluate.metrics": ["kid"]})
    (run,) = plan(mine)
    submitted([run])
    training, samples = run.tasks
    finish(training)
    finish(samples, "sample")
    fail(samples, "evaluate")
    append(samples.path / "attempts.jsonl", {"event": "start", "job": "7_1", "records": 1, "restart": 0})
    append(samples.path / "attempts.jsonl", {"event": "end", "job": "7_1", "error": "why"})
    seen({}, {"7_0": [("COMPLETED", "0:0")], "7_1": [("FAILED", "1:0")]})
    for metrics, state in ((["kid"], "failed"), (["fd"], "planned"), (["fd", "kid"], "failed")):
        (edited,) = plan(mine, [f"evaluate.metrics={metrics}".replace("'", "")])
        ((standing,), _) = standings([edited], tmp_path / "s" / ".sweep")
        assert (standing.state, standing.missing) == (state, ["evaluate"])


def test_a_run_is_as_the_task_of_it_that_works_now(tmp_path, seen, finish, fail):
    """Its job and its error are those of that task, whichever study queued it."""
    (run,) = plan(study(tmp_path, {"train.lr": [1e-4]}, ["cost", "train", "sample"]))
    array = submitted([run])
    assert [one["task"]["kind"] for one in array.tasks] == ["model", "training", "samples"]

    def row(*live):
        seen({f"7_{place}": state for place, state in live}, {})
        (row,) = rows(standings([run], tmp_path / "other" / ".sweep")[0])
        return row["state"], row["job"], row["error"], row["to do"]

    running, waits = ("RUNNING", "None"), ("PENDING", "Dependency")
    assert row((0, running), (1, running), (2, waits)) == ("running", "7_0", "", "cost train sample")
    finish(run.tasks[0])
    assert row((1, running), (2, waits)) == ("running", "7_1", "", "train sample")
    append(
        stages.prepare(run.tasks[1]) / "attempts.jsonl", {"event": "start", "job": "7_1", "records": 0, "restart": 0}
    )
    fail(run.tasks[1], "train", "oom")
    assert row((2, waits)) == ("queued", "7_2", "", "train sample")
    array.log(2).write_text("not started\n")
    assert row() == ("oom", "7_1", "why", "train sample")
    finish(run.tasks[1])
    assert row() == ("failed", "7_2", "not started", "sample")


def test_a_long_error_keeps_the_table_readable(tmp_path, monkeypatch, capsys, seen, fail):
    monkeypatch.chdir(tmp_path)
    path = Path("mine.yaml")
    path.write_text(yaml.safe_dump({"question": "?", "base": SMALL, "axes": {"train.lr": [1e-4]}, "stages": ["train"]}))
    (run,) = plan(Study("s", "?", base=SMALL, axes={"train.lr": [1e-4]}, stages=["train"]))
    fail(run.tasks[0], "train", error=f"words {'and more ' * 50}")
    submitted([run])
    append(run.folder / "attempts.jsonl", {"event": "start", "job": "7_0", "records": 0, "restart": 0})
    live = {"7_0": ("RUNNING", "None")}
    for queue, wanted in ((live, "starting    7_0"), ({}, "7_0    words and more")):
        seen(queue, {})
        assert main(["sweep", "status", "mine.yaml"]) == 0
        out = capsys.readouterr().out
        assert wanted in out and max(map(len, out.splitlines())) < 170, out


def test_status_of_some_runs_or_stages_calls_nothing_of_the_study_unnamed(tmp_path, monkeypatch, capsys, finish):
    monkeypatch.chdir(tmp_path)
    content = {"question": "?", "base": SMALL, "axes": {"sample.guidance": [1.0, 2.0]}, "stages": ["train", "sample"]}
    Path("mine.yaml").write_text(yaml.safe_dump(content))
    for piece in pieces(plan(Study("mine", "?", base=SMALL, axes=content["axes"], stages=content["stages"]))):
        finish(piece.task)
    for words, count in ((["--stages", "train"], "2 runs: 2"), (["--only", "1*"], "1 run: 1")):
        assert main(["sweep", "status", "mine.yaml", *words]) == 0
        out = capsys.readouterr().out
        assert f"{count} done" in out and "no study" not in out


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Writes mine.yaml in an empty folder, with some learning rates."""
    monkeypatch.chdir(tmp_path)

    def write(rates, name="mine", stages=("cost", "train", "sample"), **more):
        content = {"question": "?", "base": SMALL | more, "axes": {"train.lr": rates}, "stages": list(stages)}
        Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
        return f"{name}.yaml", Study(name, "?", base=content["base"], axes=content["axes"], stages=content["stages"],
                                     file=str(tmp_path / f"{name}.yaml"))  # fmt: skip

    return write


def do(study, finish):
    """Writes what a study did; its runs."""
    runs = plan(study)
    plans.write(study, runs)
    for piece in pieces(runs):
        if left := piece.missing():
            finish(piece.task, *left)
    return runs


def test_collect_keeps_to_the_study(mine, capsys, finish):
    path, _ = mine([1e-4])
    assert main(["sweep", "collect", path]) == 2
    assert "no such folder: runs/mine; nothing of the study ran yet" in capsys.readouterr().err
    path, study = mine([1e-4, 2e-4])
    do(study, finish)
    assert main(["sweep", "collect", path, "--out", "both.jsonl"]) == 0
    lines = read_lines(Path("both.jsonl"))
    assert [(line["name"], line["kind"]) for line in lines] == [
        (name, kind) for name in ("0.0001", "0.0002") for kind in ("cost", "train", "sample")
    ]
    for out, message in ((".", ". is a folder"), ("/proc/both.jsonl", "cannot write /proc/both.jsonl: No such file")):
        assert main(["sweep", "collect", path, "--out", out]) == 2
        assert message in capsys.readouterr().err
    mine([1e-4, 3e-4])
    assert main(["sweep", "collect", path]) == 1  # one of them is not done
    lines = read_lines(Path("runs/mine/records.jsonl"))
    assert {line["name"] for line in lines if line["kind"] != "cost"} == {"0.0001"}
    assert {line["model"] for line in lines} == {"dit_nano"} and {line["seed"] for line in lines} == {0}


def test_collect_leaves_out_what_others_asked_of_the_same_folders(mine, finish):
    path, study = mine([1e-4], stages=["train", "sample", "evaluate"], **{"evaluate.metrics": ["fd"]})
    do(study, finish)
    _, other = mine([1e-4], "other", ["train", "sample", "evaluate", "cost"], **{"evaluate.metrics": ["kid"]})
    do(other, finish)
    assert main(["sweep", "collect", path]) == 0
    lines = read_lines(Path("runs/mine/records.jsonl"))
    assert [line.get("metric", line["kind"]) for line in lines] == ["train", "sample", "fd"]


def test_prune_never_lists_what_another_study_names(mine, capsys, finish):
    path, study = mine([1e-4, 2e-4])
    one, two = do(study, finish)
    _, other = mine([2e-4], "other", ["train"])  # it needs the second training, and none of its samples
    do(other, finish)
    mine([3e-4])
    capsys.readouterr()
    assert main(["sweep", "prune", path]) == 2
    err = capsys.readouterr().err
    size = 1000 / 2**30
    assert f"{one.folder}: 2 hours of training, {size:.3g} GiB" not in err and f"{one.folder}: 2 hours" in err
    assert f"{two.tasks[2].path}: 0 hours" in err and f"{two.folder}:" not in err
    assert "2 folders would be deleted" in err and one.folder.is_dir()
    assert main(["sweep", "prune", path, "--yes"]) == 0
    assert not one.folder.exists() and not two.tasks[2].path.exists()
    assert two.folder.is_dir() and one.tasks[0].path.is_dir()  # the model is that of the third rate, too
    assert not Path("runs/mine/0.0001").is_symlink()
    capsys.readouterr()
    assert main(["sweep", "prune", path]) == 0 and "nothing to prune" in capsys.readouterr().out


def test_prune_leaves_what_is_locked_or_queued(mine, capsys, finish, monkeypatch):
    path, study = mine([1e-4, 2e-4])
    one, two = do(study, finish)
    array = manifest.write(Path("runs/gone/.sweep"), "gone", [manifest.Draft(ClusterConfig(), [
        entry(piece) for piece in pieces([two]) if piece.task.kind == "samples"])], {"path": None})[0]  # fmt: skip
    manifest.job_file(array.folder, 0).write_text("7\n")
    monkeypatch.setattr("lamabench.launch.slurm.client.live", lambda *_: {"7_0": ("PENDING", "None", array.name)})
    monkeypatch.setattr("lamabench.launch.slurm.client.accounted", lambda *_: {})
    mine([3e-4])
    with locked(one.tasks[2].path):  # of the samples in a training that nobody names
        assert main(["sweep", "prune", path, "--yes"]) == 0
    err = capsys.readouterr().err
    assert err.count("kept, because it is queued or running") == 2 and one.folder.is_dir() and two.folder.is_dir()


def test_prune_takes_nothing_of_a_listing_that_it_cannot_read(mine, capsys, finish):
    path, study = mine([1e-4])
    do(study, finish)
    other = Path("runs/other")
    other.mkdir()
    (other / ".study.json").write_text("{")
    mine([2e-4])
    assert main(["sweep", "prune", path, "--yes"]) == 2
    assert "runs/other/.study.json is not JSON" in capsys.readouterr().err


def test_prune_of_checkpoints_leaves_the_weights(mine, capsys, finish):
    path, study = mine([1e-4, 2e-4])
    one, two = do(study, finish)
    (two.tasks[2].path / "record.jsonl").unlink()  # not finished
    assert main(["sweep", "prune", path, "--checkpoints", "--yes"]) == 0
    out, err = capsys.readouterr()
    assert "deleted checkpoints of 1 training, 9.31e-07 GiB" in out and "1 checkpoint," in err
    assert not list(one.folder.glob("checkpoints/step-*")) and list(one.folder.glob("weights/step-*"))
    assert list(two.folder.glob("checkpoints/step-*")) and one.state() == "done"
    for file in two.folder.glob("weights/*"):
        file.unlink()
    finish(two.tasks[2])
    assert main(["sweep", "prune", path, "--checkpoints", "--yes"]) == 0
    assert "nothing to prune" in capsys.readouterr().out  # they alone hold its weights
    assert main(["sweep", "plan", path, "--checkpoints"]) == 2
    assert "--checkpoints is for prune, not for plan" in capsys.readouterr().err
