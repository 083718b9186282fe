"""The scan paths, and the selective scan against its float64 reference (output and every gradient)."""

import pytest
import torch
from lamabench.kernels import selective_scan as op
from lamabench.kernels.cross_scan import DIRECTIONS, scan_paths
from lamabench.kernels.errors import InputError
from lamabench.kernels.selective_scan import backend_mamba_ssm, backend_torch
from torch.autograd import gradcheck

# By hand, for a grid of 3 rows and 4 columns:
#   0 1 2 3
#   4 5 6 7
#   8 9 10 11
BY_HAND = {
    "continuous": [
        [0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11],
        [8, 9, 10, 11, 7, 6, 5, 4, 0, 1, 2, 3],
        [8, 4, 0, 1, 5, 9, 10, 6, 2, 3, 7, 11],
        [11, 7, 3, 2, 6, 10, 9, 5, 1, 0, 4, 8],
    ],
    "cross": [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11],
        [11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0],
        [11, 7, 3, 10, 6, 2, 9, 5, 1, 8, 4, 0],
    ],
    "bidirectional": [list(range(12)), list(range(11, -1, -1))],
    "unidirectional": [list(range(12))],
    "bidirectional_4": [list(range(12))] * 2 + [list(range(11, -1, -1))] * 2,
    "unidirectional_4": [list(range(12))] * 4,
}


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_paths_by_hand(kind):
    assert scan_paths(kind, 3, 4).order.tolist() == BY_HAND[kind]


@pytest.mark.parametrize("kind", DIRECTIONS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 4), (5, 3), (8, 8)])
def test_inverse_undoes_the_path(kind, shape):
    paths = scan_paths(kind, *shape)
    assert paths.order.shape == (DIRECTIONS[kind], shape[0] * shape[1])
    steps = torch.arange(shape[0] * shape[1]).expand_as(paths.order)
    assert torch.equal(paths.order.gather(1, paths.inverse), steps)


@pytest.mark.parametrize("shape", [(4, 6), (5, 5), (3, 8)])
def test_continuous_paths_never_jump(shape):
    order = scan_paths("continuous", *shape).order
    row, column = order // shape[1], order % shape[1]
    distance = row.diff(dim=1).abs() + column.diff(dim=1).abs()
    assert (distance == 1).all()


def test_unknown_scan_lists_the_choices():
    with pytest.raises(
        InputError, match=r"unknown scan 'contiguous'.*continuous, cross, bidirectional, unidirectional"
    ):
        scan_paths("contiguous", 4, 4)


def make_inputs(batch, shape, channels, states, rank, kind, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0):
        return torch.randn(*size, generator=generator, dtype=torch.float64).mul_(scale)

    k, length = DIRECTIONS[kind], shape[0] * shape[1]
    inputs = [
        normal(batch, length, channels),
        normal(batch, length, k, rank),
        normal(batch, length, k, states),
        normal(batch, length, k, states),
        normal(k, channels, rank, scale=rank**-0.5),
        normal(k, channels) - 2,
        -torch.rand(k, channels, states, generator=generator, dtype=torch.float64) * states - 0.1,
        normal(k, channels),
    ]
    return [v.to(dtype).requires_grad_() for v in inputs], scan_paths(kind, *shape)


def run(inputs, paths, backend):
    """Output and gradients of a fixed random loss, in float64. `backend` is a name, or the function of a backend."""
    y = op.selective_scan(*inputs, paths, backend) if isinstance(backend, str) else backend(*inputs, *paths)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    return [y.double(), *(g.double() for g in torch.autograd.grad((y * weights).sum(), inputs))]


def compare(got, expected, bound):
    names = ("y", "x", "dt", "b", "c", "dt_weight", "dt_bias", "a", "skip")
    for name, fast, slow in zip(names, got, expected, strict=True):
        assert (fast - slow).norm() <= bound * slow.norm(), (name, float((fast - slow).norm() / slow.norm()))


