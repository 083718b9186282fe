"""Many short runs on a real SLURM, of which some are disturbed at random: none is lost, and none is done twice."""

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lamabench.ablations.study import load
from lamabench.harness.disk import read_lines
from lamabench.harness.progress import Progress
from lamabench.harness.stages import execute
from lamabench.launch.plan import pieces, plan
from studies import SLURM, same, trained_once, write

STEPS = 60
PLUGIN = str(Path(__file__).with_name("tiny.py"))
STARTED = "checkpoints/step-*.safetensors"  # a run has saved itself at least once


def study(folder, count):
    """A study of `count` trainings of a second each, of 16 images."""
    numbers = np.random.default_rng(0)
    images = numbers.integers(0, 256, (16, 4, 4, 1), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.arange(16) % 2)
    base = {"model": "tiny", "data": "npz", "data.path": str(folder / "images.npz"), "data.size": 4}
    base |= {"data.channels": 1, "data.num_classes": 2, "train.batch_size": 4, "train.precision": "float32"}
    base |= {"train.steps": STEPS, "run.device": "cpu", "run.checkpoint_every": 20, "run.log_every": 7}
    rates = [(1 + place) * 1e-4 for place in range(count)]
    return write(folder / "soak.yaml", base=base, plugins=[PLUGIN], axes={"train.lr": rates})


def undisturbed(folder, path):
    """The folders of the same runs, done one after the other in this process, by name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a job has
    each = pieces(plan(load(path), [f"run.root={folder}"]))
    for piece in each:
        execute(piece.task, Progress(piece.folder, every=60))
    torch.set_num_threads(threads)
    return {piece.run: piece.folder for piece in each}


def running(node, job):
    """The tasks of an array that run, as JOB_TASK."""
    return node.run("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i", "-j", job).split()


def kill(folder):
    """Kill the process of a run without a word."""
    try:
        os.kill(int((folder / ".lock").read_text()), signal.SIGKILL)
    except (OSError, ValueError):  # it ended meanwhile
        return False
    return True


def disturb(node, rng, job, kind, folders, left):
    """Disturb a random one of the tasks `left` that run and have saved a checkpoint; its number, or None."""
    tasks = {key: int(key.split("_")[1]) for key in running(node, job)}
    saved = [key for key, task in tasks.items() if task in left and any(folders[task].glob(STARTED))]
    if not saved:
        return None
    key = rng.choice(saved)
    if kind == "kill" and not kill(folders[tasks[key]]):
        return None
    if kind != "kill":
        node.run(*{"requeue": ("scontrol", "requeue"), "scancel": ("scancel",)}[kind], key)
    return tasks[key]


def drain(node):
    """For a while what runs goes on, and nothing starts."""
    name = node.run("sinfo", "--noheader", "--partition=test", "--format=%N")
    node.run("scontrol", "update", f"nodename={name}", "state=drain", "reason=test")
    time.sleep(3)
    node.run("scontrol", "update", f"nodename={name}", "state=resume")


def soak(node, folder, sweep, count, groups, seconds):
    """Submit `count` runs, disturb four for each of the `groups`, and retry once."""
    path, rng = study(folder, count), random.Random(count)
    each = pieces(plan(load(path), [f"run.root={folder / 'runs'}"]))
    (job,) = sweep.submit(path, *SLURM, "--parallel", "8")
    kinds = [kind for _ in range(groups) for kind in ("kill", "kill", "requeue", "scancel")]
    rng.shuffle(kinds)
    left = set(range(count))
    for place, kind in enumerate(kinds):
        if place == len(kinds) // 2:
            drain(node)
        end = time.monotonic() + 60
        while (task := disturb(node, rng, job, kind, [piece.folder for piece in each], left)) is None:
            assert time.monotonic() < end and node.queued(job), f"nothing is left for {kind}"
            time.sleep(rng.uniform(0, 0.3))
        left.remove(task)
        time.sleep(rng.uniform(0, 0.5))
    theirs = undisturbed(folder / "whole", path)
    node.ended(job, seconds)

    states = sweep.states(path)
    lost = [state for state in states.values() if state != "done"]
    assert len(states) == count and set(lost) <= {"failed", "cancelled"} and len(lost) <= 3 * len(kinds) // 4, states
    if lost:
        (again,) = sweep.submit(path, action="retry")
        node.ended(again, seconds)
    assert set(sweep.states(path).values()) == {"done"}
    starts = []
    for piece in each:
        assert trained_once(piece.folder), piece.run
        same(piece.folder, theirs[piece.run], STEPS)
        lines = read_lines(piece.folder / "attempts.jsonl")
        assert {line["error"] for line in lines if line["event"] == "end"} == {None}, piece.run
        starts.append(sum(line["event"] == "start" for line in lines))
    assert starts.count(1) + starts.count(2) == count and len(lost) <= starts.count(2) <= len(kinds), starts


@pytest.mark.soak  # test_queue.py and test_sweep.py disturb runs one by one
def test_of_twenty_runs_a_fifth_is_disturbed(node, tmp_path, sweep):
    soak(node, tmp_path, sweep, 20, 1, 120)


@pytest.mark.soak
def test_of_two_hundred_runs_a_tenth_is_disturbed(node, tmp_path, sweep):
    soak(node, tmp_path, sweep, 200, 5, 900)
