"""The fused scans against the float64 reference, on a GPU (marked gpu), interpreted (Triton) and by g++ (CUDA C++).

Triton decides at import whether it interprets, so that the CPU's tests run in their own process.
"""

import math
from contextlib import nullcontext
from functools import partial
from threading import Thread
from types import SimpleNamespace

import cuda_on_cpu
import pytest
import torch
from lamabench.kernels import nvrtc, triton_support
from lamabench.kernels import selective_scan as op
from lamabench.kernels.cross_scan import scan_paths
from lamabench.kernels.errors import InputError
from lamabench.kernels.operator import Operator
from lamabench.kernels.selective_scan import backend_cuda

NAMES = ("y", "x", "dt", "b", "c", "dt_weight", "dt_bias", "a", "skip")

SMALL = [
    # batch, grid, channels, states, rank, scan
    (1, (1, 1), 1, 1, 1, "unidirectional"),
    (2, (3, 6), 3, 1, 2, "bidirectional"),
    (1, (1, 5), 17, 3, 5, "unidirectional"),
    (1, (3, 3), 2, 2, 1, "cross"),
    (1, (2, 3), 4, 2, 1, "unidirectional_4"),
]


def make(batch, grid, channels, states, rank, kind, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    paths = scan_paths(kind, *grid)
    k, length = paths.order.shape

    def normal(*size):
        return torch.randn(*size, generator=generator)

    tokens = normal(batch, length, k, rank + 2 * states).to(dtype)
    inputs = [
        normal(batch, length, channels).to(dtype),
        *tokens.split([rank, states, states], dim=-1),  # strided, as in the model
        normal(k, channels, rank) * rank**-0.5,
        normal(k, channels) - 2,
        -torch.rand(k, channels, states, generator=generator) * states - 0.1,
        normal(k, channels),
    ]
    paths = paths._replace(order=paths.order.to(device), inverse=paths.inverse.to(device))
    return [v.to(device).detach().requires_grad_() for v in inputs], paths


def run(inputs, paths, backend):
    y = op.selective_scan(*inputs, paths, backend)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.double(), *(g.double() for g in torch.autograd.grad(y, inputs, weights))]


def hold(inputs, paths, floor, backend="triton"):
    """DESIGN.md, rule 4: at most twice the error of plain torch in the same precision, plus a floor."""
    exact = [v.detach().double().requires_grad_() for v in inputs]
    results = (run(inputs, paths, backend), run(inputs, paths, "torch"), run(exact, paths, "torch"))
    for name, fast, plain, true in zip(NAMES, *results, strict=True):
        error = (fast - true).norm()
        assert error <= 2 * (plain - true).norm() + floor * true.norm(), (name, float(error / true.norm()))


@pytest.mark.interpreted
@pytest.mark.parametrize("size", SMALL)
def test_small(size, poison):
    hold(*make(*size), floor=2e-6)


@pytest.mark.interpreted
def test_torch_opcheck():
    inputs, paths = make(*SMALL[0])
    torch.library.opcheck(torch.ops.lamabench.selective_scan_triton.default, (*inputs, paths.order))


@pytest.fixture(scope="session")
def libraries(tmp_path_factory):
    return tmp_path_factory.mktemp("libraries")


@pytest.fixture
def without_gpu(monkeypatch, libraries):
    """Backend `cuda` takes tensors on the CPU. The fixture is the class of its kernels, which has settings."""

    def kernel(files, name, constants, shared, device):
        return cuda_on_cpu.Kernel(cuda_on_cpu.compiled(files, constants, libraries), name, shared)

    gpu = SimpleNamespace(multi_processor_count=2, shared_memory_per_block_optin=227 * 1024, total_memory=0)
    monkeypatch.setattr(nvrtc, "kernel", kernel)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    for name in ("cuda", "cuda_kept"):
        monkeypatch.setitem(op.OPERATOR._resolved, (name, "cpu"), op.OPERATOR.backends[name])
    monkeypatch.setattr(cuda_on_cpu.Kernel, "late", True)
    monkeypatch.setattr(cuda_on_cpu.Kernel, "seed", 0)
    return cuda_on_cpu.Kernel


