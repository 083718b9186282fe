"""Gradients that are means over all processes of a run (torch's DistributedDataParallel)."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import cycle
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import parallel

# Calls before a CUDA graph may capture the exchange of gradients: in the first ones, DistributedDataParallel measures
# itself. torch's notes on CUDA graphs ask for 11.
WARM_UP = 12
# Gradients that are summed at a time, in MiB. A step of DiT-XL/2 takes 119.1 ms on one H200. On two it takes 129.3 ms
# with 25, torch's default, and 127.8 ms with 200: the compiled network is cut where a bucket ends, and large sums are
# faster. Of DiT-B/2 with 128 images a GPU: 49.4 ms on one, 51.0 on two, of which the exchange is all; 51.7 with 60 MiB,
# 51.7 to 52.0 with four or eight blocks of NCCL, and 52.3 if the network is not cut.
BUCKET_MIB = 200


def averaging(net: nn.Module, call: Callable[..., Tensor], passes: int) -> Callable[..., Tensor]:
    """A function like `call`, the network `net` or `net` compiled, that is called `passes` times a step. The backward
    pass of the last call replaces gradients by their means over all processes. For one process, it is `call` itself.

    The first call looks for parameters that get no gradient. They are not trained.
    """
    if parallel.size() == 1:
        return call
    together: DistributedDataParallel | None = None
    last = cycle(number == passes - 1 for number in range(passes))

    def run(*inputs: Tensor) -> Tensor:
        nonlocal together
        if together is None:
            with torch.random.fork_rng([inputs[0].device] if inputs[0].is_cuda else []):
                _leave_out_unused(net, inputs)
                together = _together(call, inputs)
        with nullcontext() if next(last) else together.no_sync():
            return together(*inputs)

    return run


def _leave_out_unused(net: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Let the parameters without a gradient require none, because the exchange would wait for it."""
    net(*(value[:1] for value in inputs)).sum().backward()
    for parameter in net.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    net.zero_grad(set_to_none=True)


def _together(call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> DistributedDataParallel:
    # Buffers are constants. The second name is that of torch before 2.13.
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if new else "broadcast_buffers": False}
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # of sides of length 1
    # The compiled network inside: its graph ends where a bucket does, so that the sums begin before the pass has ended.
    together = DistributedDataParallel(
        cast(nn.Module, call), gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MIB, **options
    )
    # After its first backward pass, it puts gradients in other buckets, in which sums are rounded differently. A pass
    # before the first step lets a continued training have the buckets of an undisturbed one.
    together(*inputs).sum().backward()
    together.zero_grad(set_to_none=True)
    return together
