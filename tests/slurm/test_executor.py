"""submitit on a real SLURM through our executor: ranks, results and what came of a task."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import submitit
from lamabench.launch import worker
from lamabench.launch.slurm.cluster import ClusterConfig
from lamabench.launch.slurm.executor import SlurmExecutor
from submitit.core.utils import FailedJobError

pytestmark = pytest.mark.slurm
SMALL = ClusterConfig(cpus=1, time_min=5, mem_gb=1)


@pytest.mark.parametrize("nodes", [1, 2])
def test_every_task_knows_its_rank(node, tmp_path, nodes):
    """What torch.distributed reads, and the CPUs that srun would not take over by itself."""
    names = ("SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS", "SLURMD_NODENAME")
    cluster = replace(SMALL, cpus=2, nodes=nodes, tasks_per_node=2 // nodes)
    if nodes == 2:
        node.must("start", "second")
        cluster = replace(cluster, partition="pair")
    probe = lambda: {**worker.environment(), **{name: os.environ[name] for name in names}}  # noqa: E731  by value
    jobs = SlurmExecutor(tmp_path / "ranks", cluster, "ranks").submit_array([probe] * 2)
    array = jobs[0].job_id.split("_")[0]
    assert [job.job_id for job in jobs] == [f"{array}_0", f"{array}_1"] and set(node.ended(array)) == {"COMPLETED"}
    ports = []
    for job in jobs:
        rows = job.results()
        assert sorted(row["rank"] for row in rows) == ["0", "1"]
        assert len({row["SLURMD_NODENAME"] for row in rows}) == nodes
        assert sorted(row["local_rank"] for row in rows) == (["0", "1"] if nodes == 1 else ["0", "0"])
        assert {(row["world_size"], *(row[name] for name in names[:2])) for row in rows} == {("2", "2", "2")}
        (place,) = {(row["master_addr"], row["master_port"]) for row in rows}
        ports.append(place[1])
    assert ports[0] != ports[1]  # two tasks of an array may meet on one node
    if nodes == 2:
        node.must("stop", "second")


@pytest.mark.parametrize("name", ["plain", "sp ace,x=y 1'q", "100%1 #b"])
def test_submitit_finds_what_came_of_an_array_of_one(node, tmp_path, name):
    """By the folder and the id alone, in a folder of any name; a failure has its words and its exit code."""
    ids = []
    for place, call in enumerate((lambda: print("some words") or 7, lambda: 1 / 0, lambda: os._exit(28))):
        stem = tmp_path / name / str(place) / "array"
        stem.parent.mkdir(parents=True)
        (job,) = SlurmExecutor(stem, SMALL, f"one-{place}").submit_array([call])
        ids.append(job.job_id)
    good, bad, ended = (submitit.SlurmJob(tmp_path / name / str(place) / "logs", key) for place, key in enumerate(ids))
    assert [node.ended(key.split("_")[0]) for key in ids] == [["COMPLETED"], ["FAILED"], ["FAILED"]]
    assert good.result() == 7 and "some words" in good.paths.stdout.read_text()
    assert good.submission().function() == 7
    with pytest.raises(FailedJobError, match="ZeroDivisionError"):
        bad.result()
    assert "ZeroDivisionError" in bad.paths.stdout.read_text()  # both streams are one log
    node.wait(lambda: ended.done(force_check=True), "sacct knows")  # no result: it ended without one
    assert ended.state == "FAILED"
    assert node.sacct(ids[2].split("_")[0], "ExitCode") == ["28:0"]
    assert Path(ended.paths.stdout).is_file() and not list((tmp_path / name).glob("*/*_log.out"))


@pytest.mark.soak  # a minute of waiting
def test_a_task_waits_for_the_folder_of_its_submission(node, tmp_path):
    """A file system that is away for a moment, as the job starts; what stays away is told by the exit code."""
    job, gone = (
        SlurmExecutor(tmp_path / name / "array", replace(SMALL, options=["--hold"]), name).submit_array([lambda: 1])[0]
        for name in ("back", "gone")
    )
    pickles = [tmp_path / name / "array.pkl" for name in ("back", "gone")]
    for pickle in pickles:
        pickle.rename(pickle.with_suffix(".away"))
    for one in (job, gone):
        node.run("scontrol", "release", one.job_id.split("_")[0])
    node.wait(lambda: job.paths.stdout.exists() and "does not see" in job.paths.stdout.read_text(), "it waits")
    pickles[0].with_suffix(".away").rename(pickles[0])
    assert node.ended(job.job_id.split("_")[0]) == ["COMPLETED"] and job.result() == 1
    assert node.ended(gone.job_id.split("_")[0], 120) == ["FAILED"]
    assert node.sacct(gone.job_id.split("_")[0], "ExitCode") == ["116:0"]
