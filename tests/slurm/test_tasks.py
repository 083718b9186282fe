"""Studies of several stages on a real SLURM: a task a training, then a task a set of samples, shared by studies."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from lamabench.harness.disk import read_lines
from lamabench.harness.keys import config_from_dict
from lamabench.harness.progress import Progress
from lamabench.harness.run import read_run
from lamabench.harness.sampling import generate
from lamabench.harness.shards import Shards
from studies import BASE, SLURM, Fork, done, run_folder, tasks, trained_once, write

pytestmark = pytest.mark.slurm
ONE = {"variants": {"one": {}}}
HELD = "cluster.options=[--hold]"
SAMPLED = {**BASE, "train.steps": 20, "sample.count": 8, "sample.method": "ddim", "sample.steps": 2}
SCORED = {**SAMPLED, "evaluate.metrics": ["fd"], "evaluate.reference_count": 16}


def kinds(arrays):
    return [[kind for kind, _ in array] for array in arrays]


def waits_for(node, job):
    """The jobs that end before this one starts, as SLURM lists them; an array without tasks: all of them."""
    lines = node.run("scontrol", "show", "job", "--oneliner", job).splitlines()
    (listed,) = {re.search(r"Dependency=(\S+)", line)[1] for line in lines}
    return {part.removeprefix("afterany:").split("(")[0] for part in listed.split(",") if part != "(null)"}


def test_samples_with_their_scores_come_after_the_trainings(node, tmp_path, sweep):
    """Two trainings, a set of samples of each; then a metric is added, which trains and samples nothing."""
    study = {"axes": {"train.lr": [1e-3, 2e-3]}, "stages": ["train", "sample", "evaluate"]}
    path = write(tmp_path / "whole.yaml", base=SCORED, **study)
    first, second = sweep.submit(path, *SLURM, HELD)
    trainings, samples = tasks(tmp_path / "runs", "whole")
    assert kinds([trainings, samples]) == [["training"] * 2, ["samples"] * 2]
    assert waits_for(node, first) == set() and waits_for(node, second) == {f"{first}_*"}
    assert set(sweep.states(path).values()) == {"queued"} and sweep.submit(path, *SLURM) == []
    for job in (first, second):
        node.run("scontrol", "release", job)
    sweep.until(node, 120, path, **{"0.001": "done", "0.002": "done"})
    assert node.ended(first) + node.ended(second) == ["COMPLETED"] * 4
    assert max(node.sacct(first, "End")) <= min(node.sacct(second, "Start"))

    edited = {**SCORED, "evaluate.metrics": ["fd", "prc"]}
    write(tmp_path / "whole.yaml", base=edited, **study)
    assert set(sweep.states(path).values()) == {"planned"}
    (third,) = sweep.submit(path, *SLURM)
    assert tasks(tmp_path / "runs", "whole", 2) == [samples]
    assert node.ended(third, 120) == ["COMPLETED"] * 2 and set(sweep.states(path).values()) == {"done"}
    assert all(trained_once(folder) for _, folder in trainings)
    for _, folder in samples:
        assert len(done(folder, "sample")) == 1
        assert sorted(row.metric.split("-")[0] for row in done(folder, "score")) == ["FD", "precision", "recall"]
    lines = json.loads(sweep("collect", path, "--json"))
    assert lines["missing"] == [] and lines["records"] == 2 * (1 + 1 + 3)


def test_a_training_that_another_study_queued_is_waited_for(node, tmp_path, sweep):
    """Three more studies below the root: samples of its end, the very same ones, and twice its steps, with samples of
    the moment at which the shorter one ends."""
    short = write(tmp_path / "short.yaml", **ONE, base={**BASE, "train.steps": 20})
    guided = write(
        tmp_path / "guided.yaml", **ONE, base={**SAMPLED, "sample.guidance": 2.0}, stages=["train", "sample"]
    )
    same = write(tmp_path / "same.yaml", **ONE, base={**SAMPLED, "sample.guidance": 2.0}, stages=["train", "sample"])
    longer = {**SAMPLED, "train.steps": 40, "sample.at": [20, 40]}
    long = write(tmp_path / "long.yaml", **ONE, base=longer, stages=["train", "sample"])
    (first,) = sweep.submit(short, *SLURM, HELD)
    (sampled,) = sweep.submit(guided, *SLURM)
    further, moments = sweep.submit(long, *SLURM)
    runs = tmp_path / "runs"
    assert sweep.submit(same, *SLURM) == [] and set(sweep.states(same).values()) == {"queued"}
    assert [kinds(tasks(runs, name)) for name in ("short", "guided", "long")] == [
        [["training"]], [["samples"]], [["training"], ["samples", "samples"]]
    ]  # fmt: skip
    assert waits_for(node, sampled) == waits_for(node, further) == {f"{first}_0"}
    assert waits_for(node, moments) == {f"{further}_*"}
    node.run("scontrol", "release", first)
    jobs = (first, sampled, further, moments)
    assert [set(node.ended(job, 120)) for job in jobs] == [{"COMPLETED"}] * 4
    assert all(set(sweep.states(study).values()) == {"done"} for study in (short, guided, same, long))
    (folder,) = (runs / "trainings").iterdir()
    assert [row.steps for row in done(folder, "train")] == [20, 40]
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")][-1] == 40
    (log,) = (runs / "long" / ".sweep" / "0001" / "logs").glob(f"{further}_*_log.out")
    assert "continuing at step 20 of 40" in log.read_text()
    samples = [done(path, "sample") for path in (folder / "samples").iterdir()]
    assert sorted(row.checkpoint_step for (row,) in samples) == [20, 20, 40]


@pytest.mark.soak  # test_stages.py does the same with a job of their scores
def test_samples_of_a_training_that_failed_are_done_with_it_again(node, tmp_path, sweep):
    study = write(tmp_path / "fails.yaml", **ONE, base={**SAMPLED, "run.device": "cuda"}, stages=["train", "sample"])
    first, second = sweep.submit(study, *SLURM)
    assert node.ended(first) + node.ended(second) == ["FAILED"] * 2
    (row,) = sweep.status(study).values()
    assert row["state"] == "failed" and row["job"] == f"{first}_0" and "no GPU here" in row["error"]
    assert row["to do"] == "train sample"
    again = sweep.submit(study, "run.device=cpu", action="retry")
    assert kinds(tasks(tmp_path / "runs", "fails", 2)) == [["training"], ["samples"]]
    assert [node.ended(job) for job in again] == [["COMPLETED"]] * 2
    assert set(sweep.states(study).values()) == {"done"}


def test_samples_that_were_stopped_go_on_bit_for_bit(node, tmp_path, sweep):
    base = {**SAMPLED, "sample.count": 48, "sample.method": "ancestral", "sample.steps": 150, "sample.batch_size": 4}
    study = write(tmp_path / "drawn.yaml", **ONE, base=base, stages=["train", "sample"])
    _, job = sweep.submit(study, *SLURM)
    ((_, folder),) = tasks(tmp_path / "runs", "drawn")[1]
    parts = lambda: sorted(folder.glob("shards/*/*.npy"))  # noqa: E731
    node.wait(lambda: len(parts()) > 2, "a few batches")
    node.run("scontrol", "requeue", f"{job}_0")
    node.wait(lambda: set(sweep.states(study).values()) == {"preempted"}, "it waits again")
    kept = {path: path.stat().st_mtime_ns for path in parts()}
    assert 2 < len(kept) < 12
    node.wait(lambda: len(parts()) > len(kept), "it goes on", 90)
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in parts()}.items()
    assert node.ended(job) == ["COMPLETED"] and len(done(folder, "sample")) == 1
    info = read_run(folder).info
    (out := tmp_path / "out").mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the job has
    generate(out, Path(info["training"]), config_from_dict(info["config"]), info["step"], Progress(out))
    torch.set_num_threads(threads)
    ours, theirs = (Shards(next(path.glob("shards/*"))) for path in (folder, out))
    assert len(ours) == len(theirs) == 48 and np.array_equal(ours[:], theirs[:])


MIXER = """
from dataclasses import dataclass

