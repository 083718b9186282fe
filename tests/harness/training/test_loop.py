"""The loop and its step: a killed training continues bit for bit, and a diverged one leaves no bad weights."""

import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from lamabench.harness.data.images import load
from lamabench.harness.data.items import epoch_order
from lamabench.harness.disk import read_lines
from lamabench.harness.progress import Progress
from lamabench.harness.sections import BackendConfig, RunConfig
from lamabench.harness.training import checkpoint, loop
from lamabench.harness.training.loop import train
from lamabench.harness.training.start import initial_model
from lamabench.harness.training.steps import Diverged
from lamabench.kernels import OPERATORS
from lamabench.kernels.errors import InputError
from PIL import Image
from trainings import DIT, FAMILIES, LAMAMBA, assert_same, longer, make, metrics, stop_at, tensors, trained


# One family is enough: test_resume.py continues each of them bit for bit.
@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=() if family == "dit" else pytest.mark.soak) for family in FAMILIES]
)
def test_a_killed_training_continues_bit_for_bit(family, tmp_path):
    """Kill a training process after its first checkpoint, continue, and compare with an uninterrupted run."""
    config = make(FAMILIES[family], 24)
    whole, broken = trained(tmp_path / "whole", config), tmp_path / "broken"
    broken.mkdir()
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    code = (
        f"import pickle, sys, time, torch; torch.set_num_threads({torch.get_num_threads()})\n"
        "from pathlib import Path\n"
        "from lamabench.harness.training import folder, loop\n"
        "from lamabench.harness.progress import Progress\n"
        "append = folder.append\n"
        "folder.append = lambda *a: (append(*a), time.sleep(0.3))\n"  # time for the kill
        "config = pickle.loads(Path(sys.argv[2]).read_bytes())\n"
        "loop.train(Path(sys.argv[1]), config, Progress())\n"
    )
    command = [sys.executable, "-c", code, str(broken), str(tmp_path / "config")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(read_lines(broken / "metrics.jsonl")) < 4 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.communicate()
    assert 0 < len(checkpoint.files(broken / "checkpoints")) <= 2
    assert len(metrics(broken)) < config.train.steps // 2
    assert_same(whole, trained(broken, config))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_is_damaged_in_the_middle(workers, tmp_path, monkeypatch, capsys):
    """The run stops with the name of the file at the last whole step. With the same bytes again it continues there and
    ends as an undisturbed run does."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for i in range(20):
        (tmp_path / "set" / f"{i % 10}").mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
        image.save(tmp_path / "set" / f"{i % 10}" / f"{i}.png")
    config = make(steps=9, log_every=3, checkpoint_every=100)
    data = replace(config.data, kind="folder", path=str(tmp_path / "set"))
    config = replace(config, data=data, run=replace(config.run, workers=workers))
    whole, broken = trained(tmp_path / "whole", config), tmp_path / "broken"
    last = load(data).files[int(epoch_order(config.seed, 0, 20)[-1])]  # an image of step 5
    good = last.read_bytes()
    batches = loop.batches

    def damage(*words):
        last.write_bytes(good[: len(good) // 2])
        return batches(*words)

    with monkeypatch.context() as patch, pytest.raises(InputError, match=f"^unreadable image {last}: .*truncated"):
        patch.setattr(loop, "batches", damage)
        trained(broken, config)
    assert [file.name for file in checkpoint.files(broken / "checkpoints")] == [checkpoint.file_name(4)]
    assert "saved at step 4 of 9" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in broken.rglob("*")}
    with pytest.raises(InputError, match=f"^unreadable image {last}: "):
        trained(broken, config)
    assert before == {path: path.stat().st_mtime_ns for path in broken.rglob("*")}
    last.write_bytes(good)
    assert_same(whole, trained(broken, config))
    assert "continuing at step 4 of 9" in capsys.readouterr().err


def test_interruption_between_log_and_checkpoint(tmp_path, monkeypatch):
    """Training stops at the log of step 6 with a checkpoint of step 4. Later metrics are computed again, and the window
    from 3 to 6, which that checkpoint interrupts, is complete."""
    config = make(steps=9, log_every=3, checkpoint_every=4)
    whole, broken = trained(tmp_path / "a", config), tmp_path / "b"
    stop_at(monkeypatch, 6, broken, config)
    assert [line["step"] for line in metrics(broken)] == [3, 6]
    assert [path.stem for path in checkpoint.files(broken / "checkpoints")] == ["step-00000004"]
    assert_same(whole, trained(broken, config))


def test_means_stay_right_if_log_every_changes(tmp_path, monkeypatch):
    """Training stops with a line every 3 steps and continues with one every 2. The window keeps its start."""
    every, broken = trained(tmp_path / "a", make(steps=6, log_every=1)), tmp_path / "b"
    stop_at(monkeypatch, 6, broken, make(steps=9, log_every=3, checkpoint_every=4))
    trained(broken, make(steps=6, log_every=2))
    steps, losses = zip(*((line["step"], line["loss"]) for line in metrics(broken)), strict=True)
    single = [line["loss"] for line in metrics(every)]
    assert steps == (3, 6)
    assert losses == pytest.approx([sum(single[:3]) / 3, sum(single[3:]) / 3], rel=1e-6)


def test_compiled_training(tmp_path, monkeypatch, traced):
    """Compiled and with checkpointing, losses are the same except for rounding, checkpoints fit a plain run, and an
    interrupted run continues bit for bit."""
    config = make(steps=6, compile="compile", checkpointing=True)
    plain = trained(tmp_path / "plain", make())
    assert not traced
    whole, broken = tmp_path / "a", tmp_path / "b"
    whole.mkdir()
    record = train(whole, config, Progress())
    assert (record["compile"], record["checkpointing"]) == ("compile", True)
    assert traced == [{"fullgraph": True, "dynamic": False}]
    losses = [[line["loss"] for line in metrics(folder)] for folder in (whole, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert tensors(whole).keys() == tensors(plain).keys()
    stop_at(monkeypatch, 4, broken, config)
    assert_same(whole, trained(broken, config))


def test_workers_change_nothing(tmp_path):
    config = make(steps=4)
    others = replace(config, run=replace(config.run, workers=2))
    assert_same(trained(tmp_path / "0", config), trained(tmp_path / "2", others))


@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_are_the_same_training(family, tmp_path):
    """At most four of six images in one pass means three. The gradients of the first step, from Adam's moments, and all
    losses are those of the whole batch."""
    whole = make(FAMILIES[family], batch_size=6, checkpoint_every=1)
    parts = replace(whole, run=replace(whole.run, micro_batch=4))
    first, losses = [], []
    for config, size in ((whole, 6), (parts, 3)):
        folder = tmp_path / str(size)
        folder.mkdir()
        assert train(folder, longer(config, 1), Progress())["micro_batch"] == size
        first.append(tensors(folder))
        losses.append([line["loss"] for line in metrics(trained(folder, config))])
    for name, tensor in first[0].items():
        if name.startswith("exp_avg/"):
            error = (first[1][name] - tensor).abs().max().item()
            assert error <= 1e-5 * tensor.abs().max().item() + 1e-9, name
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) > 1


def test_every_step_updates_the_progress(tmp_path):
    """The loss is that of the last line, which may be minutes old."""
    seen = []

    class Watched(Progress):
        def update(self, stage, done, total, **facts):
            seen.append((done, facts.get("loss")))

    train(tmp_path, make(DIT, 5), Watched())
    first, second, last = (f"{line['loss']:.4f}" for line in metrics(tmp_path))
    assert seen == [(0, None), (1, None), (2, first), (3, first), (4, second), (5, last)]


def test_average_follows_the_weights(tmp_path):
    """After one step: ema = 0.9 · start + 0.1 · weights; Adam's first step is lr · sign(gradient) (up to its eps)."""
    config = make(steps=1, ema_rampup=False)
    saved, start = tensors(trained(tmp_path, config)), initial_model(config).state_dict()
    for name, before in start.items():
        after = saved[f"model/{name}"]
        assert torch.allclose(saved[f"ema/{name}"], 0.9 * before + 0.1 * after, atol=1e-7), name
    name = "blocks.0.mlp.fc1.bias"
    moved = saved["model/final_layer.linear.bias"] - start["final_layer.linear.bias"]
    gradient = saved["exp_avg/final_layer.linear.bias"] / 0.1  # the first moment after one step, beta1 0.9
    assert torch.allclose(moved, -1e-3 * gradient / (gradient.abs() + 1e-8), atol=1e-8)
    assert torch.equal(saved[f"model/{name}"], start[name])  # the gate before it is closed at the start


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_falls(family, tmp_path):
    record = train(tmp_path, make(FAMILIES[family], steps=30, lr=3e-3, batch_size=16), Progress())
    losses = [line["loss"] for line in read_lines(tmp_path / "metrics.jsonl")]
    assert record["final_loss"] == losses[-1] < 0.8 * losses[0]
    assert record["images"] == 480 and record["backend"]


def test_initial_weights_do_not_depend_on_earlier_draws():
    torch.manual_seed(1)
    first = initial_model(make()).state_dict()
    torch.rand(7)
    assert all(torch.equal(v, first[k]) for k, v in initial_model(make()).state_dict().items())
    other = initial_model(replace(make(), seed=1)).state_dict()
    assert not all(torch.equal(v, first[k]) for k, v in other.items())


def test_divergence_stops_and_keeps_no_bad_weights(tmp_path):
    with pytest.raises(Diverged, match=r"the loss is not finite by step \d+ of 40: loss (nan|inf)"):
        train(tmp_path, make(steps=40, lr=1e18, log_every=50, checkpoint_every=50, snapshots=4), Progress())
    for folder in ("checkpoints", "weights"):
        for path in checkpoint.files(tmp_path / folder):
            assert all(torch.isfinite(v).all() for v in checkpoint.load(path).tensors.values())
    assert 40 not in checkpoint.moments(tmp_path)


def test_the_reference_backend_trains_the_same_way(tmp_path):
    """A few steps with the plain and the fast scan and attention have the same losses except for rounding."""
    losses = []
    for name in ("auto", "reference"):
        config = replace(make(LAMAMBA, steps=4), backend=BackendConfig(**dict.fromkeys(OPERATORS, name)))
        folder = tmp_path / name
        folder.mkdir()
        record = train(folder, config, Progress())
        losses.append([line["loss"] for line in metrics(folder)])
        assert record["backend"]["selective_scan"] == {"auto": "torch", "reference": "reference"}[name]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_training_switches_tf32_off_but_an_import_does_not(tmp_path):
    code = (
        "import torch, lamabench.harness.training.loop, lamabench.harness.measure.models\n"
        "assert torch.backends.cudnn.allow_tf32\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, True
    try:
        trained(tmp_path, make(steps=1))
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_gpu_tracks_the_cpu(family, tmp_path):
    losses = {}
    for device, precision in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")):
        config = make(FAMILIES[family], steps=40, precision=precision, batch_size=16)
        config.run.device = device
        losses[device, precision] = [line["loss"] for line in metrics(trained(tmp_path / device / precision, config))]
    assert losses["cuda", "float32"] == pytest.approx(losses["cpu", "float32"], rel=2e-3)
    assert losses["cuda", "bfloat16"] == pytest.approx(losses["cpu", "float32"], rel=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["eager", "reduce-overhead", "max-autotune", "whole-step"])
def test_an_interrupted_training_on_the_gpu_continues(kind, tmp_path):
    """Adam's moments and counts return to the GPU, and CUDA graphs are recorded again."""
    config = replace(make(DIT, steps=12, compile=kind), run=RunConfig(device="cuda", log_every=1))
    whole = metrics(trained(tmp_path / "whole", config))
    broken = metrics(trained(trained(tmp_path / "broken", longer(config, 6)), config))
    losses = [[line["loss"] for line in lines] for lines in (whole, broken)]
    assert len(losses[1]) == 12 and losses[1] == pytest.approx(losses[0], rel=1e-4)
