"""Benchmarks of models: the checks before a number is printed, and failures that become rows."""

import json
import math
from dataclasses import replace

import pytest
import torch
from lamabench.baselines.adm import ADMConfig
from lamabench.baselines.dit import DiT
from lamabench.baselines.uvit import UViTConfig
from lamabench.harness import device
from lamabench.harness.diffusion.gaussian import DDPM
from lamabench.harness.measure import check, models
from lamabench.harness.measure.search import Point
from lamabench.harness.sections import BackendConfig, ObjectiveConfig
from lamabench.harness.training import graph
from lamabench.kernels.errors import InputError
from lamabench.models.registry import build, preset
from measuring import DIT, NANO, collect, make, out_of_memory_above, planted, rows_of


def test_a_bench_with_nothing_to_measure_does_not_wait(monkeypatch):
    rows, _ = collect(make(modes=["forward"]))
    monkeypatch.setattr(models, "one_at_a_time", None)
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
        assert row["backend"] == {"modulated_norm": "torch", "attention": "sdpa"}
        assert row["checked_against"] == dict.fromkeys(row["backend"], "reference")
        assert row["peak_memory_gib"] is None and row["repeats"] == 2 and row["began"] == rows[0]["began"]
        assert row["timed_error"] < 1e-6 and row["clock_mhz"] is row["power_w"] is row["throttled"] is None
        assert json.dumps(row, allow_nan=False)
    assert "gradient_error" not in rows[0] and 0 <= rows[1]["gradient_error"] < 1e-6
    assert rows[0]["macs"] > 3 * rows[2]["macs"] and rows[0]["flops"] > 2 * rows[0]["macs"]
    assert collect(config, rows) == ([], None)  # nothing is missing


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_a_call_that_is_wrong_only_while_it_is_timed_has_no_number(mode, monkeypatch):
    timing = []
    planted(monkeypatch, lambda right: lambda *args: right(*args) * (1.01 if timing else 1))

    def timed(*args):
        timing.append(True)
        try:
            return right(*args)
        finally:
            timing.clear()

    right = models.time_calls
    monkeypatch.setattr(models, "time_calls", timed)
    (row,), error = collect(make(modes=[mode]))
    assert row["state"] == "wrong" and "p50_ms" not in row and error is not None
    assert row["error"].startswith("output off by" if mode == "forward" else "the last timed step is off by")


def replayed(wrong=1.0):
    """A step that takes losses and gradients from a replay at the call after the warm-up: it writes where the capture
    did, `wrong` times what is right, whatever Python calls the gradients since."""
    torch.manual_seed(0)
    net = build(DIT)
    models.fill_constants(net)
    step = models.training_step(net, net, "cpu", "float32", DDPM(), None)
    captured = []

    def run(inputs):
        before = [p.grad for p in check.trained(net)]
        step._update(inputs)
        if step.updates < graph.WARM_UP:
            return
        for place, (p, grad) in enumerate(zip(check.trained(net), before, strict=True)):
            p.grad.mul_(wrong)
            if len(captured) <= place:
                captured.append(p.grad)
            else:
                captured[place].copy_(p.grad)
                p.grad = grad

    step._run = run
    return step


def batch_of_two():
    t = torch.randint(0, 1000, (2,))
    return models.noisy(torch.randn(2, 1, 8, 8), t, torch.zeros_like(t))


def test_the_gradients_of_a_replayed_step_are_those_that_are_compared():
    step = replayed()
    check.check_whole_step(step, batch_of_two(), "float32")
    step(last := batch_of_two())
    assert check.check_step(step, last, "float32") == 0
    step = replayed()
    check.check_whole_step(step, batch_of_two(), "float32")
    step(batch_of_two())
    with pytest.raises(check.WrongOutput, match="the last timed step is off by"):
        check.check_step(step, batch_of_two(), "float32")


def test_a_replay_that_is_wrong_has_no_number():
    with pytest.raises(check.WrongOutput, match="the whole step as a CUDA graph is off by"):
        check.check_whole_step(replayed(1.001), batch_of_two(), "float32")


def test_the_weights_stay_those_of_the_check():
    settings = make(modes=["train"]).bench
    subject = models.Subject(DIT, settings, BackendConfig(), DDPM(), "cpu", lambda text: None)
    before = [parameter.clone() for parameter in subject.net.parameters()]
    assert subject.row(Point(8, "train", False, "eager", 2))["state"] == "done"
    assert all(torch.equal(a, b) for a, b in zip(before, subject.net.parameters(), strict=True))
    assert all(bool((v != 0).any()) for v in before)


