"""Gradients that are means over all processes of a run (torch's DistributedDataParallel)."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle
from typing import Any

from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ...models.registry import Backbone
from .. import parallel


def averaging(net: Backbone, wrap: Callable[[Any], Callable[..., Tensor]], passes: int) -> Callable[..., Tensor]:
    """`wrap(net)`, a module, to be called `passes` times a step. The backward pass of the last call replaces gradients
    by their means over all processes. `wrap` compiles a network or leaves it."""
    if parallel.size() == 1:
        return wrap(net)
    # A search for unused parameters keeps the buckets of gradients as they are: in other buckets than before, after a
    # restart, sums would be rounded differently. It also takes networks that have such parameters.
    options: dict[str, Any] = {"gradient_as_bucket_view": True, "find_unused_parameters": True}
    # Buffers are constants. The second name is that of torch before 2.13.
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    options["forward_sync_buffers" if new else "broadcast_buffers"] = False
    # The compiled network is inside, because torch compiles no call of the wrapper as one graph.
    together = DistributedDataParallel(wrap(net), **options)  # pyright: ignore[reportArgumentType]
    last = cycle(number == passes - 1 for number in range(passes))

    def run(*inputs: Tensor) -> Tensor:
        with nullcontext() if next(last) else together.no_sync():
            return together(*inputs)

    return run