from lamabench.models import Mixer, register_mixer
from torch import nn


@register_mixer("plain")
@dataclass
class Plain(Mixer):
    def build(self, dim, side, shift):
        return nn.Linear(dim, dim)
"""


def test_jobs_run_the_plugins_that_were_submitted(node, tmp_path):
    """A file that is edited, then gone, while its jobs wait."""
    (plugin := tmp_path / "mine.py").write_text(MIXER)
    base = {key: value for key, value in SAMPLED.items() if not key.startswith("model")}
    base |= {"model": "lamamba_nano", "model.mixers": ["plain"]}
    study = write(tmp_path / "own.yaml", **ONE, base=base, plugins=["mine.py"], stages=["train", "sample"])

    def command(*words):
        code, out, err = Fork(tmp_path, "sweep", *words, "--json", PYTHONPATH="").end()
        assert code == 0, err
        return json.loads(out)

    jobs = [array["job"] for array in command("submit", study, *SLURM, "--dirty", HELD)["arrays"]]
    (row,) = command("status", study)
    plugin.write_text("raise RuntimeError('edited')\n")
    node.run("scontrol", "release", jobs[0])
    assert node.ended(jobs[0]) == ["COMPLETED"]
    plugin.unlink()
    node.run("scontrol", "release", jobs[1])
    assert node.ended(jobs[1]) == ["COMPLETED"]
    plugin.write_text(MIXER)
    (row,) = command("status", study)
    assert row["state"] == "done"
    training = run_folder(tmp_path / "runs", "own", row["run"])
    digest = subprocess.run(["sha256sum", plugin], capture_output=True, text=True, check=True).stdout.split()[0]
    (samples,) = (training / "samples").iterdir()
    for folder, kind in ((training, "train"), (samples, "sample")):
        (record,) = done(folder, kind)
        assert record.provenance["plugins"] == {"mine": digest}
