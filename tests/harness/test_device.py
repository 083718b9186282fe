"""Devices, rounded weights, and torch.compile."""

import threading
from dataclasses import replace
from queue import Queue

import pytest
import torch
from lamabench.baselines.dit import DiTConfig
from lamabench.harness import device, sections
from lamabench.harness.device import autocast, compiled, device_type, is_cuda, pick_device, round_weights, wake
from lamabench.harness.measure.models import fill_constants
from lamabench.kernels.errors import InputError
from lamabench.models.registry import build, preset

DIT = DiTConfig(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=16, depth=1, num_heads=2)


def gpus(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_devices_of_this_machine(monkeypatch):
    gpus(monkeypatch, 0)
    assert pick_device("auto") == pick_device("cpu") == "cpu"
    gpus(monkeypatch, 2)
    assert pick_device("auto") == "cuda"
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        assert pick_device(name) == name
    assert (device_type("cuda:1"), device_type("cpu")) == ("cuda", "cpu") and is_cuda("cuda:1") and not is_cuda("cpu")


@pytest.mark.parametrize(
    ("request_", "count", "message"),
    [
        ("cuda", 0, "run.device=cuda, but torch finds no GPU here; choices: auto, cpu"),
        ("cuda:9", 0, "run.device=cuda:9, but torch finds no GPU here; choices: auto, cpu"),
        ("cuda:9", 2, r"unknown run.device 'cuda:9'.*; choices: auto, cpu, cuda, cuda:0, cuda:1$"),
        ("cuda:-1", 2, "unknown run.device 'cuda:-1'"),
        ("tpu", 0, "unknown run.device 'tpu'.*; choices: auto, cpu$"),
        ("meta", 2, "unknown run.device 'meta'.*; choices: auto, cpu, cuda"),
    ],
)
def test_other_devices_are_one_line(monkeypatch, request_, count, message):
    gpus(monkeypatch, count)
    with pytest.raises(InputError, match=message) as caught:
        pick_device(request_)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lamamba_nano", "dit_nano", "dit_modern_nano", "unet_nano", "uvit_nano"])
def test_rounded_weights_give_the_same_bits(name):
    model = preset(name).config
    torch.manual_seed(0)
    net = build(model).eval()
    fill_constants(net)
    net.requires_grad_(False)  # else torch multiplies transposed inputs in another order by rounded weights
    rounded, unchanged = (build(model).eval().requires_grad_(False) for _ in range(2))
    for other, precision in ((rounded, "bfloat16"), (unchanged, "float32")):
        other.load_state_dict(net.state_dict())
        round_weights(other, precision)
    assert all(parameter.dtype == torch.float32 for parameter in unchanged.parameters())
    smaller = [name for name, parameter in rounded.named_parameters() if parameter.dtype == torch.bfloat16]
    assert sum(rounded.get_parameter(one).numel() for one in smaller) > 0.6 * sum(p.numel() for p in net.parameters())
    x = torch.randn(3, model.in_channels, model.input_size, model.input_size)
    t, y = torch.tensor([1, 500, 999]), torch.zeros(3, dtype=torch.int64)
    with torch.no_grad(), autocast("cpu", "bfloat16"):
        assert torch.equal(net(x, t, y), rounded(x, t, y))


def test_compile_modes_are_those_of_torch():
    """The modes are torch's own, and `CUDA_GRAPHS` names those whose options include CUDA graphs."""
    graphs = set()
    for kind in sections.COMPILE[1:]:
        mode = device.COMPILE_OPTIONS[kind].get("mode", "default")
        assert mode in ("default", kind)
        if torch._inductor.list_mode_options(mode).get("triton.cudagraphs"):
            graphs.add(kind)
    assert graphs == set(sections.CUDA_GRAPHS)


def test_compiling_more_models_than_torch_keeps_graphs(traced):
    """torch keeps few graphs of a forward method, but each of these models needs its own graph."""
    for width in (16, 20, 24):
        net = build(replace(DIT, hidden_size=width)).eval()
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
            out = compiled(net, "compile")(torch.randn(1, 1, 8, 8), *torch.zeros(2, 1, dtype=torch.long))
            assert out.shape == (1, 2, 8, 8)


def test_a_graph_break_is_an_error(traced):
    """There is no silent fallback to eager."""
    net = build(DIT)
    net.blocks[0].register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(net, "compile")(torch.randn(1, 1, 8, 8), *torch.zeros(2, 1, dtype=torch.long))


def test_a_gpu_wakes_in_a_thread_whose_errors_are_those_of_the_next_use(monkeypatch):
    calls, errors = Queue(), []

    def zeros(*size, device):
        calls.put((threading.current_thread(), device))
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(threading, "excepthook", errors.append)
    wake("cpu")
    wake("cuda:1")
    thread, device = calls.get(timeout=60)
    thread.join(60)
    assert device == "cuda:1" and thread is not threading.current_thread() and calls.empty() and not errors
