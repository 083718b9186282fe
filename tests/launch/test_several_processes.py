"""One training in several processes, as torchrun starts them, with gloo on the CPU: the same numbers, and one end."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from lamabench.harness.disk import read_lines
from lamabench.harness.run import read_run
from lamabench.harness.shards import joined, open_samples
from processes import MODEL, SMALL, STEPS, losses, same, saved, training
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """Undisturbed runs of 1, 2 and 4 processes: the folders of their trainings."""
    folders = {}
    for count in (1, 2, 4):
        run = start(tmp_path_factory.mktemp("whole"), count=count)
        assert run.codes == [0] * count, [run.text("err", rank) for rank in range(count)]
        folders[count] = training(run.folder)
        for rank in range(1, count):
            assert run.text("out", rank) == run.text("err", rank) == ""
    return folders


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_processes_learns_the_same(whole, count):
    assert whole[count].name == whole[1].name  # no key has the number of processes
    assert len(losses(whole[1])) == STEPS // 7 + 1
    assert losses(whole[count]) == pytest.approx(losses(whole[1]), rel=1e-4)
    alone, together = (load_file(whole[n] / "weights" / f"step-{STEPS:08d}.safetensors") for n in (1, count))
    # Not each by itself: the gradient of the keys' bias is rounding alone, and Adam makes steps of it.
    differences = sum((together[name] - value).square().sum() for name, value in alone.items())
    assert differences < 1e-6 * sum(value.square().sum() for value in alone.values())


@pytest.mark.parametrize("count", [2, 4])
def test_lines_of_several_processes_are_of_the_whole_batch(whole, count):
    """The norm is that of the averaged gradient, and a quarter of t has the images of all processes."""
    ours, theirs = (read_lines(whole[n] / "metrics.jsonl") for n in (count, 1))
    for one, other in zip(ours, theirs, strict=True):
        for name in ("grad_norm", "loss_q1", "loss_q2", "loss_q3", "loss_q4"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), name
    assert len({line["grad_norm"] for line in ours}) == len(ours)


def test_the_first_process_logs_and_draws(start, whole, tmp_path):
    """Others neither write nor draw, and the training is the same to the bit."""
    extra = ["run.log_to=[tensorboard]", "run.preview_every=40", "sample.steps=2"]
    run = start(tmp_path, *extra, count=2)
    assert run.codes == [0, 0], run.text("err")
    assert len(list(training(tmp_path).glob("tensorboard/*"))) == 1
    assert [path.name for path in sorted(training(tmp_path).glob("previews/*"))] == [
        "step-00000040.png", "step-00000080.png",
    ]  # fmt: skip
    same(whole[2], training(tmp_path))


HELD_OUT = ["data.split=most", "run.log_every=5", "run.heldout_every=5", "train.steps=10", "evaluate.batch_size=20"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_processes_share_the_held_out_loss(start, tmp_path, parallel):
    """It is to the last digit what one process computes from the weights of that step, also where one of two computes
    it alone: from weights in shards, and as a score."""
    run = start(tmp_path, *HELD_OUT, f"run.parallel={parallel}", count=2)
    run.until(lambda: "10 steps" in run.text("out"))  # a process that waits for another one would wait for minutes
    assert run.codes == [0, 0], run.text("err")
    _, line = read_lines(training(tmp_path) / "metrics.jsonl")
    words = ["evaluate", str(training(tmp_path)), "evaluate.metrics=[heldout]", "--json"]
    run = start(tmp_path / "score", command=words, count=2)
    run.until(lambda: run.text("out").endswith("]\n"))
    assert run.codes == [0, 0], run.text("err")
    (row,) = json.loads(run.text("out"))
    assert row["value"] == line["heldout_loss"] and row["by_timestep"]["62"] == line["heldout_loss_1"]


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.soak)])
def test_a_signal_in_a_held_out_loss_stops_all_processes(start, tmp_path, parallel):
    """To all processes, as a scheduler sends it. The run that continues has the lines of one that was not disturbed."""
    words = [*HELD_OUT, "evaluate.batch_size=1", "evaluate.heldout_count=100", "train.steps=15"]
    words += [f"run.parallel={parallel}"]
    assert start(tmp_path / "whole", *words, count=2).codes == [0, 0]
    run = start(tmp_path / "stopped", *words, count=2)
    run.until(lambda: any((tmp_path / "stopped").glob("runs/trainings/*/metrics.jsonl")))
    run.until(lambda: len(losses(training(tmp_path / "stopped"))) == 1)
    time.sleep(0.1)  # five steps take less, and what follows takes longer
    run.kill(signal.SIGTERM, 0, 1)
    assert run.codes == [143, 143], run.text("err")
    assert start(tmp_path / "stopped", *words, count=2).codes == [0, 0]
    same(training(tmp_path / "stopped"), training(tmp_path / "whole"), 15)


def test_a_divergence_of_several_processes_leaves_one_snapshot(start, tmp_path):
    run = start(tmp_path, "train.lr=1e18", "run.checkpoint_every=40", "run.log_every=40", count=2)
    assert set(run.codes) == {1}, run.text("err")
    (snapshot,) = training(tmp_path).glob("failures/*")
    facts = json.loads((snapshot / "failure.json").read_text())
    assert (facts["kind"], facts["checkpoint"], facts["last_step"], facts["micro_batch"]) == ("diverged", 0, 40, 4)
    assert facts["command"] in run.text("err") and run.text("err", 1) == ""


def test_gradients_of_several_passes_are_averaged_once(start, whole, tmp_path):
    run = start(tmp_path, "train.steps=21", "run.micro_batch=1", count=2)
    assert run.codes == [0, 0]
    assert losses(training(tmp_path)) == pytest.approx(losses(whole[1])[:3], rel=1e-4)
    assert read_run(training(tmp_path)).last("train").micro_batch == 1


def test_the_record_counts_processes(whole):
    record = read_run(whole[4]).last("train")
    assert (record.processes, record.batch_size, record.micro_batch, record.images) == (4, 8, 2, 8 * STEPS)
    (stretch,) = record.stretches
    assert (stretch["processes"], stretch["hosts"], stretch["from_seconds"]) == (4, [socket.gethostname()], 0.0)
    assert record.process_seconds == pytest.approx(4 * record.seconds, abs=0.01)
    assert "processes" not in read_run(whole[1]).last("train").stretches[0]


def test_a_run_that_was_stopped_and_killed_goes_on_bit_for_bit(start, whole, tmp_path):
    run = start(tmp_path, count=4)
    run.until(lambda: saved(tmp_path))
    run.kill(signal.SIGTERM, 2)
    assert run.codes == [143] * 4
    (step,) = re.findall(rf"saved at step (\d+) of {STEPS}", run.text("err"))
    assert saved(tmp_path)[-1] == int(step) < STEPS
    assert run.text("err").splitlines()[-1] == "lamabench train: ended by SIGTERM; the same command continues"
    assert [run.text("err", rank) for rank in (1, 2, 3)] == [""] * 3

    run = start(tmp_path, count=4)
    run.until(lambda: saved(tmp_path)[-1] > int(step))
    run.kill(signal.SIGKILL, *range(4))
    assert run.codes == [-9] * 4 and not (training(tmp_path) / "record.jsonl").exists()
    run = start(tmp_path, count=4)
    assert run.codes == [0] * 4
    assert re.search(rf"continuing at step \d+ of {STEPS}", run.text("err"))
    same(training(tmp_path), whole[4])


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_killed_process_ends_the_others_and_another_number_goes_on(start, whole, tmp_path, killed):
    run = start(tmp_path, count=2)
    run.until(lambda: saved(tmp_path))
    run.kill(signal.SIGKILL, killed)
    started = time.monotonic()
    codes = run.codes
    assert time.monotonic() - started < 15 and codes[killed] == -9 and codes[1 - killed] == 1
    if killed:
        line = run.text("err").splitlines()[-1]
        assert line.startswith("lamabench train: one of the 2 processes of the run is gone") and "Traceback" not in line
        assert read_run(training(tmp_path)).last("train").state == "failed"
        count = 1
    else:
        count = 4
    run = start(tmp_path, count=count)
    assert run.codes == [0] * count
    assert f"the number of processes is {count} from step" in run.text("err")
    assert losses(training(tmp_path)) == pytest.approx(losses(whole[1]), rel=1e-4)
    record = read_run(training(tmp_path)).last("train")
    first, second = record.stretches
    assert [first.get("processes", 1), second.get("processes", 1)] == [2, count]
    expected = 2 * second["from_seconds"] + count * (record.seconds - second["from_seconds"])
    assert record.process_seconds == pytest.approx(expected, abs=0.01)


def test_bad_input_is_one_line_of_all(start, tmp_path):
    run = start(tmp_path, "train.batch_size=9", count=2)
    assert run.codes == [2, 2]
    assert "train.batch_size 9 is no multiple of the 2 processes" in run.text("err") and run.text("err", 1) == ""
    assert run.text("err").count("\n") == 1 and not (tmp_path / "runs").exists()


def test_sample_is_of_all_processes_and_other_commands_are_of_the_first(start, whole):
    folder, several = whole[2].parents[2], {}
    for count in (1, 2):
        run = start(folder, count=count, command=["sample", str(whole[2]), *DRAWN, f"run.root=by-{count}"])
        assert run.codes == [0] * count, run.text("err")
        assert "60 images at step" in run.text("out")
        several[count] = drawn(folder / f"by-{count}")
    assert run.text("out", 1) == run.text("err", 1) == ""
    assert [several[count][1].processes for count in (1, 2)] == [1, 2]
    assert np.array_equal(several[1][0], several[2][0]) and len(several[1][0]) == 60
    assert start(folder, count=2, command=["report", "nothing", "--out", "x"]).codes == [2, 2]


DRAWN = ["sample.count=60", "sample.method=ddim", "sample.steps=10", "sample.batch_size=2", "run.device=cpu"]


def drawn(root):
    """The images of the only set below a root, and its newest record."""
    (folder,) = root.glob("trainings/*/samples/*")
    return open_samples(next(folder.glob("shards/*")))[:], read_run(folder).last("sample")


def test_a_signal_to_one_process_stops_the_sampling_of_all_and_the_same_command_goes_on(start, whole):
    """Images that this process has claimed keep the others from being done before the signal comes."""
    folder = whole[2].parents[2]
    command = ["sample", str(whole[2]), *DRAWN, "sample.steps=160"]
    assert start(folder, count=1, command=[*command, "run.root=plain"]).codes == [0]
    begun = shutil.ignore_patterns("*.npy", "*.jsonl", "*.png")
    shutil.copytree(folder / "plain", folder / "stopped", ignore=begun)
    (shards,) = folder.glob("stopped/trainings/*/samples/*/shards/*")
    command.append("run.root=stopped")
    parts = lambda: list(shards.glob("0*.npy"))  # noqa: E731
    with joined(shards, 60) as claims:
        assert claims.take(2) == range(2)
        run = start(folder, count=2, command=command)
        run.until(lambda: len(parts()) > 3)
        killer = threading.Timer(60, run.kill, [signal.SIGKILL, 0, 1])  # where the other process does not learn of it
        killer.start()
        run.kill(signal.SIGTERM, 1)
        assert run.codes == [143, 143]
        killer.cancel()
    assert start(folder, count=1, command=command).codes == [0] and len(parts()) == 30
    assert np.array_equal(drawn(folder / "stopped")[0], drawn(folder / "plain")[0])


PLUGIN = """
import json
import os
from dataclasses import dataclass

