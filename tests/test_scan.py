"""The scan paths, and the selective scan against its float64 reference: output and every gradient."""

import pytest
import torch
from lamabench.kernels import selective_scan as op
from lamabench.kernels.cross_scan import DIRECTIONS, scan_paths
from lamabench.kernels.errors import InputError
from lamabench.kernels.selective_scan import vectorised
from torch.autograd import gradcheck

# Written down by hand for a grid of 3 rows and 4 columns:
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
    """Output and gradients under a fixed random loss, in float64."""
    y = op.selective_scan(*inputs, paths, backend)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return [y.double(), *(g.double() for g in torch.autograd.grad((y * weights).sum(), inputs))]


SIZES = [
    # batch, grid, channels, states, rank, scan
    (1, (1, 1), 1, 1, 1, "unidirectional"),
    (2, (4, 4), 3, 1, 2, "cross"),
    (1, (5, 7), 8, 4, 1, "continuous"),
    (3, (3, 11), 5, 16, 3, "bidirectional"),
    (2, (8, 8), 16, 2, 4, "continuous"),
    (1, (17, 1), 4, 64, 1, "unidirectional"),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_vectorised_scan_matches_the_reference(size, dtype, bound):
    inputs, paths = make_inputs(*size, dtype)
    exact, _ = make_inputs(*size, torch.float64)
    with torch.no_grad():
        for a, b in zip(exact, inputs, strict=True):
            a.copy_(b)
    names = ("y", "x", "dt", "b", "c", "dt_weight", "dt_bias", "a", "skip")
    for name, fast, slow in zip(names, run(inputs, paths, "torch"), run(exact, paths, "reference"), strict=True):
        assert (fast - slow).norm() <= bound * slow.norm(), name


def test_reference_against_a_closed_form():
    """One state, constant step: y_l is a geometric sum."""
    length, decay, delta = 9, 0.5, 0.7
    ones = torch.ones(1, length, 1, dtype=torch.float64)
    bias = torch.tensor([[delta]], dtype=torch.float64).expm1().log()  # softplus of it is delta
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


def test_gradients_numerically():
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
    monkeypatch.setattr(vectorised, "CHUNK", 4)
    for a, b in zip(whole, run(inputs, paths, "torch"), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("batch", [1, 3])
def test_bfloat16_is_as_good_as_its_inputs(batch):
    """The recurrence runs in float32: the error is that of one rounding of the output, not of 64 steps."""
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


def test_torch_checks_of_the_operator():
    """torch's own checks of a custom operator: schema, fake implementation, autograd registration."""
    inputs, paths = make_inputs(1, (3, 5), 4, 2, 2, "cross", torch.float32)
    torch.library.opcheck(torch.ops.lamabench.selective_scan.default, (*inputs, *paths))


def test_the_environment_does_not_change_what_auto_means(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert op.OPERATOR.resolve("auto", "cpu").name == op.OPERATOR.resolve("auto", "meta").name == "torch"


def test_the_fused_backend_refuses_float64_in_words(monkeypatch):
    inputs, paths = make_inputs(1, (2, 2), 2, 1, 1, "cross", torch.float64)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(InputError, match="computes in float32, not in float64; use 'torch' or 'reference'"):
        op.selective_scan(*inputs, paths, "triton")


def test_unknown_backend_lists_the_choices():
    inputs, paths = make_inputs(1, (2, 2), 2, 1, 1, "cross", torch.float32)
    with pytest.raises(
        InputError, match="unknown selective_scan backend 'cuda'; choices: auto, triton, torch, reference"
    ):
        op.selective_scan(*inputs, paths, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("size", SIZES)
def test_on_the_gpu(size):
    inputs, paths = make_inputs(*size, torch.float32)
    expected = run(inputs, paths, "reference")
    there = [v.detach().cuda().requires_grad_() for v in inputs]
    y = op.selective_scan(*there, type(paths)(*(p.cuda() for p in paths)), "torch")
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    got = [y, *torch.autograd.grad((y * weights).sum(), there)]
    for fast, slow in zip(got, expected, strict=True):
        assert (fast.double().cpu() - slow).norm() <= 3e-5 * slow.norm()
