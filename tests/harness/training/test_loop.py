"""Training: a killed run continues bit for bit, and every way to go wrong ends in a clear state."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from lamabench.baselines.dit import DiTConfig
from lamabench.harness import run as runs
from lamabench.harness.config import BackendConfig, Config, DataConfig, RunConfig, SampleConfig, TrainConfig, check_fit
from lamabench.harness.device import autocast, compiled, round_weights
from lamabench.harness.measure.models import fill_constants
from lamabench.harness.progress import Progress
from lamabench.harness.record import append, read_lines, read_run
from lamabench.harness.training import checkpoint as ckpt
from lamabench.harness.training import loop as train_module
from lamabench.harness.training.loop import Diverged, initial_model, train
from lamabench.kernels import OPERATORS
from lamabench.kernels.errors import InputError
from lamabench.models.lamamba import LaMambaConfig
from lamabench.models.registry import build, preset, to_dict
from safetensors import safe_open

LAMAMBA = LaMambaConfig(
    input_size=8, in_channels=1, num_classes=10, dim=8, depths=[1, 1, 1], bottleneck_depth=1, num_heads=2,
    window_size=4, d_state=2, patch_size=2,
)  # fmt: skip
DIT = DiTConfig(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=16, depth=1, num_heads=2)
ADM = replace(preset("unet_nano").config, input_size=8)


def make(model=DIT, steps=6, root="runs", **settings):
    return Config(
        model=model,
        data=DataConfig(kind="digits", size=8, channels=1, num_classes=10),
        train=TrainConfig(**{"steps": steps, "batch_size": 4, "lr": 1e-3, "ema_decay": 0.9, "precision": "float32",
                             **settings}),
        run=RunConfig(root=str(root), device="cpu", log_every=2, checkpoint_every=2),
    )  # fmt: skip


def tensors(folder):
    with safe_open(ckpt.files(folder / "checkpoints")[0], "pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def metrics(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(folder / "metrics.jsonl")]


def create(config):
    info = runs.describe(config, study="t", name="t", model="dit_nano", variant={}, overrides=[])
    return runs.create(info)


def assert_same(a, b):
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys() and any(name.startswith("exp_avg_sq/") for name in first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert metrics(a) == metrics(b)


@pytest.mark.parametrize("model", [LAMAMBA, DIT, ADM], ids=["lamamba", "dit", "adm"])
def test_killed_run_continues_bit_for_bit(model, tmp_path):
    """SIGKILL a training process after its first checkpoint, start again, compare with an unbroken run."""
    steps = 24
    whole = create(make(model, steps, tmp_path / "whole"))
    train(whole, make(model, steps), Progress())
    broken = create(make(model, steps, tmp_path / "broken"))
    config = make(model, steps, tmp_path / "broken")
    code = (
        f"import sys, time, torch; torch.set_num_threads({torch.get_num_threads()})\n"
        "from pathlib import Path\n"
        "from lamabench.harness.training import loop as module\n"
        "from lamabench.harness.run import config_from_dict\n"
        "from lamabench.harness.record import read_run\n"
        "from lamabench.harness.progress import Progress\n"
        "append = module.append\n"
        "module.append = lambda *a: (append(*a), time.sleep(0.3))\n"  # time to be killed in
        "folder = Path(sys.argv[1])\n"
        "module.train(folder, config_from_dict(read_run(folder).info['config']), Progress())\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(broken)], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(read_lines(broken / "metrics.jsonl")) < 4 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.communicate()
    assert 0 < len(ckpt.files(broken / "checkpoints")) <= 2
    assert len(metrics(broken)) < steps // 2
    train(broken, config, Progress())
    assert_same(whole, broken)


def test_interruption_between_log_and_checkpoint(tmp_path, monkeypatch):
    """Stopped at the log of step 6, the newest checkpoint is of step 4: metrics after it are made again, and the
    window from 3 to 6, cut by that checkpoint, is whole."""

    def config_in(root):
        made = make(steps=9, root=root)
        made.run.log_every, made.run.checkpoint_every = 3, 4
        return made

    def stop_at_six(path, line):
        append(path, line)
        if line["step"] == 6:
            raise KeyboardInterrupt

    whole, broken = create(config_in(tmp_path / "a")), create(config_in(tmp_path / "b"))
    train(whole, config_in(tmp_path / "a"), Progress())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_module, "append", stop_at_six)
        train(broken, config_in(tmp_path / "b"), Progress())
    assert [line["step"] for line in metrics(broken)] == [3, 6]
    assert [path.stem for path in ckpt.files(broken / "checkpoints")] == ["step-00000004"]
    train(broken, config_in(tmp_path / "b"), Progress())
    assert_same(whole, broken)


def test_compiled_training(tmp_path, monkeypatch, traced):
    """Compiled and checkpointed: the same losses but for rounding, checkpoints that fit a plain run, and a broken run
    that continues bit for bit."""
    settings = {"steps": 6, "compile": "compile", "checkpointing": True}
    plain = create(make(root=tmp_path / "plain"))
    record = train(plain, make(), Progress())
    assert (record["compile"], record["checkpointing"]) == ("eager", False) and not traced
    whole, broken = (create(make(root=tmp_path / name, **settings)) for name in "ab")
    record = train(whole, make(**settings), Progress())
    assert (record["compile"], record["checkpointing"]) == ("compile", True)
    assert traced == [{"fullgraph": True, "dynamic": False}]
    losses = [[line["loss"] for line in metrics(folder)] for folder in (whole, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert tensors(whole).keys() == tensors(plain).keys()

    def stop_at_four(path, line):
        append(path, line)
        if line["step"] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_module, "append", stop_at_four)
        train(broken, make(**settings), Progress())
    train(broken, make(**settings), Progress())
    assert_same(whole, broken)


def test_compiling_more_models_than_torch_keeps_graphs_for(traced):
    """torch keeps a few graphs of a forward method; each of these models needs one of its own."""
    for width in (16, 20, 24):
        net = build(replace(DIT, hidden_size=width)).eval()
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
            out = compiled(net, "compile")(torch.randn(1, 1, 8, 8), *torch.zeros(2, 1, dtype=torch.long))
            assert out.shape == (1, 2, 8, 8)


def test_what_breaks_the_graph_is_an_error(traced):
    """Never a plain call in its place."""
    net = build(DIT)
    net.blocks[0].register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(net, "compile")(torch.randn(1, 1, 8, 8), *torch.zeros(2, 1, dtype=torch.long))


def test_compile_and_checkpointing_are_part_of_a_run():
    ids = {runs.describe(make(**settings), study="t", name="t", model="dit_nano", variant={}, overrides=[])["id"]
           for settings in ({}, {"compile": "compile"}, {"checkpointing": True})}  # fmt: skip
    assert len(ids) == 3


def test_float16_is_refused_with_the_reason():
    with pytest.raises(InputError, match=r"train\.precision=float16 .*65504.*no loss scaling.*float32, bfloat16$"):
        TrainConfig(precision="float16")
    with pytest.raises(InputError, match=r"unknown train\.precision 'fp16'; choices: float32, bfloat16"):
        TrainConfig(precision="fp16")


def test_workers_change_nothing(tmp_path):
    folders = []
    for workers in (0, 2):
        config = make(steps=4, root=tmp_path / str(workers))
        config.run.workers = workers
        folders.append(create(config))
        train(folders[-1], config, Progress())
    assert_same(*folders)


@pytest.mark.parametrize("model", [LAMAMBA, DIT, ADM], ids=["lamamba", "dit", "adm"])
def test_micro_batches_are_the_same_training(model, tmp_path):
    """At most four images at a time of six, so three: the gradients of the first step, which Adam's moments hold, and
    the losses of all are those of the whole batch."""
    whole, parts = (make(model, batch_size=6, root=tmp_path / name) for name in ("whole", "parts"))
    parts.run.micro_batch = 4
    whole.run.checkpoint_every = parts.run.checkpoint_every = 1
    assert create(whole).name == create(parts).name  # one identity: where and how, not what
    first, losses = [], []
    for config, size in ((whole, 6), (parts, 3)):
        folder = create(config)
        one = replace(config, train=replace(config.train, steps=1))
        assert train(folder, one, Progress())["micro_batch"] == size
        first.append(tensors(folder))
        train(folder, config, Progress())
        losses.append([line["loss"] for line in metrics(folder)])
    for name, tensor in first[0].items():
        if name.startswith("exp_avg/"):
            error = (first[1][name] - tensor).abs().max().item()
            assert error <= 1e-5 * tensor.abs().max().item() + 1e-9, name
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) > 1


def test_every_step_is_progress(tmp_path):
    """Also where the next line of the log is minutes away; the loss is that of the last one."""
    seen = []

    class Watched(Progress):
        def update(self, stage, done, total, **facts):
            seen.append((done, facts.get("loss")))

    folder = create(make(DIT, 5, tmp_path))
    train(folder, make(DIT, 5, tmp_path), Watched())
    first, second, last = (f"{line['loss']:.4f}" for line in metrics(folder))
    assert seen == [(0, None), (1, None), (2, first), (3, first), (4, second), (5, last)]


def test_average_follows_the_weights(tmp_path):
    """After one step: ema = 0.9 · start + 0.1 · weights; Adam's first step is lr · sign(gradient) (up to its eps)."""
    config = make(steps=1, root=tmp_path)
    folder = create(config)
    train(folder, config, Progress())
    saved, start = tensors(folder), initial_model(config).state_dict()
    for name, before in start.items():
        after = saved[f"model/{name}"]
        assert torch.allclose(saved[f"ema/{name}"], 0.9 * before + 0.1 * after, atol=1e-7), name
    name = "blocks.0.mlp.fc1.bias"
    moved = saved["model/final_layer.linear.bias"] - start["final_layer.linear.bias"]
    gradient = saved["exp_avg/final_layer.linear.bias"] / 0.1  # the first moment after one step, beta1 0.9
    assert torch.allclose(moved, -1e-3 * gradient / (gradient.abs() + 1e-8), atol=1e-8)
    assert torch.equal(saved[f"model/{name}"], start[name])  # behind a closed gate nothing moves at first


