"""The Triton depthwise convolution against float64, interpreted on the CPU and (marked gpu) on a GPU.

Triton decides at import whether it interprets, so that the CPU's tests run in their own process.
"""

import pytest
import torch
from lamabench.kernels import depthwise_conv as op
from lamabench.kernels.depthwise_conv import backend_triton
from lamabench.kernels.errors import InputError

SMALL = [
    # batch, height, width, channels, kernel, bias
    (2, 3, 5, 3, 3, True),
    (1, 1, 1, 1, 3, False),
    (1, 2, 9, 17, 3, False),  # two programs each over columns and channels
    (1, 11, 1, 2, 3, True),  # two programs over rows
    (1, 2, 2, 2, 5, True),
    (1, 1, 2, 1, 7, False),
    (1, 2, 3, 2, 1, True),
]


def make(batch, height, width, channels, k, bias, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, height, width, 2 * channels, generator=generator).to(device, dtype)
    weight, b = (torch.randn(shape, generator=generator).to(device) for shape in ((channels, 1, k, k), (channels,)))
    inputs = [x.chunk(2, dim=-1)[0], weight, *([b] if bias else [])]  # x strided, as in the model
    return [v.detach().requires_grad_() for v in inputs]


def run(inputs, backend):
    """Output and every gradient. The gradient of the output is strided too."""
    x = inputs[0]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        y = op.depthwise_conv_silu(*inputs, backend=backend)
    weights = torch.randn(y.transpose(1, 2).shape, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    grads = torch.autograd.grad(y, inputs, weights.to(y.device, y.dtype))
    assert y.dtype == x.dtype and [g.dtype for g in grads] == [v.dtype for v in inputs]
    return [y.double(), *(g.double() for g in grads)]


def hold(inputs, floor):
    """DESIGN.md, rule 4: at most twice the error of plain torch in the same precision, plus a floor."""
    exact = [v.detach().double().requires_grad_() for v in inputs]
    results = (run(inputs, "triton"), run(inputs, "torch"), run(exact, "torch"))
    for name, fast, plain, true in zip(("y", "x", "weight", "bias"), *results, strict=False):
        error = (fast - true).norm()
        assert error <= 2 * (plain - true).norm() + floor * true.norm(), (name, float(error / true.norm()))


@pytest.fixture
def poison(poison, monkeypatch):
    """Without TF32, because cuDNN would round float32 inputs and the bound would be looser than float32's."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.interpreted
@pytest.mark.parametrize("size", SMALL)
def test_small(size, poison):
    hold(make(*size), floor=2e-6)


@pytest.mark.interpreted
def test_small_bfloat16(poison):
    hold(make(*SMALL[0], torch.bfloat16), floor=2e-5)


@pytest.mark.interpreted
def test_torch_opcheck():
    for bias, side in ((True, 3), (False, 1)):  # a kernel of 3 × 3 takes ten seconds
        x, weight, *rest = (v.detach().requires_grad_() for v in make(1, 2, 2, 2, side, bias))
        arguments = (x, weight, rest[0] if rest else None)
        torch.library.opcheck(torch.ops.lamabench.depthwise_conv_silu.default, arguments)
        detached = [None if v is None else v.detach() for v in (torch.ones_like(x), *arguments)]
        torch.library.opcheck(torch.ops.lamabench.depthwise_conv_silu_backward.default, tuple(detached))


def test_errors(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert op.OPERATOR.resolve("auto", "meta").name == op.OPERATOR.resolve("auto", "cpu").name == "torch"
    with pytest.raises(InputError, match=r"'triton' cannot run on cpu: .*Usable here: torch, reference"):
        op.OPERATOR.resolve("triton", "cpu")
    x, weight = make(1, 3, 3, 2, 9, False)
    with pytest.raises(InputError, match=r"no 9 × 9 kernel; sides: 1, 3, 5, 7"):
        backend_triton.depthwise_conv_silu(x, weight, None)
    with pytest.raises(InputError, match="not in float64; use 'torch' or 'reference'"):
        backend_triton.depthwise_conv_silu(x.double(), weight.double(), None)


def test_programs_have_few_rows_only_where_programs_are_few():
    assert backend_triton.rows_of_a_program(32, 2560) == 32
    assert backend_triton.rows_of_a_program(32, 640) == 8
    assert backend_triton.rows_of_a_program(11, 1) == 6
    assert backend_triton.rows_of_a_program(8, 1) == 8


BIG = [
    # LaMamba-XL at 256 px, then at 512
    (64, 32, 32, 640, 3, False),
    (64, 16, 16, 1280, 3, False),
    (64, 8, 8, 2560, 3, False),
    (8, 64, 64, 640, 3, True),
    (8, 32, 32, 1280, 3, True),
    (8, 16, 16, 2560, 3, True),
    # Awkward sizes
    (60, 1, 1, 1, 3, True),
    (3, 2, 37, 33, 3, True),
    (2, 41, 3, 100, 3, False),
    (2, 7, 9, 65, 5, True),
    (2, 5, 17, 40, 7, True),
    (2, 5, 6, 70, 1, True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", BIG)
def test_on_the_gpu(size, dtype, poison):
    hold(make(*size, dtype, "cuda"), floor=3e-6 if dtype == torch.float32 else 2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("size", BIG[1:4])
def test_results_repeat_to_the_bit(size):
    inputs = make(*size, torch.bfloat16, "cuda")
    for one, other in zip(run(inputs, "triton"), run(inputs, "triton"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_far_values_stay_finite_where_the_output_does():
    x, weight = make(2, 9, 10, 64, 3, False, torch.float32, "cuda")
    for scale in (1e-30, 1e30):
        assert all(torch.isfinite(v).all() for v in run([(x * scale).detach().requires_grad_(), weight], "triton"))
