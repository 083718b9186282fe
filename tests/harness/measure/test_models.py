"""Benchmarks: what is measured next, what is checked before a number is printed, and what becomes a row instead."""

import importlib.util
import json
import math
import sys
import types
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from lamabench.ablations import study as studies
from lamabench.baselines.adm import ADMConfig
from lamabench.baselines.dit import DiT, DiTConfig
from lamabench.harness import run as runs
from lamabench.harness.config import BenchConfig, Config, DataConfig, RunConfig
from lamabench.harness.measure import calls, check, operators, timing
from lamabench.harness.measure import models as module
from lamabench.harness.measure.models import WrongOutput, bench
from lamabench.harness.measure.search import Point, best_batch, finished, next_batch, next_compiled_batch, next_point
from lamabench.harness.progress import Progress
from lamabench.harness.record import read_lines, read_run
from lamabench.harness.training import loop as training
from lamabench.kernels import OPERATORS
from lamabench.kernels.cross_scan import scan_paths
from lamabench.kernels.errors import InputError
from lamabench.kernels.selective_scan import reference as scan_reference
from lamabench.launch.cli import main
from lamabench.launch.plan import plan
from lamabench.models.registry import build, preset
from lamabench.reports.report import build as build_report

DIT = DiTConfig(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=16, depth=2, num_heads=2)


