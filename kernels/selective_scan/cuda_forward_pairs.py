"""The forward pass of backend `cuda` where every path has a partner that is its reverse (`scan_forward_pairs.cu`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .backend_cuda import Plan

FILE = "scan_forward_pairs.cu"
# Fewer chunks are no gain (README.md). A number that no path reaches turns this kernel off.
LEAST_CHUNKS = 8
WARPS = 12  # of a multiprocessor


def layout(plan: Plan, pairs: Sequence[int]) -> dict[str, int]:
    """What the kernels need to know of the pairs; empty where the pass that takes any paths is to run."""
    served = (
        plan.paths in (2, 4) and sorted(pairs) == list(range(plan.paths)) and plan.states == 1 and not plan.exact
        and plan.channels % 32 == 0 and plan.length % 32 == 0 and plan.chunks >= LEAST_CHUNKS
    )  # fmt: skip
    if not served:
        return {}
    most = torch.cuda.get_device_properties(plan.device).shared_memory_per_block_optin
    if WARPS // plan.paths * (_shared(plan) + 1024) > most + 1024:
        return {}
    return {"PAIRS": sum(path << 4 * place for place, path in enumerate(pairs))}


def _shared(plan: Plan) -> int:
    """Bytes of shared memory of a block."""
    weight = 4 * plan.w_block if plan.halves > 2 else 0
    return 4 * plan.paths * (4 * 20 + 2 * (plan.dt_block + plan.bc_block) + 256 + 2 * 32 * 20 + weight)


def launch(
    plan: Plan,
    layout: dict[str, int],
    x: Tensor,
    tokens: tuple[Tensor, ...],
    fragments: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    skip: Tensor,
    starts: Tensor,
) -> Tensor:
    """The output. `tokens` are the table of paths and the blocks of dt, b and c along them. `starts` gets the states at
    the start of every chunk, unless it is empty."""
    table, *blocks_of_tokens = tokens
    keep = starts.numel() > 0
    blocks = WARPS // plan.paths
    kernel = plan.kernel(FILE, "scan_forward_pairs", _shared(plan), **layout, BLOCKS_AN_SM=blocks, KEEP=int(keep))
    items = plan.batch * plan.tiles
    grid = min(items, kernel.blocks_at_once(32 * plan.paths))
    y = plan.empty(x, grid if plan.paths > 2 else 0, plan.length, 32, dtype=torch.float32)
    if not keep:  # only for the length of the call
        starts = plan.empty(x, grid, plan.paths, plan.chunks // 2, 32, dtype=torch.float32)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kernel(
        (grid, 1), 32 * plan.paths, x, *blocks_of_tokens, fragments, dt_bias, a, skip, table, y, out, starts,
        plan.length, plan.chunks, plan.batch, items,
    )  # fmt: skip
    return out