SIZES = [
    # batch, grid, channels, states, rank, scan
    (1, (1, 1), 1, 1, 1, "unidirectional"),
    (2, (4, 4), 3, 1, 2, "cross"),
    (1, (5, 7), 8, 4, 1, "continuous"),
    (3, (3, 11), 5, 16, 3, "bidirectional"),
    (2, (8, 8), 16, 2, 4, "continuous"),
    (1, (17, 1), 4, 64, 1, "unidirectional"),
    (2, (3, 5), 4, 2, 2, "bidirectional_4"),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_vectorised_scan_matches_the_reference(size, dtype, bound):
    inputs, paths = make_inputs(*size, dtype)
    exact, _ = make_inputs(*size, torch.float64)
    with torch.no_grad():
        for a, b in zip(exact, inputs, strict=True):
            a.copy_(b)
    compare(run(inputs, paths, "torch"), run(exact, paths, "reference"), bound)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(("kind", "times"), [("unidirectional", 4), ("bidirectional", 2)])
def test_a_path_that_several_equal_sets_read_counts_as_often(kind, times, backend):
    (x, *tokens), paths = make_inputs(2, (3, 4), 5, 3, 2, kind, torch.float64)
    axes = (2, 2, 2, 0, 0, 0, 0)
    several = [value.repeat_interleave(times, axis) for value, axis in zip(tokens, axes, strict=True)]
    y = op.selective_scan(x, *several, scan_paths(f"{kind}_4", 3, 4), backend)
    torch.testing.assert_close(y, times * op.selective_scan(x, *tokens, paths, "reference"))


def test_reference_against_a_closed_form():
    """With one state and a constant step, y_l is a geometric sum."""
    length, decay, delta = 9, 0.5, 0.7
    ones = torch.ones(1, length, 1, dtype=torch.float64)
    bias = torch.tensor([[delta]], dtype=torch.float64).expm1().log()  # its softplus is delta
    y = op.selective_scan(
        ones,
        torch.zeros(1, length, 1, 1, dtype=torch.float64),
        ones[..., None],
        ones[..., None],
        torch.zeros(1, 1, 1, dtype=torch.float64),
        bias,
        torch.tensor([[[-decay]]], dtype=torch.float64),
        torch.tensor([[3.0]], dtype=torch.float64),
        scan_paths("unidirectional", 1, length),
        "reference",
    )
    keep = torch.exp(torch.tensor(-decay * delta, dtype=torch.float64))
    expected = torch.stack([delta * (1 - keep ** (n + 1)) / (1 - keep) + 3 for n in range(length)])
    assert torch.allclose(y.flatten(), expected, rtol=1e-13)


def test_gradients_against_finite_differences():
    inputs, paths = make_inputs(1, (2, 3), 2, 2, 1, "cross", torch.float64)
    assert gradcheck(lambda *v: op.selective_scan(*v, paths, "torch"), inputs)


def test_large_and_tiny_steps_stay_finite():
    inputs, paths = make_inputs(1, (6, 6), 4, 4, 1, "cross", torch.float32)
    for shift in (-30.0, 30.0):
        with torch.no_grad():
            inputs[5].fill_(shift)
        assert all(torch.isfinite(v).all() for v in run(inputs, paths, "torch"))


def test_chunks_do_not_matter(monkeypatch):
    inputs, paths = make_inputs(2, (5, 5), 4, 3, 2, "continuous", torch.float64)
    whole = run(inputs, paths, "torch")
    monkeypatch.setattr(backend_torch, "CHUNK", 4)
    for a, b in zip(whole, run(inputs, paths, "torch"), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("batch", [1, 3])
def test_bfloat16_is_as_good_as_its_inputs(batch):
    """The recurrence runs in float32, so that the error is one rounding of the output, not that of 64 steps."""
    inputs, paths = make_inputs(batch, (8, 8), 8, 4, 2, "cross", torch.bfloat16)
    exact = op.selective_scan(*(v.detach().double() for v in inputs), paths, "reference")
    fast = op.selective_scan(*(v.detach() for v in inputs), paths, "torch")
    assert fast.dtype == torch.bfloat16
    assert (fast.double() - exact).norm() <= 2 * (exact.bfloat16().double() - exact).norm() + 1e-6 * exact.norm()


def test_strided_inputs():
    inputs, paths = make_inputs(2, (4, 4), 6, 2, 2, "cross", torch.float64)
    strided = [v.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for v in inputs]
    assert not strided[0].is_contiguous()
    for a, b in zip(run(inputs, paths, "torch"), run(strided, paths, "torch"), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_torch_opcheck():
    """torch's own checks of a custom operator: schema, fake implementation, autograd registration."""
    inputs, paths = make_inputs(1, (3, 5), 4, 2, 2, "cross", torch.float32)
    torch.library.opcheck(torch.ops.lamabench.selective_scan.default, (*inputs, *paths[:2]))


def test_the_environment_does_not_change_what_auto_means(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert op.OPERATOR.resolve("auto", "cpu").name == op.OPERATOR.resolve("auto", "meta").name == "torch"


def test_triton_error_for_float64(monkeypatch):
    inputs, paths = make_inputs(1, (2, 2), 2, 1, 1, "cross", torch.float64)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(InputError, match="computes in float32, not in float64; use 'torch' or 'reference'"):
        op.selective_scan(*inputs, paths, "triton")


def test_unknown_backend_lists_the_choices():
    inputs, paths = make_inputs(1, (2, 2), 2, 1, 1, "cross", torch.float32)
    with pytest.raises(
        InputError, match=r"unknown selective_scan backend 'cub'.*; choices: auto, .*triton, .*torch, .*reference"
    ):
        op.selective_scan(*inputs, paths, "cub")


@pytest.mark.parametrize("backend", op.OPERATOR.backends)
def test_error_for_float16(backend):
    """The error comes with every backend, the reference included: a float16 run never has a loss."""
    inputs, paths = make_inputs(1, (2, 2), 2, 1, 1, "cross", torch.float32)
    with pytest.raises(InputError, match=r"selective_scan: float16 .*65504.*; use bfloat16 or float32"):
        op.selective_scan(inputs[0].half(), *inputs[1:], paths, backend)
    with pytest.raises(InputError, match="selective_scan: float16"):
        op.selective_scan(inputs[0], inputs[1].half(), *inputs[2:], paths, backend)


def test_autocast_does_not_change_the_type_of_the_step_sizes():
    """The products inside the operator run in float32 also under autocast, forward and backward."""
    inputs, paths = make_inputs(2, (4, 4), 6, 2, 3, "cross", torch.float32)
    expected = run(inputs, paths, "torch")
    with torch.autocast("cpu", torch.bfloat16):
        got = run(inputs, paths, "torch")
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


class Extension:
    """mamba-ssm's compiled scan in plain torch, with its rules: one type for u, delta, b and c, float32 for the rest,
    dense time, float32 inside, and gradients in the types of their inputs."""

    def _states(self, u, delta, a, b, bias):
        """Step sizes [B, K·E, L], decays [L, B, K·E, N], states [L + 1, B, K·E, N] from before the first step on."""
        delta = torch.nn.functional.softplus(delta.float() + bias[:, None])
        decay = torch.exp(delta[..., None] * a[:, None]).permute(2, 0, 1, 3)
        b = b.float().repeat_interleave(u.shape[1] // b.shape[1], dim=1)  # [B, K·E, N, L]
        states = [torch.zeros_like(decay[0])]
        for t in range(u.shape[2]):
            states.append(decay[t] * states[-1] + (delta * u)[..., t, None] * b[..., t])
        return delta, decay, torch.stack(states)

    @torch.autocast("cpu", enabled=False)  # autocast does not reach compiled code
    def fwd(self, u, delta, a, b, c, skip, z, bias, softplus):
        assert z is None and softplus and u.shape == delta.shape and b.shape == c.shape
        assert u.dtype == delta.dtype == b.dtype == c.dtype in (torch.float32, torch.bfloat16)
        assert a.dtype == skip.dtype == bias.dtype == torch.float32 and u.shape[1] % b.shape[1] == 0
        assert all(v.stride(-1) == 1 or v.shape[-1] == 1 for v in (u, delta, b, c, skip, bias))
        batch, channels, length = u.shape
        *_, states = self._states(u, delta, a, b, bias)
        c = c.float().repeat_interleave(channels // c.shape[1], dim=1)
        y = torch.einsum("lbdn,bdnl->bdl", states[1:], c) + skip[:, None] * u.float()
        return y.to(u.dtype), a.new_zeros(batch, channels, -(-length // 2048), 2 * a.shape[1])

    def bwd(self, u, delta, a, b, c, skip, z, bias, grad, ends, out, grad_z, softplus, recompute):
        assert (z, out, grad_z, softplus, recompute) == (None, None, None, True, False)
        assert grad.dtype == u.dtype and grad.shape == u.shape and grad.stride(-1) in (0, 1)
        assert ends.shape == (*u.shape[:2], -(-u.shape[2] // 2048), 2 * a.shape[1])
        inputs = (u, delta, a, b, c, skip, bias)
        group = b.shape[1]
        step, decay, states = self._states(u, delta, a, b, bias)
        u, gy, b, c = (v.float() for v in (u, grad, b, c))
        b, c = (v.repeat_interleave(u.shape[1] // group, dim=1) for v in (b, c))
        after, flow = torch.zeros_like(states[0]), []  # gradients of states, from outputs and from next states
        for t in reversed(range(u.shape[2])):
            flow.append(gy[..., t, None] * c[..., t] + after)
            after = decay[t] * flow[-1]
        g = torch.stack(flow[::-1])
        g_exponent = g * decay * states[:-1]  # of step · a
        g_input = torch.einsum("lbdn,bdnl->bdl", g, b)  # of step · u
        g_pre = (torch.einsum("lbdn,dn->bdl", g_exponent, a) + g_input * u) * -torch.expm1(-step)
        grads = (
            g_input * step + skip[:, None] * gy,
            g_pre,
            torch.einsum("lbdn,bdl->dn", g_exponent, step),
            torch.einsum("lbdn,bdl->bdnl", g, step * u).unflatten(1, (group, -1)).sum(2),
            torch.einsum("lbdn,bdl->bdnl", states[1:], gy).unflatten(1, (group, -1)).sum(2),
            (gy * u).sum((0, 2)),
            g_pre.sum((0, 2)),
        )
        return [*(one.to(v.dtype).contiguous() for one, v in zip(grads, inputs, strict=True)), None]


@pytest.fixture
def extension(monkeypatch):
    monkeypatch.setattr(backend_mamba_ssm, "extension", Extension)


@pytest.mark.parametrize("size", SIZES)
def test_mamba_ssm_gets_its_layout(size, extension):
    """Gather, step sizes, scatter and sum, on the CPU with a stand-in for the compiled scan."""
    inputs, paths = make_inputs(*size, torch.float32)
    exact = [v.detach().double().requires_grad_() for v in inputs]
    compare(run(inputs, paths, backend_mamba_ssm.selective_scan), run(exact, paths, "reference"), 3e-6)


def test_mamba_ssm_under_autocast(extension):
    """x, dt, b and c are bfloat16 and parameters float32. The error is that of step sizes and four paths' outputs
    rounded to 8 bits, not that of 64 steps."""
    inputs, paths = make_inputs(2, (8, 8), 16, 2, 4, "continuous", torch.float32)
    inputs = [v.detach().to(torch.bfloat16 if i < 4 else torch.float32).requires_grad_() for i, v in enumerate(inputs)]
    exact = [v.detach().double().requires_grad_() for v in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        y = backend_mamba_ssm.selective_scan(*inputs, *paths)
        assert y.dtype == torch.bfloat16 and y.is_contiguous()
    got = run(inputs, paths, backend_mamba_ssm.selective_scan)
    compare(got, run(exact, paths, "reference"), 2**-6)
    assert torch.equal(got[0], y.double())


def test_torch_opcheck_of_mamba_ssm(extension):
    inputs, paths = make_inputs(2, (3, 5), 4, 2, 2, "cross", torch.float32)
    torch.library.opcheck(
        backend_mamba_ssm.scan_forward, tuple(v.detach().clone().requires_grad_() for v in (
            torch.randn(2, 8, 5), torch.randn(2, 8, 5), -torch.rand(8, 3), torch.randn(2, 4, 3, 5),
            torch.randn(2, 4, 3, 5), torch.randn(8), torch.randn(8),
        ))
    )  # fmt: skip
    call = torch.compile(backend_mamba_ssm.selective_scan, fullgraph=True, backend="aot_eager")
    compare(run(inputs, paths, call), run(inputs, paths, backend_mamba_ssm.selective_scan), 1e-6)


def test_mamba_ssm_says_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(backend_mamba_ssm, "INSTALLED", False)
    monkeypatch.setattr(backend_mamba_ssm, "PACKAGE", False)
    missing, device = backend_mamba_ssm.reasons("cpu")
    assert "mamba-ssm is not installed" in missing and device == "it runs on CUDA GPUs only, not on 'cpu'"
    assert backend_mamba_ssm.reasons("cuda") == [missing] and "MAMBA_KEEP_CUDA_BUILD=TRUE " in missing
    monkeypatch.setattr(backend_mamba_ssm, "PACKAGE", True)
    (missing,) = backend_mamba_ssm.reasons("cuda")
    assert "was built without its CUDA extension" in missing and "MAMBA_KEEP_CUDA_BUILD=TRUE " in missing
    monkeypatch.setattr(backend_mamba_ssm, "INSTALLED", True)
    assert backend_mamba_ssm.reasons("cuda") == [] and backend_mamba_ssm.reasons("meta") == [
        "it runs on CUDA GPUs only, not on 'meta'"
    ]
    inputs, paths = make_inputs(1, (2, 2), 2, 1, 1, "cross", torch.float64)
    with pytest.raises(InputError, match="'mamba_ssm' computes in float32, not in float64; use 'torch' or 'reference'"):
        backend_mamba_ssm.selective_scan(*inputs, *paths)
    inputs, paths = make_inputs(1, (2, 2), 2, 257, 1, "cross", torch.float32)
    with pytest.raises(InputError, match="'mamba_ssm' takes at most 256 states, not 257"):
        backend_mamba_ssm.selective_scan(*inputs, *paths)


def test_mamba_ssm_is_never_auto():
    backend = op.OPERATOR.backends["mamba_ssm"]
    assert backend.run is backend_mamba_ssm.selective_scan and backend.auto_on == ()


# Every installed backend without its own test file.
ON_CUDA = [
    ("torch", torch.float32),
    *((("mamba_ssm", torch.float32), ("mamba_ssm", torch.bfloat16)) if backend_mamba_ssm.INSTALLED else ()),
]


@pytest.mark.gpu
@pytest.mark.parametrize("size", [*SIZES, (2, (16, 16), 640, 16, 20, "continuous"), (1, (50, 50), 40, 1, 3, "cross")])
@pytest.mark.parametrize(("backend", "dtype"), ON_CUDA)
def test_on_the_gpu(size, backend, dtype, monkeypatch):
    """float32 is within 3e-5 of float64: a GPU's exponentials have 22 bits, and errors of up to 2500 steps add up.
    bfloat16 follows rule 4, against the same calls with a scan in plain torch. The floor is one rounding."""
    inputs, paths = make_inputs(*size, torch.float32)
    on_gpu = [v.detach().cuda().to(dtype if i < 4 else torch.float32).requires_grad_() for i, v in enumerate(inputs)]
    paths = paths._replace(order=paths.order.cuda(), inverse=paths.inverse.cuda())
    exact = run([v.detach().double().requires_grad_() for v in on_gpu], paths, "torch")
    got = run(on_gpu, paths, backend)
    if dtype == torch.float32:
        return compare(got, exact, 3e-5)
    monkeypatch.setattr(backend_mamba_ssm, "extension", Extension)
    for fast, plain, true in zip(got, run(on_gpu, paths, backend), exact, strict=True):
        assert (fast - true).norm() <= 2 * (plain - true).norm() + 2**-8 * true.norm()