def make(model=DIT, device="cpu", **settings):
    quick = {"batch_size": 2, "repeats": 2, "seconds": 0.05, "warmup": 1, "precision": "float32"}
    data = DataConfig(kind="none", size=model.input_size, channels=model.in_channels, num_classes=model.num_classes)
    return Config(model=model, data=data, bench=BenchConfig(**{**quick, **settings}), run=RunConfig(device=device))


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Tests that share a GPU do not wait for each other: nobody reads their times."""
    for place in (module, operators):
        monkeypatch.setattr(place, "one_at_a_time", lambda device, say: nullcontext())


def collect(config, rows=()):
    """Every row, and the error at the end or None."""
    found = []
    try:
        for row in bench(config, rows=rows):
            found.append(row)
    except WrongOutput as error:
        return found, str(error)
    return found, None


# What comes next


def measured(speeds, seconds=0.001):
    """Rows by batch from images per second, "oom" or another state."""
    return {
        batch: {"state": "done", "images_per_s": speed, "p50_ms": 1e3 * seconds}
        if isinstance(speed, int | float)
        else {"state": speed}
        for batch, speed in speeds.items()
    }


@pytest.mark.parametrize(
    ("speeds", "batch"),
    [
        ({}, 1),
        ({1: 5.0}, 8),
        ({1: "oom"}, None),
        ({1: 5.0, 8: 30.0}, 16),
        ({1: 5.0, 8: 30.0, 16: 30.1}, 32),  # one doubling without a gain may be chance
        ({1: 5.0, 8: 30.0, 16: 30.1, 32: 30.5}, 48),  # two are not; one and a half times the best, 32
        ({1: 5.0, 8: 30.0, 16: 29.0, 32: 28.0}, 12),
        ({1: 5.0, 8: 30.0, 16: 29.0, 32: 30.7}, 64),  # 2.3 % over the best
        ({1: 5.0, 8: 30.0, 16: 29.0, 32: 28.0, 12: 31.0}, None),
        ({1: 5.0, 8: 30.0, 16: "oom"}, 12),
        ({1: 5.0, 8: 30.0, 16: "oom", 12: "oom"}, None),
        ({1: 5.0, 8: "oom"}, 4),
        ({1: 5.0, 8: "oom", 4: "oom"}, 2),
        ({1: 5.0, 8: "oom", 4: "oom", 2: "oom"}, None),
        ({1: 5.0, 8: "oom", 4: 9.0}, 6),
        ({1: 5.0, 8: "oom", 4: 4.0}, None),  # one and a half images
        ({1: 5.0, 8: "wrong"}, None),
        ({1: "failed"}, None),
    ],
)
def test_batch_search(speeds, batch):
    assert next_batch(measured(speeds), 3.0) == batch


def test_batch_search_ends_where_a_call_takes_as_long_as_a_measurement():
    assert next_batch(measured({1: 1.0, 8: 2.0}, seconds=3.0), 3.0) == 12
    assert best_batch(measured({1: 1.0, 8: 2.0, 12: 1.5, 16: "oom"})) == 8
    assert best_batch(measured({1: "oom"})) is None


def fill(settings, size, speed):
    """The points that a sweep goes through where `speed(point)` is the outcome, with the rows."""
    rows, points = [], []
    while (point := next_point(settings, size, rows)) is not None:
        points.append(point)
        (row,) = measured({0: speed(point)}).values()
        rows.append({**point._asdict(), **row})
        assert len(rows) < 100
    return points, rows


def test_sweep_of_lists_is_their_product():
    settings = BenchConfig(
        batch_size=[2, 4], compile=["eager", "compile"], input_sizes=[16, 8], checkpointing=[False, True]
    )
    points, _ = fill(settings, 32, lambda point: 1.0)
    assert (
        len(points) == len(set(points)) == 2 * (1 + 2) * 2 * 2
    )  # sizes, forward and two ways of training, kinds, batches
    assert points[0] == Point(16, "forward", False, "eager", 2) and {p.input_size for p in points} == {8, 16}
    assert {p.checkpointing for p in points if p.mode == "forward"} == {False}
    assert {p.input_size for p in fill(BenchConfig(), 32, lambda point: 1.0)[0]} == {32}


def test_auto_batch_compiles_at_the_best_eager_batch_and_its_double():
    settings = BenchConfig(batch_size="auto", modes=["forward"], compile=["compile", "max-autotune"])

    def speed(point):
        if point.compile == "compile":
            return "failed"
        return "oom" if point.batch_size > 16 else float(point.batch_size)

    points, rows = fill(settings, 32, speed)
    assert [(p.compile, p.batch_size) for p in points] == [
        ("eager", 1), ("eager", 8), ("eager", 16), ("eager", 32), ("eager", 24),
        ("compile", 16),  # its double would fail as well
        ("max-autotune", 16), ("max-autotune", 32), ("max-autotune", 24), ("max-autotune", 20),
    ]  # fmt: skip
    for kept in range(len(rows)):  # from whatever a killed sweep left
        assert next_point(settings, 32, rows[:kept]) == points[kept]


@pytest.mark.parametrize("best", [1, 2, 7, 16, 100])
@pytest.mark.parametrize("limit", range(0, 300, 7))
def test_compiled_batches_end_near_what_memory_holds(best, limit):
    rows = {}
    while (batch := next_compiled_batch(rows, best)) is not None:
        assert batch >= 1 and batch not in rows
        rows |= measured({batch: 1.0 if batch <= limit else "oom"})
    fitted = best_batch(rows) and max(batch for batch, row in rows.items() if row["state"] == "done")
    assert len(rows) <= 8 and (fitted is None) == (limit == 0)
    if fitted is not None:
        assert fitted == 2 * best or limit <= fitted + max(1, fitted // 4)


def test_a_failed_compilation_ends_the_search_of_a_batch():
    assert next_compiled_batch(measured({8: "failed"}), 8) is None
    assert next_compiled_batch(measured({8: 1.0, 16: "wrong"}), 8) is None


def test_only_rows_that_stand_are_kept():
    point = Point(8, "train", False, "eager", 2)._asdict()
    here, there = {"device": "a"}, {"device": "b"}

    def line(state, provenance=here, **more):
        return {"kind": "bench", "state": state, "provenance": provenance, **point, **more}

    records = [line("failed"), line("done"), line("oom", batch_size=4), line("wrong", batch_size=8)]
    records += [line("done", batch_size=16), line("failed", batch_size=16), line("done", there, batch_size=32)]
    records += [{"kind": "bench", "state": "failed", "error": "x"}, {"kind": "cost", "state": "done"}]
    assert [row["batch_size"] for row in finished(records)] == [2, 4, 32]
    assert [row["batch_size"] for row in finished(records, here)] == [2, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "bench.batch_size must be numbers above 0, or auto, not"),
        ({"batch_size": [4, "many"]}, "bench.batch_size must be numbers above 0, or auto"),
        ({"batch_size": []}, "bench.batch_size is empty"),
        ({"compile": ["eagre"]}, r"unknown bench.compile 'eagre' \(did you mean 'eager'\?\); choices: eager, compile"),
        ({"modes": ["fly"]}, "unknown bench.modes 'fly'; choices: forward, train"),
        ({"input_sizes": [0]}, "bench.input_sizes must be above 0"),
        ({"seconds": 0.0}, "bench.seconds must be above 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        BenchConfig(**settings)


# Models


@pytest.mark.parametrize("command", ["bench", "bench-kernels"])
def test_both_benchmarks_hold_the_gpu(command, monkeypatch):
    held = []

    @contextmanager
    def watched(device, say):
        held.append(device)
        yield
        held.append("free")

    place, config = (module, make()) if command == "bench" else (operators, make(NANO))
    monkeypatch.setattr(place, "one_at_a_time", watched)
    rows = module.bench(config) if command == "bench" else operators.bench_kernels(config)
    assert held == [] and next(iter(rows))["state"] == "done" and held == ["cpu"]
    assert all(held == ["cpu"] for _ in rows) and held == ["cpu", "free"]


def test_a_bench_with_nothing_to_measure_does_not_wait(monkeypatch):
    rows, _ = collect(make(modes=["forward"]))
    monkeypatch.setattr(module, "one_at_a_time", None)
    assert collect(make(modes=["forward"]), rows) == ([], None)


def test_rows():
    config = make(input_sizes=[8, 4])
    rows, error = collect(config)
    assert error is None and [(r["input_size"], r["mode"]) for r in rows] == [
        (8, "forward"), (8, "train"), (4, "forward"), (4, "train")
    ]  # fmt: skip
    for row in rows:
        assert row["state"] == "done" and 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["images_per_s"] == pytest.approx(2 / (row["p50_ms"] / 1e3))
        assert row["backend"] == {"attention": "sdpa"} and row["checked_against"] == {"attention": "reference"}
        assert row["mfu"] is None and row["peak_memory_gib"] is None and row["repeats"] == 2
        assert json.dumps(row, allow_nan=False)
    assert "gradient_error" not in rows[0] and 0 <= rows[1]["gradient_error"] < 1e-6
    assert rows[0]["macs"] > 3 * rows[2]["macs"] and rows[0]["flops"] > 2 * rows[0]["macs"]
    assert collect(config, rows) == ([], None)  # all there


def test_the_weights_stay_what_was_checked():
    subject = module.Subject(make(modes=["train"]), 8, lambda text: None)
    before = [parameter.clone() for parameter in subject.net.parameters()]
    assert subject.row(Point(8, "train", False, "eager", 2))["state"] == "done"
    assert all(torch.equal(a, b) for a, b in zip(before, subject.net.parameters(), strict=True))
    assert all(bool((v != 0).any()) for v in before)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_reference_is_the_model_and_its_gradients(precision):
    """Against the same net called plainly: the first and last of four images, the gradient of the last alone."""
    torch.manual_seed(0)
    net = build(DIT)
    module.fill_constants(net)
    made = check.reference(net, precision, "cpu")
    assert (made.plain_output > 0) == (made.plain_gradients > 0) == (precision == "bfloat16")
    assert net.training and not net.checkpointing
    x, t, y = check.batch_of(made, 4, "cpu")
    assert not torch.equal(x[0], x[1]) and torch.equal(x[0], x[3])
    out = net(x, t, y)
    torch.testing.assert_close(out[3], made.output, rtol=1e-5, atol=1e-5)
    parameters = check.trained(net)
    gradients = torch.autograd.grad((out[3] * made.weights).sum(), parameters)
    for ours, theirs in zip(made.gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_relative_rms_by_hand():
    exact = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    assert check.relative_rms([torch.tensor([3.0, 0.3]), torch.tensor([4.4])], exact) == pytest.approx(0.1)
    assert math.isnan(check.relative_rms([torch.tensor([math.nan, 0.0]), exact[1]], exact))
    zero = [torch.zeros(2)]
    assert check.relative_rms([torch.tensor([3.0, 4.0])], zero) == 5 and check.relative_rms(zero, zero) == 0


def planted(monkeypatch, run, operator="attention", backend="sdpa", **more):
    """Put another function in the place of a backend's."""
    backends = OPERATORS[operator].backends
    monkeypatch.setitem(backends, backend, replace(backends[backend], run=run(backends[backend].run), **more))
    monkeypatch.setattr(OPERATORS[operator], "_resolved", {})  # what it has answered so far