@pytest.mark.parametrize("model", [LAMAMBA, DIT, ADM], ids=["lamamba", "dit", "adm"])
def test_loss_falls(model, tmp_path):
    config = make(model, steps=30, root=tmp_path, lr=3e-3, batch_size=16)
    folder = create(config)
    record = train(folder, config, Progress())
    losses = [line["loss"] for line in read_lines(folder / "metrics.jsonl")]
    assert record["final_loss"] == losses[-1] < 0.8 * losses[0]
    assert record["images"] == 480 and record["backend"]


def test_initial_weights_do_not_depend_on_what_was_drawn_before():
    torch.manual_seed(1)
    first = initial_model(make()).state_dict()
    torch.rand(7)
    assert all(torch.equal(v, first[k]) for k, v in initial_model(make()).state_dict().items())
    other = initial_model(replace(make(), seed=1)).state_dict()
    assert not all(torch.equal(v, first[k]) for k, v in other.items())


def test_divergence_stops_and_is_recorded(tmp_path):
    config = make(steps=40, root=tmp_path, lr=1e18)
    folder = create(config)
    with pytest.raises(Diverged, match=r"the loss is not finite by step \d+ of 40: loss (nan|inf)"):
        runs.execute(folder, ["train"], Progress())
    record = read_run(folder).last("train")
    assert record["state"] == "diverged" and "not finite" in record["error"]
    for path in ckpt.files(folder / "checkpoints"):
        assert all(torch.isfinite(v).all() for v in ckpt.load(path).group("model").values())


