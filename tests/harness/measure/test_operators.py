"""Benchmarks of operators: their floors, and no number for wrong results."""

import importlib.util
import json
import math
import sys
import types

import pytest
import torch
from lamabench.harness.measure import calls, operators
from lamabench.kernels import OPERATORS
from lamabench.kernels.cross_scan import scan_paths
from lamabench.kernels.selective_scan import reference as scan_reference
from lamabench.models.registry import preset
from measuring import NANO, kernel_rows, make, planted


def tensors(**shapes):
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


# Arguments of every operator, with multiply-adds and exponentials that were counted by hand.
CALLS = {
    # B 2, L 9, E 5, K 4, r 3, N 7: 2·9·4·5 = 360 step sizes of 3 multiply-adds; 8 exponentials each
    "selective_scan": (tensors(x=(2, 9, 5), dt=(2, 9, 4, 3), b=(2, 9, 4, 7)), 1080, 2880),
    # B 2, L 9 (one chunk), K 4, H 3, P 2, N 7: 2·4·9·9 pairs of 7 + 6 multiply-adds; 2·9·4·3 step sizes with 2 each
    "ssd": (tensors(x=(2, 9, 6), dt=(2, 9, 4, 3), b=(2, 9, 4, 7)), 8424, 432),
    # 2·8·8 = 128 tokens meet 16 keys in 3 heads of 2 channels: 2·128·16·6 multiply-adds, 128·16·3 scores
    "window_attention": ({**tensors(qkv=(2, 8, 8, 18)), "heads": 3, "window": 4}, 24576, 6144),
    # 2·3 heads, 5 queries, 7 keys, width 4
    "attention": (tensors(q=(2, 3, 5, 4), k=(2, 3, 7, 4)), 1680, 210),
    # 2·4·4·6 = 192 values of 9 multiply-adds
    "depthwise_conv": (tensors(x=(2, 4, 4, 6), weight=(6, 1, 3, 3)), 1728, 192),
    # 2·4·4·6 = 192 gates
    "gated_norm": ({**tensors(y=(2, 4, 4, 6), z=(2, 4, 4, 6), weight=(6,), bias=(6,)), "eps": 1e-5}, 0, 192),
}


def call(operator):
    values = CALLS[operator][0]
    args = tuple(values.get(name) for name in OPERATORS[operator].arguments)
    return calls.Call(operator, args, tuple(isinstance(arg, torch.Tensor) for arg in args))


@pytest.mark.parametrize("operator", list(OPERATORS))
def test_work_of_every_operator_by_hand(operator):
    work = OPERATORS[operator].work(*call(operator).args)
    assert (work.macs, work.exponentials) == CALLS[operator][1:]


def test_floors_by_hand():
    one = call("attention")  # inputs (120 + 168) · 4 bytes
    machine = {"bytes_per_s": 1e6, "exponentials_per_s": 1e5, "flops_per_s": None}
    actual = operators.floors(one, 480, False, machine)
    assert actual == {
        "bytes_floor_ms": pytest.approx(1e3 * (1152 + 480) / 1e6),
        "exponentials_floor_ms": pytest.approx(1e3 * 210 / 1e5),
        "flops_floor_ms": None,
    }
    actual = operators.floors(one, 480, True, {**machine, "flops_per_s": 1e6})
    assert actual["bytes_floor_ms"] == pytest.approx(1e3 * (2 * (1152 + 480) + 1152) / 1e6)
    assert actual["exponentials_floor_ms"] == pytest.approx(1e3 * 420 / 1e5)
    assert actual["flops_floor_ms"] == pytest.approx(1e3 * 6 * 1680 / 1e6)


def test_kernel_rows():
    rows, error = kernel_rows(make(NANO, batch_size=3))
    assert error is None
    shapes = {(row["operator"], row["shape"]) for row in rows}
    assert (
        "selective_scan",
        "x 3×16×8, dt 3×16×4×1, b 3×16×4×1, c 3×16×4×1",
    ) in shapes  # 4 × 4 tokens, r = ceil(8 / 16)
    assert ("window_attention", "qkv 3×4×4×24, heads 2, window 4, shift 0") in shapes
    assert len(rows) == 2 * len(shapes)  # one usable backend, two passes; equal calls are one row
    for row in rows:
        assert row["state"] == "done" and row["p50_ms"] > 0 and row["relative_error"] < 1e-5
        assert row["floor"] == "bytes" and row["times_floor"] == pytest.approx(row["p50_ms"] / row["floor_ms"])
        assert "reference" not in row["backend"].values() and json.dumps(row, allow_nan=False)
    assert {row["pass"] for row in rows} == {"forward", "forward+backward"}


