"""One run in several tasks of a SLURM job: stopped, queued again, killed, and gone on with on two nodes."""

import os
import signal
import time

import pytest
from lamabench.harness.disk import read_lines
from studies import PLUGIN, SLOW, SLURM, pids, progress, run_folder, same, trained_once, trains, write

STEPS = 300
BASE = {**SLOW, "train.steps": STEPS, "run.checkpoint_every": STEPS // 2}
TWO = (*SLURM, "cluster.tasks_per_node=2")
NAME = str(STEPS)


def logs(root, study):
    return sorted((root / study / ".sweep" / "0001" / "logs").glob("*_log.out"))


@pytest.mark.slurm
def test_two_tasks_of_a_run_are_stopped_and_go_on_bit_for_bit(node, tmp_path, sweep):
    """The notice before a time limit, after which the first task has the job queued again, and a preemption."""
    study, other = (
        write(tmp_path / f"{name}.yaml", base=BASE, axes={"train.steps": [STEPS]}, plugins=[PLUGIN])
        for name in ("twice", "whole")
    )
    (undisturbed,) = sweep.submit(other, *TWO, "run.root=undisturbed")
    (job,) = sweep.submit(study, *TWO)
    node.wait(lambda: list(tmp_path.glob("runs/trainings/*/attempts.jsonl")), "it starts", 120)
    folder, seen = run_folder(tmp_path / "runs", "twice", NAME), [0]
    for start, command in enumerate((["scancel", "--signal=USR2"], ["scontrol", "requeue"]), 1):
        node.wait(lambda start=start: trains(folder, start, seen[-1]), "a few steps", 120)
        seen.append(progress(folder))
        node.run(*command, f"{job}_0")
        node.wait(lambda: sweep.states(study)[NAME] == "preempted", "it waits again", 120)
        node.wait(lambda: sweep.states(study)[NAME] == "running", "it runs again", 120)
    sweep.until(node, 240, study, **{NAME: "done"})
    assert node.ended(job) == ["COMPLETED"]
    assert node.sacct(job, "State", "-D") == ["REQUEUED", "REQUEUED", "COMPLETED"]
    assert node.ended(undisturbed, 240) == ["COMPLETED"] and trained_once(folder)
    same(folder, run_folder(tmp_path / "undisturbed", "whole", NAME), STEPS)
    events = [line["event"] for line in read_lines(folder / "attempts.jsonl")]
    assert events == ["start", "stop", "start", "stop", "start", "end"]  # of the first task alone
    first, second = logs(tmp_path / "runs", "twice")
    assert first.read_text().count("rank=0 world_size=2") == 3 and "rank=1 world_size=2" in second.read_text()
    assert first.read_text().count("continuing at step") == 2 and "step" not in second.read_text()
    assert not list(tmp_path.glob("runs/twice/.sweep/0001/*.port"))


@pytest.mark.soak
def test_a_task_that_is_killed_ends_the_job_and_two_nodes_go_on(node, tmp_path, sweep):
    study = write(tmp_path / "killed.yaml", base=BASE, axes={"train.steps": [STEPS]}, plugins=[PLUGIN])
    (job,) = sweep.submit(study, *TWO)
    node.wait(lambda: list(tmp_path.glob("runs/trainings/*/attempts.jsonl")), "it starts", 120)
    folder = run_folder(tmp_path / "runs", "killed", NAME)
    node.wait(lambda: list(folder.glob("checkpoints/step-*")), "it has a checkpoint", 120)
    os.kill(pids(tmp_path)[1], signal.SIGKILL)
    killed = time.monotonic()
    assert node.ended(job) == ["FAILED"] and time.monotonic() - killed < 40
    row = sweep.status(study)[NAME]
    assert row["state"] == "failed" and row["error"].startswith("process 1 was killed (signal 9)"), row
    node.must("start", "second")
    more = ("cluster.nodes=2", "cluster.tasks_per_node=1", "cluster.partition=pair")
    (again,) = sweep.submit(study, *more, action="retry")
    assert node.ended(again, 240) == ["COMPLETED"]
    node.must("stop", "second")
    assert sweep.states(study) == {NAME: "done"} and trained_once(folder)
    text = next((tmp_path / "runs/killed/.sweep/0002/logs").glob("*_0_log.out")).read_text()
    assert f"continuing at step {STEPS // 2}" in text
