"""Stages that ask for resources of their own, on a real SLURM: jobs that come one after the other."""

import os
import re
import signal

import pytest
from lamabench.harness.disk import read_lines
from studies import BASE, SLURM, done, pids, tasks, write

pytestmark = pytest.mark.slurm
STAGED = {"cluster": {"stage": {"evaluate": {"mem_gb": 2}}}}
SCORED = {**BASE, **STAGED, "train.steps": 20, "sample.count": 8, "sample.method": "ddim", "sample.steps": 2,
          "evaluate.metrics": ["fd"], "evaluate.reference_count": 16, "run.root": "runs"}  # fmt: skip
STUDY = {"axes": {"train.lr": [1e-3, 2e-3]}, "stages": ["train", "sample", "evaluate"]}


def facts(node, job):
    """What SLURM notes of the tasks of an array: the memory of a node, and what it waits for."""
    lines = node.run("scontrol", "show", "job", "--oneliner", job).splitlines()
    find = lambda name: {match[1] for line in lines if (match := re.search(rf"\b{name}=(\S+)", line))}  # noqa: E731
    return find("MinMemoryNode"), find("Dependency")


def test_each_score_has_a_job_of_its_own_after_that_of_its_samples(node, tmp_path, sweep):
    study = write(tmp_path / "staged.yaml", base=SCORED, **STUDY)
    out = sweep("plan", study, *SLURM)
    assert "asked for: 6 jobs, 0 GPU-hours and 6 CPU-hours" in out and "evaluate: 2 jobs, 0 GPU-hours and 2 CPU" in out
    assert "array 1, after array 0:" in out and "array 2, each task after that of array 1:" in out
    first, second, third = sweep.submit(study, *SLURM, "cluster.options=[--hold]")
    assert [[kind for kind, _ in array] for array in tasks(tmp_path / "runs", "staged")] == [
        ["training"] * 2, ["samples"] * 2, ["samples"] * 2
    ]  # fmt: skip
    assert facts(node, third) == ({"2G"}, {f"aftercorr:{second}_*(unfulfilled)"})
    assert facts(node, second)[0] == {"1G"} and sweep.submit(study, *SLURM) == []
    assert set(sweep.states(study).values()) == {"queued"}
    for job in (first, second, third):
        node.run("scontrol", "release", job)
    sweep.until(node, 120, study, **{"0.001": "done", "0.002": "done"})
    assert [node.ended(job, tasks=2) for job in (first, second, third)] == [["COMPLETED"] * 2] * 3
    for _, folder in tasks(tmp_path / "runs", "staged")[2]:
        assert len(done(folder, "sample")) == len(done(folder, "score")) == 1
        starts = [line["job"] for line in read_lines(folder / "attempts.jsonl") if line["event"] == "start"]
        assert [job.split("_")[0] for job in starts] == [second, third]

    # Another metric, of which only the stage that computes it is queued.
    write(tmp_path / "staged.yaml", base={**SCORED, "evaluate.metrics": ["fd", "prc"]}, **STUDY)
    (fourth,) = sweep.submit(study, *SLURM)
    assert facts(node, fourth)[0] == {"2G"} and node.ended(fourth, 120, tasks=2) == ["COMPLETED"] * 2
    assert set(sweep.states(study).values()) == {"done"}


def test_a_failed_job_ends_the_job_that_waits_for_it_and_status_tells_of_the_failure(node, tmp_path, sweep):
    """The training fails, so that its samples cannot be drawn, and SLURM cancels the job of their scores."""
    base = {**SCORED, "run.device": "cuda"}
    study = write(tmp_path / "fails.yaml", base=base, variants={"one": {}}, stages=STUDY["stages"])
    jobs = sweep.submit(study, *SLURM)
    assert [node.ended(job) for job in jobs] == [["FAILED"], ["FAILED"], ["CANCELLED"]]
    (row,) = sweep.status(study).values()
    assert row["state"] == "failed" and row["job"] == f"{jobs[0]}_0" and "no GPU here" in row["error"]
    assert row["to do"] == "train sample evaluate"
    again = sweep.submit(study, "run.device=cpu", action="retry")
    assert len(again) == 3 and facts(node, again[2])[0] == {"2G"}  # as last time
    assert [node.ended(job, 120) for job in again] == [["COMPLETED"]] * 3
    assert set(sweep.states(study).values()) == {"done"}


def test_samples_that_are_preempted_keep_their_scores_waiting_and_cancel_ends_both(node, tmp_path, sweep):
    base = {**SCORED, "sample.count": 64, "sample.method": "ancestral", "sample.steps": 150, "sample.batch_size": 4}
    study = write(tmp_path / "long.yaml", base=base, variants={"one": {}}, stages=["train", "sample", "evaluate"])
    train, sample, score = sweep.submit(study, *SLURM)
    folder = tasks(tmp_path / "runs", "long")[1][0][1]
    drawn = lambda: len(list(folder.glob("shards/*/*.npy")))  # noqa: E731
    node.wait(lambda: drawn() > 1, "a few batches", 120)
    assert sweep.states(study) == {"one": "running"}
    node.run("scontrol", "requeue", f"{sample}_0")
    node.wait(lambda: sweep.states(study) == {"one": "preempted"}, "it waits again")
    kept = drawn()
    node.wait(lambda: drawn() > kept, "it goes on", 120)
    assert facts(node, score)[1] == {f"aftercorr:{sample}_*(unfulfilled)"}
    out = sweep("cancel", study)
    assert sample in out and score in out and train not in out.replace(sample, "").replace(score, "")
    assert node.ended(sample) + node.ended(score) == ["CANCELLED"] * 2 or node.sacct(score, "State") == [
        "CANCELLED by 0"
    ]
    row = sweep.status(study)["one"]
    assert row["state"] == "cancelled" and row["job"] == f"{sample}_0" and row["to do"] == "sample evaluate"
    assert len(sweep.submit(study, action="retry")) == 2
    sweep.until(node, 240, study, one="done")


@pytest.mark.soak
def test_the_tasks_of_a_job_draw_together_and_the_first_one_scores(node, tmp_path, sweep):
    base = {**SCORED, "cluster.tasks_per_node": 2, "sample.count": 200, "sample.batch_size": 2, "sample.steps": 20}
    study = write(tmp_path / "two.yaml", base=base, variants={"one": {}}, stages=["train", "sample", "evaluate"])
    _, sample, score = sweep.submit(study, *SLURM)
    folder = tasks(tmp_path / "runs", "two")[1][0][1]
    node.wait(lambda: len(list(folder.glob("shards/*/*.npy"))) > 4, "a few batches", 120)
    os.kill(pids(tmp_path)[1], signal.SIGKILL)
    assert node.ended(sample) == ["FAILED"] and node.ended(score) == ["CANCELLED"]
    row = sweep.status(study)["one"]
    assert row["state"] == "failed" and row["error"].startswith("process 1 was killed (signal 9)"), row
    assert len(sweep.submit(study, action="retry")) == 2
    sweep.until(node, 240, study, one="done")
    assert done(folder, "sample")[0].processes >= 3 and len(done(folder, "score")) == 1
    logs = [path.read_text() for path in sorted((tmp_path / "runs" / "two" / ".sweep" / "0002" / "logs").glob("*.out"))]
    assert len(logs) == 4 and sum("sample" in text and "200" in text for text in logs) == 1
