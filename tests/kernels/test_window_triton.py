"""The Triton window attention against float64 over all pairs of tokens, interpreted on the CPU and on a GPU.

Triton decides at import whether it interprets, so that the CPU's tests run in their own process.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from lamabench.kernels import triton_support
from lamabench.kernels import window_attention as op
from lamabench.kernels.errors import InputError
from lamabench.kernels.window_attention import backend_triton

_spec = importlib.util.spec_from_file_location("pairs", Path(__file__).with_name("test_window_attention.py"))
_pairs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_pairs)
by_pairs, make = _pairs.by_pairs, _pairs.make


SMALL = [
    # batch, height, width, heads, head width, window, shift, bias
    (3, 4, 4, 1, 3, 4, 0, True),
    (1, 9, 6, 2, 5, 3, 1, True),
    (1, 6, 4, 1, 7, 2, 1, False),
    (1, 2, 3, 1, 1, 1, 0, True),
    (1, 5, 10, 1, 20, 5, 2, True),
    (1, 7, 7, 1, 80, 7, 0, True),
    (3, 8, 8, 1, 20, 8, 4, True),  # one block in float16, several in float32
    (1, 18, 9, 1, 4, 9, 4, False),
    (3, 9, 9, 1, 4, 9, 4, True),  # several blocks in both, the last one not full
]


def arguments(qkv, table, size, backend):
    _, height, width, heads, _, window, shift, _ = size
    index = None if table is None else op.relative_position_index(window).to(qkv.device)
    mask = op.shift_mask(height, width, window, shift).to(qkv) if shift else None
    return qkv, heads, window, shift, table, index, mask, backend


def run(inputs, size, backend):
    """The output and every gradient, in float64."""
    qkv, table = inputs[0], inputs[1] if size[-1] else None
    if backend == "pairs":
        out = by_pairs(qkv, size[3], size[5], size[6], table)
    else:
        out = op.window_attention(*arguments(qkv, table, size, backend))
    assert out.dtype == qkv.dtype
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(torch.float16).to(out)
    gradients = torch.autograd.grad(out, inputs, weights)
    assert [g.dtype for g in gradients] == [v.dtype for v in inputs]
    return [v.double() for v in (out, *gradients)]


def inputs_of(size, dtype, device="cpu"):
    """qkv in `dtype` and the table in float32, as under autocast."""
    qkv, *table = make(*size[:6], size[-1], torch.float32)
    return [v.detach().to(device).requires_grad_() for v in (qkv.to(dtype), *table)]


def hold(size, dtype, floor, device="cpu"):
    """DESIGN.md, rule 4: at most twice the error of plain torch in the same precision, plus a floor."""
    inputs = inputs_of(size, dtype, device)
    exact = [v.detach().double().requires_grad_() for v in inputs]
    results = run(inputs, size, "triton"), run(inputs, size, "sdpa"), run(exact, size, "pairs")
    for name, fast, plain, true in zip(("out", "qkv", "table"), *results, strict=False):
        error = (fast - true).norm()
        assert error <= 2 * (plain - true).norm() + floor * true.norm(), (name, float(error / true.norm()))


@pytest.fixture
def two_programs(monkeypatch):
    """Two programs share three images: one takes two, the other takes one."""

    def plan(*args):
        return plan_of(*args[:-1], 2 * args[2] * args[0].shape[1] * args[0].shape[2] // args[3] ** 2)

    plan_of = backend_triton._plan
    monkeypatch.setattr(backend_triton, "_plan", plan)


@pytest.mark.interpreted
@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 1e-6), (torch.float16, 1e-5)])
@pytest.mark.parametrize("size", SMALL)
def test_small(size, dtype, floor, poison, two_programs):
    hold(size, dtype, floor)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_small_and_strided(dtype, poison):
    """A slice of wider rows, channels first, and a gradient that is not contiguous give what contiguous ones give."""
    size = (1, 4, 8, 2, 3, 4, 2, True)
    qkv, table = inputs_of(size, dtype)
    wide = torch.nn.functional.pad(qkv.detach(), (5, 2))
    weights = torch.randn(1, 6, 4, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = None
    for strided in (qkv.detach(), wide[..., 5:-2], qkv.detach().permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
        leaf = strided.detach().requires_grad_()
        out = op.window_attention(*arguments(leaf, table, size, "triton"))
        got = [out, *torch.autograd.grad(out.permute(0, 3, 1, 2), (leaf, table), weights)]
        expected = expected or got
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.interpreted
@pytest.mark.parametrize(("window", "table"), [(2, True), (2, False), (6, True)])  # one block, and several
def test_small_opcheck(window, table):
    size = (1, window, window, 1, 2, window, 1, table)
    qkv, *tables = inputs_of(size, torch.float32)
    rest = (tables[0] if table else None, 1, window, 1, True)
    torch.library.opcheck(torch.ops.lamabench.window_attention_triton.default, (qkv, *rest))
    with torch.no_grad():
        outputs = backend_triton.attention_forward(qkv, *rest)
        saved = (outputs[0].clone(), qkv.detach(), *rest[:1], *outputs, *rest[1:])
        torch.library.opcheck(torch.ops.lamabench.window_attention_triton_backward.default, saved)


@pytest.mark.interpreted
def test_small_and_traced():
    """A traced call is one graph with the same numbers."""
    size = (1, 4, 4, 2, 3, 2, 1, True)
    inputs = inputs_of(size, torch.float32)
    plain = run(inputs, size, "triton")
    traced = torch.compile(op.window_attention, fullgraph=True, backend="aot_eager")
    out = traced(*arguments(*inputs, size, "triton"))
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(torch.float16).to(out)
    for one, other in zip(plain, (out, *torch.autograd.grad(out, inputs, weights)), strict=True):
        assert torch.equal(one, other.double())


@pytest.mark.parametrize("window", [1, 2, 3, 5])
def test_table_gradient_is_a_sum_by_index(window):
    pairs = torch.randn(3, window**2, window**2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    index = op.relative_position_index(window).flatten()
    expected = torch.zeros((2 * window - 1) ** 2, 3, dtype=torch.float64).index_add_(0, index, pairs.flatten(1).T)
    torch.testing.assert_close(backend_triton.table_gradient(pairs, window), expected, rtol=1e-13, atol=1e-13)


def test_where_backends_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert any("TRITON_INTERPRET" in reason for reason in triton_support.triton_reasons("cpu"))
    assert any("'meta'" in reason for reason in triton_support.triton_reasons("meta"))
    assert op.OPERATOR.resolve("auto", "meta").name == op.OPERATOR.resolve("auto", "cpu").name == "sdpa"
    with pytest.raises(InputError, match=r"'triton' cannot run on cpu: .*Usable here: sdpa, reference"):
        op.OPERATOR.resolve("triton", "cpu")
    monkeypatch.setattr(triton_support, "INSTALLED", False)
    assert "the package triton is not installed" in triton_support.triton_reasons("cuda")
    assert op.OPERATOR.resolve("auto", "cuda").name == "sdpa"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(1, 4, 4, 12, dtype=torch.float64)}, "not on a qkv of torch.float64; use 'sdpa'"),
        ({"table": torch.zeros(9, 2, dtype=torch.float64)}, "not on a table of torch.float64; use 'sdpa'"),
        ({"qkv": torch.zeros(1, 4, 5, 12)}, r"qkv \[1, 4, 5, 12\] does not fit 2 heads, window 2 and shift 1"),
        ({"heads": 5}, "sides must be multiples of the window, channels of 3 · heads"),
        ({"shift": 2}, "the shift less than the window"),
        ({"qkv": torch.zeros(1, 2, 2, 6 * 257)}, "heads of width 1 to 256, not 257; use 'sdpa'"),
        ({"table": torch.zeros(16, 2)}, r"a table for window 2 and 2 heads must be \[9, 2\], not \[16, 2\]"),
    ],
)
def test_errors_for_bad_input(change, message):
    good = {"qkv": torch.zeros(1, 4, 4, 12), "heads": 2, "window": 2, "shift": 1, "table": torch.zeros(9, 2)}
    index, mask = op.relative_position_index(2), op.shift_mask(4, 4, 2, 1)
    with pytest.raises(InputError, match=message):
        backend_triton.window_attention(**{**good, **change}, index=index, mask=mask)


def test_macs_of_a_call():
    # 16 tokens of width 6, each with 4 keys: 16 · 4 · 6 for the scores and as much for the values.
    call = (torch.empty(1, 4, 4, 18, device="meta"), None, 2, 2, 0, False)
    assert op.OPERATOR.traced["lamabench::window_attention_triton"](*call).macs == 2 * 16 * 4 * 6


BIG = [
    (12, 32, 32, 16, 20, 8, 4, True),  # LaMamba-XL, 256 px
    (40, 16, 16, 16, 40, 8, 4, True),
    (150, 8, 8, 16, 80, 8, 0, True),
    (1, 64, 64, 16, 20, 8, 4, True),  # 512 px
    (3, 32, 32, 4, 16, 8, 4, True),  # other sizes' heads
    (3, 16, 16, 9, 32, 8, 0, True),
    (3, 16, 16, 17, 64, 8, 4, True),
    (3, 10, 15, 3, 33, 5, 2, True),
    (3, 14, 14, 3, 128, 7, 3, False),
    (3, 6, 6, 2, 1, 1, 0, True),
    (5, 12, 12, 2, 256, 4, 2, True),
    (3, 32, 16, 2, 20, 16, 8, True),  # several blocks
    (2, 24, 24, 1, 128, 12, 6, True),
    (2, 9, 9, 1, 256, 9, 4, False),
    (1, 32, 32, 2, 40, 32, 0, True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", BIG)
def test_on_the_gpu(size, dtype, poison):
    hold(size, dtype, floor=3e-6 if dtype == torch.float32 else 2e-5, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [*BIG[:3], BIG[11]])
def test_results_repeat_to_the_bit(size):
    inputs = inputs_of(size, torch.bfloat16, "cuda")
    for one, other in zip(run(inputs, size, "triton"), run(inputs, size, "triton"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [*BIG[:3], BIG[11]])
def test_an_image_does_not_see_its_batch(size):
    qkv, table = inputs_of(size, torch.bfloat16, "cuda")
    grad = torch.randn(*qkv.shape[:3], qkv.shape[3] // 3, device="cuda", dtype=qkv.dtype)
    results = []
    for n in (len(qkv), 1):
        part = qkv[:n].detach().requires_grad_()
        out = op.window_attention(*arguments(part, table, size, "triton"))
        results.append((out[0], torch.autograd.grad(out, part, grad[:n])[0][0]))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.gpu
def test_compiled_under_autocast():
    """A Linear before it gives bfloat16; one graph; the table's gradient is float32 and repeats to the bit."""
    size = (4, 16, 16, 16, 40, 8, 4, True)
    qkv, table = inputs_of(size, torch.float32, "cuda")
    linear = torch.nn.Linear(qkv.shape[-1], qkv.shape[-1], device="cuda")

    def call(x):
        return op.window_attention(*arguments(linear(x), table, size, "auto"))

    results = []
    for function in (call, *[torch.compile(call, fullgraph=True)] * 2):
        with torch.autocast("cuda", torch.bfloat16):
            out = function(qkv)
        assert out.dtype == torch.bfloat16
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (qkv, table))))
    for eager, compiled, again in zip(*results, strict=True):
        assert eager.dtype == compiled.dtype
        assert (eager.double() - compiled.double()).norm() <= 1e-2 * eager.double().norm()  # bfloat16, other kernels
        assert torch.equal(compiled, again)
