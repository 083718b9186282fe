"""The worker: one task of a manifest, in whatever executor; stopping, going on, and being queued again."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import submitit
from lamabench.ablations.study import Study
from lamabench.harness import provenance, signals
from lamabench.harness.disk import read_lines
from lamabench.harness.progress import Progress
from lamabench.harness.run import read_run
from lamabench.harness.shards import joined
from lamabench.harness.stages import execute
from lamabench.kernels.errors import InputError
from lamabench.launch import worker
from lamabench.launch.plan import pieces, plan
from lamabench.launch.slurm import client
from lamabench.launch.slurm.cluster import ClusterConfig
from lamabench.launch.slurm.jobs import entry
from lamabench.launch.slurm.snapshot import other_code
from lamabench.launch.worker import Attempt, requeue
from safetensors.torch import load_file

SMALL = {"model": "dit_nano", "model.depth": 1, "model.hidden_size": 16, "model.num_heads": 2, "data": "digits",
         "data.size": 8, "train.batch_size": 4, "train.precision": "float32", "run.device": "cpu"}  # fmt: skip


def study(root, axes, **more):
    return Study("s", "?", base={**SMALL, "run.root": str(root), **more}, axes=axes, stages=["train"])


def training(root, **more):
    """The task of one run."""
    (piece,) = pieces(plan(study(root, {"train.lr": [1e-3]}, **more)))
    return piece


def manifest(piece, folder, **cluster):
    """A manifest of one array of one task."""
    array = {"cluster": asdict(ClusterConfig(**cluster)), "tasks": [entry(piece)]}
    (folder / "manifest.json").write_text(json.dumps({"arrays": [array]}))
    return str(folder / "manifest.json")


def test_the_debug_executor_does_a_task_in_this_process(tmp_path):
    """It leaves the signal handlers and the environment as they were."""
    run = training(tmp_path, **{"train.steps": 3})
    before, signals_here = dict(os.environ), []
    handler = signal.signal(signal.SIGTERM, lambda number, _: signals_here.append(number))
    try:
        job = submitit.DebugExecutor(tmp_path).submit(worker.work, manifest(run, tmp_path), 0)
        assert not run.folder.exists() and job.results() == [None]
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals_here == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert read_run(run.folder).last("train").state == "done" and dict(os.environ) == before
    start, end = read_lines(run.folder / "attempts.jsonl")
    assert (start["event"], start["records"], end["event"], end["error"]) == ("start", 0, "end", None)
    assert start["job"] == end["job"] == job.job_id


def test_a_task_that_fails_in_this_process_raises_its_own_error(tmp_path, monkeypatch):
    run = training(tmp_path, **{"run.device": "nothing:0"})
    job = submitit.DebugExecutor(tmp_path).submit(worker.work, manifest(run, tmp_path), 0)
    monkeypatch.setenv("SUBMITIT_DEBUG_JOB_ID", job.job_id)  # only `results` sets it, and it debugs failures
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "29500")  # so that they are restored afterwards
    error = job.exception()
    assert isinstance(error, InputError) and "unknown run.device 'nothing:0'" in str(error)
    (_, end) = read_lines(run.folder / "attempts.jsonl")
    assert end["error"].startswith("unknown run.device 'nothing:0'")


def test_a_local_job_replaces_the_signal_handlers_of_submitit(tmp_path, jobs):
    """With the handlers of submitit, the notice would end the task unsaved, and SIGTERM would be ignored."""
    for number in (signal.SIGUSR2, signal.SIGTERM):
        folder = tmp_path / number.name
        more = {"train.steps": 100000, "run.checkpoint_every": 100000}
        run = training(folder, **more)
        (folder / "logs").mkdir(parents=True)
        executor = submitit.LocalExecutor(folder / "logs")
        executor.update_parameters(timeout_min=60)
        job = executor.submit(worker.work, manifest(run, folder, kind="local"), 0)
        end = time.monotonic() + 120
        while not run.progress() and time.monotonic() < end:
            time.sleep(0.1)
        os.kill(int((run.folder / ".lock").read_text()), number)
        while not job.done():
            time.sleep(0.1)
        (saved,) = (run.folder / "checkpoints").iterdir()
        assert 0 < int(saved.stem[5:]) < 100000 and not job.paths.result_pickle.exists()
        assert [line["event"] for line in read_lines(run.folder / "attempts.jsonl")] == ["start", "stop"]
        assert read_lines(run.folder / "attempts.jsonl")[1]["signal"] == number.name


@pytest.fixture
def own(tmp_path):
    """A plug-in as a submit copies it, and the code of its manifest."""
    (plugin := tmp_path / "mine.py").write_text("A = 1\n")
    folder = provenance.ROOT.parent / "lamabench"
    path = str(folder.parent) if folder.exists() and folder.samefile(provenance.ROOT) else None
    code = {"path": path, "sha256": provenance.code_sha256(provenance.ROOT)}
    return plugin, {**code, "plugins": {str(plugin): hashlib.sha256(plugin.read_bytes()).hexdigest()}}


def test_a_job_compares_its_code_with_that_of_its_manifest(own, tmp_path):
    plugin, code = own
    assert other_code(code, [str(plugin)]) is None
    assert other_code({}, [str(plugin)]) is None  # a local job, and the manifest of an earlier version
    (copy := tmp_path / "copy" / "lamabench").mkdir(parents=True)
    for changed, words in (
        ({"path": str(tmp_path / "gone")}, f"{tmp_path}/gone/lamabench is gone, and Python imports {provenance.ROOT}"),
        ({"path": str(copy.parent)}, f"{copy} is gone, and Python imports {provenance.ROOT}"),
        ({"sha256": "0" * 64}, f"{provenance.ROOT} has changed since"),
        ({"plugins": {str(plugin): "0" * 64}}, f"the plug-in {plugin} has changed since"),
        ({"plugins": {"json": "0" * 64}}, "the plug-in json has changed since"),
    ):
        text = other_code({**code, **changed}, [str(plugin), *(["json"] if "json" in words else [])])
        assert text is not None and text.startswith(words), text
    plugin.write_text("raise RuntimeError('imported')\n")
    assert other_code(code, [str(plugin)]) == f"the plug-in {plugin} has changed since"
    plugin.unlink()
    assert other_code(code, [str(plugin)]) == f"the plug-in {plugin} is gone"


def test_the_hash_of_code_is_of_every_file_of_it(tmp_path):
    for name in ("harness/a.py", "kernels/op/b.cu", "launch/conf/c.yaml", "reports/__pycache__/d.pyc"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    hashes = [provenance.code_sha256(tmp_path)]
    for name in ("launch/conf/c.yaml", "reports/__pycache__/d.pyc"):
        (tmp_path / name).write_text("changed")
        assert provenance.code_sha256(tmp_path) == hashes[0]
    for change in (
        lambda: (tmp_path / "harness/a.py").write_text("changed"),
        lambda: (tmp_path / "kernels/op/b.cu").unlink(),
        lambda: (tmp_path / "harness/a.py").rename(tmp_path / "harness/e.py"),
        lambda: (tmp_path / "kernels/op/f.py").touch(),
    ):
        change()
        hashes.append(provenance.code_sha256(tmp_path))
    assert len(set(hashes)) == 5


def test_a_job_with_other_code_does_nothing(tmp_path, monkeypatch, capsys):
    """Its exit code tells why, because other code must not write into the folder of the run."""
    run = training(tmp_path, **{"train.steps": 3})
    path = Path(manifest(run, tmp_path))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"code": {"path": "/gone/code"}}))
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "debug")
    monkeypatch.setenv("SUBMITIT_DEBUG_JOB_ID", "7")
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "29500")
    with pytest.raises(SystemExit) as caught:
        worker.work(str(path), 0)
    assert caught.value.code == worker.OTHER_CODE and worker.OTHER_CODE in worker.EXITS and not run.folder.exists()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("not the code that was submitted: /gone/code/lamabench is gone")


@pytest.mark.parametrize(("count", "sees", "error"), [(1, False, "given 1 GPU, and torch sees none"), (0, False, ""),
                                                      (2, False, "given 2 GPUs, and"), (1, True, "")])  # fmt: skip
def test_a_job_that_requested_a_gpu_does_not_run_on_the_cpu(count, sees, error, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: sees)
    if not error:
        return worker.check_gpus(count)
    with pytest.raises(RuntimeError, match=error):
        worker.check_gpus(count)


def test_a_run_that_cannot_stop_ends_after_its_grace(tmp_path):
    """The stage cannot stop halfway. The watch runs in a process of its own, so that none is left in this one."""
    program = """
