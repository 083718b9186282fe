"""Backend `cuda` of the scan at the edges of what it takes: any address, no image at all, states that just fit."""

import math

import cuda_on_cpu
import pytest
import test_scan_kernels as scans
import torch
from lamabench.kernels import nvrtc
from lamabench.kernels import selective_scan as op
from lamabench.kernels.selective_scan import backend_cuda

libraries, without_gpu = scans.libraries, scans.without_gpu
needs_compiler = pytest.mark.skipif(cuda_on_cpu.COMPILER is None, reason="g++ is not installed")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_takes_tensors_at_any_address_without_a_gpu(dtype, without_gpu):
    """Copies of 16 bytes need addresses that are multiples of 16, which views of larger tensors may not have."""

    def shifted(v):
        return torch.empty(v.numel() + 1, dtype=v.dtype)[1:].view_as(v).copy_(v.detach())

    inputs, paths = scans.make(2, (3, 7), 40, 2, 3, "cross", dtype)
    elsewhere = [shifted(v).requires_grad_() for v in inputs]
    results = []
    for tensors, change in ((inputs, torch.clone), (elsewhere, shifted)):
        y = op.selective_scan(*tensors, paths, "cuda")
        results.append([y, *torch.autograd.grad(y, tensors, change(torch.ones_like(y)))])
    for name, one, other in zip(scans.NAMES, *results, strict=True):
        assert torch.equal(one, other), name


@needs_compiler
@pytest.mark.parametrize("states", [1, 2, 16])
def test_cuda_takes_no_image_without_a_gpu(states, without_gpu):
    inputs, paths = scans.make(0, (8, 16), 32, states, 3, "bidirectional", torch.bfloat16)
    results = [scans.run(inputs, paths, backend) for backend in ("cuda", "torch")]
    for name, actual, expected in zip(scans.NAMES, *results, strict=True):
        assert torch.equal(actual, expected), name


def test_a_grid_without_blocks_is_not_launched():
    """CUDA would refuse it. A kernel without a driver can do nothing else."""
    kernel = nvrtc.Kernel.__new__(nvrtc.Kernel)
    for grid in ((0, 1), (1, 0)):
        kernel(grid, 32, torch.zeros(1))


@pytest.mark.parametrize(("batch", "keep"), [(64, "few"), (63, "all")])
def test_states_are_kept_where_they_fit(batch, keep, monkeypatch):
    """At stage 1 of LaMamba-Diff-XL an image's are 10 MiB, and a 128th of an H100's 79 GiB is 632 MiB."""
    plan, _ = scans.choice_on_an_h100(monkeypatch, batch, 1024, 640, 16, 20)
    assert math.prod(plan.starts_shape("all")) * 4 == batch * 10 * 2**20
    shape = plan.starts_shape(backend_cuda.SMALL)
    assert shape == plan.starts_shape(keep) != plan.starts_shape("few" if keep == "all" else "all")


@needs_compiler
@pytest.mark.parametrize("gib", [0, 1])
def test_backend_cuda_keeps_what_fits(gib, without_gpu, monkeypatch):
    """A training under `cuda` stores all states if the GPU has the memory, and few if it has not."""
    monkeypatch.setattr(torch.cuda.get_device_properties(0), "total_memory", gib * 2**30)
    inputs, paths = scans.make(2, (4, 5), 72, 16, 20, "continuous", torch.bfloat16)
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: stored.append(v) or v, lambda v: v):
        scans.run(inputs, paths, "cuda")
    (starts,) = [v for v in stored if v.ndim == 6]
    assert starts.shape[3] == (2 if gib else 0)  # chunks of 20 tokens
