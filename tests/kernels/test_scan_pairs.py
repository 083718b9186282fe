"""The forward scan over pairs of reversed paths, on a GPU (marked gpu) and by g++, and what names the pairs."""

from types import SimpleNamespace

import cuda_on_cpu
import pytest
import test_scan_kernels as scans
import torch
from lamabench.kernels import nvrtc
from lamabench.kernels.cross_scan import scan_paths
from lamabench.kernels.selective_scan import backend_cuda, cuda_forward_pairs

libraries, without_gpu = scans.libraries, scans.without_gpu
needs_compiler = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="g++ is not installed")
BFLOAT16 = torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "grid", "pairs"),
    [
        ("continuous", (4, 6), (0, 1, 2, 3)),
        ("continuous", (4, 5), ()),  # the snakes over columns are not each other's reverse
        ("continuous", (3, 3), ()),
        ("cross", (3, 5), (0, 2, 1, 3)),
        ("bidirectional", (3, 4), (0, 1)),
        ("bidirectional_4", (3, 4), (0, 2, 1, 3)),
        ("unidirectional", (3, 4), ()),
        ("unidirectional_4", (3, 4), ()),
    ],
)
def test_pairs_of_reversed_paths(kind, grid, pairs):
    paths = scan_paths(kind, *grid)
    assert paths.pairs == pairs
    for one, other in zip(pairs[::2], pairs[1::2], strict=True):
        assert torch.equal(paths.order[one].flip(0), paths.order[other])


SIZES = [
    # batch, grid, channels, states, rank, scan
    (3, (8, 8), 64, 1, 20, "continuous"),  # several images a block, and both tiles of 32 channels
    (1, (8, 12), 32, 1, 3, "cross"),  # three chunks a half
    (3, (4, 16), 64, 1, 40, "bidirectional"),  # one pair: it writes the output at once; W in shared memory
]


def served(inputs, paths):
    return cuda_forward_pairs.layout(backend_cuda.Plan(inputs[0], inputs[1], inputs[6]), paths.pairs)


@needs_compiler
@pytest.mark.parametrize("size", SIZES)
def test_pairs_without_a_gpu(size, without_gpu, poison, monkeypatch):
    """Also against the pass that takes any paths: the states that the backward pass reads are the same bits."""
    monkeypatch.setattr(cuda_forward_pairs, "LEAST_CHUNKS", 4)
    inputs, paths = scans.make(*size, BFLOAT16)
    assert served(inputs, paths)
    scans.hold(inputs, paths, floor=2e-5, backend="cuda")
    call = torch.ops.lamabench.selective_scan_cuda.default
    y, starts = call(*inputs, *paths, "few")
    without_gpu.late, without_gpu.seed = False, 1
    for keep in ("few", "none"):  # other scratch where the states are not kept
        other, again = call(*inputs, *paths, keep)
        assert torch.equal(y, other) and (torch.equal(starts, again) if keep == "few" else again.numel() == 0)
    other, again = call(*inputs, *paths[:2], (), "few")
    assert torch.equal(starts, again)
    assert (y.float() - other.float()).norm() <= 3e-3 * y.float().norm()


@needs_compiler
def test_pairs_under_torch_compile_without_a_gpu(without_gpu, monkeypatch):
    """The paths go through torch.compile and autograd as the model hands them over."""
    monkeypatch.setattr(cuda_forward_pairs, "LEAST_CHUNKS", 4)
    inputs, paths = scans.make(1, (8, 8), 32, 1, 3, "bidirectional", BFLOAT16)
    call = torch.compile(backend_cuda.selective_scan, fullgraph=True, backend="aot_eager")
    launches = []
    launch = cuda_forward_pairs.launch
    monkeypatch.setattr(cuda_forward_pairs, "launch", lambda *args: launches.append(1) or launch(*args))
    results = [run(*inputs, *paths) for run in (call, backend_cuda.selective_scan)]
    assert len(launches) == 2 and torch.equal(*results)
    for one, other in zip(*(torch.autograd.grad(y, inputs, torch.ones_like(y)) for y in results), strict=True):
        assert torch.equal(one, other)