def test_forward_passes_have_rounded_weights_and_training_has_not(monkeypatch):
    seen = []

    def watch(right):
        def made(call, net, *more):
            seen.append({parameter.dtype for parameter in net.parameters()})
            return right(call, net, *more)

        return made

    for name in ("forward", "train_step"):
        monkeypatch.setattr(module, name, watch(getattr(module, name)))
    modes = {"modes": ["forward", "train"], "batch_size": [1, 2]}
    assert collect(make(precision="bfloat16", **modes))[1] is None
    both, full = {torch.bfloat16, torch.float32}, {torch.float32}
    assert seen == [both, both, full, full]
    seen.clear()
    assert collect(make(precision="float32", **modes))[1] is None and seen == [full] * 4


def test_no_number_for_a_wrong_output(monkeypatch):
    planted(monkeypatch, lambda right: lambda *args: right(*args) * 1.01)
    rows, error = collect(make())
    assert [row["state"] for row in rows] == ["wrong", "wrong"]
    assert not any("images_per_s" in row or "p50_ms" in row for row in rows)
    assert "output off by" in rows[0]["error"] and "not measured" in rows[0]["error"]
    assert error is not None and error.startswith("2 measurements without a number, the first: input 8, forward")


def test_a_wrong_last_image_is_found(monkeypatch):
    def spoil(right):
        def run(*args):
            out = right(*args)
            return torch.cat([out[:-1], 1.01 * out[-1:]])

        return run

    planted(monkeypatch, spoil)
    assert [row["state"] for row in collect(make(modes=["forward"]))[0]] == ["wrong"]


