"""Gradients that are means over all processes of a run (torch's DistributedDataParallel)."""

import inspect
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import parallel


def averaging(call: Callable[..., Tensor], passes: int) -> Callable[..., Tensor]:
    """A function like `call`, a network or a compiled one, that is called `passes` times a step. The backward pass of
    the last call replaces gradients by their means over all processes. For one process, it is `call` itself."""
    if parallel.size() == 1:
        return call
    # A search for unused parameters keeps the buckets of gradients as they are: in other buckets than before, after a
    # restart, sums would be rounded differently. It also takes networks that have such parameters.
    options: dict[str, Any] = {"gradient_as_bucket_view": True, "find_unused_parameters": True}
    # Buffers are constants. The second name is that of torch before 2.13.
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    options["forward_sync_buffers" if new else "broadcast_buffers"] = False
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")  # of sides of length 1
    # The compiled network inside: its graph ends where a bucket does, so that the sums begin before the pass has ended.
    together = DistributedDataParallel(cast(nn.Module, call), **options)
    last = cycle(number == passes - 1 for number in range(passes))

    def run(*inputs: Tensor) -> Tensor:
        with nullcontext() if next(last) else together.no_sync():
            return together(*inputs)

    return run
