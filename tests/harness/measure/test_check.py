"""Every operator is compared with the reference in isolation before a benchmark prints a number."""

import json
import math
from dataclasses import replace

import pytest
import torch
from lamabench.baselines.dit import DiTConfig
from lamabench.harness.config import Config
from lamabench.harness.disk import read_lines
from lamabench.harness.measure import check, models
from lamabench.harness.measure.calls import Call, results
from lamabench.harness.measure.check import SMALL, Held, WrongOutput, check_operators, fill_free_memory
from lamabench.harness.sections import BenchConfig, DataConfig, RunConfig
from lamabench.kernels import OPERATORS
from lamabench.kernels.attention import PlainAttention, sdpa
from lamabench.kernels.errors import InputError
from lamabench.launch.cli import main
from lamabench.models.registry import Backbone, build, preset, select_backends
from measuring import collect
from torch import nn

DIT = DiTConfig(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=16, depth=2, num_heads=2)


def make(model=DIT, precision="float32", attention="flash4", **settings):
    quick = {"batch_size": [1, 2], "repeats": 2, "seconds": 0.05, "warmup": 1, "precision": precision}
    bench = BenchConfig(**{**quick, **settings})
    config = Config(model=model, data=DataConfig(), bench=bench, run=RunConfig(device="cpu"))
    config.backend.attention = attention
    return config


def ready(model, precision, **backends):
    """A net, its backends, and the reference of the whole net."""
    torch.manual_seed(0)
    net = build(model)
    models.fill_constants(net)
    return net, select_backends(net, backends, "cpu"), check.reference(net, precision, "cpu")


@pytest.fixture
def plant(monkeypatch):
    """Replaces FlashAttention 4, which does not run here and whose rival is plain torch, by a function."""

    def put(run):
        backends = OPERATORS["attention"].backends
        planted = replace(backends["flash4"], run=run, reasons=lambda device: [])
        monkeypatch.setitem(backends, "flash4", planted)
        monkeypatch.setattr(OPERATORS["attention"], "_resolved", {})  # forget earlier choices

    return put


@pytest.fixture
def compared(monkeypatch):
    """The calls that are compared, as (operator, shape of its first argument)."""
    calls, compare = [], Held.compare

    def watched(self, run, floor):
        calls.append((self.call.operator, tuple(self.call.args[0].shape)))
        return compare(self, run, floor)

    monkeypatch.setattr(Held, "compare", watched)
    return calls