WITHOUT_GPU = [
    ((2, (3, 6), 3, 1, 2, "bidirectional"), torch.float32),  # channels that do not fill 16 bytes
    ((3, (3, 7), 40, 2, 3, "cross"), torch.float32),  # several images a block; 32 channels and 8
    ((3, (3, 7), 40, 2, 3, "cross"), torch.bfloat16),
    ((2, (4, 5), 72, 16, 20, "continuous"), torch.bfloat16),  # states in shared memory; a second forward walk
    ((1, (1, 17), 33, 5, 40, "unidirectional"), torch.bfloat16),  # W in shared memory; a last chunk of one token
    ((2, (1, 70), 40, 6, 3, "bidirectional"), torch.bfloat16),  # the forward walk visits four chunks of five
    ((2, (1, 9), 40, 6, 3, "bidirectional"), torch.bfloat16),  # the forward walk visits none of one chunk
    ((4, (2, 3), 160, 2, 3, "bidirectional"), torch.bfloat16),  # ten warps a multiprocessor: one state at a time
]
SEGMENTED = [
    # the same, and the segments of a path in the backward pass
    ((2, (4, 17), 40, 2, 3, "continuous"), torch.bfloat16, 3),  # two chunks, two, one; the forward pass stores all
    ((2, (4, 17), 40, 2, 3, "continuous"), torch.float32, 5),  # a chunk each
    ((2, (1, 70), 72, 6, 20, "bidirectional"), torch.bfloat16, 3),  # starts of segments stored; segments walked
    ((1, (1, 70), 33, 16, 5, "cross"), torch.bfloat16, 5),  # a chunk each: nothing to walk
    ((1, (1, 102), 33, 5, 40, "unidirectional"), torch.float32, 2),  # four chunks, three
    ((3, (3, 7), 200, 6, 3, "cross"), torch.bfloat16, 2),  # several images a block; a warp without channels
    ((1, (3, 11), 200, 2, 3, "cross"), torch.float32, 3),  # in float32, what such a warp adds shows
]
KEPT = [(*WITHOUT_GPU[3], 1), (*WITHOUT_GPU[5], 1), SEGMENTED[2], SEGMENTED[4]]  # more than four states


def cut(monkeypatch, segments):
    """Let the backward pass cut a path into `segments` segments, whatever is fastest."""
    right = backend_cuda._fastest

    def fastest(batch, chunks, *more):
        choice, count = right(batch, chunks, *more), min(segments, more[-1])
        return choice._replace(segments=count, parts=max(1, batch // 2) if count > 1 else choice.parts)

    monkeypatch.setattr(backend_cuda, "_fastest", fastest)


@pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="g++ is not installed")
@pytest.mark.parametrize(
    ("size", "dtype", "segments"), [*((size, dtype, 1) for size, dtype in WITHOUT_GPU), *SEGMENTED]
)
def test_cuda_without_a_gpu(size, dtype, segments, without_gpu, poison, monkeypatch):
    """The bits are the same whenever copies land and in whatever order threads run."""
    cut(monkeypatch, segments)
    inputs, paths = make(*size, dtype)
    hold(inputs, paths, floor=3e-6 if dtype == torch.float32 else 2e-5, backend="cuda")
    first = run(inputs, paths, "cuda")
    without_gpu.late, without_gpu.seed = False, 1
    for name, one, other in zip(NAMES, first, run(inputs, paths, "cuda"), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="g++ is not installed")
@pytest.mark.parametrize("states", [2, 6])
def test_paths_stay_whole_where_the_forward_pass_stored_nothing(states, without_gpu, monkeypatch):
    cut(monkeypatch, 3)
    inputs, paths = make(1, (1, 70), 40, states, 3, "bidirectional", torch.bfloat16)
    results = []
    for keep in ("few", "none"):
        y, starts = torch.ops.lamabench.selective_scan_cuda(*inputs, *paths, keep)
        assert (starts.numel() > 0) == (keep == "few")
        results.append(torch.autograd.grad(y, inputs, torch.ones_like(y)))
    for name, one, other in zip(NAMES[1:], *results, strict=True):
        assert (one - other).norm() <= 1e-3 * one.norm(), name


@pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="g++ is not installed")
@pytest.mark.parametrize(("size", "dtype", "segments"), KEPT)
def test_kept_states_without_a_gpu(size, dtype, segments, without_gpu, poison, monkeypatch):
    """States that the forward pass kept are those that the backward pass walks to."""
    cut(monkeypatch, segments)
    inputs, paths = make(*size, dtype)
    hold(inputs, paths, floor=3e-6 if dtype == torch.float32 else 2e-5, backend="cuda_kept")
    _, starts = torch.ops.lamabench.selective_scan_cuda(*inputs, *paths, "all")
    assert starts.shape[3] == -(-inputs[0].shape[1] // backend_cuda.STEPS)
    for name, one, other in zip(NAMES, run(inputs, paths, "cuda_kept"), run(inputs, paths, "cuda"), strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm(), name


@pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="g++ is not installed")
def test_cuda_opcheck_without_a_gpu(without_gpu):
    """Also with symbols as sizes, as under torch.compile."""
    inputs, paths = make(1, (1, 50), 33, 5, 3, "bidirectional")
    for keep in backend_cuda.KEEP:
        torch.library.opcheck(torch.ops.lamabench.selective_scan_cuda.default, (*inputs, *paths, keep))


H100 = SimpleNamespace(multi_processor_count=132, shared_memory_per_block_optin=227 * 1024, total_memory=79 << 30)


@pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="g++ is not installed")
@pytest.mark.parametrize(
    ("size", "segments"),
    [((2, (8, 12), 640, 1, 20, "continuous"), 6), ((1, (1, 200), 100, 16, 13, "bidirectional"), 13)],
)
def test_cuda_without_a_gpu_as_an_h100_would_cut(size, segments, without_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: H100)
    inputs, paths = make(*size)
    assert backend_cuda.backward_choices(backend_cuda.Plan(inputs[0], inputs[1], inputs[6])).segments == segments
    hold(inputs, paths, floor=3e-6, backend="cuda")


