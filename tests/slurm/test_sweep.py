"""Studies on a real SLURM: submitted, preempted, lost, out of memory, mended; each run once, and bit for bit.

What stops slurmctld comes first, what crashes the node last: in between, long trainings run in the background.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from lamabench.harness.record import read_lines, read_run
from lamabench.launch.cli import main
from lamabench.launch.slurm import client
from lamabench.launch.slurm.cluster import ClusterConfig
from safetensors.torch import load_file

pytestmark = pytest.mark.slurm
ROOT = Path(__file__).resolve().parents[2]

# More than what is left of a minute after a start: one core takes 200 a second, or 90 beside other work.
STEPS = 8000
HALF = str(STEPS // 2)
BASE = {
    "model": "dit_nano", "model.depth": 1, "model.hidden_size": 16, "model.num_heads": 2, "data": "digits",
    "data.size": 8, "train.batch_size": 4, "train.precision": "float32", "run.device": "cpu",
    "run.checkpoint_every": STEPS // 2,
}  # fmt: skip
COMMAND = (sys.executable, "-c", "import sys; from lamabench.launch.cli import main; sys.exit(main())")
SLURM = ("cluster=slurm", "cluster.cpus=1", "cluster.mem_gb=1")


def write(path, **study):
    path.write_text(yaml.safe_dump({"question": "?", "base": BASE, "stages": ["train"], **study}, sort_keys=False))
    return str(path)


class Sweep:
    """The command in a folder, in this process: its output, and how runs stand by their names."""

    def __init__(self, folder, capsys):
        self.folder, self.capsys = folder, capsys

    def __call__(self, action, study, *words, code=0):
        here = os.getcwd()
        os.chdir(self.folder)
        try:
            found = main(["sweep", action, str(study), *words])
        finally:
            os.chdir(here)
        out, err = self.capsys.readouterr()
        assert found == code, f"{out}\n{err}"
        self.err = err
        return out

    def submit(self, study, *words, action="submit", code=0):
        return [row["job"] for row in json.loads(self(action, study, *words, "--dirty", "--json", code=code))["arrays"]]

    def status(self, study, *words):
        return {row["run"]: row for row in json.loads(self("status", study, *words, "--json"))}

    def states(self, study, *words):
        return {name: row["state"] for name, row in self.status(study, *words).items()}

    def until(self, node, seconds, study, **wanted):
        node.wait(lambda: wanted.items() <= self.states(study).items(), str(wanted), seconds)


@pytest.fixture
def sweep(tmp_path, capsys):
    return Sweep(tmp_path, capsys)


@pytest.fixture(scope="module")
def long(node, tmp_path_factory):
    """The same training twice: with a limit of one minute, and undisturbed."""
    folder = tmp_path_factory.mktemp("long")
    write(folder / "long.yaml", axes={"train.steps": [STEPS]})
    for root, *words in (("limited", "cluster.time_min=1", "cluster.signal_s=15"), ("whole", "cluster.time_min=20")):
        command = [*COMMAND, "sweep", "submit", "long.yaml", "--dirty", *SLURM]
        subprocess.run([*command, f"run.root={root}", *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder


def run_folder(root, study, name):
    (found,) = Path(root, study).glob(f"{name}-????????")
    return found


def progress(folder):
    try:
        return json.loads((folder / "progress.json").read_text())["done"]
    except (OSError, ValueError):
        return 0


def trains(folder, start, steps=0):
    """Whether the run trains in its `start`-th start, more than `steps` steps so far. SLURM says "running" as soon as
    the batch script begins, and until the run begins its progress is of the start before."""
    starts = [line for line in read_lines(folder / "attempts.jsonl") if line["event"] == "start"]
    return len(starts) == start and progress(folder) > steps


def same(ours, theirs, step):
    """The checkpoints of a step hold the same bits, and the metrics before it are the same."""
    one, two = (load_file(folder / "checkpoints" / f"step-{step:08d}.safetensors") for folder in (ours, theirs))
    assert one.keys() == two.keys() and all(one[key].equal(two[key]) for key in one)
    lines = [
        [{**line, "seconds": 0} for line in read_lines(folder / "metrics.jsonl") if line["step"] <= step]
        for folder in (ours, theirs)
    ]
    assert lines[0] == lines[1] and lines[0][-1]["step"] == step


def trained_once(folder):
    records = [line for line in read_run(folder).records if line["kind"] == "train"]
    return [line["state"] for line in records if line["state"] == "done"] == ["done"]


@pytest.mark.parametrize("nodes", [1, 2])
def test_every_task_knows_its_rank(node, tmp_path, nodes):
    """What torch.distributed reads, and the CPUs that srun would not take over by itself."""
    probe = "import json, os; from lamabench.launch.worker import environment as e; print(json.dumps({**e(), "
    probe += "'cpus': os.environ['SLURM_CPUS_PER_TASK'], 'threads': os.environ['OMP_NUM_THREADS'], "
    probe += "'node': os.environ['SLURMD_NODENAME']}))"
    cluster = ClusterConfig(cpus=2, nodes=nodes, tasks_per_node=2 // nodes, time_min=5, mem_gb=1)
    if nodes == 2:
        node.must("start", "second")
        cluster = replace(cluster, partition="pair")
    text = client.script(cluster, "ranks", 2, f'{sys.executable} -c "{probe}"', tmp_path / "%a.log", None)
    (tmp_path / "job.sh").write_text(text)
    node.ended(node.run("sbatch", "--parsable", str(tmp_path / "job.sh")))
    ports = []
    for task in range(2):
        rows = [json.loads(line) for line in (tmp_path / f"{task}.log").read_text().splitlines()]
        assert sorted(row["rank"] for row in rows) == ["0", "1"] and len({row["node"] for row in rows}) == nodes
        assert sorted(row["local_rank"] for row in rows) == (["0", "1"] if nodes == 1 else ["0", "0"])
        assert {(row["world_size"], row["cpus"], row["threads"]) for row in rows} == {("2", "2", "2")}
        (place,) = {(row["master_addr"], row["master_port"]) for row in rows}
        ports.append(place[1])
    assert ports[0] != ports[1]  # two tasks of an array may meet on one node
    if nodes == 2:
        node.must("stop", "second")


def test_two_submitters_queue_every_run_once(node, tmp_path, sweep):
    study = write(tmp_path / "two.yaml", axes={"train.lr": [1e-3, 2e-3, 3e-3]})
    command = [
        *COMMAND,
        "sweep",
        "submit",
        study,
        "--dirty",
        "--json",
        *SLURM,
        "cluster.options=[--hold]",
    ]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    for process, (_, err) in zip(both, outputs, strict=True):
        assert process.returncode == 0 or b"is being worked on" in err, err
    jobs = [row["job"] for out, _ in outputs if out for row in json.loads(out)["arrays"]]
    assert len(jobs) == 1 and len(node.run("squeue", "-h", "-r", "-j", jobs[0]).splitlines()) == 3
    assert set(sweep.states(study).values()) == {"queued"}
    assert "JobHeldUser" in sweep("status", study)
    assert sweep.submit(study, *SLURM) == []
    sweep("cancel", study)
    assert not node.queued(jobs[0])
    node.wait(lambda: set(node.sacct(jobs[0], "State")) == {"CANCELLED by 0"}, "sacct knows")
    assert set(sweep.states(study).values()) == {"cancelled"}, sweep.err


def test_a_thousand_runs(node, tmp_path, sweep, monkeypatch):
    """Queued within 30 s, and looked at with one call of sacct and one of squeue."""
    axes = {"train.lr": [place * 1e-5 for place in range(1, 101)]}
    study = write(tmp_path / "large.yaml", axes=axes, seeds=list(range(10)))
    started = time.monotonic()
    (job,) = sweep.submit(study, *SLURM, "cluster.options=[--hold]")
    seconds = time.monotonic() - started
    assert seconds < 30 and len(node.run("squeue", "-h", "-r", "-j", job).splitlines()) == 1000
    tools, calls = tmp_path / "bin", tmp_path / "calls"
    tools.mkdir()
    for name in ("sacct", "squeue"):
        (tools / name).write_text(f'#!/bin/sh\necho {name} >> {calls}\nexec {shutil.which(name)} "$@"\n')
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    assert list(sweep.states(study).values()) == ["queued"] * 1000
    assert sorted(calls.read_text().split()) == ["sacct", "squeue"]
    sweep("cancel", study)
    assert not node.queued(job)


def test_slurmctld_is_away_for_a_moment(node, tmp_path, sweep):
    study = write(tmp_path / "away.yaml", axes={"train.steps": [STEPS]})
    node.must("stop", "slurmctld")
    back = threading.Timer(8, lambda: node.must("start", "slurmctld"))
    back.start()
    try:
        (job,) = sweep.submit(study, *SLURM)
    finally:
        back.join()
    assert "Unable to contact slurm controller (connect failure); trying again in 2 s" in sweep.err
    # While it trains, cancelling saves it; only `retry` queues it again.
    node.wait(lambda: list(tmp_path.glob("runs/away/*/progress.json")), "it trains")
    folder = run_folder(tmp_path / "runs", "away", str(STEPS))
    node.wait(lambda: progress(folder) > 50, "a few steps")
    seen = progress(folder)
    sweep("cancel", study)
    assert node.ended(job) == ["CANCELLED by 0"] and sweep.states(study) == {str(STEPS): "cancelled"}
    (saved,) = (folder / "checkpoints").iterdir()
    assert int(saved.stem[5:]) >= seen and sweep.submit(study, *SLURM) == []
    (again,) = sweep.submit(study, action="retry")
    node.wait(lambda: progress(folder) > int(saved.stem[5:]), "it goes on")
    sweep("cancel", study)
    assert node.ended(again) == ["CANCELLED by 0"]


def test_what_makes_room_for_another_job_is_queued_again(node, tmp_path, sweep):
    """Preempted by a partition of higher priority. Within its GraceTime a run ends by itself: SLURM queues only what it
    killed."""
    study = write(tmp_path / "room.yaml", axes={"train.steps": [int(HALF)]})
    (job,) = sweep.submit(study, *SLURM)
    node.wait(lambda: list(tmp_path.glob("runs/room/*/attempts.jsonl")), "it starts")
    folder = run_folder(tmp_path / "runs", "room", HALF)
    node.wait(lambda: trains(folder, 1, 50), "it trains")
    other = node.submit("sleep 3", tmp_path / "other.log", "--partition=urgent", "--cpus-per-task=16", "--mem=1G")
    node.wait(lambda: sweep.states(study)[HALF] == "preempted", "it makes room")
    (saved,) = (folder / "checkpoints").iterdir()
    assert 50 <= int(saved.stem[5:]) < int(HALF)
    assert node.ended(other) == ["COMPLETED"]
    sweep.until(node, 150, study, **{HALF: "done"})
    assert node.ended(job) == ["COMPLETED"] and node.sacct(job, "State", "-D") == ["REQUEUED", "COMPLETED"]
    assert sweep.status(study)[HALF]["requeued"] == 1 and trained_once(folder)
    (log,) = tmp_path.glob("runs/room/.sweep/0001/logs/*")
    assert f"continuing at step {int(saved.stem[5:])}" in log.read_text()


def test_a_full_disk_is_said_and_mended(node, tmp_path, sweep):
    study = write(tmp_path / "full.yaml", axes={"train.lr": [1e-3]}, base={**BASE, "train.steps": 10})
    (disk := tmp_path / "runs").mkdir()
    node.run("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk))
    try:
        (job,) = sweep.submit(study, *SLURM, "cluster.options=[--hold]")
        with pytest.raises(OSError, match="No space left"), open(disk / "other", "wb") as file:
            for size in (2**16, 2**10, 1):
                while file.write(b"x" * size):
                    file.flush()
        node.run("scontrol", "release", job)
        assert node.ended(job) == ["FAILED"]
        row = sweep.status(study)["0.001"]
        assert row["state"] == "failed" and "the disk of its folder is full" in row["error"], row
        (disk / "other").unlink()
        (again,) = sweep.submit(study, "cluster.options=[]", action="retry")
        assert node.ended(again) == ["COMPLETED"]
        assert sweep.states(study) == {"0.001": "done"} and trained_once(run_folder(disk, "full", "0.001"))
    finally:
        node.run("umount", "--lazy", str(disk))


def test_the_exit_code_of_a_task_that_ends_at_once_is_known_at_once(node, tmp_path, sweep):
    """For some seconds sacct has the row of an array's only task as that of a job: `7` in place of `7_0`."""
    study = write(tmp_path / "soon.yaml", axes={"train.lr": [1e-3]})
    (job,) = sweep.submit(study, *SLURM, f"cluster.setup=[exit {errno.ENOSPC}]")
    assert node.ended(job) == ["FAILED"]
    assert "the disk of its folder is full" in sweep.status(study)["0.001"]["error"]


