"""Global attention: output and every gradient against float64, cost against torch's counter, backends by name."""

import numpy as np
import pytest
import torch
from lamabench.kernels.attention import OPERATOR, attention, macs
from lamabench.kernels.attention.reference import reference
from lamabench.kernels.errors import InputError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

SIZES = [(1, 1, 1, 1, 8), (2, 3, 17, 17, 24), (1, 2, 5, 33, 72), (2, 1, 64, 7, 40), (1, 4, 130, 130, 1)]


def inputs(size: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and the gradient that flows back."""
    batch, heads, queries, keys, width = size
    generator = torch.Generator().manual_seed(7)
    shapes = [(queries, width), (keys, width), (keys, width), (queries, width)]
    return [torch.randn(batch, heads, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def run(call, tensors: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    out = call(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])]


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).square().mean() / exact.square().mean().clamp_min(1e-12)).sqrt().item()


def test_reference_is_the_written_formula():
    q, k, v, _ = (x.numpy() for x in inputs((2, 3, 5, 4, 8)))
    got = reference(*(torch.from_numpy(x) for x in (q, k, v))).numpy()
    for index in np.ndindex(2, 3, 5):
        weights = np.exp(k[index[:2]] @ q[index] / np.sqrt(8))
        np.testing.assert_allclose(got[index], weights @ v[index[:2]] / weights.sum(), rtol=1e-12)


def test_reference_gradient_is_the_numerical_one():
    q, k, v, _ = (x.requires_grad_() for x in inputs((1, 2, 3, 4, 5)))
    assert torch.autograd.gradcheck(reference, (q, k, v))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", OPERATOR.backends)
def test_output_and_gradients_in_float32(backend, size):
    exact = run(reference, inputs(size))
    got = run(lambda *qkv: attention(*qkv, backend=backend), inputs(size, torch.float32))
    for name, one, true in zip(("out", "dq", "dk", "dv"), got, exact, strict=True):
        assert one.dtype == torch.float32 and one.shape == true.shape
        assert error(one, true) <= 1e-6, name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", OPERATOR.backends)
def test_bfloat16_errs_at_most_twice_as_much_as_the_plain_version(backend, size):
    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v

    tensors = inputs(size, torch.bfloat16)
    exact = run(reference, [x.double() for x in tensors])
    got = run(lambda *qkv: attention(*qkv, backend=backend), tensors)
    for name, one, base, true in zip(("out", "dq", "dk", "dv"), got, run(plain, tensors), exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert error(one, true) <= 2 * error(base, true) + 1e-3, name


@pytest.mark.parametrize("backend", OPERATOR.backends)
def test_strides_do_not_matter(backend):
    q, k, v, _ = inputs((2, 3, 9, 9, 16))
    strided = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    assert strided[0].stride(-1) != 1
    torch.testing.assert_close(attention(*strided, backend=backend), reference(q, k, v), rtol=1e-12, atol=1e-12)


def test_macs_are_what_torch_counts():
    with torch.device("meta"):
        q, k, v = (torch.empty(2, 3, length, 24) for length in (17, 33, 33))
    with FlopCounterMode(display=False) as counter:
        out = reference(q, k, v)
    assert out.shape == q.shape
    assert macs(2, 3, 17, 33, 24) == counter.get_total_flops() // 2


def test_backends_are_asked_for_by_name():
    assert OPERATOR.resolve("auto", "cpu").name == OPERATOR.resolve("auto", "meta").name == "sdpa"
    q, k, v, _ = inputs((1, 1, 2, 2, 4))
    with pytest.raises(InputError, match=r"unknown attention backend 'sdpaa'.*choices: auto, sdpa, reference"):
        attention(q, k, v, backend="sdpaa")