def test_a_wrong_gradient_stops_training_alone(monkeypatch):
    class Tilted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, *grad_outputs):
            return grad_outputs[0] * 1.01

    planted(monkeypatch, lambda right: lambda *args: Tilted.apply(right(*args)))
    monkeypatch.setattr(module, "check_operators", lambda *_: None)  # which would find it first, in every row
    rows, error = collect(make())
    assert [row["state"] for row in rows] == ["done", "wrong"] and "gradient off by" in rows[1]["error"]
    assert error is not None and "images_per_s" in rows[0] and "images_per_s" not in rows[1]


def test_bfloat16_is_held_to_twice_plain_bfloat16(monkeypatch):
    assert [row["state"] for row in collect(make(precision="bfloat16"))[0]] == ["done", "done"]
    planted(monkeypatch, lambda right: lambda *args: right(*args) * 1.3)
    assert [row["state"] for row in collect(make(precision="bfloat16"))[0]] == ["wrong", "wrong"]


def test_many_tokens_are_checked_by_plain_torch(monkeypatch):
    monkeypatch.setattr(check, "MANY_TOKENS", 16)
    (row,) = collect(make(modes=["forward"]))[0]
    assert row["state"] == "done" and row["checked_against"] == {"attention": "sdpa"}


def out_of_memory_above(monkeypatch, batch):
    forward = DiT.forward

    def limited(self, x, t, y):
        if len(x) > batch and not x.is_meta:  # the cost is counted without memory
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return forward(self, x, t, y)

    monkeypatch.setattr(DiT, "forward", limited)