def finished(tmp_path, steps=6):
    config = make(steps=steps, root=tmp_path)
    folder = create(config)
    train(folder, config, Progress())
    return folder, config


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_checkpoint_falls_back_and_says_so(tmp_path, capsys, damage):
    folder, config = finished(tmp_path)
    expected = tensors(folder)
    newest, before = ckpt.files(folder / "checkpoints")
    with open(newest, "r+b") as file:
        if damage == "flip":  # one bit of a tensor
            file.seek(-9, 2)
            (byte,) = file.read(1)
            file.seek(-9, 2)
            file.write(bytes([byte ^ 4]))
        else:
            file.truncate(newest.stat().st_size // 2 if damage == "cut" else 0)
    with pytest.raises(InputError, match=f"{newest.name} is truncated or damaged"):
        ckpt.load(newest)
    train(folder, config, Progress())
    said = capsys.readouterr().err
    assert "falling back to the one before" in said and f"continuing at step {int(before.stem[5:])} of 6" in said
    assert all(torch.equal(v, expected[k]) for k, v in tensors(folder).items())


def test_damaged_checkpoints_do_not_take_the_place_of_whole_ones(tmp_path, capsys):
    """Training that begins anew below damaged files keeps its last two checkpoints, not theirs."""
    folder, config = finished(tmp_path)
    expected = tensors(folder)
    for path in ckpt.files(folder / "checkpoints"):
        path.write_bytes(b"")
    train(folder, replace(config, train=replace(config.train, steps=2)), Progress())
    assert "training begins anew at step 0 of 2" in capsys.readouterr().err
    assert [path.name for path in ckpt.files(folder / "checkpoints")] == ["step-00000002.safetensors"]
    train(folder, config, Progress())
    assert "continuing at step 2 of 6" in capsys.readouterr().err and len(ckpt.files(folder / "checkpoints")) == 2
    assert all(torch.equal(v, expected[k]) for k, v in tensors(folder).items())


def test_other_files_are_not_checkpoints(tmp_path):
    path = tmp_path / "step-00000001.safetensors"
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="not a lamabench checkpoint"):
        ckpt.load(path)
    with pytest.raises(InputError, match="no such checkpoint"):
        ckpt.load(tmp_path / "nothing.safetensors")


def test_checkpoint_of_another_model_is_refused(tmp_path):
    folder, config = finished(tmp_path)
    other = replace(config, model=replace(DIT, depth=2))
    with pytest.raises(InputError, match="of another model: depth 1 there, 2 here"):
        train(folder, other, Progress())
    saved = ckpt.load(ckpt.files(folder / "checkpoints")[0])
    with pytest.raises(InputError, match="family dit there, lamamba here"):
        ckpt.check_model(saved, to_dict(LAMAMBA) | {"depth": 1}, folder)


