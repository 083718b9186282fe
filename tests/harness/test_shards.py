"""Any number of processes draw a set together, each image once, whatever is killed; sets are read a part at a time."""

import multiprocessing
import os
import signal
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lamabench.baselines.dit import DiTConfig
from lamabench.harness.config import Config
from lamabench.harness.disk import read_lines
from lamabench.harness.progress import Progress
from lamabench.harness.record import read_records
from lamabench.harness.run import Busy, is_locked
from lamabench.harness.sampling import Sampler, generate
from lamabench.harness.sections import DataConfig, RunConfig, SampleConfig, TrainConfig
from lamabench.harness.shards import Shards, busy_seconds, first_gap, images_of, joined, labels_at, open_samples
from lamabench.harness.stages import execute, missing
from lamabench.harness.tasks import tasks
from lamabench.harness.training.loop import train
from lamabench.kernels.errors import InputError
from lamabench.models.registry import build, preset

DIT = DiTConfig(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=16, depth=1, num_heads=2)
NANO = preset("lamamba_nano").config
ABOUT = {"study": "s", "name": "n", "variant": {}, "seed": 0, "model": "dit_nano", "family": "dit", "title": "DiT-nano"}


def work(task, hangs, out, err):
    """Draw in a fork of this process. Each batch says when it begins. With `hangs`, the second one never ends, so that
    a test can kill in the middle of it."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    draw = Sampler.draw

    def slowly(self, indices):
        os.write(1, f"{indices.start} {indices.stop}\n".encode())
        time.sleep(1000 if hangs and indices.start else 0.05)
        return draw(self, indices)

    Sampler.draw = slowly
    execute(task, Progress())


def make(root, **sample):
    return Config(
        model=DIT,
        data=DataConfig(kind="digits", size=8, channels=1, num_classes=10),
        train=TrainConfig(steps=2, batch_size=4, ema_decay=0.5, precision="float32", lr=1e-2),
        sample=SampleConfig(**{"count": 42, "method": "ancestral", "steps": 4, "batch_size": 4, **sample}),
        run=RunConfig(root=str(root), device="cpu"),
    )


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    train(folder, make(folder), Progress())
    return folder


def pieces_of(folder):
    """(start, stop) of every range that was finished, in the order of the images."""
    return sorted((one["start"], one["stop"]) for one in read_lines(folder / "claims.jsonl") if "seconds" in one)


def test_the_first_gap():
    """Against a walk over the indices, one by one."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        count, most = int(rng.integers(1, 20)), int(rng.integers(1, 6))
        cuts = sorted(rng.integers(0, count + 1, size=6).tolist())
        taken = [(a, b) for a, b in zip(cuts[::2], cuts[1::2], strict=True) if a < b]
        free = [i for i in range(count) if not any(a <= i < b for a, b in taken)]
        run = [i for n, i in enumerate(free) if i == free[0] + n][:most]
        gap = first_gap(count, taken, most)
        assert ([] if gap is None else list(gap)) == run


def test_seconds_in_which_anyone_drew():
    assert busy_seconds([(0, 2), (1, 3), (10, 11), (10.5, 10.75)]) == 4
    assert busy_seconds([]) == 0


def test_three_processes_one_of_them_killed(tmp_path, training):
    """The images are those of one process; whatever was finished is drawn once, whatever was not is drawn by others."""
    few = make(tmp_path)
    (task,) = tasks(few, ABOUT, ["sample"], training=training)

    def start(name, hangs=False):
        files = [tmp_path / f"{name}.{stream}" for stream in ("out", "err")]
        process = multiprocessing.get_context("fork").Process(target=work, args=(task, hangs, *files), daemon=True)
        process.start()
        return process, *files

    def until(path, word):
        end = time.monotonic() + 60
        while not path.exists() or word not in path.read_text():
            assert time.monotonic() < end, [one.read_text() for one in tmp_path.glob("*.err")]
            time.sleep(0.02)

    victim, out, _ = start("victim", hangs=True)
    others = []
    try:
        until(out, "\n4")
        begun = [tuple(map(int, line.split())) for line in out.read_text().splitlines()]
        others = [start("one"), start("two")]
        until(others[0][2], "images that other processes draw")
        assert "waiting for" in others[0][2].read_text()
        assert is_locked(task.path) and missing(task) == ["sample"]
        victim.kill()
        for process, _, err in others:
            process.join(100)
            assert process.exitcode == 0, err.read_text()
    finally:
        for process in (victim, *(other for other, *_ in others)):
            process.kill()
            process.join()
    assert not is_locked(task.path)
    lines = [tuple(map(int, line.split())) for _, out, _ in others for line in out.read_text().splitlines()]
    assert begun == [(0, 4), (4, 8)] and begun[0] not in lines and begun[1] in lines
    assert sorted([*lines, begun[0]]) == [(i, min(i + 4, 42)) for i in range(0, 42, 4)]
    (row,) = [one.flat() for one in read_records(task.path / "record.jsonl")]
    place = images_of(task.path)
    assert pieces_of(place) == sorted([*lines, begun[0]]) and (row["kind"], row["state"]) == ("sample", "done")
    assert 2 <= row["processes"] <= 3 and 0 < row["seconds"] <= row["process_seconds"]
    assert row["images_per_s"] == pytest.approx(42 / row["seconds"], rel=1e-2)
    assert not [path for path in place.iterdir() if path.name.endswith((".lock", ".tmp")) and path.name != ".lock"]

    alone = tmp_path / "alone"
    alone.mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    record = generate(alone, training, few, 2, Progress())
    torch.set_num_threads(threads)
    assert record["processes"] == 1 and record["shards"] == place.name
    assert np.array_equal(Shards(alone / "shards" / record["shards"])[:], Shards(place)[:])
    assert labels_at(place).tolist() == [i % 10 for i in range(42)]


