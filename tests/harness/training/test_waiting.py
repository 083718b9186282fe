"""The time in which a device waits for data, over interruptions and in records."""

import time
from dataclasses import replace

import pytest
import torch
from lamabench.harness.disk import read_lines
from lamabench.harness.progress import Progress
from lamabench.harness.record import row
from lamabench.harness.training import checkpoint, loop
from lamabench.harness.training.loop import train
from lamabench.harness.training.waiting import Waiting
from trainings import assert_same, longer, make, trained

SLOW_S = 0.05


def slow(batches):
    """Batches of which each takes a while."""

    def fetch(*words):
        for batch in batches(*words):
            time.sleep(SLOW_S)
            yield batch

    return fetch


def test_waiting_is_measured_and_goes_on(tmp_path, monkeypatch):
    """Five of ten batches are slow, before and after a resume."""
    whole = trained(tmp_path / "whole", make(steps=10))
    folder, config = tmp_path / "run", make(steps=10)
    trained(folder, longer(config, 3))
    quick = checkpoint.load(checkpoint.files(folder / "checkpoints")[0])
    assert quick.waited is not None and 0 < quick.waited < quick.seconds
    with monkeypatch.context() as patch:
        patch.setattr(loop, "batches", slow(loop.batches))  # pyright: ignore[reportPrivateLocalImportUsage]
        trained(folder, longer(config, 6))
        record = train(folder, longer(config, 8), Progress())
    assert 5 * SLOW_S < record["waiting_share"] * record["seconds"] < min(record["seconds"], 5 * SLOW_S + 1)
    again = train(folder, config, Progress())
    saved = checkpoint.load(checkpoint.files(folder / "checkpoints")[0])
    assert saved.waited is not None
    assert again["waiting_share"] == pytest.approx(saved.waited / saved.seconds, abs=1e-4)
    assert 5 * SLOW_S < saved.waited < saved.seconds
    lines = [line["waited"] for line in read_lines(folder / "metrics.jsonl")]
    assert lines == sorted(lines) and lines[-1] == round(saved.waited, 3)
    assert row("train", key="", **again).waiting_share == again["waiting_share"]
    assert_same(whole, folder)


def test_it_is_unknown_after_a_checkpoint_that_does_not_say_it(tmp_path):
    config = make(steps=4)
    folder = trained(tmp_path, longer(config, 2))
    (path,) = checkpoint.files(folder / "checkpoints")
    checkpoint.save(path.parent, replace(checkpoint.load(path), waited=None))
    assert train(folder, config, Progress())["waiting_share"] is None
    assert [("waited" in line) for line in read_lines(folder / "metrics.jsonl")] == [True, False]


@pytest.mark.gpu
def test_a_gpu_that_still_works_does_not_wait():
    """A fetch costs the time in which the GPU is idle, and no more."""
    cycles = int(2e8)  # about 0.1 s
    torch.cuda._sleep(1000)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    torch.cuda.synchronize()
    started = time.perf_counter()
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()
    busy = time.perf_counter() - started

    def source(seconds):
        for _ in range(3):
            time.sleep(seconds)
            yield {}

    for fetch, expected in ((busy / 2, busy / 2), (2 * busy, 4 * busy)):
        waiting = Waiting("cuda")
        for _ in waiting.around(source(fetch)):
            torch.cuda._sleep(cycles)
        torch.cuda.synchronize()
        # The first fetch is of an idle GPU; the others are hidden, or as long as the rest of the step.
        assert waiting.seconds() == pytest.approx(expected, rel=0.2), fetch