def test_a_folder_that_goes_away_is_said_and_nothing_is_lost(node, tmp_path, sweep):
    study = write(tmp_path / "gone.yaml", axes={"train.steps": [STEPS]}, base={**BASE, "run.checkpoint_every": 100})
    (job,) = sweep.submit(study, *SLURM)
    node.wait(lambda: list(tmp_path.glob("runs/gone/*/checkpoints/step-*")), "it trains")
    (tmp_path / "runs").rename(tmp_path / "away")
    assert node.ended(job) == ["FAILED"] and not (tmp_path / "runs").exists()
    (tmp_path / "away").rename(tmp_path / "runs")
    row = sweep.status(study)[str(STEPS)]
    assert row["state"] == "failed" and "did not see the folder of the submission" in row["error"], row
    (again,) = sweep.submit(study, action="retry")
    logs = tmp_path / "runs" / "gone" / ".sweep" / "0002" / "logs"
    node.wait(lambda: any("continuing at step" in log.read_text() for log in logs.glob("*")), "it goes on")
    sweep("cancel", study)
    assert node.ended(again) == ["CANCELLED by 0"]


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

    done = command("submit", study, *SLURM, "cluster.options=[--hold]", "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["code"]["commit"] == commit and not made["code"]["dirty"]
    (clone / "harness" / "training" / "loop.py").write_text("raise RuntimeError('edited')\n")
    node.run("scontrol", "release", made["arrays"][0]["job"])
    assert node.ended(made["arrays"][0]["job"]) == ["COMPLETED"]
    for folder in (tmp_path / "runs" / "code").glob("0*"):
        trained = read_run(folder).last("train")
        assert trained["state"] == "done"
        assert (trained["provenance"]["commit"], trained["provenance"]["dirty"]) == (commit, False)

    subprocess.run([*git, "checkout", "-q", "harness"], check=True)
    with open(clone / "harness" / "training" / "loop.py", "a") as file:
        file.write("CHANGED = 1\n")
    (clone / "harness" / "new.py").write_text("NEW = 1\n")
    other = write(tmp_path / "other.yaml", axes={"train.lr": [1e-3]}, base={**BASE, "train.steps": 10})
    done = command("submit", other, *SLURM)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "runs" / "other").exists()
    assert "harness/training/loop.py, harness/new.py" in done.stderr and "--dirty" in done.stderr
    done = command("submit", other, *SLURM, "--dirty", "--json")
    made = json.loads(done.stdout)
    diff = Path(made["code"]["diff"]).read_text()
    assert "+CHANGED = 1" in diff and "+NEW = 1" in diff
    assert node.ended(made["arrays"][0]["job"]) == ["COMPLETED"]
    (folder,) = (tmp_path / "runs" / "other").glob("0*")
    assert read_run(folder).last("train")["provenance"]["dirty"]


