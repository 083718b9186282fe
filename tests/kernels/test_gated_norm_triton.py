"""The Triton gated norm against float64, interpreted on the CPU and (marked gpu) on a GPU.

Triton decides at import whether it interprets, so that the CPU's tests run in their own process.
"""

import pytest
import torch
from lamabench.kernels import gated_norm as op
from lamabench.kernels.errors import InputError
from lamabench.kernels.gated_norm import backend_triton

SMALL = [
    (2, 3, 5, 7),
    (5,),
    (61, 33),  # two tiles, the second one padded; many rows for every program
    (2, 5, 640),  # five tiles
    (4, 1283),  # six, the last one padded
    (2, 2560),
    (2, 8192),
    (0, 4),
]


def make(shape, dtype=torch.float32, device="cpu", offset=0.0):
    """y, a gate that is half of a projection, weight and bias. The mean of y is about `offset` deviations."""
    generator = torch.Generator().manual_seed(0)
    *rows, channels = shape
    y = (torch.randn(shape, generator=generator) + offset).to(device, dtype)
    z = (2 * torch.randn((*rows, 2 * channels), generator=generator)).to(device, dtype).chunk(2, dim=-1)[1]
    weight, bias = (torch.randn(channels, generator=generator).to(device) for _ in range(2))
    return [v.detach().requires_grad_() for v in (y, z, weight, bias)]


def run(inputs, backend):
    """Output and every gradient. The gradient of the output has strided rows too."""
    y = inputs[0]
    low = y.dtype == torch.bfloat16
    with torch.autocast(y.device.type, torch.bfloat16, enabled=low):
        out = op.gated_norm(*inputs, backend=backend)
    wide = low and y.is_cuda and backend == "torch"  # LayerNorm is float32 under CUDA's autocast, not under the CPU's
    assert out.dtype == (torch.float32 if wide else y.dtype)
    out = out.to(y.dtype)  # as the Linear that follows does under autocast
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn((*y.shape[:-1], 3 * y.shape[-1]), generator=generator).chunk(3, dim=-1)[1]
    grads = torch.autograd.grad(out, inputs, weights.to(y.device, y.dtype))
    assert [g.dtype for g in grads] == [v.dtype for v in inputs]
    return [out.double(), *(g.double() for g in grads)]


def hold(inputs, floor):
    """DESIGN.md, rule 4: at most twice the error of plain torch in the same precision, plus a floor."""
    exact = [v.detach().double().requires_grad_() for v in inputs]
    results = (run(inputs, "triton"), run(inputs, "torch"), run(exact, "torch"))
    for name, fast, plain, true in zip(("out", "y", "z", "weight", "bias"), *results, strict=True):
        error = (fast - true).norm()
        assert error <= 2 * (plain - true).norm() + floor * true.norm(), (name, float(error / true.norm()))


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", SMALL)
def test_small(shape, poison):
    hold(make(shape), floor=2e-6)


@pytest.mark.interpreted
def test_small_far_from_zero(poison):
    """The mean is a thousand deviations, and squares are summed around it."""
    hold(make((6, 100), offset=1000.0), floor=2e-6)


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", [SMALL[0], SMALL[6]])
def test_small_bfloat16(shape, poison):
    hold(make(shape, torch.bfloat16), floor=2e-5)


