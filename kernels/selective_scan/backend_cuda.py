"""The selective scan in CUDA C++ (`scan*.cu`), compiled at run time. README.md says how it works."""

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import nvrtc
from ..errors import InputError
from . import cuda_forward_pairs

FOLDER = Path(__file__).parent
COMMON = FOLDER / "scan.cuh"
STEPS = 16  # of a chunk
FEW_STATES = 4  # take K·E·L / 4 numbers an image or fewer
SHARE = 128  # the 22 calls of LaMamba-Diff-XL take 17 % of the memory or less
SMALL = f"small-{SHARE}"  # with the number, because compiled graphs are kept by the name
# What the forward pass stores for the backward pass. none: nothing, because there is none. few: the states at the start
# of every chunk, but of more than FEW_STATES a channel only those at the start of segments. all: at every chunk. SMALL:
# all where one call's take at most a part in SHARE of the GPU's memory, else few.
KEEP = ("none", "few", SMALL, "all")
MOST_SEGMENTS = 64  # of a path in the backward pass
reasons = nvrtc.reasons


def _align4(words: int) -> int:
    return -(-words // 4) * 4


class Plan:
    """Sizes and compiled kernels of a call, from its shapes and types."""

    def __init__(self, x: Tensor, dt: Tensor, a: Tensor) -> None:
        self.batch, self.length, self.channels = x.shape
        self.paths, _, self.states = a.shape
        self.rank = dt.shape[-1]
        self.exact = int(x.dtype == torch.float32)
        self.chunks = -(-self.length // STEPS)
        self.tiles = -(-self.channels // 32)
        self.halves = -(-self.rank // 16)
        self.device = x.device.index
        words = STEPS * self.rank if self.exact else STEPS * (self.halves * 8 + 4)
        self.dt_block, self.bc_block = _align4(words), self.states * 2 * STEPS
        self.w_block = self.halves * 128

    def starts_shape(self, keep: str) -> tuple[int, ...]:
        """The shape of the states that the forward pass stores for the backward pass, by a name of `KEEP`. With `all`
        or few states these are the states at the start of every chunk, else of every segment, and none where paths stay
        whole."""
        if keep == SMALL:
            keep = "all" if self.may_keep_all() else "few"
        count = self.chunks if keep != "none" else 0
        if keep == "few" and self.states > FEW_STATES:
            segments = backward_choices(self).segments
            count = segments if segments > 1 else 0
        return (self.batch, self.paths, self.tiles, count, self.states, 32)

    def may_keep_all(self) -> bool:
        """Whether the states at the start of every chunk are at most a part in SHARE of the GPU's memory."""
        memory = torch.cuda.get_device_properties(self.device).total_memory
        return 4 * math.prod(int(v) for v in self.starts_shape("all")) <= memory / SHARE

    def chunks_a_segment(self, segments: int) -> int:
        """Chunks of every segment but the last, which may have fewer."""
        return -(-self.chunks // segments)

    def kernel(self, file: str, name: str, shared: int = 0, **more: int) -> nvrtc.Kernel:
        constants = {
            "K": self.paths, "N": self.states, "R": self.rank, "E": self.channels, "EXACT": self.exact, **more
        }  # fmt: skip
        return nvrtc.kernel((COMMON, FOLDER / file), name, tuple(constants.items()), shared, self.device)

    def empty(self, like: Tensor, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=like.device)


def _tokens(
    plan: Plan, dt: Tensor, b: Tensor, c: Tensor, order: Tensor, inverse: Tensor, **layout: int
) -> tuple[Tensor, ...]:
    """The table of paths and the blocks of dt, b and c along them."""
    lead = (plan.batch, plan.paths, plan.chunks)
    table = plan.empty(dt, plan.paths, plan.chunks, STEPS + 4)
    dt_blocks = plan.empty(dt, *lead, plan.dt_block)
    bc_blocks = plan.empty(dt, *lead, plan.bc_block, dtype=torch.float32)
    strides = [ctypes.c_longlong(s) for v in (dt, b, c) for s in v.stride()[:3]]
    plan.kernel("scan_prepare.cu", "prepare_tokens", **layout)(
        (plan.paths * plan.chunks, plan.batch), 128,
        dt, b, c, order, inverse, table, dt_blocks, bc_blocks, *strides, plan.length, plan.chunks,
    )  # fmt: skip
    return table, dt_blocks, bc_blocks


def _weights(plan: Plan, weight: Tensor, transpose: bool) -> tuple[Tensor, Tensor | None]:
    """W in the layout of the matrix units, and its transpose if `transpose`."""
    if plan.exact:
        return weight, None
    shape = (plan.paths, plan.tiles, plan.w_block * 4)
    fragments = plan.empty(weight, *shape)
    transposed = plan.empty(weight, *shape) if transpose else None
    plan.kernel("scan_prepare.cu", "prepare_weights")((plan.paths, plan.tiles), 128, weight, fragments, transposed)
    return fragments, transposed


def _dense(v: Tensor) -> Tensor:
    return v if v.stride(-1) == 1 else v.contiguous()


def _aligned(v: Tensor) -> Tensor:
    """`v`, contiguous, at an address that is a multiple of 16 bytes, because kernels copy so many at once."""
    v = v.contiguous()
    return v.clone() if v.data_ptr() % 16 else v


def _inputs(x: Tensor, tokens: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """x, dt, b and c in bfloat16 if all of them are, else in float32; parameters in float32."""
    dtype = torch.bfloat16 if all(v.dtype == torch.bfloat16 for v in (x, *tokens)) else torch.float32
    return (
        x.to(dtype).contiguous(), *(_dense(v.to(dtype)) for v in tokens), *(v.float().contiguous() for v in weights)
    )  # fmt: skip


@torch.library.custom_op("lamabench::selective_scan_cuda", mutates_args=())
def scan_forward(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    skip: Tensor,
    order: Tensor,
    inverse: Tensor,
    pairs: Sequence[int],
    keep: str,
) -> tuple[Tensor, Tensor]:
    """The output [B, L, E], and float32 states [B, K, tiles of 32 channels, chunks or segments, N, 32] for the backward
    pass, by a name of `KEEP` (`Plan.starts_shape`)."""
    kind = x.dtype
    x, dt, b, c, dt_weight, dt_bias, a, skip = _inputs(x, (dt, b, c), (dt_weight, dt_bias, a, skip))
    x = _aligned(x)
    with torch.cuda.device(x.device):
        plan = Plan(x, dt, a)
        if layout := cuda_forward_pairs.layout(plan, pairs):
            tokens = _tokens(plan, dt, b, c, order, inverse, **layout)
            fragments, _ = _weights(plan, dt_weight, transpose=False)
            starts = plan.empty(x, *plan.starts_shape(keep), dtype=torch.float32)
            out = cuda_forward_pairs.launch(plan, layout, x, tokens, fragments, dt_bias, a, skip, starts)
            return out.to(kind), starts
        table, dt_blocks, bc_blocks = _tokens(plan, dt, b, c, order, inverse)
        fragments, _ = _weights(plan, dt_weight, transpose=False)
        w_registers, blocks = forward_choices(plan)
        stage = plan.dt_block + plan.bc_block + STEPS * 32 * x.element_size() // 4
        warp = 3 * (STEPS + 4) + stage + 32 * 20 + (0 if plan.states <= 4 else plan.states * 64)
        warp += 0 if plan.exact or w_registers else plan.w_block * 4
        shared = 4 * plan.paths * warp
        shape = plan.starts_shape(keep)
        chunks_each = plan.chunks_a_segment(shape[3]) if shape[3] else 0
        kernel = plan.kernel(
            "scan_forward.cu", "scan_forward", shared,
            W_REGISTERS=int(w_registers), BLOCKS_AN_SM=blocks, KEEP=min(chunks_each, 2),
        )  # fmt: skip
        items = plan.batch * plan.tiles
        grid = min(items, kernel.blocks_at_once(32 * plan.paths))
        scratch = plan.empty(x, grid, plan.length, 32, dtype=torch.float32)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        starts = plan.empty(x, *shape, dtype=torch.float32)
        kernel(
            (grid, 1), 32 * plan.paths, x, dt_blocks, bc_blocks, fragments, dt_bias, a, skip, table, scratch, out,
            starts, plan.length, plan.chunks, plan.batch, items, chunks_each,
        )  # fmt: skip
    return out.to(kind), starts


def forward_choices(plan: Plan) -> tuple[bool, int]:
    """Whether W lies in registers, and the blocks a multiprocessor to compile for, as measured (README.md)."""
    if plan.states <= 4:
        return True, max(1, 12 // plan.paths)
    processors = torch.cuda.get_device_properties(plan.device).multi_processor_count

    def time(choice: tuple[bool, int, float]) -> float:
        """Rounds of blocks times the time of a round, in arbitrary units."""
        return -(-plan.batch * plan.tiles // (choice[1] * processors)) * choice[2]

    shared = (False, max(1, 12 // plan.paths), 2.87)
    if plan.halves > 5:  # W is larger than the registers
        return shared[:2]
    return min((True, max(1, 8 // plan.paths), 2.0), shared, key=time)[:2]


@torch.library.custom_op("lamabench::selective_scan_cuda_backward", mutates_args=())
def scan_backward(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    skip: Tensor,
    order: Tensor,
    inverse: Tensor,
    starts: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient of x, and float32 parts of the other gradients, to be summed over the first axis: of dt, b and c
    [groups, B, L, K, R + 2N], of dt_weight [parts · segments, K, E, R], of a, dt_bias and skip
    [parts · segments, K, E, N + 2]."""
    kind = x.dtype
    x, dt, b, c, dt_weight, dt_bias, a, skip = _inputs(x, (dt, b, c), (dt_weight, dt_bias, a, skip))
    x, grad = _aligned(x), _aligned(grad.to(x.dtype))
    with torch.cuda.device(x.device):
        plan = Plan(x, dt, a)
        table, dt_blocks, bc_blocks = _tokens(plan, dt, b, c, order, inverse)
        fragments, transposed = _weights(plan, dt_weight, transpose=True)
        choice = backward_choices(plan, starts)
        segmented, stored = choice.segments > 1, starts.shape[3] == plan.chunks
        constants = {
            "WARPS": choice.warps, "BLOCKS_AN_SM": choice.blocks, "KEPT": int(stored), "SEGMENTED": int(segmented)
        }  # fmt: skip
        kernel = plan.kernel("scan_backward.cu", "scan_backward", choice.shared, **constants)

        def empty(*shape: int) -> Tensor:
            return plan.empty(x, *shape, dtype=torch.float32)

        rows, chunks_each = choice.parts * choice.segments, plan.chunks_a_segment(choice.segments)
        by_chunk = starts if stored else empty(rows * choice.groups * choice.warps, chunks_each, plan.states, 32)
        g_x = empty(*x.shape) if plan.paths > 1 else None
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        g_tokens, g_weight, g_rows = (empty(*shape) for shape in _parts(plan, choice))
        rates = a.mT.contiguous()
        later_segments = None
        if segmented:
            later_segments = empty(plan.batch, plan.paths, plan.tiles, choice.segments, 2, plan.states, 32)
            plan.kernel("scan_backward.cu", "scan_segments", choice.shared, **constants)(
                (choice.groups, plan.batch * plan.paths * (choice.segments - 1)), 32 * choice.warps, grad, dt_blocks,
                bc_blocks, fragments, dt_bias, rates, table, later_segments, plan.length, plan.chunks, chunks_each,
                choice.segments,
            )  # fmt: skip
        for path in range(plan.paths if segmented else 1):  # in turn, because each adds to the gradient of x
            kernel(
                (choice.groups, rows), 32 * choice.warps, grad, x, dt_blocks, bc_blocks, fragments, transposed, dt_bias,
                rates, skip, table, by_chunk, g_x, out, g_tokens, g_weight, g_rows, plan.length, plan.chunks,
                plan.batch, starts, later_segments, chunks_each, choice.segments, path,
            )  # fmt: skip
    return out.to(kind), g_tokens, g_weight, g_rows


class Choice(NamedTuple):
    """How a backward pass is cut up: warps of a block, blocks of a multiprocessor, groups of channels (a block each),
    parts of the batch, segments of a path, and the bytes of a block's shared memory."""

    warps: int
    blocks: int
    groups: int
    parts: int
    segments: int
    shared: int


def _parts(plan: Plan, choice: Choice) -> list[tuple[int, ...]]:
    """The shapes of the partial sums that blocks write."""
    k, n, r, e = plan.paths, plan.states, plan.rank, plan.channels
    rows = choice.parts * choice.segments
    return [(choice.groups, plan.batch, plan.length, k, r + 2 * n), (rows, k, e, r), (rows, k, e, n + 2)]


def backward_choices(plan: Plan, starts: Tensor | None = None) -> Choice:
    """The fastest way to cut up a backward pass. Paths stay whole where the forward pass stored no states."""
    device = torch.cuda.get_device_properties(plan.device)
    ranks, columns = -(-plan.rank // 8) * 8, plan.rank + 2 * plan.states
    block = 2 * (plan.dt_block + plan.bc_block) + 4 * (STEPS + 4) + 4
    warp = (640 if plan.exact else 768) + 3 * STEPS * (32 if plan.exact else 16)
    warp += 2 * plan.states * 32 + 32 * ranks + STEPS * _align4(columns) + 2 * STEPS - 4
    sizes = (plan.batch, plan.chunks, plan.tiles, 4 * block, 4 * warp)
    choice = _fastest(
        *(int(v) for v in sizes),  # ints, because torch.compile may have symbols
        bool(plan.states % 2 == 0) and not plan.exact, device.multi_processor_count,
        device.shared_memory_per_block_optin, 1 if starts is not None and starts.numel() == 0 else MOST_SEGMENTS,
    )  # fmt: skip
    if choice is None:
        raise InputError(
            f"selective_scan: backend 'cuda' has no room for d_state {plan.states} and rank {plan.rank} on this GPU; "
            "use 'triton'"
        )
    return choice


@cache
def _fastest(
    batch: int,
    chunks: int,
    tiles: int,
    block_bytes: int,
    warp_bytes: int,
    even: bool,
    processors: int,
    most_bytes: int,
    most_segments: int,
) -> Choice | None:
    """The way to cut up a backward pass that takes the least time, or None where none fits shared memory. Times of
    whole paths follow measurements (README.md); times of segments are estimates."""
    best, least = None, float("inf")
    for blocks in (2, 1):
        for warps in range(min(12 // blocks, tiles), 0, -1):
            shared = block_bytes + warps * warp_bytes
            if blocks * (shared + 1024) > most_bytes + 1024:
                continue
            groups, slots = -(-tiles // warps), processors * blocks
            resident = max(warps * blocks, 6)  # fewer warps take as long
            pairs = even and resident <= 8  # two states at a time
            slower = 1.05 if blocks == 1 else 1.0  # all warps of a multiprocessor wait for each other
            chunk = slower * (6 + resident / 4 if pairs else resident + 1.5)
            for count in range(1, min(most_segments, chunks) + 1):
                chunks_each = -(-chunks // count)
                segments = -(-chunks // chunks_each)
                parts = min(batch, max(1, slots // (groups * segments)))
                rounds = -(-batch // (parts or 1)) * -(-groups * parts * segments // slots)
                # A segment is walked twice and has a start of its own. A gain below a fifth is not worth segments.
                time = rounds * chunk * (chunks if segments == 1 else 1.25 * (1.3 * chunks_each + 2))
                if time < least:
                    best, least = Choice(warps, blocks, groups, parts, segments, shared), time
    return best


@scan_forward.register_fake
def _(x, dt, b, c, dt_weight, dt_bias, a, skip, order, inverse, pairs, keep):
    like, dt, *_ = _inputs(x, (dt, b, c), ())
    return x.new_empty(x.shape), x.new_empty(Plan(like, dt, a).starts_shape(keep), dtype=torch.float32)


@scan_backward.register_fake
def _(grad, x, dt, b, c, dt_weight, dt_bias, a, skip, order, inverse, starts):
    x, dt, *_ = _inputs(x, (dt, b, c), ())
    plan = Plan(x, dt, a)
    shapes = _parts(plan, backward_choices(plan, starts))
    return grad.new_empty(x.shape), *(x.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:10], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 12
    saved = ctx.saved_tensors  # read once: checkpointing computes them again, and forbids a second read
    _, dt, b, c, dt_weight, dt_bias, a, skip, *_ = saved
    n = a.shape[-1]
    g_x, g_tokens, g_weight, g_rows = scan_backward(grad, *saved)
    # Added here, not in the operator, so that torch.compile fuses the sums with what follows.
    g_dt, g_b, g_c = g_tokens.sum(0).split([dt.shape[-1], n, n], dim=-1)
    g_a, g_bias, g_skip = g_rows.sum(0).split([n, 1, 1], dim=-1)
    sums = (g_dt, g_b, g_c, g_weight.sum(0), g_bias[..., 0], g_a, g_skip[..., 0])
    likes = (dt, b, c, dt_weight, dt_bias, a, skip)
    return g_x, *(v.to(like.dtype) for v, like in zip(sums, likes, strict=True)), None, None, None, None


scan_forward.register_autograd(_backward, setup_context=_setup_context)


def selective_scan(*inputs: Any, keep: str = SMALL) -> Tensor:
    """See `lamabench.kernels.selective_scan.selective_scan`. `keep`, of `KEEP`, is what training stores.

    Raises InputError for float64, because the kernel computes in float32, and where the backward pass does not fit
    shared memory.
    """
    tensors, pairs = inputs[:10], inputs[10] if len(inputs) > 10 else ()
    if torch.float64 in [v.dtype for v in tensors]:
        raise InputError(
            "selective_scan: backend 'cuda' computes in float32, not in float64; use 'torch' or 'reference'"
        )
    trained = torch.is_grad_enabled() and any(v.requires_grad for v in tensors)
    return scan_forward(*tensors, pairs, keep if trained else "none")[0]


def kept_selective_scan(*inputs: Any) -> Tensor:
    """`selective_scan` that keeps all states in training whatever they take: K·E·L·N / 16 numbers an image, and no walk
    forwards in the backward pass."""
    return selective_scan(*inputs, keep="all")