import sys, threading, time
from pathlib import Path
from lamabench.harness import provenance, signals
from lamabench.launch import worker
signals.listen()
attempt = worker.Attempt(Path(sys.argv[1]))
threading.Thread(target=worker._let_go, args=(attempt, 0.1, threading.Event()), daemon=True).start()
print("ready", flush=True)
end = time.monotonic() + 60
while time.monotonic() < end:
    time.sleep(0.1)
"""
    environment = {**os.environ, "SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_JOB_ID": "7"}
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 1
    (line,) = read_lines(tmp_path / "attempts.jsonl")
    assert (line["event"], line["job"], line["signal"]) == ("stop", "7", "SIGTERM")


class NoReader:
    """An stderr whose reader is gone, as when srun's own log is on a full disk."""

    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    flush = close = lambda self: None


def test_a_full_disk_is_reported_by_the_exit_code(tmp_path, monkeypatch):
    (path := tmp_path / "manifest.json").write_text('{"arrays": [{"cluster": {}, "tasks": [{}]}]}')

    def full(*_):
        worker.say("started")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("SUBMITIT_DEBUG_JOB_ID", "7")
    monkeypatch.setattr(worker, "_attempt", full)
    monkeypatch.setattr(sys, "stderr", NoReader())
    with pytest.raises(SystemExit) as caught:
        worker.work(str(path), 0)
    assert caught.value.code == errno.ENOSPC