@pytest.mark.parametrize(("model", "key"), [(DIT, "66a1e1664114a964"), (NANO, "3cbea5f4e2a08d70")])
def test_a_set_from_before_an_operator_had_a_name_goes_on(model, key):
    """The keys are those of commit 7566601, where the norms of these models were no operator."""
    config = replace(make("."), model=model)
    tensors = {name: torch.zeros_like(value) for name, value in build(model).state_dict().items()}
    assert Sampler(config, tensors, "cpu").key(tensors) == key
    config.backend.modulated_norm = "reference"  # computes other digits
    assert Sampler(config, tensors, "cpu").key(tensors) != key


def test_another_batch_size_fills_what_is_left(tmp_path, training):
    class Stop(Progress):
        def update(self, stage, done, total, **facts):
            if done >= 8:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path, training, make(tmp_path), 2, Stop())
    record = generate(tmp_path, training, make(tmp_path, batch_size=30), 2, Progress())
    place = tmp_path / "shards" / record["shards"]
    assert pieces_of(place) == [(0, 4), (4, 8), (8, 38), (38, 42)] and record["processes"] == 2
    assert Shards(place).shape == (42, 8, 8, 1)


def killed(claims):
    """The claims of another process, which is gone."""
    return replace(claims, process="gone")


def test_what_a_killed_process_leaves(tmp_path):
    image = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
    with joined(tmp_path / "shards" / "k", 10) as claims:
        other = killed(claims)
        assert other.take(4) == range(4)
        np.save(claims._file(0, 4), image)  # it was killed before it could note that
        assert other.take(4) == range(4, 8)
        assert claims.take(4) == range(4, 8), "its other claim is free"
        assert claims.drawn == 4
        claims.write(range(4, 8), image + 4, time.time())
        assert not claims.complete() and claims.take(4) == range(8, 10) and claims.take(4) is None
        claims.write(range(8, 10), image[:2] + 8, time.time())
        claims._file(4, 8).unlink()
        assert not claims.complete() and claims.take(9) == range(4, 8), "a file that is gone is drawn again"
        claims.write(range(4, 8), image + 4, time.time())
        assert claims.take(1) is None and claims.complete()
        with open(tmp_path / "shards" / "k" / "claims.jsonl", "a") as file:
            file.write('{"start": 0, "stop')  # killed in the middle of a line
        assert claims.complete() and len(list(tmp_path.glob("shards/k/*.lock"))) == 2
    assert Shards(tmp_path / "shards" / "k")[:].ravel().tolist() == list(range(10))
    assert [path.name for path in tmp_path.glob("shards/k/*.lock")] == [".lock"]


def test_a_damaged_line_of_claims_costs_its_range_only(tmp_path):
    image = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
    with joined(tmp_path / "shards" / "k", 8) as claims:
        other = killed(claims)
        for indices in (range(4), range(4, 8)):
            assert other.take(4) == indices
            other.write(indices, image + indices.start, time.time())
        path = tmp_path / "shards" / "k" / "claims.jsonl"
        *lines, last = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines) + last.replace(b'"by"', b'"bx"') + b"\x00\xff garbage\n[]\n")
        assert claims.complete(), "the file of the range is there"
        claims._file(4, 8).unlink()
        assert not claims.complete() and claims.take(4) == range(4, 8)


def test_one_set_has_one_kind_of_image(tmp_path):
    with (
        joined(tmp_path / "shards" / "cpu", 10),
        pytest.raises(Busy, match=rf"being worked on by .*-{os.getpid()}-.*, on another kind of device"),
        joined(tmp_path / "shards" / "cuda", 10),
    ):
        pass
    assert not list(tmp_path.glob("shards/cuda/*.lock"))


