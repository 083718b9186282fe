"""Folders of tasks as jobs leave them, written without doing the work; commands as a terminal starts them."""

import os
import signal
from contextlib import suppress

import pytest
from lamabench.ablations.study import Study
from lamabench.harness import stages
from lamabench.harness.disk import append
from lamabench.harness.keys import config_from_dict, score_key, speed_key
from lamabench.harness.record import row
from lamabench.harness.sections import BenchConfig
from processes import forked_jobs, starting

SMALL = {"model": "dit_nano", "model.depth": 1, "model.hidden_size": 16, "model.num_heads": 2, "data": "digits"}
SMALL |= {"data.size": 8, "train.batch_size": 4, "train.precision": "float32", "train.steps": 4, "sample.count": 5}
SMALL |= {"evaluate.metrics": ["fd"], "evaluate.reference_count": 5, "bench.batch_size": 2}
ONE = {"model": ["dit_nano"]}
DEVICE = {"device": "GPU A"}


@pytest.fixture(scope="session")
def start():
    """Starts runs of several processes."""
    with starting() as run:
        yield run


@pytest.fixture
def jobs(start):
    """Jobs of `sweep run` in this process start soon."""
    with forked_jobs(start):
        yield


@pytest.fixture
def terminal(start):
    """Starts commands in sessions of their own, with no signal ignored, even if the tests run below nohup or `&`. What
    is left of them ends with the test."""
    commands = []

    def run(folder, *words, **environment):
        commands.append(start.alone(folder, *words, **environment))
        return commands[-1]

    yield run
    for command in commands:
        with suppress(ProcessLookupError):
            os.killpg(command.pids[0], signal.SIGKILL)


@pytest.fixture
def study(tmp_path):
    """Builds a study of one run, or a variation of it with other axes or settings."""

    def build(axes=ONE, stages=("cost", "train", "sample", "evaluate", "bench"), seeds=(0,), **more):
        base = {**SMALL, "run.root": str(tmp_path), **{key.replace("__", "."): value for key, value in more.items()}}
        return Study("s", "?", base=base, axes=dict(axes), stages=list(stages), seeds=list(seeds))

    return build


def files(folder, name, *steps, size=0):
    """Files of weights or checkpoints."""
    (folder / name).mkdir(exist_ok=True)
    for step in steps:
        (folder / name / f"step-{step:08d}.safetensors").write_bytes(bytes(size))


@pytest.fixture
def finish():
    """Pretends to do a task: writes the rows of its stages, or of some of them, and the weights of its moments."""

    def write_results(task, *some, **values):
        folder = stages.prepare(task)
        config = config_from_dict(task.config)

        def note(kind, key, **fields):
            line = row(kind, key=key, provenance=DEVICE, **{**fields, **values})
            append(folder / "record.jsonl", line.as_dict())

        for stage in some or task.stages:
            if stage == "cost":
                note("cost", task.key, params=1, macs=1, flops=1, parts={})
            if stage == "train":
                steps = config.train.steps
                note("train", task.key, steps=steps, images=steps, seconds=7200.0, final_loss=1.0, batch_size=1)
                append(folder / "metrics.jsonl", {"step": steps, "seconds": 7200.0})
                files(folder, "weights", *task.moments)
                files(folder, "checkpoints", steps, size=1000)
            if stage == "sample":
                note("sample", task.key, count=1, method="ddim", steps=1, guidance=1.0, checkpoint_step=task.step)
            for metric in task.metrics if stage == "evaluate" else ():
                note("score", score_key(config, task.key, metric), metric=metric, value=1.0, count=1, protocol="p")
            for plan in task.plans if stage == "bench" else ():
                settings = BenchConfig(**plan["bench"])
                for mode in settings.modes:
                    fields = {"input_size": config.model.input_size, "mode": mode, "checkpointing": False}
                    fields |= {"compile": "eager", "precision": settings.precision}
                    fields |= {"batch_size": settings.batch_size[0], "images_per_s": 10.0}
                    note("speed", speed_key(config.model, fields, config.backend, "GPU A"), **fields)
        return folder

    return write_results


@pytest.fixture
def fail():
    """Writes the record of a stage that failed."""

    def write_failure(task, stage, state="failed", error="why"):
        folder = stages.prepare(task)
        for line in stages._failure(task, config_from_dict(task.config), stage, RuntimeError(error)):
            stages.write(folder, {**line, "state": state, "error": error})
        return folder

    return write_failure
