"""Studies on a real SLURM: what is queued, each run once, also where slurmctld, the disk or the folder is away."""

import errno
import json
import os
import shutil
import threading
import time

import pytest
from studies import BASE, PLUGIN, SLOW, SLURM, STEPS, Fork, progress, run_folder, trained_once, trains, write

pytestmark = pytest.mark.slurm


def test_two_submitters_queue_every_run_once(node, tmp_path, sweep):
    study = write(tmp_path / "two.yaml", axes={"train.lr": [1e-3, 2e-3, 3e-3]})
    words = ["sweep", "submit", study, "--dirty", "--json", *SLURM, "cluster.options=[--hold]"]
    both = [Fork(tmp_path, *words) for _ in range(2)]
    outputs = [process.end() for process in both]
    for code, _, err in outputs:
        assert code == 0 or "is being worked on" in err, err
    jobs = [row["job"] for _, out, _ in outputs if out for row in json.loads(out)["arrays"]]
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
    node.wait(lambda: list(tmp_path.glob("runs/trainings/*/progress.json")), "it trains")
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
    study = write(tmp_path / "room.yaml", base=SLOW, axes={"train.steps": [600]}, plugins=[PLUGIN])
    (job,) = sweep.submit(study, *SLURM)
    node.wait(lambda: list(tmp_path.glob("runs/trainings/*/attempts.jsonl")), "it starts")
    folder = run_folder(tmp_path / "runs", "room", "600")
    node.wait(lambda: trains(folder, 1, 50), "it trains")
    other = node.submit("sleep 3", tmp_path / "other.log", "--partition=urgent", "--cpus-per-task=16", "--mem=1G")
    node.wait(lambda: sweep.states(study)["600"] == "preempted", "it makes room")
    (saved,) = (folder / "checkpoints").iterdir()
    assert 50 <= int(saved.stem[5:]) < 600
    assert node.ended(other) == ["COMPLETED"]
    sweep.until(node, 150, study, **{"600": "done"})
    assert node.ended(job) == ["COMPLETED"] and node.sacct(job, "State", "-D") == ["REQUEUED", "COMPLETED"]
    assert sweep.status(study)["600"]["requeued"] == 1 and trained_once(folder)
    (log,) = tmp_path.glob("runs/room/.sweep/0001/logs/*_log.out")
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
    node.wait(lambda: list(tmp_path.glob("runs/trainings/*/checkpoints/step-*")), "it trains")
    (tmp_path / "runs").rename(tmp_path / "away")
    assert node.ended(job) == ["FAILED"] and not (tmp_path / "runs").exists()
    (tmp_path / "away").rename(tmp_path / "runs")
    row = sweep.status(study)[str(STEPS)]
    assert row["state"] == "failed" and "did not see the folder of the submission" in row["error"], row
    (again,) = sweep.submit(study, action="retry")
    logs = tmp_path / "runs" / "gone" / ".sweep" / "0002" / "logs"
    node.wait(lambda: any("continuing at step" in log.read_text() for log in logs.glob("*_log.out")), "it goes on")
    sweep("cancel", study)
    assert node.ended(again) == ["CANCELLED by 0"]


def test_a_job_with_other_code_or_a_failing_setup_does_nothing(node, tmp_path, sweep):
    """A snapshot that is gone, one that was edited, and a module that is not there; then each is mended by a retry."""
    words = {"gone": [], "edited": [], "setup": ["cluster.setup=[date, module load nosuch]"]}
    jobs, studies = {}, {}
    for place, name in enumerate(words):
        base = {**BASE, "train.steps": 10, "train.lr": (1 + place) * 1e-3}
        studies[name] = write(tmp_path / f"{name}.yaml", variants={"one": {}}, base=base)
        (jobs[name],) = sweep.submit(studies[name], *SLURM, "cluster.options=[--hold]", *words[name])
    (code,) = (tmp_path / "runs" / "gone" / ".sweep" / "code").iterdir()
    code.rename(tmp_path / "away")
    (edited,) = (tmp_path / "runs" / "edited" / ".sweep" / "code").glob("*/lamabench/harness/training/ema.py")
    edited.write_text(edited.read_text() + "\n# edited\n")
    for job in jobs.values():
        node.run("scontrol", "release", job)
    errors = {
        "gone": (f"not the code that was submitted: {code}/lamabench is gone", "41:0"),
        "edited": (f"not the code that was submitted: {edited.parents[2]} has changed since", "41:0"),
        "setup": ("cluster.setup failed with exit code 127: module load nosuch", "58:0"),
    }
    for name, (error, exit_code) in errors.items():
        assert node.ended(jobs[name], 120) == ["FAILED"] and node.sacct(jobs[name], "ExitCode") == [exit_code]
        row = sweep.status(studies[name])["one"]
        assert (row["state"], row["error"]) == ("failed", error)
        assert not (run_folder(tmp_path / "runs", name, "one") / "attempts.jsonl").exists()
    retries = {"setup": ["cluster.setup=[]"]}
    again = [
        sweep.submit(path, "cluster.options=[]", *retries.get(name, []), action="retry")[0]
        for name, path in studies.items()
    ]
    assert [node.ended(job, 120) for job in again] == [["COMPLETED"]] * 3
    assert code.is_dir() and "# edited" not in edited.read_text()