def test_a_failed_process_leaves_its_error_or_the_others_result(tmp_path, training, monkeypatch):
    (task,) = tasks(make(tmp_path, count=4), ABOUT, ["sample"], training=training)
    right = Sampler.draw

    def fail(self, indices):
        raise ZeroDivisionError("the device is gone")

    monkeypatch.setattr(Sampler, "draw", fail)
    with pytest.raises(ZeroDivisionError):
        execute(task, Progress())
    (row,) = read_records(task.path / "record.jsonl")
    assert (row.kind, row.state, row.error) == ("sample", "failed", "ZeroDivisionError: the device is gone")
    assert "the device is gone" in (task.path / "error.log").read_text() and missing(task) == ["sample"]

    def overtaken(self, indices):  # another process draws all before this one fails
        monkeypatch.setattr(Sampler, "draw", right)
        folder = next(task.path.glob("shards/*"))
        for lock in folder.glob("?*.lock"):
            lock.unlink()
        execute(task, Progress())
        raise ZeroDivisionError("too late")

    monkeypatch.setattr(Sampler, "draw", overtaken)
    execute(task, Progress())
    assert missing(task) == [] and [row.state for row in read_records(task.path / "record.jsonl")] == ["failed", "done"]


def test_memory_holds_one_batch(tmp_path, training, monkeypatch):
    """A set of 24 MB is drawn and read in less than 4 MB of numpy arrays."""
    monkeypatch.setattr(Sampler, "draw", lambda self, indices: torch.zeros(len(indices), 1, 8, 8))
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), np.uint8)
    monkeypatch.setattr(Sampler, "images", lambda self, x: picture[: len(x)].copy())
    tracemalloc.start()
    record = generate(tmp_path, training, make(tmp_path, count=2000, batch_size=50), 2, Progress())
    images, total = open_samples(tmp_path / "shards" / record["shards"]), 0
    for start in range(0, len(images), 64):
        total += int(images[start : start + 64].sum())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert images.shape == (2000, 64, 64, 3) and total == 40 * int(picture[:50].sum())
    assert peak < 4e6


def test_slices_of_shards_and_of_files(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (23, 2, 3, 1), np.uint8)
    (folder := tmp_path / "k").mkdir()
    for start, stop in ((0, 5), (5, 6), (6, 20), (20, 23)):
        np.save(folder / f"{start:08d}-{stop:08d}.npy", images[start:stop])
    np.savez(tmp_path / "plain.npz", images=images)
    np.savez_compressed(tmp_path / "adm.npz", arr_0=images, arr_1=np.arange(23))
    np.savez(tmp_path / "columns.npz", arr_0=np.asfortranarray(images))
    for path in (folder, *tmp_path.glob("*.npz")):
        opened = open_samples(path)
        assert (len(opened), opened.shape, opened.dtype) == (23, images.shape, np.uint8)
        for part in (slice(0, 4), slice(4, 9), slice(15, 23), slice(3, 7), slice(None), slice(7, 7), slice(20, 99)):
            assert np.array_equal(opened[part], images[part]), (path, part)


def test_a_damaged_set_is_one_line(tmp_path):
    def files(*ranges):
        for path in tmp_path.iterdir():
            path.unlink()
        for start, stop in ranges:
            np.save(tmp_path / f"{start:08d}-{stop:08d}.npy", np.zeros((stop - start, 2, 2, 1), np.uint8))

    for ranges in ((), [(1, 4)], [(0, 2), (4, 6)]):
        files(*ranges)
        with pytest.raises(InputError, match=r"has no image [012]: draw the samples again"):
            Shards(tmp_path)
    with pytest.raises(InputError, match=r"cannot read .*nowhere"):
        Shards(tmp_path / "nowhere")
    for content in (b"", b"text", (tmp_path / "00000000-00000002.npy").read_bytes()[:-3]):
        files((0, 2), (2, 4))
        (tmp_path / "00000002-00000004.npy").write_bytes(content)
        with pytest.raises(InputError, match=r"00000002-00000004\.npy") as caught:
            Shards(tmp_path)[:]
        assert "\n" not in str(caught.value)
    files((0, 2))
    np.save(tmp_path / "00000002-00000004.npy", np.zeros((2, 3, 3, 1), np.uint8))
    with pytest.raises(InputError, match=r"should have images uint8 \[2, 2, 2, 1\]"):
        Shards(tmp_path)[:]
    whole = np.zeros((40, 64, 64, 3), np.uint8)
    np.savez_compressed(tmp_path / "cut.npz", images=np.random.default_rng(0).integers(0, 256, whole.shape, np.uint8))
    content = bytearray((tmp_path / "cut.npz").read_bytes())
    content[len(content) // 2] ^= 255
    Path(tmp_path / "cut.npz").write_bytes(content)
    opened = open_samples(tmp_path / "cut.npz")
    with pytest.raises(InputError, match=r"cut\.npz is not a readable \.npz file"):
        opened[:]


def test_signals_stop_between_batches(tmp_path, training):
    """As a signal does in the middle of a batch: that batch is kept, and the claim of no other is left."""
    from lamabench.harness import signals

    class Signalled(Progress):
        def update(self, stage, done, total, **facts):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt), signals.noted():
        generate(tmp_path, training, make(tmp_path), 2, Signalled())
    (place,) = tmp_path.glob("shards/*")
    assert pieces_of(place) == [(0, 4)] and len(read_lines(place / "claims.jsonl")) == 2