def choice_on_an_h100(monkeypatch, batch, length, channels, states, rank):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: H100)
    x, dt = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((batch, length, channels), (4, rank)))
    plan = backend_cuda.Plan(x, dt, torch.empty(4, channels, states, device="meta"))
    return plan, backend_cuda.backward_choices(plan)


@pytest.mark.parametrize("states", [1, 16])
def test_few_long_images_are_cut_into_segments(states, monkeypatch):
    """Paths stay whole where they fill an H100. Where they would leave most of it idle, segments fill it."""
    for size in ((1024, 640), (256, 1280), (64, 2560)):
        plan, choice = choice_on_an_h100(monkeypatch, 256, *size, states, size[1] // 32)
        assert choice.segments == 1 and plan.chunks_a_segment(1) == plan.chunks
        assert plan.starts_shape("few")[3] == (plan.chunks if states <= backend_cuda.FEW_STATES else 0)
        assert plan.starts_shape("none")[3] == 0
    plan, choice = choice_on_an_h100(monkeypatch, 4, 16384, 640, states, 20)
    assert 0.75 * 132 * choice.blocks < choice.groups * choice.parts * choice.segments <= 132 * choice.blocks
    assert plan.starts_shape("few")[3] == (plan.chunks if states <= backend_cuda.FEW_STATES else choice.segments)
    assert math.prod(plan.starts_shape("few")) <= 4 * 4 * 640 * 16384 / 4  # K·E·L / 4 an image


def test_segments_hold_every_chunk_once(monkeypatch):
    for length in (1, 15, 16, 17, 100, 1000, 1025, 4097, 16384, 70000):
        for batch in (1, 3, 30):
            plan, choice = choice_on_an_h100(monkeypatch, batch, length, 33, 5, 3)
            each = plan.chunks_a_segment(choice.segments)
            assert (choice.segments - 1) * each < plan.chunks <= choice.segments * each


def test_reasons(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert any("TRITON_INTERPRET" in reason for reason in triton_support.triton_reasons("cpu"))
    assert any("'meta'" in reason for reason in triton_support.triton_reasons("meta"))
    assert op.OPERATOR.resolve("auto", "meta").name == op.OPERATOR.resolve("auto", "cpu").name == "torch"
    fresh = Operator("selective_scan", list(op.OPERATOR.backends.values()), op.work)
    with pytest.raises(InputError, match=r"'triton' cannot run on cpu: .*Usable here: torch, reference"):
        fresh.resolve("triton", "cpu")
    monkeypatch.setattr(triton_support, "INSTALLED", False)
    assert "the package triton is not installed" in triton_support.triton_reasons("cuda")


BIG = [
    *((1, (1, length), 33, 5, 3, "bidirectional") for length in (1, 15, 16, 17, 100, 1000, 4097, 16384)),
    (2, (16, 16), 640, 1, 20, "continuous"),
    (2, (16, 16), 640, 16, 20, "cross"),
    (3, (7, 9), 200, 16, 13, "cross"),
    (2, (8, 8), 256, 16, 80, "continuous"),
    (1, (5, 5), 40, 64, 4, "cross"),
]


GPU = pytest.mark.parametrize("backend", ["cuda", "cuda_kept", "triton"])


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", BIG)
def test_on_the_gpu(size, dtype, backend, poison):
    hold(*make(*size, dtype, "cuda"), floor=3e-6 if dtype == torch.float32 else 2e-5, backend=backend)


REAL = [  # of LaMamba-XL at 256 px, and of LaMamba-S
    (2, (32, 32), 640, 20),
    (2, (16, 16), 1280, 40),
    (2, (8, 8), 2560, 80),
    (2, (32, 32), 128, 4),
]


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [64, 256])
@pytest.mark.parametrize("states", [1, 16])
@pytest.mark.parametrize("size", REAL)
def test_cuda_as_large_batches_are_cut(size, states, batch, poison, monkeypatch):
    """The code of a large batch, with few images."""
    right = backend_cuda._fastest
    monkeypatch.setattr(backend_cuda, "_fastest", lambda images, *more: right(batch, *more)._replace(parts=images))
    inputs, paths = make(*size[:3], states, size[3], "continuous", torch.bfloat16, "cuda")
    for backend in ("cuda", "cuda_kept"):
        hold(inputs, paths, floor=2e-5, backend=backend)
        for one, other in zip(run(inputs, paths, backend), run(inputs, paths, backend), strict=True):
            assert torch.equal(one, other)


@pytest.mark.gpu
@GPU
def test_results_repeat_to_the_bit(backend):
    inputs, paths = make(*BIG[-3], torch.bfloat16, "cuda")
    for one, other in zip(run(inputs, paths, backend), run(inputs, paths, backend), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("shift", [-30.0, 0.0, 30.0])
def test_large_and_tiny_steps(backend, shift):
    inputs, paths = make(1, (6, 6), 4, 4, 1, "cross", torch.float32, "cuda")
    with torch.no_grad():
        inputs[5].fill_(shift)
    hold(inputs, paths, 3e-6, backend)


@pytest.mark.gpu
@GPU
def test_strided_inputs(backend):
    """x is channels first in memory, as after a convolution; dt, b and c are every second element of a tensor."""
    inputs, paths = make(2, (4, 6), 40, 4, 5, "cross", torch.bfloat16, "cuda")
    strided = [inputs[0].detach().transpose(1, 2).contiguous().transpose(1, 2)]
    strided += [torch.stack([v.detach(), v.detach()], dim=-1)[..., 0] for v in inputs[1:4]]
    strided = [v.requires_grad_() for v in strided] + inputs[4:]
    assert not any(v.is_contiguous() for v in strided[:4])
    for one, other in zip(run(strided, paths, backend), run(inputs, paths, backend), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_a_thread_that_has_not_called_cuda():
    """Autograd's thread is one where the scan's backward pass is its first call."""
    inputs, paths = make(*SMALL[3], torch.float32, "cuda")
    results = []
    with torch.no_grad():
        expected = backend_cuda.selective_scan(*inputs, *paths)
        call = partial(torch.ops.lamabench.selective_scan_cuda.default, *[v.detach() for v in inputs], *paths, "none")
        thread = Thread(target=lambda: results.append(call()[0]))
        thread.start()
        thread.join()
    assert results and torch.equal(results[0], expected)


@pytest.mark.gpu
def test_cuda_opcheck():
    for size in (SMALL[1], (1, (1, 1000), 33, 5, 3, "bidirectional")):  # whole paths, and segments
        inputs, paths = make(*size, torch.float32, "cuda")
        for keep in backend_cuda.KEEP:
            torch.library.opcheck(torch.ops.lamabench.selective_scan_cuda.default, (*inputs, *paths, keep))


def test_cuda_adds_up_the_sums_of_blocks(monkeypatch):
    """Sums over parts, each split into its gradients, without a GPU. Saved tensors are read once."""
    inputs, paths = make(*SMALL[3], torch.bfloat16)
    (batch, length, channels), (k, _, n), rank = inputs[0].shape, inputs[6].shape, inputs[1].shape[-1]
    g_x, tokens = torch.randn(batch, length, channels), torch.randn(3, batch, length, k, rank + 2 * n)
    weight, rows = torch.randn(5, k, channels, rank), torch.randn(5, k, channels, n + 2)
    monkeypatch.setattr(backend_cuda, "scan_backward", lambda *_: (g_x, tokens, weight, rows))

    class Saved:
        reads = 0

        @property
        def saved_tensors(self):
            self.reads += 1
            return (*inputs, *paths[:2], torch.empty(0))

    saved = Saved()
    gradients = backend_cuda._backward(saved, torch.ones(1), None)
    assert saved.reads == 1 and gradients[8:] == (None,) * 4
    token, row = tokens.double().sum(0), rows.double().sum(0)
    true = [
        g_x, token[..., :rank], token[..., rank : rank + n], token[..., rank + n :],
        weight.double().sum(0), row[..., n], row[..., :n], row[..., n + 1],
    ]  # fmt: skip
    for one, exact, like in zip(gradients[:8], true, inputs, strict=True):
        assert one.shape == like.shape and (one is g_x or one.dtype == like.dtype)
        torch.testing.assert_close(one.double(), exact.double(), rtol=2**-8, atol=1e-5)


def test_cuda_errors(monkeypatch):
    with pytest.raises(InputError, match=r"'cuda' cannot run on cpu: needs an NVIDIA GPU\. Usable here: torch"):
        op.OPERATOR.resolve("cuda", "cpu")
    inputs, paths = make(*SMALL[0], torch.float64)
    with pytest.raises(InputError, match="'cuda' computes in float32, not in float64"):
        backend_cuda.selective_scan(*inputs, *paths)
    monkeypatch.setattr(nvrtc, "INSTALLED", False)
    assert "the package cuda-bindings is not installed" in nvrtc.reasons("cuda")
