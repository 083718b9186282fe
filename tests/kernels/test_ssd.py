"""The SSD scan against its float64 reference (output and every gradient), the selective scan and sums by hand."""

import pytest
import torch
from lamabench.kernels import selective_scan
from lamabench.kernels import ssd as op
from lamabench.kernels.cross_scan import DIRECTIONS, scan_paths
from lamabench.kernels.errors import InputError
from lamabench.kernels.ssd import backend_mamba_ssm, backend_torch
from torch.autograd import gradcheck
from torch.nn.functional import softplus
from torch.utils.flop_counter import FlopCounterMode

NAMES = ("y", "x", "dt", "b", "c", "dt_bias", "a", "skip")


def make_inputs(batch, shape, heads, width, states, kind, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    k, length = DIRECTIONS[kind], shape[0] * shape[1]
    inputs = [
        normal(batch, length, heads * width),
        normal(batch, length, k, heads),
        normal(batch, length, k, states),
        normal(batch, length, k, states),
        normal(k, heads) - 2,
        -torch.rand(k, heads, generator=generator, dtype=torch.float64) * 15 - 0.1,
        normal(k, heads),
    ]
    return [v.to(dtype).requires_grad_() for v in inputs], scan_paths(kind, *shape)


def run(inputs, paths, backend):
    """Output and gradients of a fixed random loss, in float64. `backend` is a name, or the function of a backend."""
    y = op.ssd(*inputs, paths, backend) if isinstance(backend, str) else backend(*inputs, *paths[:2])
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    return [y.detach().double(), *(g.double() for g in torch.autograd.grad((y * weights).sum(), inputs))]


def exactly(inputs):
    return [v.detach().double().requires_grad_() for v in inputs]


def compare(got, expected, bound):
    for name, fast, slow in zip(NAMES, got, expected, strict=True):
        assert (fast - slow).norm() <= bound * slow.norm(), (name, float((fast - slow).norm() / slow.norm()))


SIZES = [
    # batch, grid, heads, width, states, scan
    (1, (1, 1), 1, 1, 1, "unidirectional"),  # one token
    (2, (5, 7), 2, 3, 5, "cross"),  # one chunk, odd
    (1, (8, 8), 3, 2, 4, "bidirectional_4"),  # one whole chunk
    (1, (5, 13), 1, 8, 3, "bidirectional"),  # one token more than a chunk, one head
    (2, (9, 11), 3, 4, 6, "continuous"),
    (1, (12, 16), 2, 3, 7, "continuous"),  # three whole chunks
    (1, (199, 1), 4, 1, 17, "unidirectional"),  # heads of one channel, a prime number of tokens
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_chunks_match_the_reference(size, dtype, bound):
    inputs, paths = make_inputs(*size, dtype)
    compare(run(inputs, paths, "torch"), run(exactly(inputs), paths, "reference"), bound)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("size", [SIZES[1], SIZES[4]])
def test_it_is_a_selective_scan_whose_decays_are_equal(size, backend):
    """Another operator of this suite, with the step size and the decay of a head for each of its channels."""
    _, _, heads, width, states, kind = size[:6]
    inputs, paths = make_inputs(*size, torch.float64)
    x, dt, b, c, bias, a, skip = inputs
    to_channels = torch.eye(heads, dtype=torch.float64).repeat_interleave(width, 0).expand(DIRECTIONS[kind], -1, -1)
    wide = [v.repeat_interleave(width, 1) for v in (bias, a, skip)]
    rates = wide[1][..., None].expand(-1, -1, states)
    y = selective_scan.selective_scan(x, dt, b, c, to_channels, wide[0], rates, wide[2], paths, "reference")
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = [y, *torch.autograd.grad((y * weights).sum(), inputs)]
    compare(run(inputs, paths, backend), expected, 1e-12)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("length", [9, 70])
def test_a_closed_form(length, backend):
    """With constant inputs, y_l is N times a geometric sum, times the step size, plus the skip."""
    decay, delta, states = 0.5, 0.07, 3
    ones = torch.ones(1, length, 1, dtype=torch.float64)
    bias = torch.tensor([[delta]], dtype=torch.float64).expm1().log()  # its softplus is delta
    both = ones[..., None].expand(-1, -1, -1, states)
    a, skip = torch.tensor([[[-decay]], [[3.0]]], dtype=torch.float64)
    paths = scan_paths("unidirectional", 1, length)
    y = op.ssd(ones, torch.zeros_like(ones)[..., None], both, both, bias, a, skip, paths, backend)
    keep = torch.exp(torch.tensor(-decay * delta, dtype=torch.float64))
    expected = torch.stack([states * delta * (1 - keep ** (n + 1)) / (1 - keep) + 3 for n in range(length)])
    assert torch.allclose(y.flatten(), expected, rtol=1e-13)


def test_gradients_against_finite_differences(monkeypatch):
    monkeypatch.setattr(backend_torch, "CHUNK", 2)
    inputs, paths = make_inputs(1, (1, 3), 2, 1, 2, "bidirectional", torch.float64)
    for backend in ("torch", "reference"):
        assert gradcheck(lambda *v, backend=backend: op.ssd(*v, paths, backend), inputs)


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_the_size_of_a_chunk_does_not_matter(chunk, monkeypatch):
    inputs, paths = make_inputs(2, (5, 5), 2, 2, 3, "continuous", torch.float64)
    whole = run(inputs, paths, "torch")
    monkeypatch.setattr(backend_torch, "CHUNK", chunk)
    compare(run(inputs, paths, "torch"), whole, 1e-12)


@pytest.mark.parametrize("shift", [-30.0, 30.0])
def test_large_and_tiny_steps_are_exact_in_float32(shift):
    """Tiny steps beside steps of 30: with sums of exponents in float32, the gradient of dt is off by 2e-5, and that of
    a by more than itself."""
    inputs, paths = make_inputs(1, (9, 9), 2, 3, 4, "cross", torch.float32)
    with torch.no_grad():
        inputs[4].fill_(shift)
        inputs[1][:, ::2] = -20.0 - shift
    compare(run(inputs, paths, "torch"), run(exactly(inputs), paths, "reference"), 3e-6)


def in_bfloat16_throughout(x, dt, b, c, dt_bias, a, skip, order, inverse):
    """The equations with every intermediate result in the type of x: plain torch in the same precision."""
    u, dt, b, c, dt_bias, a, skip = (v.to(x.dtype) for v in (x, dt, b, c, dt_bias, a, skip))
    u, out = u.unflatten(-1, (a.shape[1], -1)), 0
    for k, path in enumerate(order):
        delta, h, steps = softplus(dt[:, :, k] + dt_bias[k]), 0, []
        for token in path.tolist():
            entering = (delta[:, token, :, None] * u[:, token])[..., None] * b[:, token, k, None, None, :]
            h = torch.exp(delta[:, token] * a[k])[..., None, None] * h + entering
            steps.append((h * c[:, token, k, None, None, :]).sum(-1) + skip[k, :, None] * u[:, token])
        out = out + torch.stack(steps, dim=1)[:, inverse[k]]
    return out.flatten(2)


@pytest.mark.parametrize("size", [(2, (5, 7), 2, 8, 5, "cross"), (1, (9, 11), 3, 16, 16, "continuous")])
def test_bfloat16_follows_rule_4(size):
    """x, dt, b and c are bfloat16 and parameters float32, as under autocast. The floor is one rounding."""
    inputs, paths = make_inputs(*size, torch.float32)
    inputs = [v.detach().to(torch.bfloat16 if i < 4 else torch.float32).requires_grad_() for i, v in enumerate(inputs)]
    exact = run(exactly(inputs), paths, "reference")
    with torch.autocast("cpu", torch.bfloat16):
        y = op.ssd(*inputs, paths)
        got = run(inputs, paths, "torch")
    assert y.dtype == torch.bfloat16
    plain = run(inputs, paths, in_bfloat16_throughout)
    for name, fast, base, true in zip(NAMES, got, plain, exact, strict=True):
        assert (fast - true).norm() <= 2 * (base - true).norm() + 2**-8 * true.norm(), name
    compare(got, exact, 2**-6)  # not only better than a bad one


def test_autocast_does_not_lower_float32():
    inputs, paths = make_inputs(*SIZES[4], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = op.ssd(*inputs, paths, "torch")
    assert torch.equal(y, op.ssd(*inputs, paths, "torch"))


def test_memory_full_of_nan_changes_nothing():
    """torch fills new memory with NaN in its deterministic mode, so that reading it before writing would show."""
    inputs, paths = make_inputs(*SIZES[3], torch.float64)
    expected = run(inputs, paths, "torch")
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
        got = run(inputs, paths, "torch")
    finally:
        torch.use_deterministic_algorithms(False)
    compare(got, expected, 1e-14)


def test_strided_inputs():
    inputs, paths = make_inputs(*SIZES[4], torch.float64)
    strided = [v.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for v in inputs]
    assert not strided[0].is_contiguous()
    compare(run(strided, paths, "torch"), run(inputs, paths, "torch"), 1e-13)


def test_compiled_as_one_graph():
    inputs, paths = make_inputs(*SIZES[4], torch.float64)
    torch.compiler.reset()
    call = torch.compile(backend_torch.ssd, fullgraph=True, backend="aot_eager")
    compare(run(inputs, paths, call), run(inputs, paths, "torch"), 1e-13)


@pytest.mark.parametrize("size", SIZES)
def test_multiply_adds_are_those_of_the_products(size):
    """The closed form against torch's count of the products that run, and by hand for the last size: 4 chunks."""
    inputs, paths = make_inputs(*size, torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        op.ssd(*inputs, paths, "torch")
    macs = op.OPERATOR.work(*inputs, *paths[:2]).macs
    assert counter.get_total_flops() == 2 * macs
    if size == SIZES[-1]:
        assert macs == 256 * 64 * 17 + 256 * 64 * 4 + 2 * 192 * 17 * 4


@pytest.mark.parametrize("backend", op.OPERATOR.backends)
def test_errors(backend):
    inputs, paths = make_inputs(1, (2, 2), 2, 1, 1, "cross", torch.float32)
    with pytest.raises(InputError, match=r"ssd: float16 .*65504.*; use bfloat16 or float32"):
        op.ssd(inputs[0].half(), *inputs[1:], paths, backend)
    with pytest.raises(InputError, match="ssd: 2 heads do not divide 3 channels"):
        op.ssd(torch.zeros(1, 4, 3), *inputs[1:], paths, backend)


def test_an_unknown_backend_lists_the_choices():
    inputs, paths = make_inputs(1, (2, 2), 2, 1, 1, "cross", torch.float32)
    with pytest.raises(InputError, match="unknown ssd backend 'fla'; choices: auto, torch, mamba_ssm, reference"):
        op.ssd(*inputs, paths, "fla")


class Kernels:
    """The module of mamba-ssm in plain torch, with its rules: x, b and c of one type, float32 for parameters, a group
    of heads for each b and c, gradients in the types of their inputs, and the positions of its results."""

    def _output(self, x, dt, a, b, c, d, bias):
        length, heads = x.shape[1:3]
        b, c = (v.repeat_interleave(heads // b.shape[2], dim=2) for v in (b, c))
        steps, h, y = softplus(dt + bias), 0, []
        for t in range(length):
            entering = (steps[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
            h = torch.exp(steps[:, t] * a)[..., None, None] * h + entering
            y.append((h * c[:, t, :, None]).sum(-1) + d[:, None] * x[:, t])
        return torch.stack(y, dim=1)

    def mamba_chunk_scan_combined(self, x, dt, a, b, c, chunk, *, D, dt_bias, dt_softplus):
        assert chunk == 64 and dt_softplus and x.shape[2] % b.shape[2] == 0 and b.shape == c.shape
        assert x.dtype == b.dtype == c.dtype in (torch.float32, torch.bfloat16)
        assert a.dtype == D.dtype == dt_bias.dtype == torch.float32
        assert x.shape[:3] == dt.shape and a.shape == D.shape == dt_bias.shape == dt.shape[2:]
        assert all(v.is_contiguous() for v in (x, dt, a, b, c, D, dt_bias))
        return self._output(*(v.float() for v in (x, dt, a, b, c, D, dt_bias))).to(x.dtype)

    def _mamba_chunk_scan_combined_bwd(self, grad, x, dt, a, b, c, out, chunk, *, D, dt_bias, dt_softplus):
        assert chunk == 64 and dt_softplus and grad.shape == out.shape == x.shape and grad.is_contiguous()
        inputs = (x, dt, a, b, c, D, dt_bias)
        # A custom operator runs below autograd, so that a stand-in takes the gradients by a forward mode of its own.
        values = [v.double() for v in inputs]
        function = torch.func.vjp(self._output, *values)[1]
        grads = [g.to(v.dtype) for g, v in zip(function(grad.double()), inputs, strict=True)]
        return *grads[:6], None, grads[6], None


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setattr(backend_mamba_ssm, "kernels", Kernels)


@pytest.mark.parametrize("size", SIZES[:5])
def test_mamba_ssm_gets_its_layout(size, kernels):
    """Gather, scatter and sum, on the CPU with a stand-in for the kernels."""
    inputs, paths = make_inputs(*size, torch.float32)
    compare(run(inputs, paths, backend_mamba_ssm.ssd), run(exactly(inputs), paths, "reference"), 3e-6)


def test_mamba_ssm_under_autocast(kernels):
    """x, dt, b and c are bfloat16 and parameters float32. The error is that of two paths' outputs and of the gradients
    rounded to 8 bits, not that of 35 steps."""
    inputs, paths = make_inputs(2, (5, 7), 2, 8, 5, "bidirectional", torch.float32)
    inputs = [v.detach().to(torch.bfloat16 if i < 4 else torch.float32).requires_grad_() for i, v in enumerate(inputs)]
    with torch.autocast("cpu", torch.bfloat16):
        assert backend_mamba_ssm.ssd(*inputs, *paths[:2]).dtype == torch.bfloat16
    compare(run(inputs, paths, backend_mamba_ssm.ssd), run(exactly(inputs), paths, "reference"), 2**-6)


def test_torch_opcheck_of_mamba_ssm(kernels):
    inputs, paths = make_inputs(2, (3, 5), 2, 3, 2, "bidirectional", torch.float32)
    shapes = ((2, 15, 4, 3), (2, 15, 4), (4,), (2, 15, 2, 2), (2, 15, 2, 2), (4,), (4,))
    values = tuple(-torch.rand(shape).requires_grad_() for shape in shapes)
    torch.library.opcheck(backend_mamba_ssm.scan_forward, tuple(v.detach().requires_grad_() for v in values))
    torch.compiler.reset()
    call = torch.compile(backend_mamba_ssm.ssd, fullgraph=True, backend="aot_eager")
    compare(run(inputs, paths, call), run(inputs, paths, backend_mamba_ssm.ssd), 1e-6)


def test_mamba_ssm_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(backend_mamba_ssm, "INSTALLED", False)
    missing, device = backend_mamba_ssm.reasons("cpu")
    assert missing == "mamba-ssm is not installed: pip install 'mamba-ssm>=2.2'"
    assert device == "it runs on CUDA GPUs only, not on 'cpu'" and backend_mamba_ssm.reasons("cuda") == [missing]
    monkeypatch.setattr(backend_mamba_ssm, "INSTALLED", True)
    assert backend_mamba_ssm.reasons("cuda") == [] and backend_mamba_ssm.reasons("meta") == [
        "it runs on CUDA GPUs only, not on 'meta'"
    ]
    assert op.OPERATOR.backends["mamba_ssm"].auto_on == ()  # never by `auto`
    monkeypatch.setattr(backend_mamba_ssm, "MODULE", "mamba_ssm_of_nobody.ops")
    with pytest.raises(InputError, match=r"cannot import mamba_ssm_of_nobody\.ops: No module named"):
        backend_mamba_ssm.kernels()
    inputs, paths = make_inputs(1, (2, 2), 2, 1, 1, "cross", torch.float64)
    with pytest.raises(InputError, match="'mamba_ssm' computes in float32, not in float64; use 'torch' or 'reference'"):
        backend_mamba_ssm.ssd(*inputs, *paths[:2])
    inputs, paths = make_inputs(1, (2, 2), 2, 1, 257, "cross", torch.float32)
    with pytest.raises(InputError, match="'mamba_ssm' takes at most 256 states, not 257"):
        backend_mamba_ssm.ssd(*inputs, *paths[:2])


# Every installed backend. The kernels of mamba-ssm multiply float32 as TF32, so that only bfloat16 is asked of them.
ON_CUDA = [
    ("torch", torch.float32),
    ("torch", torch.bfloat16),
    *((("mamba_ssm", torch.bfloat16),) if backend_mamba_ssm.INSTALLED else ()),
]


@pytest.mark.gpu
@pytest.mark.parametrize("size", [*SIZES, (2, (16, 16), 10, 64, 64, "continuous"), (1, (50, 50), 2, 64, 128, "cross")])
@pytest.mark.parametrize(("backend", "dtype"), ON_CUDA)
def test_on_the_gpu(size, backend, dtype):
    """float32 is within 3e-5 of float64, because a GPU's exponentials have 22 bits. bfloat16 follows rule 4, against
    the same products on the CPU. The floor is one rounding."""
    inputs, paths = make_inputs(*size, torch.float32)
    types_of = [dtype if i < 4 else torch.float32 for i in range(len(inputs))]
    inputs = [v.detach().to(kind).requires_grad_() for v, kind in zip(inputs, types_of, strict=True)]
    exact = run(exactly(inputs), paths, "torch")
    on_gpu = [v.detach().cuda().requires_grad_() for v in inputs]
    got = [
        v.cpu() for v in run(on_gpu, paths._replace(order=paths.order.cuda(), inverse=paths.inverse.cuda()), backend)
    ]
    if dtype == torch.float32:
        return compare(got, exact, 3e-5)
    for name, fast, base, true in zip(NAMES, got, run(inputs, paths, "torch"), exact, strict=True):
        assert (fast - true).norm() <= 2 * (base - true).norm() + 2**-8 * true.norm(), name