from lamabench.models import Mixer, register_mixer
from torch import nn


class Failing(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        if os.environ["RANK"] == os.environ["FAILS"] and self.calls > 5:
            raise ValueError("no more")
        return super().forward(x)


@register_mixer("failing")
@dataclass
class FailingMixer(Mixer):
    def build(self, dim, side, shift):
        return Failing(dim, dim)
"""


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_the_error_of_one_process_ends_all(start, tmp_path, rank):
    """An error of the program: a process of its own writes the traceback, and the record has one line."""
    (tmp_path / "own.py").write_text(PLUGIN.replace('os.environ["FAILS"]', repr(str(rank))))
    started = time.monotonic()
    model = ["model=lamamba_nano", "model.mixers=[failing]", "plugins=[own.py]"]
    run = start(tmp_path, model=model, count=2)
    assert run.codes == [1, 1] and time.monotonic() - started < 30
    record = read_run(training(tmp_path)).last("train")
    place = f"process 1 of 2 on {socket.gethostname()}: " if rank else ""
    assert record.state == "failed" and record.error.endswith(f"{place}ValueError: no more")
    assert "no more" in run.text("err", rank) and "Traceback" in run.text("err", rank)


def test_the_error_of_a_process_that_samples_ends_all(start, tmp_path):
    (tmp_path / "own.py").write_text(PLUGIN.replace('os.environ["FAILS"]', "'1'"))
    model = ["model=lamamba_nano", "model.mixers=[failing]", "plugins=[own.py]"]
    assert start(tmp_path, "train.steps=1", model=model).codes == [0]
    started = time.monotonic()
    run = start(tmp_path, count=2, command=["sample", str(training(tmp_path)), *DRAWN])
    assert run.codes == [1, 1] and time.monotonic() - started < 30
    (folder,) = training(tmp_path).glob("samples/*")
    record = read_run(folder).last("sample")
    words = f"process 1 of 2 on {socket.gethostname()}: ValueError: no more"
    assert record.state == "failed" and record.error.endswith(words) and words in run.text("err")
    assert "Traceback" in run.text("err", 1) and "Traceback" not in run.text("err")


DAMAGE = """
from lamabench.harness.data.items import TrainItems
from lamabench.kernels.errors import InputError

get = TrainItems.__getitems__


def damaged(self, indices):
    if 8 * 10 + 5 in indices:
        raise InputError("unreadable image x.png")
    return get(self, indices)


TrainItems.__getitems__ = damaged
"""


def test_an_image_that_one_process_cannot_read_stops_all_at_a_whole_step(start, tmp_path):
    (tmp_path / "own.py").write_text(DAMAGE)
    run = start(tmp_path, "plugins=[own.py]", count=2)
    assert run.codes == [2, 2] and saved(tmp_path) == [10]
    saying, error = run.text("err").splitlines()[-2:]
    assert saying == f"saved at step 10 of {STEPS}" and run.text("err", 1) == ""
    assert error == f"lamabench train: error: process 1 of 2 on {socket.gethostname()}: unreadable image x.png"


def torchrun(*words):
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    return [*program, Path(sys.executable).with_name("lamabench"), *words]


def ranks(launcher):
    """The processes that torchrun started, by their ranks."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_text().split("\0") for pid in children}
    return sorted(environments, key=lambda pid: next(word for word in environments[pid] if word.startswith("RANK=")))


def test_torchrun_starts_the_command(tmp_path):
    command = torchrun("train", *MODEL, *SMALL, "train.steps=3")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.count("3 steps, loss") == 1, done.stderr
    assert read_run(training(tmp_path)).last("train").processes == 2


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_killed_torchrun_ends_its_processes_which_save(tmp_path):
    words = ["train.steps=1000000", "run.checkpoint_every=1000000", "run.log_every=1"]
    with open(tmp_path / "err", "w") as file:
        command = torchrun("train", *MODEL, *SMALL, *words)
        launcher = subprocess.Popen(command, cwd=tmp_path, stderr=file, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while not list(tmp_path.glob("runs/trainings/*/metrics.jsonl")):
            assert launcher.poll() is None and time.monotonic() < end, (tmp_path / "err").read_text()
            time.sleep(0.02)
        pids = ranks(launcher)
        assert len(pids) == 2
        launcher.kill()
        launcher.wait()
        end = time.monotonic() + 20
        while any(alive(pid) for pid in pids):
            assert time.monotonic() < end, (tmp_path / "err").read_text()
            time.sleep(0.02)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    (step,) = saved(tmp_path)
    err = (tmp_path / "err").read_text()
    assert f"saved at step {step} of 1000000" in err and "Traceback" not in err
    assert err.splitlines()[-1] == "lamabench train: ended by SIGTERM; the same command continues"


def test_the_end_of_the_first_process_ends_a_sampling_by_torchrun(whole, tmp_path):
    """The other one does not wait for it until torchrun kills it too, after 30 s."""
    words = [*DRAWN, f"run.root={tmp_path}", "sample.count=100000"]
    launcher = subprocess.Popen(torchrun("sample", whole[2], *words), cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while len(list(tmp_path.glob("trainings/*/samples/*/shards/*/0*.npy"))) < 4:
            assert launcher.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        os.kill(ranks(launcher)[0], signal.SIGKILL)
        assert launcher.wait(20) == 1
    finally:
        launcher.kill()
        launcher.wait()


def test_a_benchmark_of_several_processes(start, tmp_path):
    """Both do the same steps, each on half of the batch, and the first one records them. Gradients are checked."""
    small = [word.removeprefix("model.") for word in MODEL[1:]]
    words = ["bench", "dit_nano", *small, "input_size=8", "bench.batch_size=4", "bench.seconds=0.1", "bench.repeats=5"]
    words += ["bench.precision=float32", "run.device=cpu"]
    run = start(tmp_path, command=[*words, "bench.modes=[train]"], count=2)
    assert run.codes == [0, 0], [run.text("err", rank) for rank in (0, 1)]
    (path,) = tmp_path.glob("runs/models/*/record.jsonl")
    (row,) = read_lines(path)
    assert (row["processes"], row["batch_size"], row["state"]) == (2, 4, "done") and row["gradient_error"] < 1e-4
    assert row["images_per_s"] == pytest.approx(4e3 / row["p50_ms"]) and run.text("out", 1) == ""
    for wrong, message in (
        (["bench.modes=[forward]"], "give bench.modes=[train]"),
        (["bench.modes=[train]", "bench.batch_size=5"], "bench.batch_size 5 is no multiple"),
    ):
        run = start(tmp_path, command=[*words, *wrong], count=2)
        assert run.codes == [2, 2] and message in run.text("err") and run.text("err").count("\n") == 1
