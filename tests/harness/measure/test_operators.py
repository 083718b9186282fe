"""Benchmarks of operators: their floors, and no number for wrong results."""

import importlib.util
import json
import math
import sys
import types
from dataclasses import replace

import pytest
import torch
from lamabench.harness.measure import calls, check, operators
from lamabench.harness.measure.gpus import derived
from lamabench.kernels import OPERATORS
from lamabench.kernels.cross_scan import scan_paths
from lamabench.kernels.errors import InputError
from lamabench.kernels.operator import output_weights
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
    # Neither products nor exponentials
    "modulated_norm": ({**tensors(x=(2, 4, 4, 6), shift=(2, 6), scale=(2, 6)), "eps": 1e-5}, 0, 0),
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
    row = {"kind": "operator_speed", "p50_ms": 5.0, "bytes_per_s": 1e6, "exponentials_per_s": 1e5}
    actual = derived({**row, **operators.needs(one, 480, False)})
    assert actual == {
        "bytes_floor_ms": pytest.approx(1e3 * (1152 + 480) / 1e6),
        "exponentials_floor_ms": pytest.approx(1e3 * 210 / 1e5),
        "flops_floor_ms": None,
        "floor": "exponentials",
        "floor_ms": pytest.approx(2.1),
        "times_floor": pytest.approx(5 / 2.1),
    }
    actual = derived({**row, **operators.needs(one, 480, True), "flops_per_s": 1e6})
    assert actual["bytes_floor_ms"] == pytest.approx(1e3 * (2 * (1152 + 480) + 1152) / 1e6)
    assert actual["exponentials_floor_ms"] == pytest.approx(1e3 * 420 / 1e5)
    assert actual["flops_floor_ms"] == pytest.approx(1e3 * 6 * 1680 / 1e6)
    assert derived(row) == derived({**row, **operators.needs(one, 480, True), "p50_ms": None}) == {}


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
        limits = derived({"kind": "operator_speed", **row})
        assert limits["floor"] == "bytes" and limits["times_floor"] == row["p50_ms"] / limits["floor_ms"]
        assert row["timed_error"] < 1e-5 and row["clock_mhz"] is None and row["began"] == rows[0]["began"]
        assert "reference" not in row["backend"].values() and json.dumps(row, allow_nan=False)
    assert {row["pass"] for row in rows} == {"forward", "forward+backward"}


def test_a_shape_has_what_grows_with_the_batch_alone():
    """Parameters of four paths have as many rows as a batch of four."""
    config = make(NANO, batch_size=4, modes=["forward"])
    rows = operators.bench_operators(config.model, config.bench, config.backend, "cpu", only=["selective_scan"])
    assert next(iter(rows))["shape"] == "x 4×16×8, dt 4×16×4×1, b 4×16×4×1, c 4×16×4×1"


def test_no_two_calls_have_the_same_name():
    """The head's norm has no parameters, but the shape of those at the first level; a stream may be of two types."""
    rows, error = kernel_rows(make(replace(NANO, input_size=4, patch_size=1), modes=["forward"]))
    assert error is None
    shapes = [row["shape"] for row in rows if row["operator"] == "modulated_norm"]
    first = "x 2×4×4×8, shift 2×8, scale 2×8"
    assert len({*shapes}) == len(shapes) and {first, f"{first}, without branch, gate, weight, bias"} <= {*shapes}
    low = {name: torch.zeros(2, 3, dtype=torch.bfloat16) for name in ("shift", "scale")}
    args = [{"x": torch.zeros(2, 5, 3), **low}.get(name) for name in OPERATORS["modulated_norm"].arguments]
    one = calls.Call("modulated_norm", (*args[:-1], 1e-5), tuple(arg is not None for arg in args))
    assert one.shape(one) == "x 2×5×3 float32, shift 2×3, scale 2×3"


def test_floors_count_the_outputs_of_the_norm_in_a_block_once():
    """x' has the type of the stream, y that of the vectors. Without a branch, x' is x and is not written."""
    rows, error = kernel_rows(make(replace(NANO, input_size=4, patch_size=1), batch_size=3, precision="bfloat16"))
    assert error is None
    of_norm = [row for row in rows if row["shape"].startswith("x 3×4×4×8 float32, ")]
    moved = {("branch" in row["shape"], row["pass"]): row["call_bytes"] for row in of_norm}
    stream, low, vector, affine = 3 * 16 * 8 * 4, 3 * 16 * 8 * 2, 3 * 8 * 2, 2 * 8 * 4
    assert moved[False, "forward"] == stream + 2 * vector + affine + low
    assert moved[True, "forward"] == 2 * stream + low + 3 * vector + affine + low
    both = 2 * (2 * stream + 2 * low + 3 * vector + affine) + stream + low + 3 * vector + affine
    assert moved[True, "forward+backward"] == both


def test_floors_count_the_output_in_the_type_of_the_input(monkeypatch):
    """Plain torch's norm returns float32 under CUDA's autocast, but a kernel may return bfloat16 and write less."""
    planted(monkeypatch, lambda right: lambda *args: right(*args).float(), "gated_norm", "torch")
    rows, error = kernel_rows(make(NANO, batch_size=3, modes=["forward"], precision="bfloat16"))
    assert error is None
    (row,) = [row for row in rows if row["operator"] == "gated_norm"]
    assert row["shape"] == "y 3×4×4×8, z 3×4×4×8"
    moved = 3 * (48 * 8) * 2 + 2 * 8 * 4  # y, z and output; weight and bias
    assert row["call_bytes"] == moved


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


