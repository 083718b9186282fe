"""Global attention: output and gradients against float64, cost against torch's counter, and backends by name."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lamabench.kernels.attention import OPERATOR, PlainAttention, attention, backend_flash, macs, sdpa
from lamabench.kernels.attention.reference import reference
from lamabench.kernels.errors import InputError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

HERE = [name for name, backend in OPERATOR.backends.items() if not backend.reasons("cpu")]
ON_CUDA = [name for name, backend in OPERATOR.backends.items() if not backend.reasons("cuda")]
SIZES = [(1, 1, 1, 1, 8), (2, 3, 17, 17, 24), (1, 2, 5, 33, 72), (2, 1, 64, 7, 40), (1, 4, 130, 130, 1)]


def inputs(size: tuple[int, int, int, int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and the gradient of the output."""
    batch, heads, queries, keys, width = size
    generator = torch.Generator().manual_seed(7)
    shapes = [(queries, width), (keys, width), (keys, width), (queries, width)]
    return [torch.randn(batch, heads, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def run(call, tensors: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    q, k, v = (x.detach().requires_grad_() for x in tensors[:3])
    out = call(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])]


def error(output: Tensor, exact: Tensor) -> float:
    return ((output.double() - exact).square().mean() / exact.square().mean().clamp_min(1e-12)).sqrt().item()


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


def hold(call, tensors: list[Tensor]) -> None:
    """DESIGN.md, rule 4: at most twice the error of plain torch in the same precision, plus a floor."""
    exact = run(reference, [x.double() for x in tensors])
    got = run(call, tensors)
    for name, one, base, true in zip(("out", "dq", "dk", "dv"), got, run(plain, tensors), exact, strict=True):
        assert one.dtype == tensors[0].dtype and one.shape == true.shape
        assert error(one, true) <= 2 * error(base, true) + 1e-3, name


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
@pytest.mark.parametrize("backend", HERE)
def test_output_and_gradients_in_float32(backend, size):
    exact = run(reference, inputs(size))
    got = run(lambda *qkv: attention(*qkv, backend=backend), inputs(size, torch.float32))
    for name, one, true in zip(("out", "dq", "dk", "dv"), got, exact, strict=True):
        assert one.dtype == torch.float32 and one.shape == true.shape
        if torch.backends.cpu.get_cpu_capability() == "AVX2" and not true.any():
            assert one.abs().max() <= 1e-6, name  # of one key, whose weight is 1: torch's kernel leaves rounding
        else:
            assert error(one, true) <= 1e-6, name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", HERE)
def test_bfloat16_errs_at_most_twice_as_much_as_the_plain_version(backend, size):
    hold(lambda *qkv: attention(*qkv, backend=backend), inputs(size, torch.bfloat16))


@pytest.mark.parametrize("backend", HERE)
def test_autocast_does_not_change_the_type_of_the_products(backend):
    """The types of q, k and v decide, also under autocast: the reference multiplies float32 inputs in float32, and the
    others round them first."""
    tensors = inputs((2, 3, 17, 17, 24), torch.float32)
    exact = reference(*(x.double() for x in tensors[:3]))
    with torch.autocast("cpu", torch.bfloat16):
        got = attention(*tensors[:3], backend=backend)
    assert error(got, exact) <= (1e-6 if backend == "reference" else 1e-2)


@pytest.mark.parametrize("backend", HERE)
def test_strides_do_not_matter(backend):
    q, k, v, _ = inputs((2, 3, 9, 9, 16))
    strided = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    assert strided[0].stride(-1) != 1
    torch.testing.assert_close(attention(*strided, backend=backend), reference(q, k, v), rtol=1e-12, atol=1e-12)


def similar_keys() -> list[Tensor]:
    """Inputs whose keys and values have much in common, as in a model with random weights."""
    q, k, v, grad = inputs((2, 3, 64, 64, 16))
    common = 5 * torch.randn(2, 2, 3, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [q, k + common[0], v + common[1], grad]


def test_plain_attention_is_attention():
    for one, other in zip(run(PlainAttention.apply, similar_keys()), run(reference, similar_keys()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_plain_attention_rounds_as_flash_attention_does():
    """torch's CPU kernel is a flash attention. Both lose more of the gradient of q than bfloat16 itself does."""
    tensors = [x.bfloat16() for x in similar_keys()]
    exact = run(reference, [x.double() for x in tensors])

    def errors(call):
        return [error(one, true) for one, true in zip(run(call, tensors), exact, strict=True)]

    rounded, flash = errors(PlainAttention.apply), errors(sdpa)
    naive = errors(lambda q, k, v: (q @ k.mT * q.shape[-1] ** -0.5).float().softmax(-1).bfloat16() @ v)
    assert 0.8 < rounded[1] / flash[1] < 1.25 and rounded[1] > 3 * naive[1], (rounded, flash, naive)
    assert all(other <= 1.25 * one for one, other in zip(rounded, flash, strict=True)), (rounded, flash)


def test_macs_are_what_torch_counts():
    with torch.device("meta"):
        q, k, v = (torch.empty(2, 3, length, 24) for length in (17, 33, 33))
    with FlopCounterMode(display=False) as counter:
        out = reference(q, k, v)
    assert out.shape == q.shape
    assert macs(2, 3, 17, 33, 24) == counter.get_total_flops() // 2


def test_backends_are_chosen_by_name():
    assert OPERATOR.resolve("auto", "cpu").name == OPERATOR.resolve("auto", "meta").name == "sdpa"
    q, k, v, _ = inputs((1, 1, 2, 2, 4))
    with pytest.raises(
        InputError, match=r"unknown attention backend 'sdpaa'.*choices: auto, sdpa, flash2, .*reference"
    ):
        attention(q, k, v, backend="sdpaa")


FLASH = {"flash2": "flash-attn", "flash3": "flash_attn_interface", "flash4": "flash-attn-4"}


@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_says_why_it_cannot_run(name, monkeypatch):
    backend = OPERATOR.backends[name]
    monkeypatch.setitem(backend_flash.INSTALLED, name, False)
    q, k, v, _ = inputs((1, 1, 2, 2, 8), torch.bfloat16)
    with pytest.raises(
        InputError, match=f"'{name}' cannot run on cpu: .*{FLASH[name]}.* is not installed; .*GPUs only"
    ):
        attention(q, k, v, backend=name)
    assert len(backend.reasons("cuda")) == 1
    monkeypatch.setitem(backend_flash.INSTALLED, name, True)
    assert backend.reasons("meta") == ["it runs on CUDA GPUs only, not on 'meta'"]
    assert OPERATOR.resolve("auto", "cuda").name == "sdpa"  # whatever is installed


def test_flash_attention_3_needs_hopper(monkeypatch):
    monkeypatch.setitem(backend_flash.INSTALLED, "flash3", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, words in (((9, 0), []), ((8, 0), ["Hopper"]), ((10, 0), ["Hopper"])):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, c=capability: c)
        reasons = OPERATOR.backends["flash3"].reasons("cuda")
        assert [word in reason for word, reason in zip(words, reasons, strict=True)] == [True] * len(words)


@pytest.fixture
def packages(monkeypatch):
    """Packages with the interface of each FlashAttention, in plain torch, which assert its rules: tokens before heads,
    two types, and heads of at most 256 channels and a multiple of 8. Of the fourth, the functions that torch's own
    adapter calls."""

    def scored(q, k, v, softmax_scale):
        assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
        assert q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
        assert q.shape[2:] == k.shape[2:] and k.shape == v.shape
        q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))
        return q, k, v, q @ k.transpose(-1, -2) * softmax_scale

    def function(q, k, v, softmax_scale):
        _, _, v, scores = scored(q, k, v, softmax_scale)
        return (scores.softmax(-1) @ v).transpose(1, 2).bfloat16()

    def forward(q, k, v, softmax_scale, return_lse):
        assert return_lse
        sums = scored(q, k, v, softmax_scale)[3].logsumexp(-1)
        return function(q, k, v, softmax_scale), sums, None, None, None

    def backward(q, k, v, out, grad, sums, softmax_scale):
        """FlashAttention 2 (arXiv 2307.08691), algorithm 2, in one block, for head widths that the package computes
        correctly."""
        assert q.shape[-1] % 32 == out.shape[-1] % 32 == grad.shape[-1] % 32 == 0
        dtype, (out, grad) = q.dtype, (x.float().transpose(1, 2) for x in (out, grad))
        q, k, v, scores = scored(q, k, v, softmax_scale)
        weights = (scores - sums[..., None]).exp()
        g_scores = weights * (grad @ v.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)) * softmax_scale
        gradients = (g_scores @ k, g_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad)
        return tuple(x.transpose(1, 2).to(dtype) for x in gradients)

    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(flash_attn_func=function))
    fourth = SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", fourth)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_gets_its_layout(name, size, packages):
    """Axes, padding of heads and scale, on the CPU with stand-ins for the packages."""
    hold(OPERATOR.backends[name].run, inputs(size, torch.bfloat16))