class LastColumns(torch.autograd.Function):
    """The identity, with a gradient whose last four columns are wrong."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grad_outputs):
        wrong = grad_outputs[0].clone()
        wrong[..., -4:] = wrong[..., :4]
        return wrong


def wrong_gradient(q, k, v):
    return sdpa(LastColumns.apply(q), k, v)


def test_a_wrong_gradient_that_is_small_among_the_others_is_detected(plant):
    plant(wrong_gradient)
    net, backends, expected = ready(DIT, "bfloat16", attention="flash4")
    errors = check.check(net, net, expected, 2, "train", "bfloat16", "cpu")  # not visible in all gradients together
    assert errors["gradient_error"] < 0.02
    with pytest.raises(WrongOutput, match=r"^attention=flash4: q off by 1\.\de\+00, plain torch by \d\.\de-02: not"):
        check_operators(net, backends, expected.backends, "bfloat16", "cpu")
    rows, error = collect(make(precision="bfloat16", input_sizes=[8, 4]))
    assert len(rows) == 2 * 2 * 2 and error is not None  # sizes, modes, batches
    for row in rows:
        assert row["state"] == "wrong" and row["error"].startswith("attention=flash4: q off by")
        assert not any(name.endswith("_ms") or name == "images_per_s" for name in row)


def test_the_command_reports_it_and_fails(plant, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["depth=1", "hidden_size=16", "num_heads=2", "bench.batch_size=2", "run.device=cpu", "bench.seconds=0.05"]
    words += ["bench.precision=bfloat16", "backend.attention=flash4"]
    plant(wrong_gradient)
    assert main(["bench", "dit_nano", *words]) == 1
    assert "wrong: attention=flash4: q off by" in capsys.readouterr().err
    plant(sdpa)
    assert main(["bench", "dit_nano", *words]) == 0
    output = capsys.readouterr().err
    (path,) = tmp_path.glob("runs/bench/*/record.jsonl")
    lines = read_lines(path)
    assert [line["state"] for line in lines] == ["wrong", "wrong", "done", "done"]
    (error,) = {line.get("operator_error") for line in lines[2:]}
    assert "checked against float32, modulated_norm=reference, attention=reference; operators alone" in output
    assert f"operators alone off by {error:.1e} at most" in output


def test_a_wrong_output_is_detected_if_only_forward_passes_are_measured(plant):
    plant(lambda q, k, v: sdpa(q, k, v) * 1.01)
    rows, error = collect(make(modes=["forward"]))
    assert [row["state"] for row in rows] == ["wrong", "wrong"] and error is not None
    assert rows[0]["error"].startswith("attention=flash4: output off by 1.0e-02, plain torch by")


@pytest.mark.parametrize(("factor", "state"), [(1 + 5e-5, "done"), (1 + 2e-4, "wrong")])
def test_the_floor_is_that_of_whole_models(factor, state, plant):
    """1e-4 in float32, where bench-kernels allows 1e-5."""
    plant(lambda q, k, v: sdpa(q, k, v) * factor)
    rows, _ = collect(make(modes=["forward"]))
    assert [row["state"] for row in rows] == [state, state]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "calls"),
    [
        # The norms of a block without and with the branch before; the head's is as a block's first.
        ("dit_nano", {"modulated_norm": 2, "attention": 1}),
        ("dit_modern_nano", {"attention": 1}),
        ("uvit_nano", {"attention": 1}),
        # Two levels, of 8 × 8 and 4 × 4 tokens. Windows are shifted only on the larger level.
        (
            "lamamba_nano",
            {"depthwise_conv": 2, "selective_scan": 2, "gated_norm": 2, "modulated_norm": 5, "window_attention": 3},
        ),
        ("unet_nano", {"attention": 1}),
    ],
)
def test_the_right_backends_pass(name, calls, precision, compared):
    net, backends, expected = ready(preset(name).config, precision)
    net.eval()
    error = check_operators(net, backends, expected.backends, precision, "cpu")
    assert error is not None and 0 < error < {"float32": 1e-5, "bfloat16": 5e-2}[precision]
    assert not net.training and not net.checkpointing and all(v.grad is None for v in net.parameters())
    assert {operator: [one for one, _ in compared].count(operator) for operator in dict(compared)} == calls


def test_operators_are_checked_once_for_each_size(compared):
    rows, error = collect(make(attention="reference", input_sizes=[8, 4], checkpointing=[False, True]))
    assert error is None and len(rows) == 2 * 3 * 2
    assert [one for one in compared if one[0] == "attention"] == [
        ("attention", (1, 2, 16, 8)),
        ("attention", (1, 2, 4, 8)),
    ]
    assert all(0 < row["operator_error"] < 1e-5 for row in rows)


class Convolution(Backbone):
    """A net without operators."""

    def __init__(self):
        super().__init__()
        self.config, self.layer = DIT, nn.Conv2d(1, 2, 1)

    def forward(self, x, t, y):
        return self.layer(x)


def test_a_net_without_operators_has_no_error():
    net = Convolution()
    backends, expected = select_backends(net, {}, "cpu"), check.reference(net, "float32", "cpu")
    assert backends == {} and check_operators(net, backends, expected.backends, "float32", "cpu") is None


def test_queries_that_see_one_key_have_no_gradient():
    """The gradient is zero, so that no relative error exists."""
    rows, error = collect(make(replace(DIT, input_size=2), attention="sdpa"))
    assert error is None and all(row["state"] == "done" for row in rows)


def test_many_tokens_are_compared_with_plain_torch(monkeypatch):
    """In float64, and without storing every score of attention."""
    calls = []

    def watched(run, call, dtype=None, **more):
        calls.append((call.operator, run, dtype))
        return results(run, call, dtype, **more)

    monkeypatch.setattr(check, "results", watched)
    monkeypatch.setattr(check, "MANY_TOKENS", 16)
    for name, operator, backend, run in (
        ("dit_nano", "attention", "sdpa", PlainAttention.apply),
        ("lamamba_nano", "selective_scan", "torch", OPERATORS["selective_scan"].backends["torch"].run),
        ("lamamba_nano", "window_attention", "reference", OPERATORS["window_attention"].backends["reference"].run),
    ):
        net, backends, expected = ready(preset(name).config, "bfloat16")
        calls.clear()
        check_operators(net, backends, expected.backends, "bfloat16", "cpu")
        exact = {(run, dtype) for called, run, dtype in calls if called == operator and dtype}
        assert expected.backends[operator] == backend and exact == {(run, torch.float64)}


def test_the_outputs_gradient_has_the_layout_of_the_output():
    seen = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(x.stride())
            return x.view_as(x)

        @staticmethod
        def backward(ctx, *grad_outputs):
            seen.append(grad_outputs[0].stride())
            return grad_outputs[0]

    call = a_call(tokens=6)
    results(lambda q, k, v: Watched.apply(sdpa(q, k, v)), call)
    tokens_first = results(lambda q, k, v: Watched.apply(sdpa(q, k, v).mT.contiguous().mT), call)
    assert seen[0] == seen[1] and seen[2] == seen[3] != seen[0]
    exact = results(PlainAttention.apply, call, torch.float64)
    assert all(check.relative_rms([a], [b]) < 1e-5 for a, b in zip(tokens_first, exact, strict=True))


def test_torchs_own_attention_is_not_its_own_rival(monkeypatch):
    backends = OPERATORS["attention"].backends
    monkeypatch.setitem(backends, "sdpa", replace(backends["sdpa"], run=wrong_gradient))
    monkeypatch.setattr(OPERATORS["attention"], "_resolved", {})
    rows, error = collect(make(attention="sdpa", modes=["forward"]))
    assert error is not None and [row["state"] for row in rows] == ["wrong", "wrong"]
    assert "attention=sdpa: q off by" in rows[0]["error"]


@pytest.mark.parametrize(
    ("error", "state", "message"),
    [
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory"),
            "oom",
            "no reference for one image: OutOfMemoryError",
        ),
        (RuntimeError("no kernel image\nat a"), "failed", "RuntimeError: no kernel image"),
    ],
)
def test_a_backend_that_cannot_be_checked_is_in_every_row(error, state, message, plant):
    def broken(q, k, v):
        raise error

    plant(broken)
    rows, _ = collect(make(batch_size=[1]))
    assert [row["state"] for row in rows] == [state, state] and rows[0]["error"].startswith(message)


def test_a_backend_that_refuses_its_input_ends_the_benchmark(plant):
    def refused(q, k, v):
        raise InputError("attention: not this type")

    plant(refused)
    with pytest.raises(InputError, match="not this type"):
        collect(make())


# Uninitialised memory


def a_call(tokens=16, width=8, device="cpu"):
    draw = torch.Generator().manual_seed(0)
    args = tuple(torch.randn(1, 2, tokens, width, generator=draw).to(device) for _ in range(3))
    return Call("attention", args, (True, True, True))


def reader(left, place):
    """Attention that adds zero times the result of `left` to the queries or, in the backward pass, to the output's
    gradient. It does so first, before it uses and frees other memory."""

    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x + 0 * left(x) if place == "forward" else x.clone()

        @staticmethod
        def backward(ctx, *grad_outputs):
            return grad_outputs[0] + 0 * left(grad_outputs[0]) if place == "backward" else grad_outputs[0]

    if place == "forward":
        return lambda q, k, v: sdpa(Reads.apply(q), k, v)
    return lambda q, k, v: Reads.apply(sdpa(q, k, v))


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_memory_is_spoilt_before_each_pass(place, monkeypatch):
    """A number stands for the memory, and each reader resets it."""
    memory, sizes = [0.0], []

    def spoil(device, size):
        memory[0] = math.nan
        sizes.append(size)

    def left(x):
        content, memory[0] = memory[0], 0.0
        return torch.full_like(x, content)

    held = Held(a_call(), "float32", "cpu")
    assert held.compare(reader(left, place), 1e-5)["state"] == "done"
    monkeypatch.setattr(check, "fill_free_memory", spoil)
    row = held.compare(reader(left, place), 1e-5)
    assert row["state"] == "wrong" and row["error"].startswith(f"{'output' if place == 'forward' else 'q'} off by nan")
    assert row["relative_error"] is None and json.dumps(row, allow_nan=False)
    assert sizes == [8 * 3 * 2 * 16 * 8 * 4] * 2


def test_a_cpu_has_no_memory_to_spoil(monkeypatch):
    monkeypatch.setattr(torch, "full", None)
    fill_free_memory("cpu", SMALL)


def test_every_gap_is_filled(monkeypatch):
    """With a made-up snapshot of the allocator, and 160 MiB of free memory."""

    def segment(kind, *blocks):
        held = [{"size": size, "state": state} for size, state in blocks]
        return {"segment_type": kind, "total_size": sum(size for size, _ in blocks), "blocks": held}

    segments = [
        segment("small", (512, "active_allocated"), (2 * SMALL - 512, "inactive")),
        segment("large", (7 * SMALL, "inactive"), (11 * SMALL, "active_allocated"), (2 * SMALL, "inactive")),
    ]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (160 * SMALL, 0))
    taken, full = [], torch.full

    def counted(shape, value, dtype, device):
        taken.append(shape[0])
        assert device == "cuda:0" and full((8,), value, dtype=dtype).view(torch.bfloat16).isnan().all()

    monkeypatch.setattr(torch, "full", counted)
    gaps = [SMALL, SMALL - 512, 7 * SMALL, 2 * SMALL]
    for size, new in ((1, 32), (50 * SMALL, 50), (99 * SMALL, 80)):
        taken.clear()
        fill_free_memory("cuda:0", size)
        assert sorted(taken) == sorted([*gaps, *[SMALL] * 8, new * SMALL])


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize(("tokens", "width"), [(4, 8), (512, 64), (4096, 128)])
def test_reading_uninitialised_memory_is_detected_on_the_gpu(tokens, width, place):
    """Tensors of 256 bytes, 256 KiB and 4 MiB use the allocator's small and large blocks."""
    held = Held(a_call(tokens, width, "cuda"), "float32", "cuda")
    right = held.compare(reader(torch.zeros_like, place), 1e-5)
    assert right["state"] == "done"
    row = held.compare(reader(torch.empty_like, place), 1e-5)
    assert row["state"] == "wrong" and "off by nan" in row["error"]


