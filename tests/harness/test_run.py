"""Records, identities and stages: the same run twice is one run, and what went wrong is written down."""

import errno
import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from lamabench.baselines.dit import DiTConfig
from lamabench.harness import run as runs
from lamabench.harness.config import (
    BenchConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    RunConfig,
    SampleConfig,
    TrainConfig,
)
from lamabench.harness.progress import Progress
from lamabench.harness.random import Stream, generator
from lamabench.harness.record import RecordError, append, identity, read_lines, read_run, read_runs, write_atomically
from lamabench.harness.training import checkpoint
from lamabench.kernels.errors import InputError

DIT = DiTConfig(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=16, depth=1, num_heads=2)


def make(root, **sample):
    return Config(
        model=DIT,
        data=DataConfig(kind="digits", size=8, channels=1, num_classes=10),
        train=TrainConfig(steps=4, batch_size=4, ema_decay=0.5, precision="float32"),
        sample=SampleConfig(**{"count": 10, "method": "ddim", "steps": 4, "batch_size": 4, **sample}),
        evaluate=EvaluateConfig(metrics=["fd"]),
        bench=BenchConfig(batch_size=2, repeats=3, warmup=1, precision="float32"),
        run=RunConfig(root=str(root), device="cpu", log_every=2, checkpoint_every=2),
    )


def create(config, name="t"):
    info = runs.describe(config, study="s", name=name, model="dit_nano", variant={"model": "dit_nano"}, overrides=[])
    return runs.create(info)


def test_configuration_survives_the_file(tmp_path):
    config = make(tmp_path)
    folder = create(config)
    assert runs.config_from_dict(json.loads((folder / "config.json").read_text())["config"]) == config


def test_identity_leaves_out_paths_and_workers_alone(tmp_path):
    config = make(tmp_path)
    same = [
        replace(config, run=RunConfig(root="elsewhere", workers=3, log_every=7)),
        replace(config, data=replace(config.data, path="/data")),
    ]
    other = [
        replace(config, seed=1),
        replace(config, data=replace(config.data, name="mine")),
        replace(config, model=replace(DIT, depth=2)),
        replace(config, train=replace(config.train, lr=2e-4)),
        replace(config, sample=replace(config.sample, guidance=2.0)),
    ]

    def name(c):
        return identity(runs.config_to_dict(c))

    assert {name(c) for c in same} == {name(config)}
    assert len({name(c) for c in [config, *other]}) == len(other) + 1


def test_identity_does_not_depend_on_the_order_of_keys():
    assert identity({"a": 1, "b": {"c": 2, "d": 3}}) == identity({"b": {"d": 3, "c": 2}, "a": 1})


def test_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "record.jsonl"
    append(path, {"a": 1})
    with open(path, "a") as file:
        file.write('{"b": ')
    assert read_lines(path) == [{"a": 1}]
    append(path, {"c": 3})
    assert read_lines(path) == [{"a": 1}, {"c": 3}]


def test_damaged_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "record.jsonl"
    path.write_text('{"a": 1}\nnonsense\n{"b": 2}\n')
    with pytest.raises(RecordError, match=r"record\.jsonl line 2 is not JSON"):
        read_lines(path)


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomically(path, b"old")
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_nothing_makes_the_folder_of_a_run_anew(tmp_path):
    """A shared folder that went away, perhaps for a moment: a run that went on elsewhere would have two homes."""
    away = tmp_path / "study" / "run"
    with pytest.raises(FileNotFoundError):
        append(away / "record.jsonl", {"a": 1})
    with pytest.raises(FileNotFoundError):
        write_atomically(away / "samples.npz", b"new")
    with pytest.raises(FileNotFoundError):
        checkpoint.save(away / "checkpoints", checkpoint.Checkpoint(1, 0.0, {}, "", {"x": torch.zeros(1)}))
    assert not list(tmp_path.iterdir())


