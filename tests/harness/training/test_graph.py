"""The whole step as one CUDA graph: the same training, and what happens where there is no graph."""

import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from lamabench.harness.device import training_mode
from lamabench.harness.keys import training_key
from lamabench.harness.progress import Progress
from lamabench.harness.record import read_records
from lamabench.harness.sections import RunConfig
from lamabench.harness.signals import Stopped
from lamabench.harness.stages import execute
from lamabench.harness.tasks import tasks
from lamabench.harness.training import loop
from lamabench.harness.training.checkpoint import files, load
from lamabench.harness.training.graph import WARM_UP, NotCaptured, WholeStep
from lamabench.harness.training.start import initial_model
from lamabench.harness.training.steps import Diverged, freeing
from lamabench.kernels.errors import InputError
from trainings import DIT, EVERY, make, metrics, tensors, trained


def test_auto_is_whole_step_on_a_gpu_and_eager_elsewhere():
    assert [training_mode("auto", device) for device in ("cpu", "cuda", "cuda:1")] == ["eager", *2 * ["whole-step"]]
    assert [training_mode("compile", device) for device in ("cpu", "cuda")] == 2 * ["compile"]
    with pytest.raises(InputError, match=r"compile=whole-step needs a GPU, and the device is cpu: auto is eager there"):
        training_mode("whole-step", "cpu")


def test_auto_has_a_key_of_its_own_and_its_record_says_what_ran(tmp_path):
    eager, auto = make(steps=2, compile="eager"), make(steps=2, compile="auto")
    assert training_key(eager) != training_key(auto)
    auto.run.root = str(tmp_path / "runs")
    (task,) = tasks(auto, {"study": "s", "name": "n", "variant": {}, "seed": 0, "model": "m", "title": "t"}, ["train"])
    execute(task, Progress())
    (row,) = [row for row in read_records(task.path / "record.jsonl") if row.kind == "train"]
    assert row.flat()["compile"] == "eager" and row.flat()["stretches"][0]["compile"] == "eager"
    assert metrics(task.path) == metrics(trained(tmp_path / "eager", eager))


def on_gpu(model, steps=12, micro_batch=None, **settings):
    run = RunConfig(device="cuda", log_every=1, checkpoint_every=100, micro_batch=micro_batch)
    return replace(make(model, steps=steps, **settings), run=run)


@pytest.mark.gpu
@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("family", [*EVERY, "dropout"])
def test_replays_are_the_same_training(family, micro_batch, tmp_path):
    """Every loss and, at the end, weights, averages and moments are those of the compiled step without a graph."""
    model = EVERY.get(family, replace(DIT, dropout=0.2))
    plain = trained(tmp_path / "plain", on_gpu(model, micro_batch=micro_batch, compile="compile", clip=0.5, warmup=8))
    whole = trained(tmp_path / "whole", on_gpu(model, micro_batch=micro_batch, compile="auto", clip=0.5, warmup=8))
    losses = [[line["loss"] for line in metrics(folder)] for folder in (plain, whole)]
    assert len(losses[1]) == 12 > WARM_UP + 2 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    first, second = tensors(plain), tensors(whole)
    assert first.keys() == second.keys()
    initial = initial_model(on_gpu(model)).state_dict()
    for kind in ("model/", "ema/", "exp_avg/", "exp_avg_sq/"):
        names = [name for name in first if name.startswith(kind)]
        start = {name: initial[name.removeprefix(kind)] if kind in ("model/", "ema/") else 0 for name in names}
        moved = sum((first[name] - start[name]).square().sum() for name in names)
        error = sum((first[name] - second[name]).square().sum() for name in names)
        assert error < 1e-3 * moved, kind  # relative to the way from the start
    assert load(files(whole / "checkpoints")[0]).stretches[-1]["compile"] == "whole-step"


@pytest.mark.gpu
def test_a_capture_while_another_thread_pins_memory():
    """As the thread of a DataLoader does, most of all in the first steps."""
    pinned, failures, end = [], [], threading.Event()

    def pin():
        try:
            while not end.is_set():
                pinned.append(torch.empty(4096, pin_memory=True))
        except RuntimeError as error:
            failures.append(error)

    total, one = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")

    def update(inputs):
        for _ in range(500):
            total.add_(inputs[0])
        time.sleep(0.2)  # of the host, which captures for a while

    step = WholeStep(update)
    thread = threading.Thread(target=pin)
    thread.start()
    try:
        for _ in range(WARM_UP + 3):
            step([one])
    finally:
        end.set()
        thread.join()
    assert failures == [] and len(pinned) > 100 and step.graph is not None
    assert total.tolist() == [500 * (WARM_UP + 3)] * 3


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured():
    """A step that waits for the GPU. With a fallback it goes on without a graph, and loses no call."""
    total = torch.zeros(3, device="cuda")

    def update(inputs):
        total.add_(inputs[0] * float(inputs[0].sum() > 0))  # the host reads a number

    one = torch.ones(3, device="cuda")
    step = WholeStep(update)
    for _ in range(WARM_UP):
        step([one])
    with pytest.raises(NotCaptured, match="cannot be captured as a CUDA graph: "):
        step([one])
    assert total.tolist() == [WARM_UP] * 3
    reasons, total[:] = [], 0
    step = WholeStep(update, reasons.append)
    for _ in range(WARM_UP + 5):
        step([one])
    assert total.tolist() == [WARM_UP + 5] * 3 and len(reasons) == 1 and "\n" not in reasons[0]


@pytest.mark.gpu
def test_replays_read_the_inputs_and_the_learning_rate_of_their_call(monkeypatch, tmp_path):
    """The rate is 0 from the seventh step on, when the graph has long been captured: the weights no longer move."""
    weights, captured = [], []
    set_rate = loop.TrainStep._set_rate

    def set_to_zero(self):
        weights.append(torch.cat([parameter.detach().flatten() for parameter in self.net.parameters()]))
        captured.append(self._run.graph is not None)
        self.lr = 1e-3 if len(weights) <= 6 else 0.0
        set_rate(self)

    monkeypatch.setattr(loop.TrainStep, "_set_rate", set_to_zero)
    trained(tmp_path, on_gpu(DIT, steps=10, compile="whole-step"))
    same = [torch.equal(before, after) for before, after in pairwise(weights)]
    assert captured == [False] * (WARM_UP + 1) + [True] * (9 - WARM_UP)
    assert same == [False] * 6 + [True] * 3
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert len(set(losses)) == len(losses)  # every replay saw another batch


@pytest.mark.parametrize(
    ("error", "frees"),
    [(None, True), (Diverged("x"), True), (InputError("x"), True), (Stopped("x"), True), (RuntimeError("x"), False)],
)
def test_a_training_frees_its_graph_unless_a_process_may_be_lost(error, frees):
    """Of a lost process, a call of NCCL in the graph never returns."""

    class Step:
        closed = False

        def close(self):
            self.closed = True

    step = Step()
    with pytest.raises(type(error)) if error else nullcontext(), freeing(step):
        if error:
            raise error
    assert step.closed == frees