@pytest.mark.parametrize("batch", [1, 2, 5, 6])
def test_what_is_timed_is_copies_of_what_is_checked(batch, monkeypatch):
    """The last timed call is compared image by image, and the gradients of parameters as sums over the images."""
    seen = []

    def watched(held, outcome, images, floor, plain):
        seen.append((held.call, outcome, images))
        return right(held, outcome, images, floor, plain)

    right = check.Held.compare_timed
    monkeypatch.setattr(check.Held, "compare_timed", watched)
    rows, error = kernel_rows(make(NANO, batch_size=batch))
    assert error is None and len(seen) == len(rows) and all(row["timed_error"] < 1e-5 for row in rows)
    for few, outcome, images in seen:
        assert len(outcome[0]) == len(images) == batch and len(few.args[0]) == (1 if batch % 2 else 2)
        assert len(set(images.bincount().tolist())) == 1  # equally many copies
        assert len(outcome) in (len(few.outputs), len(few.names))


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("place", [0, 3])
def test_a_result_that_is_wrong_in_the_timed_calls_alone_has_no_number(mode, place, monkeypatch):
    """The backend is right for few images, and for many of all images but one."""

    def planted_error(right):
        def run(q, *rest):
            out = right(q, *rest)
            return torch.cat([out[:place], out[place : place + 1] * 1.01, out[place + 1 :]]) if len(q) > 2 else out

        return run

    planted(monkeypatch, planted_error)
    rows, error = kernel_rows(make(batch_size=[2, 6], modes=[mode]))
    rows = [row for row in rows if row["operator"] == "attention"]
    assert [row["state"] for row in rows] == ["done", "wrong"] and "p50_ms" not in rows[1]
    assert rows[1]["error"].startswith("what was timed: output off by") and error is not None


def test_sums_over_many_images_may_be_as_inexact_as_those_of_plain_torch(monkeypatch):
    """On a CPU, plain torch adds the gradient of the norm's weight up in bfloat16."""
    rows, error = kernel_rows(make(NANO, batch_size=64, modes=["train"], precision="bfloat16"))
    assert error is None
    assert max(row["timed_error"] for row in rows if row["operator"] == "gated_norm") > 0.03


def test_one_operator_and_one_backend(monkeypatch):
    planted(monkeypatch, lambda right: scan_reference.selective_scan, "selective_scan", "triton", reasons=lambda _: [])
    config = make(NANO, batch_size=[3, 2], modes=["forward"])

    def measured(*only, **asked):
        backend = replace(config.backend, **asked)
        rows = operators.bench_operators(config.model, config.bench, backend, "cpu", only=only)
        return {(row["batch_size"], *row["backend"].items()) for row in rows}

    both = {(batch, ("selective_scan", name)) for batch in (2, 3) for name in ("torch", "triton")}
    assert measured("selective_scan") == both
    assert measured("selective_scan", selective_scan="torch") == {one for one in both if "torch" in one[1]}
    assert measured(selective_scan="torch") > {one for one in both if "torch" in one[1]}
    operators.check_only(NANO, ["selective_scan", "gated_norm"], config.backend)
    with pytest.raises(InputError, match=r"unknown operator of this model 'attention' .*; choices: modulated_norm, "):
        operators.check_only(NANO, ["gated_norm", "attention"], config.backend)
    other = replace(config.backend, selective_scan="reference")
    operators.check_only(NANO, ["gated_norm"], other)
    for only in (["selective_scan"], []):
        with pytest.raises(InputError, match=r"is not timed; use auto, cuda, cuda_kept, triton, torch, mamba_ssm$"):
            operators.check_only(NANO, only, other)


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
    timed = yardstick.prepare(output_weights(exact[0].shape), *one.args)
    for actual, expected in zip(timed.results(timed.both()), exact[:2], strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    held, images = check.Held(one, "float32", "cpu"), torch.tensor([1, 0, 0, 1, 1, 0])
    beside = operators.HeldYardstick(yardstick, held, images)
    assert beside.compare()["state"] == "done"
    many = calls.Call("selective_scan", (*(v[images] for v in args[:4]), *args[4:], *paths), one.wanted)
    steps = beside.steps(many, output_weights(exact[0].shape)[images])
    for step in steps.values():
        assert beside.compare_timed(step())["timed_error"] < 1e-5
    others = operators.HeldYardstick(yardstick, held, images.flip(0))
    row = others.compare_timed(steps["forward"]())
    assert row["state"] == "wrong" and row["error"].startswith("what was timed: output off by ")
    monkeypatch.setattr(extension, "fwd", lambda u, *_: (torch.full_like(u, math.nan), torch.empty(0)))
    row = beside.compare()
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
    assert error is None and all(row["state"] == "done" for row in rows)
    assert all(derived({"kind": "operator_speed", **row})["times_floor"] > 0.5 for row in rows)
    assert all(row["clock_mhz"] > 100 and row["power_w"] > 10 and row["throttled"] is not None for row in rows)
    installed = importlib.util.find_spec("selective_scan_cuda") is not None
    alone = [row for row in rows if "mamba_ssm (scan alone)" in row["backend"].values()]
    assert bool(alone) == (installed and name == "lamamba_nano")