@pytest.mark.gpu
def test_gaps_are_spoilt_on_the_gpu():
    """The allocator first hands out the gaps between tensors that stay."""
    torch.cuda.empty_cache()
    blocks = [torch.zeros(SMALL // 16, device="cuda") for _ in range(8)]  # 256 KiB
    places = {block.data_ptr() for block in blocks[1::2]}
    del blocks[1::2]
    fill_free_memory("cuda", SMALL)
    fresh = [torch.empty(SMALL // 16, device="cuda") for _ in places]
    assert places & {block.data_ptr() for block in fresh}
    assert all(bool(block.isnan().all()) for block in fresh)
    assert not any(bool(block.any()) for block in blocks)


@pytest.mark.gpu
def test_the_check_of_attention_passes_after_the_model_ran_on_the_gpu():
    """For many tokens, the model's reference has run torch's attention before attention is checked in isolation. What
    cuDNN cached in the first call must fit the second."""
    model = DiTConfig(input_size=64, in_channels=4, num_classes=10, patch_size=2, hidden_size=144, depth=1, num_heads=2)
    torch.manual_seed(0)
    net = build(model).to("cuda")
    models.fill_constants(net)
    backends = select_backends(net, {}, "cuda")
    expected = check.reference(net, "bfloat16", "cuda")
    assert expected.backends["attention"] == backends["attention"] == "sdpa"
    assert (check_operators(net, backends, expected.backends, "bfloat16", "cuda") or 0) < 0.3
