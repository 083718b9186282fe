"""The Triton kernel of `backend_triton.py`, backward. As in `triton_forward.py`, a thread holds a channel and all its
steps."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .triton_forward import LOG2E, like_rows, one_state, product, row, softplus


@triton.jit
def affine_and_before(decay, value, _decay0, _value0, next_decay, next_value, next_decay0, next_value0):
    """The composition of two affine maps, as `affine` has it, and the composition of all maps but the last."""
    return (
        decay * next_decay,
        next_decay * value + next_value,
        decay * next_decay0,
        next_decay0 * value + next_value0,
    )


@triton.jit
def chunk(
    x, dt, order, image, k, start, length, e, weight, bias, steps, ranks, here, channels, db, dl, dk,
    R: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Of a chunk: which of its steps exist, its tokens, and its rows of dt, x and delta."""
    alive = start + steps < length
    token = tl.load(order + k * length + start + steps, mask=alive, other=0).to(tl.int32)
    low = tl.load(
        dt + image * db + k * dk + (token[:, None] * dl + ranks[None, :]),
        mask=alive[:, None] & (ranks < R)[None, :],
        other=0.0,
    )
    u = tl.load(x + (token[:, None] * channels + e[None, :]), mask=alive[:, None] & here[None, :], other=0.0)
    u = u.to(tl.float32)
    z, u = like_rows(product(low, weight, EXACT), u)
    delta = tl.where(alive[:, None], softplus(z + bias[None, :]), 0.0)
    return alive, token, low, u, delta


