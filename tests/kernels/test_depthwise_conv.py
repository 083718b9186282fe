"""Depthwise convolution and SiLU: the reference against torch's convolution in float64, and errors for bad input."""

import pytest
import torch
from lamabench.kernels import depthwise_conv as op
from lamabench.kernels.errors import InputError
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

SIZES = [
    # batch, height, width, channels, kernel, bias
    (2, 5, 4, 3, 3, True),
    (1, 1, 1, 1, 3, False),
    (1, 2, 3, 5, 7, True),
    (2, 6, 1, 2, 5, False),
    (1, 3, 3, 4, 1, True),
]


def make(batch, height, width, channels, k, bias, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, height, width, 2 * channels), (channels, 1, k, k), (channels,)]
    x, weight, b = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    inputs = [x.chunk(2, dim=-1)[0], weight, *([b] if bias else [])]
    return [v.detach().requires_grad_() for v in inputs]


@pytest.mark.parametrize("size", SIZES)
def test_reference_is_the_convolution(size):
    """Output and every gradient, against torch's convolution on contiguous, channels-first memory."""
    inputs = make(*size)
    weight, *bias = inputs[1:]
    image = inputs[0].permute(0, 3, 1, 2).contiguous()
    expected = F.conv2d(image, weight, *bias, padding="same", groups=len(weight))
    expected = (expected / (1 + torch.exp(-expected))).permute(0, 2, 3, 1)
    y = op.depthwise_conv_silu(*inputs, backend="reference")
    out = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    results = [(y, expected), *zip(*(torch.autograd.grad(v, inputs, out) for v in (y, expected)), strict=True)]
    for output, true in results:
        torch.testing.assert_close(output, true, rtol=1e-12, atol=1e-13)


def test_reference_against_finite_differences():
    assert gradcheck(lambda *v: op.depthwise_conv_silu(*v, backend="reference"), make(*SIZES[0]))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_torch_equals_the_modules_to_the_bit(bias, autocast):
    x, weight, *rest = make(2, 9, 6, 20, 3, bias, torch.float32)
    module = torch.nn.Conv2d(20, 20, 3, padding=1, groups=20, bias=bias)
    module.load_state_dict({"weight": weight, **({"bias": rest[0]} if bias else {})})
    results = []
    for run in (
        lambda: F.silu(module(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1),
        lambda: op.depthwise_conv_silu(x, module.weight, module.bias, backend="torch"),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = run()
        results.append([y, *torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))])
    assert results[0][0].dtype == (torch.bfloat16 if autocast else torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_output_has_the_type_of_the_input(backend):
    x, weight = (v.detach().bfloat16() for v in make(1, 3, 3, 4, 3, False))
    y = op.depthwise_conv_silu(x, weight, backend=backend)
    assert y.dtype == torch.bfloat16 and y.shape == x.shape


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        (
            (3, 4, 5),
            (5, 1, 3, 3),
            None,
            r"\[B, H, W, E\] and weight \[E, 1, k, k\] with k odd, not \[3, 4, 5\] and",
        ),
        ((1, 3, 4, 5), (4, 1, 3, 3), None, r"not \[1, 3, 4, 5\] and \[4, 1, 3, 3\]"),
        ((1, 3, 4, 5), (5, 1, 3, 5), None, r"not \[1, 3, 4, 5\] and \[5, 1, 3, 5\]"),
        ((1, 3, 4, 5), (5, 5, 3, 3), None, r"not \[1, 3, 4, 5\] and \[5, 5, 3, 3\]"),
        ((1, 3, 4, 5), (5, 1, 2, 2), None, r"k odd"),
        ((1, 3, 4, 5), (5, 1, 3, 3), (4,), r"bias must be \[5\], not \[4\]"),
    ],
)
def test_shapes_that_do_not_fit(x, weight, bias, message):
    tensors = [torch.zeros(shape) for shape in (x, weight, bias) if shape is not None]
    with pytest.raises(InputError, match=message):
        op.depthwise_conv_silu(*tensors)


def test_cost_is_what_torch_counts():
    x, weight = make(2, 5, 7, 3, 3, False, torch.float32)
    with FlopCounterMode(display=False) as counter:
        op.depthwise_conv_silu(x, weight, backend="torch")
    # torch's counter takes a multiply-add for two operations, and counts the zeros around the image too.
    assert 2 * op.macs(2, 5, 7, 3, 3) == counter.get_total_flops()
    assert op.OPERATOR.traced["lamabench::depthwise_conv_silu"](x, weight, None).macs == op.macs(2, 5, 7, 3, 3)