def test_runs_that_share_a_training_wait_for_it(node, tmp_path, sweep):
    base = {**BASE, "train.steps": 20, "sample.count": 4, "sample.method": "ddim", "sample.steps": 2}
    study = write(tmp_path / "shared.yaml", axes={"sample.guidance": [1.0, 2.0]}, base=base, stages=["train", "sample"])
    first, second = sweep.submit(study, *SLURM)
    sweep.until(node, 90, study, **{"1.0": "done", "2.0": "done"})
    assert node.ended(first) + node.ended(second) == ["COMPLETED"] * 2
    (ended,), (began,) = node.sacct(first, "End"), node.sacct(second, "Start")
    assert ended <= began
    (trainer,) = (tmp_path / "runs" / "shared").glob("1.0-*")
    assert trained_once(trainer) and len(list(tmp_path.glob("runs/shared/*/checkpoints"))) == 1


def test_stopped_by_both_signals_it_goes_on_bit_for_bit(node, tmp_path, sweep, long):
    """The notice before a time limit (the run has itself queued again) and a preemption (SLURM queues it again)."""
    study = write(tmp_path / "twice.yaml", axes={"train.steps": [int(HALF)]})
    (job,) = sweep.submit(study, *SLURM)
    node.wait(lambda: list(tmp_path.glob(f"runs/twice/{HALF}-*/progress.json")), "it trains")
    folder, seen = run_folder(tmp_path / "runs", "twice", HALF), []
    for start, command in enumerate((["scancel", "--signal=USR2"], ["scontrol", "requeue"]), 1):
        node.wait(lambda start=start: trains(folder, start, max([0, *seen])), "a few steps")
        seen.append(progress(folder))
        node.run(*command, f"{job}_0")
        node.wait(lambda: sweep.states(study)[HALF] == "preempted", "it waits again")
        row = sweep.status(study)[HALF]
        assert row["requeued"] == len(seen) and row["shown"] == f"preempted ×{len(seen)}"
        files = sorted(path.name for path in (folder / "checkpoints").iterdir())
        assert files and all(int(name[5:13]) >= seen[-1] for name in files[-1:])
        node.wait(lambda: sweep.states(study)[HALF] == "running", "it runs again")
    node.must("kill", "slurmd")  # which jobs outlive
    node.must("start", "slurmd")
    sweep.until(node, 150, study, **{HALF: "done"})
    assert node.ended(job) == ["COMPLETED"]
    assert node.sacct(job, "State", "-D") == ["REQUEUED", "REQUEUED", "COMPLETED"]
    (log,) = tmp_path.glob("runs/twice/.sweep/0001/logs/*")
    assert log.read_text().count("continuing at step") == 2 and trained_once(folder)
    assert sweep.status(study)[HALF]["requeued"] == 2
    same_step = whole(long) / "checkpoints" / f"step-{int(HALF):08d}.safetensors"
    node.wait(same_step.exists, "the undisturbed one", 150)
    same(folder, whole(long), int(HALF))