def test_read_runs_refuses_folders_without_runs(tmp_path):
    (tmp_path / "records.jsonl").touch()
    with pytest.raises(RecordError, match="is a file: name folders of runs"):
        read_runs([tmp_path / "records.jsonl"])
    (tmp_path / "records.jsonl").unlink()
    with pytest.raises(RecordError, match="no such folder"):
        read_runs([tmp_path / "nothing"])
    with pytest.raises(RecordError, match="holds no run"):
        read_runs([tmp_path])


def test_all_stages_once(tmp_path, monkeypatch):
    def score(samples, *_):
        return [{"metric": "m", "value": float(len(np.load(samples)["images"]))}]

    monkeypatch.setattr(runs, "score", score)
    folder = create(make(tmp_path))
    runs.execute(folder, runs.STAGES, Progress())
    run = read_run(folder)
    assert [line["kind"] for line in run.records] == ["cost", "train", "sample", "evaluate", "bench", "bench"]
    assert run.last("evaluate")["rows"] == [{"metric": "m", "value": 10.0}]
    assert run.last("train")["steps"] == 4 and run.last("cost")["params"] > 0
    assert [line["mode"] for line in run.records[-2:]] == ["forward", "train"]
    for line in run.records:
        assert line["state"] == "done" and {"commit", "device", "torch"} <= line["provenance"].keys()
    before = (folder / "record.jsonl").read_bytes()
    runs.execute(folder, runs.STAGES, Progress())
    assert (folder / "record.jsonl").read_bytes() == before


def test_failed_stage_is_a_record_and_is_done_again(tmp_path, monkeypatch):
    folder = create(make(tmp_path))

    def crash(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with monkeypatch.context() as patch, pytest.raises(torch.cuda.OutOfMemoryError):
        patch.setattr(runs, "train", crash)
        runs.execute(folder, ["cost", "train"], Progress())
    record = read_run(folder).last("train")
    assert record["state"] == "oom" and "Tried to allocate 2 GiB; it passed 4 images" in record["error"]
    assert runs.missing_stages(read_run(folder), ["cost", "train"]) == ["train"]
    runs.execute(folder, ["train"], Progress())
    assert read_run(folder).last("train")["state"] == "done"


def test_two_processes_do_not_work_on_one_run(tmp_path):
    folder = create(make(tmp_path))
    code = (
        "import sys, time; from pathlib import Path; from lamabench.harness.run import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert runs.is_locked(folder)
        with pytest.raises(runs.Busy, match=f"being worked on by process {other.pid}"):
            runs.execute(folder, ["cost"], Progress())
    finally:
        other.kill()
        other.wait()
    deadline = time.monotonic() + 10
    while runs.is_locked(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    runs.execute(folder, ["cost"], Progress())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_refused_in_words(tmp_path, monkeypatch, number):
    """As Lustre mounted without -o flock, or NFS without its lock daemon."""
    folder = create(make(tmp_path))

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(InputError, match=r"file system of .*/\.lock has no locks \(.*\).*: give a run\.root on one"):
        runs.execute(folder, ["cost"], Progress())
    with pytest.raises(InputError, match="has no locks"):
        runs.is_locked(folder)


def test_sampling_needs_a_checkpoint(tmp_path):
    folder = create(make(tmp_path))
    with pytest.raises(InputError, match="holds no whole checkpoint"):
        runs.execute(folder, ["sample"], Progress())
    assert not (folder / "samples.npz").exists() and not (folder / "samples.parts").exists()


def test_noise_streams_do_not_meet():
    draws = {
        (seed, stream, index): tuple(generator(seed, stream, index).integers(0, 2**63, 4))
        for seed in (0, 1)
        for stream in Stream
        for index in (0, 1, 2**40)
    }
    assert len(set(draws.values())) == len(draws)
    assert draws[0, Stream.TRAIN, 1] == tuple(generator(0, Stream.TRAIN, 1).integers(0, 2**63, 4))