def test_out_of_memory_is_a_row_and_ends_the_search(monkeypatch):
    out_of_memory_above(monkeypatch, 10)
    rows, error = collect(make(batch_size="auto", modes=["train"], seconds=5.0))
    assert error is None
    assert [(r["batch_size"], r["state"]) for r in rows] == [(1, "done"), (8, "done"), (16, "oom"), (12, "oom")]
    assert rows[2]["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert "images_per_s" not in rows[2]


def test_no_room_for_the_reference(monkeypatch):
    out_of_memory_above(monkeypatch, 0)
    rows, error = collect(make(batch_size="auto"))
    assert error is None and [(r["mode"], r["batch_size"], r["state"]) for r in rows] == [
        ("forward", 1, "oom"), ("train", 1, "oom")
    ]  # fmt: skip
    assert rows[0]["error"].startswith("no reference for one image: OutOfMemoryError")


def compile_with(monkeypatch, backend):
    options = {"fullgraph": True, "dynamic": False, "backend": backend}
    monkeypatch.setattr(training, "COMPILE", dict.fromkeys(training.COMPILE, options))


def test_compile_is_what_is_checked_and_measured(monkeypatch):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_with(monkeypatch, counting)
    rows, error = collect(make(modes=["forward"], compile=["compile"], batch_size=[1, 2]))
    assert error is None and [row["state"] for row in rows] == ["done", "done"]
    assert len(graphs) == 2  # one graph for each batch: what was checked is what was timed

    def slightly_off(graph, inputs):
        return lambda *args: tuple(out * 1.01 for out in graph.forward(*args))

    compile_with(monkeypatch, slightly_off)
    rows, error = collect(make(modes=["forward"], compile=["eager", "compile"]))
    assert [row["state"] for row in rows] == ["done", "wrong"] and "output off by" in rows[1]["error"]


def test_train_compiled(monkeypatch):
    compile_with(monkeypatch, "aot_eager")
    (row,) = collect(make(modes=["train"], compile=["compile"], checkpointing=[True]))[0]
    assert row["state"] == "done" and row["gradient_error"] < 1e-6 and row["checkpointing"] is True


def test_a_compiler_that_fails_is_a_row(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no such instruction\nand a long story")

    compile_with(monkeypatch, broken)
    rows, error = collect(make(modes=["forward"], compile=["eager", "compile"]))
    assert [row["state"] for row in rows] == ["done", "failed"] and "no such instruction" in rows[1]["error"]
    assert "\n" not in rows[1]["error"] and "images_per_s" not in rows[1] and error is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"input_sizes": [8, 7]}, "patch_size 2 does not divide model.input_size 7")],
)
def test_bad_input_before_anything_is_measured(settings, message):
    with pytest.raises(InputError, match=message):
        next(bench(make(**settings)))


# Operators


def tensors(**shapes):
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