@pytest.mark.parametrize(("kind", "most"), [("ddpm", 999), ("v", 999), ("flow", 0.999)])
def test_a_network_is_checked_and_timed_at_times_of_its_objective(monkeypatch, kind, most):
    """In the middle of their range, and at random ones. The loss is finite, of targets as large as the noise."""
    seen, forward = [], DiT.forward

    def spy(self, x, t, y):
        if not t.is_meta:  # as the cost is counted
            seen.append(t.detach().clone())
        return forward(self, x, t, y)

    monkeypatch.setattr(DiT, "forward", spy)
    config = make(replace(DIT, out_channels=2 if kind == "ddpm" else 1), batch_size=5, modes=["train"])
    config = replace(config, objective=ObjectiveConfig(kind))
    rows, error = collect(config)
    assert error is None and [row["state"] for row in rows] == ["done"]
    assert any(t.tolist() == [1000 * most / 999 / 2] for t in seen)
    times = torch.cat([t for t in seen if len(t) == 5])
    assert float(times.min()) >= 0
    assert 0.5 * most < float(times.max()) <= most
    assert len(times.unique()) > 3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_reference_is_the_model_and_its_gradients(precision):
    """Against a direct call of the net with four images, of which only the last has a gradient."""
    torch.manual_seed(0)
    net = build(DIT)
    models.fill_constants(net)
    reference = check.reference(net, precision, "cpu")
    assert (reference.plain_output > 0) == (reference.plain_gradients > 0) == (precision == "bfloat16")
    assert net.training and not net.checkpointing
    x, t, y = check.batch_of(reference, 4, "cpu")
    assert not torch.equal(x[0], x[1]) and torch.equal(x[0], x[3])
    out = net(x, t, y)
    torch.testing.assert_close(out[3], reference.output, rtol=1e-5, atol=1e-5)
    parameters = check.trained(net)
    gradients = torch.autograd.grad((out[3] * reference.weights).sum(), parameters)
    for actual, expected in zip(reference.gradients, gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_relative_rms_by_hand():
    exact = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
    assert check.relative_rms([torch.tensor([3.0, 0.3]), torch.tensor([4.4])], exact) == pytest.approx(0.1)
    assert math.isnan(check.relative_rms([torch.tensor([math.nan, 0.0]), exact[1]], exact))
    zero = [torch.zeros(2)]
    assert check.relative_rms([torch.tensor([3.0, 4.0])], zero) == 5 and check.relative_rms(zero, zero) == 0


def test_only_forward_passes_have_rounded_weights(monkeypatch):
    seen = []

    def watch(right):
        def watched(call, net, *more):
            seen.append({parameter.dtype for parameter in net.parameters()})
            return right(call, net, *more)

        return watched

    for name in ("forward", "training_step"):
        monkeypatch.setattr(models, name, watch(getattr(models, name)))
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


def test_a_wrong_last_image_is_detected(monkeypatch):
    def spoil(right):
        def run(*args):
            out = right(*args)
            return torch.cat([out[:-1], 1.01 * out[-1:]])

        return run

    planted(monkeypatch, spoil)
    assert [row["state"] for row in collect(make(modes=["forward"]))[0]] == ["wrong"]


def test_a_wrong_gradient_only_stops_training(monkeypatch):
    class Tilted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, *grad_outputs):
            return grad_outputs[0] * 1.01

    planted(monkeypatch, lambda right: lambda *args: Tilted.apply(right(*args)))
    monkeypatch.setattr(models, "check_operators", lambda *_: None)  # it would detect the error first, in every row
    rows, error = collect(make())
    assert [row["state"] for row in rows] == ["done", "wrong"] and "gradient off by" in rows[1]["error"]
    assert error is not None and "images_per_s" in rows[0] and "images_per_s" not in rows[1]


def test_bfloat16_may_have_twice_the_error_of_plain_bfloat16(monkeypatch):
    assert [row["state"] for row in collect(make(precision="bfloat16"))[0]] == ["done", "done"]
    planted(monkeypatch, lambda right: lambda *args: right(*args) * 1.3)
    assert [row["state"] for row in collect(make(precision="bfloat16"))[0]] == ["wrong", "wrong"]


def test_many_tokens_are_checked_against_plain_torch(monkeypatch):
    monkeypatch.setattr(check, "MANY_TOKENS", 16)
    (row,) = collect(make(modes=["forward"]))[0]
    assert row["state"] == "done" and row["checked_against"] == {"modulated_norm": "reference", "attention": "sdpa"}