@triton.jit
def one_state_backward(
    n, h, carry, g_a, g_du, g_delta, g_b, g_c, delta, du, gy, b, c, a, steps, states,
    t: tl.constexpr, NB: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One state of every channel back through a chunk; h [BE] is the state before it.

    carry [NP, BE] is the gradient that the chunk passes to the states before it, and g_a [NP, BE] the gradient of A.
    g_du and g_delta [T, BE] are the gradients of delta · x and, through the decay, of delta. g_b and g_c [T, NB] are
    those of b and c.
    """
    mine = states[:, None] == n
    after = row(carry, states, n)
    first, last = steps[:, None] == 0, steps[:, None] == t - 1
    decay = tl.exp2(delta * a[None, :])
    one, none = tl.full(delta.shape, 1.0, tl.float32), tl.full(delta.shape, -0.0, tl.float32)
    value = du * b[:, None] + tl.where(first, decay * h[None, :], 0.0)
    _, value, _, before = tl.associative_scan((decay, value, one, none), 0, affine_and_before)
    before = tl.where(first, h[None, :], before)
    g = gy * c[:, None] + tl.where(last, after[None, :], 0.0)
    back = row(decay * g, steps, t - 1)  # what a step passes to the one before it
    through = tl.where(last, back[None, :], 0.0)
    for i in tl.static_range(1, t):
        at = steps[:, None] == t - 1 - i
        g = tl.where(at, g + back[None, :], g)
        back = row(g, steps, t - 1 - i) * row(decay, steps, t - 1 - i)
        through = tl.where(at, back[None, :], through)
    through *= before
    g_du += g * b[:, None]
    g_delta += through * (a[None, :] * 0.6931471805599453)
    g_a = tl.where(mine, g_a + tl.sum(through * delta, 0)[None, :], g_a)
    carry = tl.where(mine, back[None, :], carry)
    columns = tl.arange(0, NB)
    if EXACT:
        g_b += tl.where(columns[None, :] == n, tl.sum(g * du, 1)[:, None], 0.0)
        g_c += tl.where(columns[None, :] == n, tl.sum(gy * value, 1)[:, None], 0.0)
    else:  # a sum over the channels on the matrix units: times a matrix whose column n is 1
        unit = tl.zeros((delta.shape[1], NB), tl.bfloat16) + (columns[None, :] == n).to(tl.bfloat16)
        g_b = tl.dot((g * du).to(tl.bfloat16), unit, g_b)
        g_c = tl.dot((gy * value).to(tl.bfloat16), unit, g_c)
    return carry, g_a, g_du, g_delta, g_b, g_c


@triton.jit(do_not_specialize=["channels"])
def scan_backward(
    grad, x, dt, b, c, dt_weight, dt_bias, a, skip, order, starts, g_x, g_tokens, g_channels, g_weight,
    db, dl, dk, padded, batch, length, channels, images,
    K: tl.constexpr, G: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, NB: tl.constexpr, R: tl.constexpr,
    RP: tl.constexpr, T: tl.constexpr, BE: tl.constexpr, EXACT: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The gradients of `images` images, one image after the other. Inputs are as in `scan_forward`, except that b and c
    are float32 [B, K, N, padded] along the paths, with zeros from L to `padded`.

    starts      [G, programs, chunks, N, E]    scratch for the states at the start of every chunk of one path
    g_x         [G, B, L, E]                   float32, to be summed over the first dimension, as all of these
    g_tokens    [blocks of E, B, L, K, R + 2N] of dt, b and c
    g_channels  [programs over B, K, 2 + N, E] of the bias, of skip and of A
    g_weight    [programs over B, K, R, E]     of dt_weight
    """
    block, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    e = block * BE + tl.arange(0, BE)
    steps, states, ranks, columns = tl.arange(0, T), tl.arange(0, NP), tl.arange(0, RP), tl.arange(0, NB)
    here = e < channels
    chunks = tl.cdiv(length, T)
    group, per_group = tl.program_id(2), K // G
    starts += (group * tl.num_programs(1) + part) * chunks * N * channels
    g_x += group.to(tl.int64) * batch * length * channels
    width: tl.constexpr = R + 2 * N
    for k in range(group * per_group, group * per_group + per_group):
        ke = k * channels + e
        weight = tl.load(
            dt_weight + ke[None, :] * R + ranks[:, None], mask=here[None, :] & (ranks < R)[:, None], other=0.0
        )
        bias = tl.load(dt_bias + ke, mask=here, other=0.0).to(tl.float32)
        skip_k = tl.load(skip + ke, mask=here, other=0.0).to(tl.float32)
        a_rows = a + k * N * channels + e
        g_w = tl.zeros((RP, BE), tl.float32)
        g_a = tl.zeros((NP, BE), tl.float32)
        g_bias = tl.zeros((BE,), tl.float32)
        g_skip = tl.zeros((BE,), tl.float32)
        for image in range(part * images, tl.minimum(part * images + images, batch)):
            h = tl.zeros((NP, BE), tl.float32)
            for zero in tl.static_range(N):
                tl.store(starts + zero * channels + e, tl.zeros((BE,), tl.float32), mask=here)
            for at in range(0, chunks - 1):
                alive, token, low, u, delta = chunk(
                    x + image * length * channels, dt, order, image, k, at * T, length, e, weight, bias, steps, ranks,
                    here, channels, db, dl, dk, R, EXACT,
                )  # fmt: skip
                du = delta * u
                rows_n = (image * K + k) * N * padded + at * T + steps
                if N <= UNROLL:
                    for n in tl.static_range(N):
                        b_n = tl.load(b + rows_n + n * padded)
                        a_n = tl.load(a_rows + n * channels, mask=here, other=0.0)
                        h, _ = one_state(n, h, du, delta, du, b_n, b_n, a_n, steps, states, T)
                        h_n = row(h, states, n)
                        tl.store(starts + ((at + 1) * N + n) * channels + e, h_n, mask=here)
                else:
                    for n in range(N):
                        b_n = tl.load(b + rows_n + n * padded)
                        a_n = tl.load(a_rows + n * channels, mask=here, other=0.0)
                        h, _ = one_state(n, h, du, delta, du, b_n, b_n, a_n, steps, states, T)
                        h_n = row(h, states, n)
                        tl.store(starts + ((at + 1) * N + n) * channels + e, h_n, mask=here)
            tl.debug_barrier()
            carry = tl.zeros((NP, BE), tl.float32)
            for back in range(0, chunks):
                at = chunks - 1 - back
                alive, token, low, u, delta = chunk(
                    x + image * length * channels, dt, order, image, k, at * T, length, e, weight, bias, steps, ranks,
                    here, channels, db, dl, dk, R, EXACT,
                )  # fmt: skip
                du = delta * u
                tile = alive[:, None] & here[None, :]
                place = token[:, None] * channels + e[None, :]
                gy = tl.load(grad + image * length * channels + place, mask=tile, other=0.0).to(tl.float32)
                g_du, g_delta = tl.zeros((T, BE), tl.float32), tl.zeros((T, BE), tl.float32)
                g_b, g_c = tl.zeros((T, NB), tl.float32), tl.zeros((T, NB), tl.float32)
                rows_n = (image * K + k) * N * padded + at * T + steps
                if N <= UNROLL:
                    for n in tl.static_range(N):
                        b_n = tl.load(b + rows_n + n * padded)
                        c_n = tl.load(c + rows_n + n * padded)
                        a_n = tl.load(a_rows + n * channels, mask=here, other=0.0)
                        h_n = tl.load(starts + (at * N + n) * channels + e, mask=here, other=0.0)
                        carry, g_a, g_du, g_delta, g_b, g_c = one_state_backward(
                            n, h_n, carry, g_a, g_du, g_delta, g_b, g_c, delta, du, gy, b_n, c_n, a_n, steps, states,
                            T, NB, EXACT,
                        )  # fmt: skip
                else:
                    for n in range(N):
                        b_n = tl.load(b + rows_n + n * padded)
                        c_n = tl.load(c + rows_n + n * padded)
                        a_n = tl.load(a_rows + n * channels, mask=here, other=0.0)
                        h_n = tl.load(starts + (at * N + n) * channels + e, mask=here, other=0.0)
                        carry, g_a, g_du, g_delta, g_b, g_c = one_state_backward(
                            n, h_n, carry, g_a, g_du, g_delta, g_b, g_c, delta, du, gy, b_n, c_n, a_n, steps, states,
                            T, NB, EXACT,
                        )  # fmt: skip
                # softplus' = sigmoid = 1 - exp(-softplus)
                slope = tl.where(delta < 0.0078125, delta * (1 - delta * (0.5 - delta * 0.16666667)),
                                 1 - tl.exp2(-delta * LOG2E))  # fmt: skip
                g_pre = (g_delta + g_du * u) * slope
                g_u = g_du * delta + gy * skip_k[None, :]
                g_bias += tl.sum(g_pre, 0)
                g_skip += tl.sum(gy * u, 0)
                g_w += product(tl.trans(low), g_pre, EXACT)
                g_low = product(g_pre, tl.trans(weight), EXACT)
                rows = (((block.to(tl.int64) * batch + image) * length + token) * K + k) * width
                some = alive[:, None]
                tl.store(g_tokens + rows[:, None] + ranks[None, :], g_low, mask=some & (ranks < R)[None, :])
                column = rows[:, None] + R + columns[None, :]
                tl.store(g_tokens + column, g_b, mask=some & (columns < N)[None, :])
                tl.store(g_tokens + column + N, g_c, mask=some & (columns < N)[None, :])
                if k > group * per_group:
                    g_u += tl.load(g_x + image * length * channels + place, mask=tile, other=0.0)
                tl.store(g_x + image * length * channels + place, g_u, mask=tile)
            tl.debug_barrier()
        rows = (part * K + k) * (2 + N) * channels + e
        tl.store(g_channels + rows, g_bias, mask=here)
        tl.store(g_channels + rows + channels, g_skip, mask=here)
        tl.store(
            g_channels + rows[None, :] + (2 + states)[:, None] * channels,
            g_a,
            mask=here[None, :] & (states < N)[:, None],
        )
        tl.store(
            g_weight + ((part * K + k) * R + ranks)[:, None] * channels + e[None, :],
            g_w,
            mask=here[None, :] & (ranks < R)[:, None],
        )