def test_floors_count_the_output_in_the_type_of_the_input(monkeypatch):
    """Plain torch's norm returns float32 under CUDA's autocast, but a kernel may return bfloat16 and write less."""
    planted(monkeypatch, lambda right: lambda *args: right(*args).float(), "gated_norm", "torch")
    rows, error = kernel_rows(make(NANO, batch_size=3, modes=["forward"], precision="bfloat16"))
    assert error is None
    (row,) = [row for row in rows if row["operator"] == "gated_norm"]
    assert row["shape"] == "y 3×4×4×8, z 3×4×4×8"
    moved = 3 * (48 * 8) * 2 + 2 * 8 * 4  # y, z and output; weight and bias
    assert row["bytes_floor_ms"] == pytest.approx(1e3 * moved / row["bytes_per_s"])


def test_kernels_have_no_number_for_a_wrong_gradient(monkeypatch):
    """`triton` does not run here, so the test replaces it: the forward pass is right, one gradient is 1 % off."""

    def tilted(right):
        def run(x, *rest):
            y = scan_reference.selective_scan(x, *rest)
            return y + 0.01 * (rest[0].sum() - rest[0].sum().detach())

        return run

    planted(monkeypatch, tilted, "selective_scan", "triton", reasons=lambda device: [])
    rows, error = kernel_rows(make(NANO, modes=["forward"]))
    states = {row["backend"]["selective_scan"]: row for row in rows if row["operator"] == "selective_scan"}
    assert states["torch"]["state"] == "done" and states["triton"]["state"] == "wrong"
    assert states["triton"]["error"].startswith("dt off by") and "p50_ms" not in states["triton"]
    assert error is not None and "selective_scan=triton" in error


def scan_in_plain_torch(u, delta, a, b, c, skip, bias):
    """The function of the extension, step by step: u, delta [B, K·E, L], b, c [B, K, N, L]."""
    directions = b.shape[1]
    delta = torch.nn.functional.softplus(delta + bias[:, None])
    b, c = (v.repeat_interleave(u.shape[1] // directions, dim=1) for v in (b, c))  # [B, K·E, N, L]
    h, y = u.new_zeros(*u.shape[:2], a.shape[1]), []
    for step in range(u.shape[2]):
        h = torch.exp(delta[..., step, None] * a) * h + (delta * u)[..., step, None] * b[..., step]
        y.append((h * c[..., step]).sum(-1) + skip * u[..., step])
    return torch.stack(y, dim=-1)


def test_the_yardstick_of_the_scan_computes_the_operator(monkeypatch):
    """The layout of the arguments for mamba-ssm's extension, with a stand-in for its two functions."""
    extension = types.ModuleType("selective_scan_cuda")

    def fwd(u, delta, a, b, c, skip, z, bias, softplus):
        assert z is None and softplus and all(v.is_contiguous() for v in (u, delta, a, b, c))
        return scan_in_plain_torch(u, delta, a, b, c, skip, bias), torch.empty(0)

    def bwd(u, delta, a, b, c, skip, z, bias, grad, states, out, dz, softplus, recompute):
        leaves = [v.detach().requires_grad_() for v in (u, delta, a, b, c, skip, bias)]
        return torch.autograd.grad(scan_in_plain_torch(*leaves), leaves, grad)

    extension.fwd, extension.bwd = fwd, bwd
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", extension)
    torch.manual_seed(0)
    paths = scan_paths("continuous", 2, 4)
    shapes = ((2, 8, 5), (2, 8, 4, 3), (2, 8, 4, 2), (2, 8, 4, 2), (4, 5, 3), (4, 5), (4, 5, 2), (4, 5))
    args = [torch.randn(shape) for shape in shapes]
    args[6] = -args[6].exp()
    one = calls.Call("selective_scan", (*args, *paths), (True,) * 8 + (False,) * 3)
    exact = calls.results(scan_reference.selective_scan, one, torch.float64)
    (yardstick,) = OPERATORS["selective_scan"].yardsticks
    for actual, expected in zip(yardstick.prepare(*one.args).output_and_gradient(), exact[:2], strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    assert operators.compare_yardstick(yardstick, one, exact)["state"] == "done"
    monkeypatch.setattr(extension, "fwd", lambda u, *_: (torch.full_like(u, math.nan), torch.empty(0)))
    row = operators.compare_yardstick(yardstick, one, exact)
    assert row["state"] == "wrong" and json.dumps(row, allow_nan=False)  # a record holds no NaN


@pytest.mark.gpu
def test_a_copy_reaches_its_own_floor_on_the_gpu():
    rate = operators.limits("cuda", "bfloat16")["bytes_per_s"]
    assert rate is not None
    source = torch.empty(2**28, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    timed = operators.time_queued(lambda: target.copy_(source), "cuda", 20)
    floor = 1e3 * 2 * source.numel() / rate
    assert 0.8 < timed["p50_ms"] / floor < 1.5


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["dit_nano", "lamamba_nano"])
def test_kernels_on_the_gpu(name):
    rows, error = kernel_rows(make(preset(name).config, "cuda", batch_size=8, precision="bfloat16"))
    assert error is None and all(row["state"] == "done" and row["times_floor"] > 0.5 for row in rows)
    installed = importlib.util.find_spec("selective_scan_cuda") is not None
    alone = [row for row in rows if "mamba_ssm (scan alone)" in row["backend"].values()]
    assert bool(alone) == (installed and name == "lamamba_nano")