def test_out_of_memory_is_a_row_and_ends_the_search(monkeypatch):
    out_of_memory_above(monkeypatch, 10)
    rows, error = collect(make(batch_size="auto", modes=["train"], seconds=5.0))
    assert error is None
    assert [(r["batch_size"], r["state"]) for r in rows] == [(1, "done"), (8, "done"), (16, "oom"), (12, "oom")]
    assert rows[2]["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    assert "images_per_s" not in rows[2]


def test_no_memory_for_the_reference(monkeypatch):
    out_of_memory_above(monkeypatch, 0)
    rows, error = collect(make(batch_size="auto"))
    assert error is None and [(r["mode"], r["batch_size"], r["state"]) for r in rows] == [
        ("forward", 1, "oom"), ("train", 1, "oom")
    ]  # fmt: skip
    assert rows[0]["error"].startswith("no reference for one image: OutOfMemoryError")


def compile_with(monkeypatch, backend):
    options = {"fullgraph": True, "dynamic": False, "backend": backend}
    monkeypatch.setattr(device, "COMPILE_OPTIONS", dict.fromkeys(device.COMPILE_OPTIONS, options))


def test_the_compiled_model_is_checked_and_measured(monkeypatch):
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_with(monkeypatch, counting)
    rows, error = collect(make(modes=["forward"], compile=["compile"], batch_size=[1, 2]))
    assert error is None and [row["state"] for row in rows] == ["done", "done"]
    assert len(graphs) == 2  # one graph for each batch: the checked graph is the timed one

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
        raise RuntimeError("no such instruction\nand more lines")

    compile_with(monkeypatch, broken)
    rows, error = collect(make(modes=["forward"], compile=["eager", "compile"]))
    assert [row["state"] for row in rows] == ["done", "failed"] and "no such instruction" in rows[1]["error"]
    assert "\n" not in rows[1]["error"] and "images_per_s" not in rows[1] and error is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_sizes": [8, 7]}, "patch_size 2 does not divide model.input_size 7"),
        ({"modes": ["train"], "compile": ["whole-step"]}, "compile=whole-step needs a GPU, and the device is cpu"),
    ],
)
def test_bad_input_is_an_error_before_anything_is_measured(settings, message):
    with pytest.raises(InputError, match=message):
        next(rows_of(make(**settings)))


SMALL = {  # one to three blocks, because each is compiled six times
    "dit": DIT,
    "modern": replace(DIT, depth=1, qk_norm=True, rope=True, swiglu=True, rms_norm=True),
    "uvit": UViTConfig(8, 1, 10, patch_size=2, hidden_size=16, depth=3, num_heads=2),
    "lamamba": replace(NANO, layout="isotropic", depths=[1]),
    "adm": ADMConfig(8, 1, 10, 64, 1, [1, 1], [], num_head_channels=16, null_class=True),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_way_of_compiling_on_the_gpu(name, precision):
    """float32 is float32 (the check's limit is below TF32's rounding), and memory is counted."""
    kinds = ["eager", "compile", "reduce-overhead", "whole-step"]
    rows, error = collect(make(SMALL[name], "cuda", compile=kinds, precision=precision, checkpointing=[False, True]))
    assert error is None and len(rows) == 3 + 8, error  # whole-step is a mode of training
    for row in rows:
        assert row["peak_memory_gib"] > 0 and row["state"] == "done"
        assert row["timed_error"] is not None and row["clock_mhz"] and row["power_w"]


@pytest.mark.gpu
def test_peak_memory_on_the_gpu():
    """Training holds five floats per parameter (weight, gradient, two moments, average), and the activations unless
    they are recomputed."""
    model = preset("dit_s_2").config
    rows, error = collect(make(model, "cuda", batch_size=64, compile=["eager"], checkpointing=[False, True]))
    assert error is None
    peak = {(row["mode"], row["checkpointing"]): 2**30 * row["peak_memory_gib"] for row in rows}
    weights = 4 * sum(parameter.numel() for parameter in build(model).parameters())
    assert weights < peak["forward", False]
    assert 5 * weights < peak["train", True]
    # each of twelve blocks keeps the hidden layer of its MLP, before and after GELU
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
        # the hidden layer alone, with 4096 images, takes 4096 · 256 tokens · 1536 · 2 bytes = 3 GiB
        config = make(
            preset("dit_s_2").config, "cuda", batch_size=[1, 4096, 2], modes=["forward"], precision="bfloat16"
        )
        rows, error = collect(config)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert error is None and [row["state"] for row in rows] == ["done", "oom", "done"]
    assert "out of memory" in rows[1]["error"]


def test_a_model_that_does_not_fit_is_a_row(monkeypatch):
    """Its weights need more memory than there is. Other sizes are measured."""
    right = models.build

    def build_small(config):
        if config.input_size == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(config)

    monkeypatch.setattr(models, "build", build_small)
    rows, error = collect(make(input_sizes=[4, 8], modes=["forward"]))
    assert [(row["input_size"], row["state"]) for row in rows] == [(4, "oom"), (8, "done")] and error is None
    assert rows[0]["error"] == "OutOfMemoryError: CUDA out of memory" and "p50_ms" not in rows[0]