# Arguments of every operator, with its multiply-adds and exponentials by hand.
CALLS = {
    # B 2, L 9, E 5, K 4, r 3, N 7: 2·9·4·5 = 360 step sizes of 3 multiply-adds; 8 exponentials each
    "selective_scan": (tensors(x=(2, 9, 5), dt=(2, 9, 4, 3), b=(2, 9, 4, 7)), 1080, 2880),
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
    given = CALLS[operator][0]
    args = tuple(given.get(name) for name in OPERATORS[operator].arguments)
    return calls.Call(operator, args, tuple(isinstance(arg, torch.Tensor) for arg in args))


@pytest.mark.parametrize("operator", list(OPERATORS))
def test_work_of_every_operator_by_hand(operator):
    work = OPERATORS[operator].work(*call(operator).args)
    assert (work.macs, work.exponentials) == CALLS[operator][1:]


def test_floors_by_hand():
    one = call("attention")  # inputs (120 + 168) · 4 bytes
    machine = {"bytes_per_s": 1e6, "exponentials_per_s": 1e5, "flops_per_s": None}
    found = operators.floors(one, 480, False, machine)
    assert found == {
        "bytes_floor_ms": pytest.approx(1e3 * (1152 + 480) / 1e6),
        "exponentials_floor_ms": pytest.approx(1e3 * 210 / 1e5),
        "flops_floor_ms": None,
    }
    found = operators.floors(one, 480, True, {**machine, "flops_per_s": 1e6})
    assert found["bytes_floor_ms"] == pytest.approx(1e3 * (2 * (1152 + 480) + 1152) / 1e6)
    assert found["exponentials_floor_ms"] == pytest.approx(1e3 * 420 / 1e5)
    assert found["flops_floor_ms"] == pytest.approx(1e3 * 6 * 1680 / 1e6)


NANO = replace(preset("lamamba_nano").config, input_size=8, depths=[2, 1], bottleneck_depth=0, dim=8, num_heads=2)


def kernel_rows(config):
    found = []
    try:
        for row in operators.bench_kernels(config):
            found.append(row)
    except WrongOutput as error:
        return found, str(error)
    return found, None


def test_kernel_rows():
    rows, error = kernel_rows(make(NANO, batch_size=3))
    assert error is None
    shapes = {(row["operator"], row["shape"]) for row in rows}
    assert (
        "selective_scan",
        "x 3×16×8, dt 3×16×4×1, b 3×16×4×1, c 3×16×4×1",
    ) in shapes  # 4 × 4 tokens, r = ceil(8 / 16)
    assert ("window_attention", "qkv 3×4×4×24, heads 2, window 4, shift 0") in shapes
    assert len(rows) == 2 * len(shapes)  # one usable backend, two passes; calls of one shape are one
    for row in rows:
        assert row["state"] == "done" and row["p50_ms"] > 0 and row["relative_error"] < 1e-5
        assert row["floor"] == "bytes" and row["times_floor"] == pytest.approx(row["p50_ms"] / row["floor_ms"])
        assert "reference" not in row["backend"].values() and json.dumps(row, allow_nan=False)
    assert {row["pass"] for row in rows} == {"forward", "forward+backward"}


def test_floors_count_the_output_in_the_type_of_the_input(monkeypatch):
    """Plain torch's norm gives float32 under CUDA's autocast, which is no limit for a kernel that gives bfloat16."""
    planted(monkeypatch, lambda right: lambda *args: right(*args).float(), "gated_norm", "torch")
    rows, error = kernel_rows(make(NANO, batch_size=3, modes=["forward"], precision="bfloat16"))
    assert error is None
    (row,) = [row for row in rows if row["operator"] == "gated_norm"]
    assert row["shape"] == "y 3×4×4×8, z 3×4×4×8"
    moved = 3 * (48 * 8) * 2 + 2 * 8 * 4  # y, z and output; weight and bias
    assert row["bytes_floor_ms"] == pytest.approx(1e3 * moved / row["bytes_per_s"])


def test_kernels_have_no_number_for_a_wrong_gradient(monkeypatch):
    """`triton` runs nowhere here, so it can be made anything: right forward, and one gradient 1 % off."""

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
    """What the extension computes, step after step: u, delta [B, K·E, L], b, c [B, K, N, L]."""
    directions = b.shape[1]
    delta = torch.nn.functional.softplus(delta + bias[:, None])
    b, c = (v.repeat_interleave(u.shape[1] // directions, dim=1) for v in (b, c))  # [B, K·E, N, L]
    h, y = u.new_zeros(*u.shape[:2], a.shape[1]), []
    for step in range(u.shape[2]):
        h = torch.exp(delta[..., step, None] * a) * h + (delta * u)[..., step, None] * b[..., step]
        y.append((h * c[..., step]).sum(-1) + skip * u[..., step])
    return torch.stack(y, dim=-1)


def test_the_scan_alone_is_the_operator(monkeypatch):
    """The layout that mamba-ssm's extension is given, with a stand-in of its two functions."""
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
    one = calls.Call("selective_scan", (*args, *paths), (True,) * 8 + (False,) * 2)
    exact = calls.results(scan_reference.selective_scan, one, torch.float64)
    (yardstick,) = OPERATORS["selective_scan"].yardsticks
    for ours, theirs in zip(yardstick.prepare(*one.args).output_and_gradient(), exact[:2], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert operators.compare_yardstick(yardstick, one, exact)["state"] == "done"
    monkeypatch.setattr(extension, "fwd", lambda u, *_: (torch.full_like(u, math.nan), torch.empty(0)))
    row = operators.compare_yardstick(yardstick, one, exact)
    assert row["state"] == "wrong" and json.dumps(row, allow_nan=False)  # a record holds no NaN


# The command, and the stage of a run

WORDS = ["depth=1", "hidden_size=16", "num_heads=2", "bench.batch_size=[1,2]", "bench.repeats=2", "bench.seconds=0.05",
         "bench.precision=float32", "run.device=cpu"]  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def records(folder):
    (path,) = folder.glob("runs/bench*/*/record.jsonl")
    return read_lines(path)


def test_a_killed_sweep_continues(folder, monkeypatch, capsys):
    timed, calls = module.time_calls, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return timed(*args)

    monkeypatch.setattr(module, "time_calls", killed)
    assert main(["bench", "dit_nano", *WORDS]) == 130
    before = records(folder)
    assert [(row["mode"], row["batch_size"]) for row in before] == [("forward", 1), ("forward", 2)]
    capsys.readouterr()
    assert main(["bench", "dit_nano", *WORDS, "--json"]) == 0
    captured = capsys.readouterr()
    after = records(folder)
    assert after[:2] == before and [(row["mode"], row["batch_size"]) for row in after[2:]] == [
        ("train", 1),
        ("train", 2),
    ]
    assert len(json.loads(captured.out)) == 4 and "2 measurements are in" in captured.err
    assert main(["bench", "dit_nano", *WORDS]) == 0 and records(folder) == after
    assert main(["bench", "dit_nano", *WORDS, "--again"]) == 0 and len(records(folder)) == 8
    assert "next: lamabench report runs/bench" in capsys.readouterr().out


def test_a_disturbed_measurement_is_told_and_kept(folder, monkeypatch, capsys):
    monkeypatch.setattr(timing, "others_busy", lambda: lambda: "other processes kept 3.0 of 4 cores busy")
    assert main(["bench", "dit_nano", *WORDS]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("(disturbed: other processes kept 3.0 of 4 cores busy)") == 4
    assert "other processes kept the host busy during 4 of 4: these times may be too long" in captured.out
    assert {row["disturbed"] for row in records(folder)} == {"other processes kept 3.0 of 4 cores busy"}


def test_wrong_rows_are_recorded_and_the_command_fails(folder, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        planted(patch, lambda right: lambda *args: right(*args) * 1.01)
        assert main(["bench", "dit_nano", "lamamba_nano", "bench.modes=[forward]", *WORDS[3:]]) == 1
    captured = capsys.readouterr()
    assert "dit_nano: 2 measurements without a number" in captured.err and "wrong" in captured.out
    (theirs,) = folder.glob("runs/bench/lamamba_nano-*")
    assert [row["state"] for row in read_run(theirs).records] == ["done", "done"]  # the next model goes on
    assert main(["bench", "dit_nano", "bench.modes=[forward]", *WORDS[3:]]) == 0  # measured again
    (ours,) = folder.glob("runs/bench/dit_nano-*")
    assert [row["state"] for row in read_run(ours).records] == ["wrong", "wrong", "done", "done"]


def test_bench_kernels_command(folder, capsys):
    words = ["bench.batch_size=2", "bench.repeats=2", "bench.precision=float32", "run.device=cpu"]
    assert main(["bench-kernels", "dit_nano", *words, "depth=1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["pass"] for row in rows] == ["forward", "forward+backward"] and rows[0]["backend"] == "sdpa"
    assert [row["p50_ms"] for row in records(folder)] == [row["p50_ms"] for row in rows]
    build_report([folder / "runs"], folder / "out")
    assert "attention" in (folder / "out" / "kernels.md").read_text()


def stage(folder, **settings):
    config = replace(make(**settings), run=RunConfig(root=str(folder), device="cpu"))
    config.data.kind = "digits"
    info = runs.describe(config, study="s", name="n", model="dit_nano", variant={}, overrides=[])
    path = runs.create(info)
    return path, lambda: runs.execute(path, ["bench"], Progress())


def test_a_stage_with_a_batch_too_large_is_done(tmp_path, monkeypatch):
    out_of_memory_above(monkeypatch, 10)
    path, work = stage(tmp_path, batch_size=[16, 2], modes=["forward"])
    work()
    assert [row["state"] for row in read_run(path).records] == ["oom", "done"]
    assert runs.missing_stages(read_run(path), ["bench"]) == []
    work()
    assert len(read_run(path).records) == 2


def test_a_stage_with_a_wrong_row_is_not_done(tmp_path, monkeypatch):
    path, work = stage(tmp_path, modes=["forward"])
    with monkeypatch.context() as patch, pytest.raises(WrongOutput):
        planted(patch, lambda right: lambda *args: right(*args) * 1.01)
        work()
    lines = read_run(path).records
    assert [row["state"] for row in lines] == ["wrong", "failed"] and "without a number" in lines[1]["error"]
    assert runs.missing_stages(read_run(path), ["bench"]) == ["bench"]
    work()
    assert runs.missing_stages(read_run(path), ["bench"]) == []


def test_crossover_runs_to_its_figure(folder):
    planned = plan(studies.load("crossover").debug_size(), ["run.device=cpu"])
    assert [run.name for run in planned] == ["dit_nano", "lamamba_nano"]
    for run in planned:
        runs.create(run.info)
        runs.execute(run.folder, run.stages, Progress())
        assert run.state() == "done" and run.missing() == []
    build_report([run.folder for run in planned], folder / "out", "dit_nano")
    names = {path.name for path in (folder / "out").iterdir()}
    assert {"bench.md", "crossover.png", "crossover.pdf", "speed_vs_flops.png"} <= names
    assert "gradient_error,operator_error" in (folder / "out" / "bench.csv").read_text()
    assert "LaMamba-Diff-nano" in (folder / "out" / "README.md").read_text()


def test_crossover_asks_about_both_and_only_measures():
    study = studies.load("crossover")
    assert study.stages == ["bench"] and study.axes == {"model": ["dit_xl_2", "lamamba_xl_release", "lamamba_xl"]}
    config = plan(study)[0].info["config"]
    assert [8 * side for side in config["bench"]["input_sizes"]] == [128, 256, 512, 1024, 2048]
    assert config["model"]["in_channels"] == 4 and config["bench"]["modes"] == ["forward", "train"]


# On a GPU


SMALL = {  # a block or two: each is compiled six times
    "dit": DIT,
    "lamamba": replace(NANO, layout="isotropic", depths=[1]),
    "adm": ADMConfig(8, 1, 10, 64, 1, [1, 1], [], num_head_channels=16, null_class=True),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_way_of_compiling_on_the_gpu(name, precision):
    """float32 is float32 (the check's limit is below TF32's rounding), and memory is counted."""
    kinds = ["eager", "compile", "reduce-overhead"]
    rows, error = collect(make(SMALL[name], "cuda", compile=kinds, precision=precision, checkpointing=[False, True]))
    assert error is None and len(rows) == 9, error
    for row in rows:
        assert row["peak_memory_gib"] > 0 and row["state"] == "done"


@pytest.mark.gpu
def test_peak_memory_on_the_gpu():
    """Training holds five floats a parameter (weight, gradient, two moments, average), and activations unless they are
    computed again."""
    model = preset("dit_s_2").config
    rows, error = collect(make(model, "cuda", batch_size=64, compile=["eager"], checkpointing=[False, True]))
    assert error is None
    peak = {(row["mode"], row["checkpointing"]): 2**30 * row["peak_memory_gib"] for row in rows}
    kept = 4 * sum(parameter.numel() for parameter in build(model).parameters())
    assert kept < peak["forward", False]
    assert 5 * kept < peak["train", True]
    # of twelve blocks each keeps its hidden layer of the MLP, before and after GELU
    hidden = 64 * 256 * 4 * 384 * 4
    assert peak["train", False] - peak["train", True] > 11 * 2 * hidden


@pytest.mark.gpu
def test_max_autotune_on_the_gpu():
    rows, error = collect(make(DIT, "cuda", compile=["max-autotune"], precision="bfloat16"))
    assert error is None and [row["state"] for row in rows] == ["done", "done"]


@pytest.mark.gpu
def test_out_of_memory_on_the_gpu():
    torch.cuda.set_per_process_memory_fraction(1.5 * 2**30 / torch.cuda.mem_get_info()[1])
    try:
        # the hidden layer of 4096 images alone: 4096 · 256 tokens · 1536 · 2 bytes = 3 GiB
        config = make(
            preset("dit_s_2").config, "cuda", batch_size=[1, 4096, 2], modes=["forward"], precision="bfloat16"
        )
        rows, error = collect(config)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert error is None and [row["state"] for row in rows] == ["done", "oom", "done"]
    assert "out of memory" in rows[1]["error"]


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