def test_flash_attention_4_keeps_one_graph(packages):
    """Its passes are torch operators with results, gradients, fakes and cost, and a compiled call is one graph."""
    tensors = inputs((2, 3, 17, 17, 24), torch.bfloat16)
    compiled = torch.compile(lambda q, k, v: backend_flash.flash4(q, k, v) * 2, fullgraph=True, backend="aot_eager")
    hold(lambda *qkv: compiled(*qkv) / 2, tensors)

    q, k, v, grad = (x.transpose(1, 2) for x in tensors)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.lamabench.flash4.default, (*leaves, 0.2), rtol=2e-2, atol=2e-2)
    saved = (grad, q, k, v, *torch.ops.lamabench.flash4(q, k, v, 0.2), 0.2)
    torch.library.opcheck(torch.ops.lamabench.flash4_backward.default, saved)
    assert OPERATOR.traced["lamabench::flash4"](q, k, v, 0.2).macs == macs(2, 3, 17, 17, 24)


@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_errors_for_types_and_widths(name, packages):
    call = OPERATOR.backends[name].run
    q, k, v, _ = inputs((1, 1, 2, 2, 8), torch.float32)
    with pytest.raises(InputError, match=f"'{name}' takes .* bfloat16 or float16, not float32; use 'sdpa'"):
        call(q, k, v)
    with pytest.raises(InputError, match="of one type, bfloat16 or float16, not bfloat16, float16; use"):
        call(q.bfloat16(), k.half(), v.half())
    with pytest.raises(InputError, match=f"'{name}' takes heads of at most 256 channels, not 264"):
        call(*(x.bfloat16() for x in inputs((1, 1, 2, 2, 264))[:3]))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [*SIZES, (2, 16, 256, 256, 72), (2, 16, 1024, 1024, 20), (1, 2, 100, 100, 128)])
@pytest.mark.parametrize("backend", ON_CUDA)
def test_on_the_gpu(backend, size):
    """Every installed backend, in the type that all of them take."""
    hold(lambda *qkv: attention(*qkv, backend=backend), [x.cuda() for x in inputs(size, torch.bfloat16)])