def whole(long):
    return run_folder(long / "whole", "long", str(STEPS))


def test_a_minute_at_a_time_is_the_same_training(node, long, capsys):
    sweep, study = Sweep(long, capsys), "long.yaml"
    going = ("running", "preempted")
    node.wait(lambda: sweep.states(study, "run.root=limited")[str(STEPS)] not in going, "ended", 300)
    row = sweep.status(study, "run.root=limited")[str(STEPS)]
    assert row["state"] == "done" and row["requeued"] >= 1, row
    node.ended(row["job"])
    states = node.sacct(row["job"], "State", "-D")
    assert states == ["REQUEUED"] * row["requeued"] + ["COMPLETED"]
    assert sweep.states(study, "run.root=whole")[str(STEPS)] == "done"
    assert sweep.status(study, "run.root=whole")[str(STEPS)]["requeued"] == 0
    limited = run_folder(long / "limited", "long", str(STEPS))
    same(limited, whole(long), STEPS)
    assert trained_once(limited)


def address_space():
    """What the process of a run maps before it trains, in KiB; most of it are libraries."""
    probe = "import lamabench.harness.run; print(open('/proc/self/status').read().split('VmPeak:')[1].split()[0])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_what_waits_but_left_the_study_is_told(node, tmp_path, sweep):
    study = write(tmp_path / "edited.yaml", axes={"train.steps": [1, 22]})
    (job,) = sweep.submit(study, *SLURM, "cluster.options=[--hold]")
    assert "not in the study" not in sweep("status", study)
    write(tmp_path / "edited.yaml", axes={"train.steps": [1, 2]})
    assert f"1 runs that are not in the study are in the queue: {job}_1 (22); scancel JOB ends one" in sweep(
        "status", study
    )
    assert "not in the study" not in sweep("status", study, "--stages", "train")
    node.run("scancel", job)
    node.wait(lambda: "not in the study" not in sweep("status", study), "the queue is empty")


