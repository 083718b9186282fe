"""The gated norm: the reference against torch's LayerNorm in float64 and by hand, and errors for bad input."""

import math

import pytest
import torch
from lamabench.kernels import gated_norm as op
from lamabench.kernels.errors import InputError
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F

SIZES = [(2, 3, 4, 5), (1, 1), (4, 2), (3, 37), (7,)]


def make(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    *rows, channels = shape
    shapes = [shape, (*rows, 2 * channels), (channels,), (channels,)]
    y, xz, weight, bias = (torch.randn(size, generator=generator, dtype=dtype) for size in shapes)
    return [v.detach().requires_grad_() for v in (y, xz.chunk(2, dim=-1)[1], weight, bias)]


@pytest.mark.parametrize("shape", SIZES)
def test_reference_is_the_norm_and_the_gate(shape):
    """Output and every gradient."""
    inputs = make(shape)
    y, z, weight, bias = inputs
    expected = F.layer_norm(y, shape[-1:], weight, bias, 0.3) * z / (1 + torch.exp(-z))
    output = op.gated_norm(*inputs, eps=0.3, backend="reference")
    out = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    gradients = (torch.autograd.grad(v, inputs, out) for v in (output, expected))
    results = [(output, expected), *zip(*gradients, strict=True)]
    for one, other in results:
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_by_hand(backend):
    """Mean 4, variance 5 + 4 = 9: a third of the distance to the mean, times 2, plus 1; SiLU(ln 3) = ¾ ln 3."""
    y = torch.tensor([[1.0, 3, 5, 7]], dtype=torch.float64)
    z, two, one = torch.full_like(y, math.log(3)), torch.full((4,), 2.0).double(), torch.ones(4).double()
    expected = torch.tensor([[-1.0, 1 / 3, 5 / 3, 3]], dtype=torch.float64) * 0.75 * math.log(3)
    torch.testing.assert_close(op.gated_norm(y, z, two, one, eps=4.0, backend=backend), expected)


@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_reference_against_finite_differences(eps):
    assert gradcheck(lambda *v: op.gated_norm(*v, eps=eps, backend="reference"), make((2, 3, 4)))


@pytest.mark.parametrize("autocast", [False, True])
def test_torch_equals_the_modules_to_the_bit(autocast):
    """The scan's [B, L, E] through a LayerNorm module, with a gate that is half of a projection [B, H, W, 2E]."""
    y, z, weight, bias = make((2, 5, 6, 20), torch.bfloat16 if autocast else torch.float32)
    module = nn.LayerNorm(20)
    module.load_state_dict({"weight": weight, "bias": bias})
    results = []
    for run in (
        lambda: module(y.flatten(1, 2)).view(2, 5, 6, 20) * F.silu(z),
        lambda: op.gated_norm(y, z, module.weight, module.bias),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = run()
        results.append([out, *torch.autograd.grad(out, [y, z, *module.parameters()], torch.ones_like(out))])
    # LayerNorm has the type of its input under the CPU's autocast, and float32 under CUDA's.
    assert results[0][0].dtype == y.dtype
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_output_has_the_type_of_the_input(backend):
    inputs = [v.detach().bfloat16() for v in make((3, 4))]
    out = op.gated_norm(*inputs, backend=backend)
    assert out.dtype == torch.bfloat16 and out.shape == (3, 4)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((), (), (), ()), r"\[\.\.\., E\], weight and bias \[E\].*not \[\], \[\], \[\], \[\]"),
        (((2, 0), (2, 0), (0,), (0,)), r"above 0, not \[2, 0\]"),
        (((2, 3), (1, 3), (3,), (3,)), r"not \[2, 3\], \[1, 3\], \[3\], \[3\]"),
        (((2, 3), (2, 3), (2,), (3,)), r"not \[2, 3\], \[2, 3\], \[2\], \[3\]"),
        (((2, 3), (2, 3), (3,), (1, 3)), r"not \[2, 3\], \[2, 3\], \[3\], \[1, 3\]"),
    ],
)
def test_shapes_that_do_not_fit(shapes, message):
    with pytest.raises(InputError, match=message):
        op.gated_norm(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("eps", [0.0, -1e-5, math.nan])
def test_eps_must_be_above_zero(eps):
    with pytest.raises(InputError, match=f"eps must be above 0, not {eps}"):
        op.gated_norm(*make((2, 3)), eps=eps)


def test_cost_counts_every_element():
    assert op.OPERATOR.traced["lamabench::gated_norm"](*make((2, 3, 4)), 1e-5).normalised == 24