def test_other_data_behind_the_same_name_is_refused(tmp_path):
    folder, config = finished(tmp_path)
    other = replace(config, data=replace(config.data, kind="synthetic"))
    with pytest.raises(InputError, match=r"trained on other data.*data\.name"):
        train(folder, other, Progress())


def test_save_leaves_nothing_half_written(tmp_path, monkeypatch):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ckpt, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        ckpt.save(tmp_path, ckpt.Checkpoint(1, 0.0, {}, "", {"x": torch.zeros(1)}))
    assert not list(tmp_path.iterdir())


def test_checkpoints_hold_no_pickle(tmp_path):
    folder, _ = finished(tmp_path, steps=2)
    head = ckpt.files(folder / "checkpoints")[0].read_bytes()
    length = int.from_bytes(head[:8], "little")
    assert "lamabench" in json.loads(head[8 : 8 + length])["__metadata__"]
    assert {p.suffix for p in folder.rglob("*") if p.is_file() and p.name != ".lock"} <= {".json", ".jsonl",
                                                                                          ".safetensors"}  # fmt: skip


BAD = [
    (make(replace(DIT, input_size=16)), "model.input_size 16 does not fit data.size 8"),
    (make(replace(DIT, num_classes=3)), "model.num_classes 3 does not fit data.num_classes 10"),
    (make(replace(ADM, null_class=False)), "train.class_dropout 0.1 needs a null class"),
    (
        replace(make(replace(ADM, null_class=False), class_dropout=0.0), sample=SampleConfig(guidance=2.0)),
        "sample.guidance 2.0 needs a null class",
    ),
    (
        replace(make(), sample=SampleConfig(guidance_channels=3)),
        "sample.guidance_channels 3 is more than the model's 1",
    ),
    (
        replace(make(compile="reduce-overhead"), run=RunConfig(micro_batch=2)),
        "run.micro_batch adds gradients up .*: choose train.compile=compile, or run.micro_batch=null",
    ),
]


@pytest.mark.parametrize(("config", "message"), BAD)
def test_model_and_data_must_fit(config, message):
    with pytest.raises(InputError, match=message):
        check_fit(config)


def test_reference_backend_trains_alike(tmp_path):
    """The same few steps with the plain and the fast scan and attention: losses agree to rounding."""
    losses = []
    for name in ("auto", "reference"):
        config = make(LAMAMBA, steps=4, root=tmp_path / name)
        config.backend = BackendConfig(**dict.fromkeys(OPERATORS, name))
        folder = create(config)
        record = train(folder, config, Progress())
        losses.append([line["loss"] for line in metrics(folder)])
        assert record["backend"]["selective_scan"] == {"auto": "torch", "reference": "reference"}[name]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("name", ["lamamba_nano", "dit_nano", "unet_nano"])
def test_weights_rounded_beforehand_give_the_same_bits(name):
    config = preset(name).config
    torch.manual_seed(0)
    net = build(config).eval()
    fill_constants(net)
    rounded, kept = (build(config).eval() for _ in range(2))
    for other, precision in ((rounded, "bfloat16"), (kept, "float32")):
        other.load_state_dict(net.state_dict())
        round_weights(other, precision)
    assert all(parameter.dtype == torch.float32 for parameter in kept.parameters())
    smaller = [name for name, parameter in rounded.named_parameters() if parameter.dtype == torch.bfloat16]
    assert sum(rounded.get_parameter(one).numel() for one in smaller) > 0.6 * sum(p.numel() for p in net.parameters())
    x = torch.randn(3, config.in_channels, config.input_size, config.input_size)
    t, y = torch.tensor([1, 500, 999]), torch.zeros(3, dtype=torch.int64)
    with torch.no_grad(), autocast("cpu", "bfloat16"):
        assert torch.equal(net(x, t, y), rounded(x, t, y))


@pytest.mark.gpu
@pytest.mark.parametrize("model", [LAMAMBA, DIT, ADM], ids=["lamamba", "dit", "adm"])
def test_gpu_tracks_the_cpu(model, tmp_path):
    losses = {}
    for device, precision in (("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")):
        config = make(model, steps=40, root=tmp_path / device / precision, precision=precision, batch_size=16)
        config.run.device = device
        folder = create(config)
        train(folder, config, Progress())
        losses[device, precision] = [line["loss"] for line in metrics(folder)]
    assert losses["cuda", "float32"] == pytest.approx(losses["cpu", "float32"], rel=2e-3)
    assert losses["cuda", "bfloat16"] == pytest.approx(losses["cpu", "float32"], rel=5e-2)
