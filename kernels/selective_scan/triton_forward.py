"""The Triton kernel of `backend_triton.py`, forward, and the functions that it shares with the backward kernel.

A program owns a block of BE channels of an image and walks along one path after the other, T steps at a time. All of
its tiles are [T, BE], and a thread holds a channel with all of its T steps. So a scan over time stays in the registers
of a thread, and the N states of a channel never reach another thread.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .. import triton_support

LOG2E = tl.constexpr(triton_support.LOG2E)


@triton.jit
def affine(decay, value, next_decay, next_value):
    """h -> decay·h + value, then h -> next_decay·h + next_value."""
    return decay * next_decay, next_decay * value + next_value


@triton.jit
def product(left, right, exact: tl.constexpr):
    """left @ right, in float32 or nearly so."""
    if exact:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    else:
        return halves(left, right)


@triton.jit
def halves(left, right):
    """left @ right, each as the sum of two bfloat16 (16 bits of mantissa), without the product of the lower halves."""
    high, other = left.to(tl.bfloat16), right.to(tl.bfloat16)
    out = tl.dot(high, other)
    if right.dtype != tl.bfloat16:
        out = tl.dot(high, (right.to(tl.float32) - other.to(tl.float32)).to(tl.bfloat16), out)
    if left.dtype != tl.bfloat16:
        out = tl.dot((left.to(tl.float32) - high.to(tl.float32)).to(tl.bfloat16), other, out)
    return out


@triton.jit
def softplus(z):
    """log(1 + exp(z)), in float32's precision also where exp(z) is far below 1."""
    e = tl.exp2(-tl.abs(z) * LOG2E)
    p = 0.0775160863995552 + e * (-0.029074065387248993 + e * 0.0051261018961668015)
    p = 0.19076880812644958 + e * (-0.13602247834205627 + e * p)
    p = 0.3331812024116516 + e * (-0.2483539879322052 + e * p)
    p = 0.9999999403953552 + e * (-0.4999944567680359 + e * p)  # log(1 + e) / e on [0, 1], to 3.4e-8
    return tl.maximum(z, 0.0) + e * p


@triton.jit
def row(tile, steps, at):
    """Row `at` of a tile [T, BE]. -0.0 is the zero that compilers may leave out of a sum."""
    return tl.sum(tl.where(steps[:, None] == at, tile, -0.0), 0)


@triton.jit
def one_state(n, h, y, delta, du, b, c, a, steps, states, t: tl.constexpr):
    """State n of every channel through a chunk: the states [NP, BE] after the chunk, and y with c · h added.

    b and c [T] and a [BE] (times log2 e) belong to state n.
    """
    mine = states[:, None] == n
    before = row(h, states, n)
    decay = tl.exp2(delta * a[None, :])
    value = du * b[:, None] + tl.where(steps[:, None] == 0, decay * before[None, :], 0.0)
    _, value = tl.associative_scan((decay, value), 0, affine)
    return tl.where(mine, row(value, steps, t - 1)[None, :], h), y + c[:, None] * value


@triton.jit
def second(_left, _left2, right, right2):
    return right, right2


@triton.jit
def like_rows(tile, rows):
    """Both tiles, unchanged. A scan that does nothing makes Triton lay both out with one channel to a thread."""
    return tl.associative_scan((tile, rows), 0, second)


@triton.jit(do_not_specialize=["channels"])
def scan_forward(
    x, dt, b, c, dt_weight, dt_bias, a, skip, order, partial, out,
    db, dl, dk, bb, bl, bk, length, channels,
    K: tl.constexpr, G: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    T: tl.constexpr, BE: tl.constexpr, EXACT: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The output [B, L, E], or `partial` [G, B, L, E]: the sums over the paths of each of G groups.

    x is [B, L, E] and `a` is [K, N, E], times log2 e. dt, b and c are in the caller's layout.
    """
    image, e = tl.program_id(1).to(tl.int64), tl.program_id(0) * BE + tl.arange(0, BE)
    steps, states, ranks = tl.arange(0, T), tl.arange(0, NP), tl.arange(0, RP)
    here = e < channels
    x += image * length * channels
    group, per_group = tl.program_id(2), K // G
    partial += (group * tl.num_programs(1) + image) * length * channels
    out += image * length * channels
    for k in range(group * per_group, group * per_group + per_group):
        ke = k * channels + e
        weight = tl.load(
            dt_weight + ke[None, :] * R + ranks[:, None], mask=here[None, :] & (ranks < R)[:, None], other=0.0
        )
        bias = tl.load(dt_bias + ke, mask=here, other=0.0).to(tl.float32)
        skip_k = tl.load(skip + ke, mask=here, other=0.0).to(tl.float32)
        h = tl.zeros((NP, BE), tl.float32)
        for start in range(0, length, T):
            alive = start + steps < length
            token = tl.load(order + k * length + start + steps, mask=alive, other=0).to(tl.int32)
            tile = alive[:, None] & here[None, :]
            low = tl.load(
                dt + image * db + k * dk + (token[:, None] * dl + ranks[None, :]),
                mask=alive[:, None] & (ranks < R)[None, :],
                other=0.0,
            )
            u = tl.load(x + (token[:, None] * channels + e[None, :]), mask=tile, other=0.0).to(tl.float32)
            z, u = like_rows(product(low, weight, EXACT), u)
            delta = tl.where(alive[:, None], softplus(z + bias[None, :]), 0.0)
            du, y = delta * u, u * skip_k[None, :]
            b_rows, c_rows = b + image * bb + k * bk + token * bl, c + image * bb + k * bk + token * bl
            a_rows = a + k * N * channels + e
            if N <= UNROLL:
                for n in tl.static_range(N):
                    b_n = tl.load(b_rows + n, mask=alive, other=0.0).to(tl.float32)
                    c_n = tl.load(c_rows + n, mask=alive, other=0.0).to(tl.float32)
                    a_n = tl.load(a_rows + n * channels, mask=here, other=0.0)
                    h, y = one_state(n, h, y, delta, du, b_n, c_n, a_n, steps, states, T)
            else:
                for n in range(N):
                    b_n = tl.load(b_rows + n, mask=alive, other=0.0).to(tl.float32)
                    c_n = tl.load(c_rows + n, mask=alive, other=0.0).to(tl.float32)
                    a_n = tl.load(a_rows + n * channels, mask=here, other=0.0)
                    h, y = one_state(n, h, y, delta, du, b_n, c_n, a_n, steps, states, T)
            at = token[:, None] * channels + e[None, :]
            if k > group * per_group:
                y += tl.load(partial + at, mask=tile, other=0.0).to(tl.float32)
            if G > 1 or k < K - 1:
                tl.store(partial + at, y.to(partial.dtype.element_ty), mask=tile)
            else:
                tl.store(out + at, y.to(out.dtype.element_ty), mask=tile)
        tl.debug_barrier()