def one_channel(rows, device):
    """A row of one channel is its mean. y does not matter; its gradient is rounding of equal products, over √eps."""
    inputs = make((rows, 1), device=device)
    _, z, _, bias = exact = [v.detach().double().requires_grad_() for v in inputs]
    out, g_y, *others = run(inputs, "triton")
    expected = bias * z * torch.sigmoid(z)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-6, atol=1e-7)
    assert g_y.abs().max() <= 2**-23 / 1e-5**0.5 * 20  # products stay below 20
    for one, other in zip(others, run(exact, "reference")[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.interpreted
def test_small_one_channel(poison):
    one_channel(71, "cpu")


@pytest.mark.interpreted
def test_small_whatever_the_strides(poison):
    """Inputs with strided channels, a broadcast gate and a broadcast gradient give what dense copies give."""
    y, z, weight, bias = (v.detach() for v in make((4, 3, 6)))
    tensors = [y.transpose(0, 2).contiguous().transpose(0, 2), z[:1].expand(4, 3, 6), weight, bias]
    results = []
    for copy in (False, True):
        inputs = [(v.contiguous() if copy else v).detach().requires_grad_() for v in tensors]
        out = op.gated_norm(*inputs, backend="triton")
        grad = torch.ones(1).expand(out.shape)
        results.append([out, *torch.autograd.grad(out, inputs, grad.contiguous() if copy else grad)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other) and other.is_contiguous() and torch.isfinite(one).all()


@pytest.mark.interpreted
def test_small_types_that_differ(poison):
    """The output has the type of y, and every gradient has the type of its input."""
    y, z, weight, bias = (v.detach() for v in make((4, 6)))
    inputs = [v.requires_grad_() for v in (y.bfloat16(), z, weight.bfloat16(), bias)]
    out = op.gated_norm(*inputs, backend="triton")
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert [v.dtype for v in (out, *grads)] == [inputs[0].dtype, *(v.dtype for v in inputs)]
    exact = [v.detach().double() for v in inputs]
    # A unit in bfloat16's last place, because interpreted Triton truncates where a GPU rounds.
    torch.testing.assert_close(out.double(), op.gated_norm(*exact, backend="torch"), rtol=2**-7, atol=1e-6)


@pytest.mark.interpreted
def test_torch_opcheck():
    arguments = [v.detach().requires_grad_() for v in make((2, 3, 4))]
    torch.library.opcheck(torch.ops.lamabench.gated_norm.default, (*arguments, 1e-5))
    detached = [v.detach() for v in (torch.ones_like(arguments[0]), *arguments)]
    torch.library.opcheck(torch.ops.lamabench.gated_norm_backward.default, (*detached, 1e-5))


def test_errors(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    names = {device: op.OPERATOR.resolve("auto", device).name for device in ("cpu", "cuda", "meta")}
    assert names == {"cpu": "torch", "cuda": "triton", "meta": "torch"}
    with pytest.raises(InputError, match=r"'triton' cannot run on cpu: .*Usable here: torch, reference"):
        op.OPERATOR.resolve("triton", "cpu")
    inputs = [v.detach() for v in make((2, 3))]
    for i in range(4):
        mixed = [v.double() if i == j else v for j, v in enumerate(inputs)]
        with pytest.raises(InputError, match="not in float64; use 'torch' or 'reference'"):
            backend_triton.gated_norm(*mixed, 1e-5)
    with pytest.raises(InputError, match="holds at most 8192 channels, not 8193; use 'torch' or 'reference'"):
        backend_triton.gated_norm(*make((1, 8193)), 1e-5)


BIG = [
    # LaMamba-XL at 256 px, then at 512
    (64, 32, 32, 640),
    (64, 16, 16, 1280),
    (64, 8, 8, 2560),
    (8, 64, 64, 640),
    (8, 32, 32, 1280),
    (8, 16, 16, 2560),
    # Awkward sizes
    (5,),
    (1000, 7),
    (4099, 33),
    (997, 5, 100),
    (1031, 1283),
    (515, 2561),
    (301, 8192),
    (0, 4),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", BIG)
def test_on_the_gpu(shape, dtype, poison):
    hold(make(shape, dtype, "cuda"), floor=3e-6 if dtype == torch.float32 else 2e-5)


@pytest.mark.gpu
def test_one_channel_on_the_gpu(poison):
    one_channel(301, "cuda")


@pytest.mark.gpu
def test_far_from_zero_on_the_gpu(poison):
    hold(make((600, 640), torch.float32, "cuda", offset=1000.0), floor=3e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", BIG[:3])
def test_results_repeat_to_the_bit(shape):
    inputs = make(shape, torch.bfloat16, "cuda")
    for one, other in zip(run(inputs, "triton"), run(inputs, "triton"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_gates_far_from_zero_stay_finite():
    y, z, weight, bias = make((9, 640), torch.float32, "cuda")
    for scale in (1e-30, 1e30):
        inputs = [y, (z * scale).detach().requires_grad_(), weight, bias]
        assert all(torch.isfinite(v).all() for v in run(inputs, "triton"))


@pytest.mark.gpu
def test_compiled_in_one_graph():
    inputs = make((4, 8, 8, 1280), torch.bfloat16, "cuda")
    compiled = torch.compile(lambda *v: op.gated_norm(*v, backend="triton"), fullgraph=True)
    out = compiled(*inputs)
    results = [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]
    out = op.gated_norm(*inputs, backend="triton")
    eager = [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]
    assert all(torch.equal(one, other) for one, other in zip(results[:3], eager[:3], strict=True))
    torch.testing.assert_close(results[3:], eager[3:], rtol=1e-5, atol=1e-4)  # the last sums are torch's, in its order