WORK = """
import json, sys
from lamabench.harness import provenance, signals
signals.listen()
from lamabench.harness.progress import Progress
from lamabench.harness.stages import execute
from lamabench.harness.tasks import Task
print("ready", flush=True)
try:
    for task in map(Task.from_dict, json.loads(sys.argv[1])):
        execute(task, Progress(task.path, every=0.0))
except signals.Stopped as error:
    print(error, flush=True)
"""


def test_a_signal_stops_a_run_at_a_step_and_it_goes_on_bit_for_bit(tmp_path):
    """SLURM sends signals to every process of the step, including those that load data."""
    more = {"train.steps": 80, "run.log_every": 7, "run.checkpoint_every": 50, "run.workers": 2}
    more |= {"sample.count": 12, "sample.method": "ddim", "sample.steps": 3, "sample.batch_size": 1}

    def newest(each):
        files = [piece.folder / "progress.json" for piece in each if piece.progress()]
        return max((file.stat().st_mtime_ns for file in files), default=0)

    folders = []
    for root, numbers in (("whole", []), ("stopped", [signal.SIGUSR2, signal.SIGTERM])):
        mine = replace(study(tmp_path / root, {"train.lr": [1e-3]}, **more), stages=["train", "sample"])
        each = pieces(plan(mine))
        folders.append([piece.folder for piece in each])
        tasks = json.dumps([asdict(piece.task) for piece in each])
        for number in numbers:
            process = subprocess.Popen([sys.executable, "-c", WORK, tasks], stdout=subprocess.PIPE, text=True,
                                       stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
            before = newest(each)
            while process.poll() is None:
                if newest(each) != before:
                    os.killpg(process.pid, number)
                    break
                time.sleep(0.005)
            out, _ = process.communicate(timeout=120)
            assert process.returncode == 0 and out.split() == ["ready", "stopped", "by", number.name]
        for piece in each:
            execute(piece.task, Progress(piece.folder))
    (whole, drawn), (stopped, redrawn) = folders
    assert len(read_lines(stopped / "record.jsonl")) == len(read_lines(redrawn / "record.jsonl")) == 1
    for step in (50, 80):
        one, two = (load_file(folder / "checkpoints" / f"step-{step:08d}.safetensors") for folder in (whole, stopped))
        assert one.keys() == two.keys() and all(one[key].equal(two[key]) for key in one)
    metrics = [
        [{**line, "seconds": 0, "images_per_s": 0, "waited": 0} for line in read_lines(folder / "metrics.jsonl")]
        for folder in (whole, stopped)
    ]
    assert metrics[0] == metrics[1]
    one, two = ({path.name: path.read_bytes() for path in each.glob("shards/*/*.npy")} for each in (drawn, redrawn))
    assert one == two and len(one) == 13  # twelve images and their labels


def test_queueing_again_is_retried_if_that_may_help(tmp_path, monkeypatch):
    calls, scontrol = tmp_path / "calls", tmp_path / "scontrol"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(client, "DELAYS_S", (0.0, 0.0))
    scontrol.touch(mode=0o755)
    for error, times in (("Requested operation is presently disabled", 1), ("Zero Bytes were transmitted", 3)):
        calls.unlink(missing_ok=True)
        scontrol.write_text(f"#!/bin/sh\necho $* >> {calls}\necho {error} >&2\nexit 1\n")
        with pytest.raises(client.SlurmError, match=error):
            requeue()
        assert calls.read_text().split("\n") == ["requeue 7"] * times + [""]


@pytest.mark.parametrize(
    ("line", "notice", "preempted"),
    [
        ("JobState=RUNNING Reason=None PreemptTime=None", True, False),
        ("JobState=RUNNING Reason=None PreemptTime=2026-11-22T10:34:23", True, True),
        ("JobState=COMPLETING Reason=None PreemptTime=None", False, False),  # cancelled, or requeued by a person
        ("JobState=COMPLETING Reason=None PreemptTime=2026-11-22T10:34:23", False, False),
        ("JobState=COMPLETING Reason=TimeLimit PreemptTime=None", True, False),
    ],
)
def test_a_cancelled_job_does_not_queue_itself_again(line, notice, preempted, tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $1 >> {calls}\necho JobId=7 {line}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for key in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.setenv(key, "7")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    for number, queued in ((signal.SIGUSR2, notice), (signal.SIGTERM, preempted)):
        calls.unlink(missing_ok=True)
        monkeypatch.setattr(signals, "_noted", [number])
        assert worker._stopped(Attempt(tmp_path)) == (0 if queued else 1)
        assert calls.read_text().split() == ["show", "requeue"][: 1 + queued]


def test_a_run_without_progress_is_not_queued_again_for_ever(tmp_path, monkeypatch):
    for key, value in (("SUBMITIT_EXECUTOR", "slurm"), ("SLURM_ARRAY_JOB_ID", "7"), ("SLURM_ARRAY_TASK_ID", "0")):
        monkeypatch.setenv(key, value)
    attempt = Attempt(tmp_path)
    assert not attempt.stuck()
    for _ in range(2):
        assert not attempt.stuck()
        attempt.note("stop", signal="SIGUSR2", mark=attempt.mark())
    assert attempt.stuck()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000001.safetensors").touch()
    assert not attempt.stuck()
    attempt.note("stop", signal="SIGUSR2", mark=attempt.mark())
    attempt.note("stop", signal="SIGUSR2", mark=attempt.mark())
    assert attempt.stuck()
    (tmp_path / "shards").mkdir()
    with joined(tmp_path / "shards" / "key", 8) as claims:
        claims.write(range(4), np.zeros((4, 8, 8, 3), np.uint8), time.time())
    assert not attempt.stuck()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_preemption_before_the_processes_met_queues_their_run_again(tmp_path, monkeypatch, rank):
    """Once, by the first process. The other ones end without an error, because that would end the first."""
    run, calls = training(tmp_path, **{"train.steps": 3}), []
    variables = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "RANK": str(rank),
                 "WORLD_SIZE": "2", "TORCH_CPP_LOG_LEVEL": "ERROR"}  # fmt: skip
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    for name in ("listen", "ignore"):
        monkeypatch.setattr(signals, name, lambda: None)
    monkeypatch.setattr(signals, "_noted", [signal.SIGTERM])
    monkeypatch.setattr(worker, "environment", dict)
    monkeypatch.setattr(worker, "ours", lambda notice: not notice)
    monkeypatch.setattr(worker, "requeue", lambda: calls.append("requeue"))
    monkeypatch.setattr(worker.parallel, "everywhere", lambda *_: signals.check())
    with pytest.raises(SystemExit) as end:
        worker.work(manifest(run, tmp_path), 0)
    assert end.value.code == 0 and calls == ["requeue"] * (rank == 0)
    if rank == 0:
        assert [line["event"] for line in read_lines(run.folder / "attempts.jsonl")] == ["start", "stop"]
        assert not (run.folder / "checkpoints").exists()


def test_a_reference_that_changes_after_a_job_was_queued_is_refused(tmp_path):
    """Keys have only the name of its file. The samples are drawn; a job that is queued later takes the file of then."""
    file = tmp_path / "r.npz"

    def put(seed):
        np.savez(file, arr_0=np.random.default_rng(seed).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8))

    put(0)
    settings = {"train.steps": 2, "sample.count": 4, "sample.steps": 2, "sample.method": "ddim",
                "evaluate.metrics": ["fd"], "evaluate.reference": str(file)}  # fmt: skip
    base = {**SMALL, "run.root": str(tmp_path / "runs"), **settings}
    axes, stages = {"train.lr": [1e-3]}, ["train", "sample", "evaluate"]
    every = pieces(plan(Study("s", "?", base=base, axes=axes, stages=stages)))
    train, samples = (json.loads(json.dumps(entry(piece))) for piece in every)
    assert samples["task"]["reference"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert train["task"]["reference"] == ""
    put(1)
    worker.do(train, Progress())
    with pytest.raises(InputError, match=r"r\.npz is not the file that it was when this job was queued: .*sweep retry"):
        worker.do(samples, Progress())
    rows = read_run(every[1].folder).records
    assert [(row.kind, row.state) for row in rows] == [("sample", "done"), ("score", "failed")]
    assert "\n" not in (rows[1].error or "") and not [row for row in rows if getattr(row, "protocol", None)]
    worker.do(json.loads(json.dumps(entry(every[1]))), Progress())
    row = read_run(every[1].folder).last("score")
    assert row.state == "done" and row.reference_count == 6
    del samples["task"]["reference"]  # of a manifest of an earlier version
    worker.do(samples, Progress())
