"""Studies on a real SLURM: submitted, preempted, lost, out of memory, mended; each run once, and bit for bit.

What crashes the node comes last: before, long trainings run in the background.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lamabench.harness.disk import read_lines
from studies import (
    BASE,
    COMMAND,
    PLUGIN,
    SLOW,
    SLOW_STEPS,
    SLURM,
    Fork,
    Sweep,
    done,
    progress,
    run_folder,
    same,
    trained_once,
    trains,
    write,
)

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def long(node, tmp_path_factory):
    """The same training twice: with a limit of one minute, and undisturbed."""
    folder = tmp_path_factory.mktemp("long")
    write(folder / "long.yaml", base=SLOW, axes={"train.steps": [SLOW_STEPS]}, plugins=[PLUGIN])
    for root, *words in (("limited", "cluster.time_min=1", "cluster.signal_s=15"), ("whole", "cluster.time_min=20")):
        code, _, err = Fork(folder, "sweep", "submit", "long.yaml", "--dirty", *SLURM, f"run.root={root}", *words).end()
        assert code == 0, err
    return folder


def test_jobs_run_the_code_that_was_submitted(node, tmp_path, long):
    """A checkout that is edited while its jobs wait; one with changes is refused before anything is written."""
    clone = tmp_path / "names" / "lamabench"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.split("\0")[:-1]:
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, clone / name)
    git = ["git", "-C", str(clone), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *words], check=True)
    commit = node.run(*git, "rev-parse", "HEAD")
    study = write(tmp_path / "code.yaml", axes={"train.lr": [1e-3]}, base={**BASE, "train.steps": 10})

    def command(*words):
        environment = {**os.environ, "PYTHONPATH": str(clone.parent)}
        words = [*COMMAND, "sweep", *words]
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)

    answer = command("submit", study, *SLURM, "cluster.options=[--hold]", "--json")
    assert answer.returncode == 0, answer.stderr
    submission = json.loads(answer.stdout)
    assert submission["code"]["commit"] == commit and not submission["code"]["dirty"]
    (clone / "harness" / "training" / "loop.py").write_text("raise RuntimeError('edited')\n")
    node.run("scontrol", "release", submission["arrays"][0]["job"])
    assert node.ended(submission["arrays"][0]["job"]) == ["COMPLETED"]
    (trained,) = done(run_folder(tmp_path / "runs", "code", "0.001"), "train")
    assert (trained.provenance["commit"], trained.provenance["dirty"]) == (commit, False)

    subprocess.run([*git, "checkout", "-q", "harness"], check=True)
    with open(clone / "harness" / "training" / "loop.py", "a") as file:
        file.write("CHANGED = 1\n")
    (clone / "harness" / "new.py").write_text("NEW = 1\n")
    other = write(tmp_path / "other.yaml", axes={"train.lr": [2e-3]}, base={**BASE, "train.steps": 10})
    answer = command("submit", other, *SLURM)
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1 and not (tmp_path / "runs" / "other").exists()
    assert "harness/training/loop.py, harness/new.py" in answer.stderr and "--dirty" in answer.stderr
    answer = command("submit", other, *SLURM, "--dirty", "--json")
    submission = json.loads(answer.stdout)
    diff = Path(submission["code"]["diff"]).read_text()
    assert "+CHANGED = 1" in diff and "+NEW = 1" in diff
    assert node.ended(submission["arrays"][0]["job"]) == ["COMPLETED"]
    (trained,) = done(run_folder(tmp_path / "runs", "other", "0.002"), "train")
    assert trained.provenance["dirty"]


@pytest.mark.soak  # test_processes.py stops a run of two tasks
def test_stopped_by_both_signals_it_goes_on_bit_for_bit(node, tmp_path, sweep, long):
    """The notice before a time limit (the run has itself queued again) and a preemption (SLURM queues it again)."""
    study = write(tmp_path / "twice.yaml", base=SLOW, axes={"train.steps": [SLOW_STEPS // 2]}, plugins=[PLUGIN])
    (job,) = sweep.submit(study, *SLURM)
    node.wait(lambda: list(tmp_path.glob("runs/trainings/*/progress.json")), "it trains")
    half = str(SLOW_STEPS // 2)
    folder, seen = run_folder(tmp_path / "runs", "twice", half), []
    for start, command in enumerate((["scancel", "--signal=USR2"], ["scontrol", "requeue"]), 1):
        node.wait(lambda start=start: trains(folder, start, max([0, *seen])), "a few steps")
        seen.append(progress(folder))
        node.run(*command, f"{job}_0")
        node.wait(lambda: sweep.states(study)[half] == "preempted", "it waits again")
        row = sweep.status(study)[half]
        assert row["requeued"] == len(seen) and row["shown"] == f"preempted ×{len(seen)}"
        files = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert files and all(int(name[5:13]) >= seen[-1] for name in files[-1:])
        node.wait(lambda: sweep.states(study)[half] == "running", "it runs again")
    node.must("kill", "slurmd")  # which jobs outlive
    node.must("start", "slurmd")
    sweep.until(node, 150, study, **{half: "done"})
    assert node.ended(job) == ["COMPLETED"]
    assert node.sacct(job, "State", "-D") == ["REQUEUED", "REQUEUED", "COMPLETED"]
    (log,) = tmp_path.glob("runs/twice/.sweep/0001/logs/*_log.out")
    assert log.read_text().count("continuing at step") == 2 and trained_once(folder)
    assert sweep.status(study)[half]["requeued"] == 2
    same_step = whole(long) / "checkpoints" / f"step-{SLOW_STEPS // 2:08d}.safetensors"
    node.wait(same_step.exists, "the undisturbed one", 150)
    same(folder, whole(long), SLOW_STEPS // 2)


def whole(long):
    return run_folder(long / "whole", "long", str(SLOW_STEPS))


def test_a_minute_at_a_time_is_the_same_training(node, long, capsys):
    sweep, study = Sweep(long, capsys), "long.yaml"
    going = ("running", "preempted")
    node.wait(lambda: sweep.states(study, "run.root=limited")[str(SLOW_STEPS)] not in going, "ended", 300)
    row = sweep.status(study, "run.root=limited")[str(SLOW_STEPS)]
    assert row["state"] == "done" and row["requeued"] >= 1, row
    node.ended(row["job"])
    states = node.sacct(row["job"], "State", "-D")
    assert states == ["REQUEUED"] * row["requeued"] + ["COMPLETED"]
    assert sweep.states(study, "run.root=whole")[str(SLOW_STEPS)] == "done"
    assert sweep.status(study, "run.root=whole")[str(SLOW_STEPS)]["requeued"] == 0
    limited = run_folder(long / "limited", "long", str(SLOW_STEPS))
    same(limited, whole(long), SLOW_STEPS)
    assert trained_once(limited)


def address_space():
    """What the process of a run maps before it trains, in KiB; most of it are libraries."""
    probe = "import lamabench.harness.training.loop; print(open('/proc/self/status').read())"
    answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return int(answer.stdout.split("VmPeak:")[1].split()[0])


def test_what_waits_but_left_the_study_is_told(node, tmp_path, sweep):
    study = write(tmp_path / "edited.yaml", axes={"train.lr": [1e-3, 2e-3]})
    (job,) = sweep.submit(study, *SLURM, "cluster.options=[--hold]")
    assert "not in the study" not in sweep("status", study)
    write(tmp_path / "edited.yaml", axes={"train.lr": [1e-3, 3e-3]})
    note = f"1 job in the queue for runs that are not in the study: {job}_1 (0.002); scancel JOB ends one"
    assert note in sweep("status", study)
    for some in (("--stages", "train"), ("--only", "0.001")):  # runs that are left out are in the study
        assert note in sweep("status", study, *some)
    node.run("scancel", job)
    node.wait(lambda: "not in the study" not in sweep("status", study), "the queue is empty")


@pytest.mark.soak  # two minutes; most of its parts have tests of their own here and in tests/launch
def test_the_whole_story(node, tmp_path, sweep, monkeypatch):
    """A typo; two preemptions, a lost node, a crash, three runs out of memory; mended and submitted again."""
    large = {"train.batch_size": 60000, "train.steps": 1}  # 1.5 GB above the limit, and 0.7 below it in micro-batches
    variants = {f"large-{n}": {**large, "train.lr": n * 1e-4} for n in (1, 2, 3)}
    variants |= {
        "long": {"train.stesp": 2000, "run.checkpoint_every": 100},
        "crash": {"run.device": "cuda", "train.lr": 5e-4},
    }
    study = write(tmp_path / "story.yaml", variants=variants)
    sweep("submit", study, *SLURM, "--dirty", code=2)
    assert "unknown key in train 'stesp' (did you mean 'steps'?)" in sweep.err and not (tmp_path / "runs").exists()

    variants["long"] = {"train.steps": 5000, "run.checkpoint_every": 100}
    write(tmp_path / "story.yaml", variants=variants)
    limit = f"cluster.setup=[ulimit -v {address_space() + 900_000}]"
    (job,) = sweep.submit(study, *SLURM, limit, "--parallel", "2")
    names = list(variants)
    place = {name: f"{job}_{index}" for index, name in enumerate(names)}
    sweep.until(node, 120, study, crash="failed", **{f"large-{n}": "oom" for n in (1, 2, 3)})
    rows = sweep.status(study)
    assert rows["crash"]["error"].startswith("run.device=cuda, but torch finds no GPU here; choices: auto, ")
    assert "Traceback" in Path(rows["crash"]["log"]).read_text()
    assert all("RuntimeError" in rows[f"large-{n}"]["error"] for n in (1, 2, 3))
    assert all("can't allocate memory" in rows[f"large-{n}"]["error"] for n in (1, 2, 3))
    assert {row["job"] for row in rows.values()} == set(place.values())

    folder = run_folder(tmp_path / "runs", "story", "long")
    for times in (1, 2):
        node.wait(lambda times=times: trains(folder, times), "it trains")
        assert sweep.states(study)["long"] == "running"
        node.run("scontrol", "requeue", place["long"])
        node.wait(lambda times=times: sweep.status(study)["long"]["requeued"] == times, "queued again")
    node.wait(lambda: trains(folder, 3, 300), "it trains")
    assert sweep.submit(study, *SLURM) == []  # what runs and what failed is not new
    node.must("crash")
    time.sleep(8)
    node.must("start", "slurmd")

    again = sweep.submit(study, "run.micro_batch=2000", action="retry")  # with no more memory than before
    sweep("retry", study, "train.batch_size=2", "--dirty", code=2)
    assert "would not repeat a run but make another one" in sweep.err
    assert len(again) == 1 and len(node.run("squeue", "-h", "-r", "-j", again[0]).splitlines()) == 4
    del variants["crash"]
    variants["new"] = {"train.steps": 5, "train.lr": 6e-4}
    write(tmp_path / "story.yaml", variants=variants)
    (new,) = sweep.submit(study, *SLURM)
    sweep.until(node, 240, study, **dict.fromkeys(variants, "done"))
    assert node.ended(new) == ["COMPLETED"]
    node.ended(place["long"])
    lost = node.sacct(place["long"], "State", "-D")
    assert lost == ["REQUEUED", "REQUEUED", "NODE_FAIL", "COMPLETED"] and sweep.status(study)["long"]["requeued"] == 3
    node.ended(again[0])

    with_sacct = sweep.status(study)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "squeue").symlink_to(shutil.which("squeue"))
    monkeypatch.setenv("PATH", str(tools))
    assert sweep.status(study) == with_sacct and "sacct is not installed" in sweep.err
    monkeypatch.undo()

    folders = {name: run_folder(tmp_path / "runs", "story", name) for name in variants}
    assert all(map(trained_once, folders.values()))
    trainings = tmp_path / "runs" / "trainings"
    (crashed,) = {*trainings.iterdir()} - {*folders.values()}
    sweep("prune", study, code=2)
    assert "1 folder would be deleted" in sweep.err and "--yes deletes them" in sweep.err and crashed.name in sweep.err
    sweep("prune", study, "--yes")
    assert {*trainings.iterdir()} == {*folders.values()}
    sweep("collect", study)
    lines = read_lines(tmp_path / "runs" / "story" / "records.jsonl")
    ended = [line["name"] for line in lines if line["kind"] == "train" and line["state"] == "done"]
    assert sorted(ended) == sorted(variants)