def test_the_whole_story(node, tmp_path, sweep, monkeypatch):
    """A typo; two preemptions, a lost node, a crash, three runs out of memory; mended and submitted again."""
    large = {"train.batch_size": 20000, "train.steps": 1}
    variants = {f"large-{n}": {**large, "train.lr": n * 1e-4} for n in (1, 2, 3)}
    variants |= {"long": {"train.stesp": 2000, "run.checkpoint_every": 100}, "crash": {"run.device": "nothing:0"}}
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
    assert "RuntimeError" in rows["crash"]["error"] and "Traceback" in Path(rows["crash"]["log"]).read_text()
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
    variants["new"] = {"train.steps": 5}
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

    assert all(trained_once(run_folder(tmp_path / "runs", "story", name)) for name in variants)
    sweep("prune", study, code=2)
    assert "1 folders would be deleted; --yes deletes them" in sweep.err and "crash-" in sweep.err
    sweep("prune", study, "--yes")
    assert {folder.name[:-9] for folder in (tmp_path / "runs" / "story").glob("[!.]*")} == set(variants)
    sweep("collect", study)
    lines = read_lines(tmp_path / "runs" / "story" / "records.jsonl")
    done = [line["name"] for line in lines if line["kind"] == "train" and line["state"] == "done"]
    assert sorted(done) == sorted(variants)