def test_what_the_kernel_of_pairs_serves(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: scans.H100)

    def choice(batch, grid, channels, states, rank, kind, dtype=BFLOAT16, pairs=None):
        paths = scan_paths(kind, *grid)
        x = torch.empty(batch, grid[0] * grid[1], channels, dtype=dtype, device="meta")
        a = torch.empty(len(paths.order), channels, states, device="meta")
        plan = backend_cuda.Plan(x, torch.empty(4, rank, device="meta"), a)
        return cuda_forward_pairs.layout(plan, paths.pairs if pairs is None else pairs).get("PAIRS")

    assert choice(64, (32, 32), 640, 1, 20, "continuous") == 0x3210  # LaMamba-XL's stages
    assert choice(64, (16, 16), 1280, 1, 40, "continuous") == 0x3210
    assert choice(64, (16, 16), 1280, 1, 40, "cross") == 0x3120
    assert choice(64, (16, 16), 1280, 1, 40, "bidirectional") == 0x10
    others = [
        (64, (8, 8), 2560, 1, 80, "continuous"),
        (64, (32, 32), 640, 16, 20, "continuous"),
        (64, (32, 32), 640, 2, 20, "continuous"),
        (64, (15, 15), 640, 1, 20, "continuous"),
        (64, (16, 15), 640, 1, 20, "cross"),
        (64, (32, 32), 648, 1, 20, "continuous"),
        (64, (32, 32), 640, 1, 160, "continuous"),
        (64, (32, 32), 640, 1, 20, "unidirectional"),
        (64, (32, 32), 640, 1, 20, "continuous", torch.float32),
        *((64, (32, 32), 640, 1, 20, "continuous", BFLOAT16, pairs) for pairs in ((), (0, 1), (0, 1, 0, 1))),
    ]
    assert not any(choice(*other) for other in others)

    def ranks():
        return [rank for rank in range(16, 97, 16) if choice(64, (32, 32), 640, 1, rank, "continuous")]

    assert ranks() == [16, 32, 48]
    a100 = SimpleNamespace(shared_memory_per_block_optin=163 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: a100)
    assert ranks() == [16, 32]


def test_the_kernel_of_pairs_compiles(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    sizes = {"K": 4, "N": 1, "R": 40, "E": 64, "EXACT": 0, "PAIRS": 0x3120, "BLOCKS_AN_SM": 3, "KEEP": 1}
    for file in (cuda_forward_pairs.FILE, "scan_prepare.cu"):
        files = (backend_cuda.COMMON, backend_cuda.FOLDER / file)
        assert nvrtc.compile_source.__wrapped__(files, tuple(sizes.items()), "80").startswith(b"\x7fELF")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "size",
    [
        # Most have more pieces of work than an H200 has places for blocks.
        (24, (32, 32), 640, 1, 20, "continuous"),  # LaMamba-XL, stages 1 and 2
        (12, (16, 16), 1280, 1, 40, "continuous"),
        (5, (16, 16), 1280, 1, 40, "cross"),
        (128, (32, 32), 128, 1, 4, "continuous"),  # LaMamba-S
        (60, (16, 16), 256, 1, 8, "continuous"),
        (100, (16, 16), 256, 1, 8, "bidirectional"),
        (1, (128, 128), 64, 1, 20, "continuous"),
    ],
)
def test_pairs_on_the_gpu(size, poison, monkeypatch):
    inputs, paths = scans.make(*size, BFLOAT16, "cuda")
    assert served(inputs, paths)
    scans.hold(inputs, paths, floor=2e-5, backend="cuda")
    call = torch.ops.lamabench.selective_scan_cuda.default
    with torch.no_grad():
        y, starts = call(*inputs, *paths, "few")
        for keep in ("few", "none", "all", "none"):
            other, again = call(*inputs, *paths, keep)
            assert torch.equal(y, other) and (keep == "none" or torch.equal(starts, again))
        other, again = call(*inputs, *paths[:2], (), "few")
    assert (starts - again).norm() <= 1e-6 * again.norm()
    assert (y.float() - other.float()).norm() <= 3e-3 * y.float().norm()


@pytest.mark.gpu
def test_pairs_opcheck():
    inputs, paths = scans.make(2, (8, 16), 64, 1, 3, "bidirectional", BFLOAT16, "cuda")
    assert served(inputs, paths)
    for keep in ("none", "few"):
        torch.library.opcheck(torch.ops.lamabench.selective_scan_cuda.default, (*inputs, *paths, keep))
