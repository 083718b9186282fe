"""The Triton kernels of `backend_triton.py`. Index arithmetic cuts windows, shifts them and puts them back.

A program owns one head of the window at one place of several images, which it takes in turn: the bias and the mask of
their scores are the same. Its neighbours read the other heads of the same tokens at the same time, so that whole rows
of DRAM are used. Scores are multiplied by log2 e, so that exponentials are powers of 2. Masks pad the w² tokens of a
window to whole blocks, and the head width D to a power of two, DP.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from .. import triton_support

LOG2E = tl.constexpr(triton_support.LOG2E)


@triton.jit
def place(
    at, token, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WINDOW: tl.constexpr, SHIFT: tl.constexpr
):  # fmt: skip
    """Row and column in the image of the tokens of window `at`, and their regions, as in `shift_mask`."""
    row = at // (WIDTH // WINDOW) * WINDOW + token // WINDOW
    column = at % (WIDTH // WINDOW) * WINDOW + token % WINDOW
    region = 3 * ((row >= HEIGHT - WINDOW).to(tl.int32) + (row >= HEIGHT - SHIFT).to(tl.int32))
    region += (column >= WIDTH - WINDOW).to(tl.int32) + (column >= WIDTH - SHIFT).to(tl.int32)
    return (row + SHIFT) % HEIGHT, (column + SHIFT) % WIDTH, region


@triton.jit
def added(
    table, head, query, key, query_region, key_region,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The addend of the scores [queries, keys], times log2 e: the bias of the relative position, -100 across the seam,
    -inf for keys beyond the window. table [heads, (2w - 1)²]."""
    out = tl.zeros((BLOCK, BLOCK), tl.float32)
    if BIAS:
        reach: tl.constexpr = 2 * WINDOW - 1
        row = query[:, None] // WINDOW - key[None, :] // WINDOW + WINDOW - 1
        column = query[:, None] % WINDOW - key[None, :] % WINDOW + WINDOW - 1
        inside = (query < WINDOW * WINDOW)[:, None] & (key < WINDOW * WINDOW)[None, :]
        out = tl.load(table + (head * reach + row) * reach + column, mask=inside, other=0.0) * LOG2E
    if MASKED:
        out += tl.where(query_region[:, None] == key_region[None, :], 0.0, -100.0 * LOG2E)
    if WINDOW * WINDOW % BLOCK != 0:
        out = tl.where((key < WINDOW * WINDOW)[None, :], out, float("-inf"))
    return out


@triton.jit
def rows(base, at, token, D: tl.constexpr, DP: tl.constexpr, WINDOW: tl.constexpr):
    """The rows [tokens, DP] at `at` [tokens], zero beyond the window and beyond D."""
    d = tl.arange(0, DP)
    mask = (token < WINDOW * WINDOW)[:, None] & (d < D)[None, :]
    return tl.load(base + at[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def put_rows(base, at, token, value, D: tl.constexpr, DP: tl.constexpr, WINDOW: tl.constexpr):
    """Store `value` [tokens, DP] where `rows` loads it."""
    d = tl.arange(0, DP)
    mask = (token < WINDOW * WINDOW)[:, None] & (d < D)[None, :]
    tl.store(base + at[:, None] + d[None, :], value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def dot(left, right):
    """left @ right in float32: bfloat16 and float16 on the tensor cores, float32 without rounding to TF32."""
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def attend(
    qkv, table, out, lse, sb, sh, sw, images, images_each,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [B, H, W, C] and, for windows of several blocks, lse [B, windows, heads, w²]: log2 of the sums of 2^score.

    qkv [B, H, W, 3C] has strides sb, sh, sw, 1. Grid: (heads · windows · parts of B, blocks of queries).
    """
    tokens: tl.constexpr = WINDOW * WINDOW
    windows: tl.constexpr = (HEIGHT // WINDOW) * (WIDTH // WINDOW)
    channels: tl.constexpr = HEADS * D
    scale: tl.constexpr = LOG2E * D**-0.5
    head, at = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS % windows
    first = tl.program_id(0) // (HEADS * windows) * images_each
    query = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, column, region = place(at, query, HEIGHT, WIDTH, WINDOW, SHIFT)
    from_q, to = row * sh + column * sw, (row * WIDTH + column) * channels
    if tokens <= BLOCK:
        more = added(table, head, query, query, region, region, WINDOW, MASKED, BIAS, BLOCK)
    for i in range(0, tl.minimum(images_each, images - first)):
        image = (first + i).to(tl.int64)
        base = qkv + image * sb + head * D
        q = rows(base, from_q, query, D, DP, WINDOW)
        if tokens <= BLOCK:
            k = rows(base + channels, from_q, query, D, DP, WINDOW)
            v = rows(base + 2 * channels, from_q, query, D, DP, WINDOW)
            s = dot(q, tl.trans(k)) * scale + more
            p = tl.exp2(s - tl.max(s, 1)[:, None])
            total = tl.sum(p, 1)
            y = dot(p.to(v.dtype), v)
        else:
            top = tl.full((BLOCK,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK,), tl.float32)
            y = tl.zeros((BLOCK, DP), tl.float32)
            for start in range(0, tokens, BLOCK):
                key = start + tl.arange(0, BLOCK)
                key_row, key_column, key_region = place(at, key, HEIGHT, WIDTH, WINDOW, SHIFT)
                from_k = key_row * sh + key_column * sw
                k = rows(base + channels, from_k, key, D, DP, WINDOW)
                v = rows(base + 2 * channels, from_k, key, D, DP, WINDOW)
                s = dot(q, tl.trans(k)) * scale
                s += added(table, head, query, key, region, key_region, WINDOW, MASKED, BIAS, BLOCK)
                new_top = tl.maximum(top, tl.max(s, 1))
                p = tl.exp2(s - new_top[:, None])
                old = tl.exp2(top - new_top)
                total = total * old + tl.sum(p, 1)
                y = y * old[:, None] + dot(p.to(v.dtype), v)
                top = new_top
            lse_here = lse + ((image * windows + at) * HEADS + head) * tokens
            tl.store(lse_here + query, top + tl.log2(total), mask=query < tokens)
        y *= (1 / total)[:, None]
        put_rows(out + image * HEIGHT * WIDTH * channels + head * D, to, query, y, D, DP, WINDOW)


@triton.jit
def attend_backward(
    grad, qkv, table, g_qkv, g_bias, sb, sh, sw, images, images_each,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """g_qkv [B, H, W, 3C] and g_bias [parts of B, windows, heads, w², w²] from grad [B, H, W, C]: windows of one block.

    g_bias has the sum of each program, to be summed over parts and windows. The rest is as in `attend`.
    """
    tokens: tl.constexpr = WINDOW * WINDOW
    windows: tl.constexpr = (HEIGHT // WINDOW) * (WIDTH // WINDOW)
    channels: tl.constexpr = HEADS * D
    scale: tl.constexpr = D**-0.5
    head, at = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS % windows
    first = tl.program_id(0) // (HEADS * windows) * images_each
    token = tl.arange(0, BLOCK)
    row, column, region = place(at, token, HEIGHT, WIDTH, WINDOW, SHIFT)
    from_qkv, to = row * sh + column * sw, (row * WIDTH + column) * channels
    more = added(table, head, token, token, region, region, WINDOW, MASKED, BIAS, BLOCK)
    sum_bias = tl.zeros((BLOCK, BLOCK), tl.float32)
    for i in range(0, tl.minimum(images_each, images - first)):
        image = (first + i).to(tl.int64)
        base = qkv + image * sb + head * D
        q = rows(base, from_qkv, token, D, DP, WINDOW)
        k = rows(base + channels, from_qkv, token, D, DP, WINDOW)
        v = rows(base + 2 * channels, from_qkv, token, D, DP, WINDOW)
        g = rows(grad + image * HEIGHT * WIDTH * channels + head * D, to, token, D, DP, WINDOW)
        s = dot(q, tl.trans(k)) * (LOG2E * scale) + more
        p = tl.exp2(s - tl.max(s, 1)[:, None])
        p *= (1 / tl.sum(p, 1))[:, None]
        g_base = g_qkv + image * HEIGHT * WIDTH * 3 * channels + head * D
        put_rows(g_base + 2 * channels, to * 3, token, dot(tl.trans(p.to(g.dtype)), g), D, DP, WINDOW)
        g_p = dot(g, tl.trans(v))
        g_s = p * (g_p - tl.sum(p * g_p, 1)[:, None])
        if BIAS:
            sum_bias += g_s
        g_s = g_s.to(q.dtype)
        put_rows(g_base, to * 3, token, dot(g_s, k) * scale, D, DP, WINDOW)
        put_rows(g_base + channels, to * 3, token, dot(tl.trans(g_s), q) * scale, D, DP, WINDOW)
    if BIAS:
        pair = token[:, None] * tokens + token[None, :]
        inside = (token < tokens)[:, None] & (token < tokens)[None, :]
        tl.store(g_bias + tl.program_id(0).to(tl.int64) * tokens * tokens + pair, sum_bias, mask=inside)


@triton.jit
def block_gradients(q, k, v, g, o, lse, more, D: tl.constexpr):
    """The softmax weights of a block of queries and keys, and the gradient of its scores."""
    p = tl.exp2(dot(q, tl.trans(k)) * (LOG2E * D**-0.5) + more - lse[:, None])
    return p, p * (dot(g, tl.trans(v)) - tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)[:, None])


@triton.jit
def attend_backward_blocks(
    grad, qkv, table, out, lse, g_qkv, g_bias, sb, sh, sw, images, images_each,
    HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    WINDOW: tl.constexpr, SHIFT: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `attend_backward`, for windows of several blocks: once by queries, once by keys. `attend` gave out and lse."""
    tokens: tl.constexpr = WINDOW * WINDOW
    windows: tl.constexpr = (HEIGHT // WINDOW) * (WIDTH // WINDOW)
    channels: tl.constexpr = HEADS * D
    scale: tl.constexpr = D**-0.5
    head, at = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS % windows
    first = tl.program_id(0) // (HEADS * windows) * images_each
    g_bias += tl.program_id(0).to(tl.int64) * tokens * tokens
    for i in range(0, tl.minimum(images_each, images - first)):
        image = (first + i).to(tl.int64)
        base = qkv + image * sb + head * D
        past = image * HEIGHT * WIDTH * channels
        g_base, grad_here, out_here = g_qkv + past * 3 + head * D, grad + past + head * D, out + past + head * D
        lse_here = lse + ((image * windows + at) * HEADS + head) * tokens
        for query_start in range(0, tokens, BLOCK):
            query = query_start + tl.arange(0, BLOCK)
            row, column, query_region = place(at, query, HEIGHT, WIDTH, WINDOW, SHIFT)
            query_to = (row * WIDTH + column) * channels
            q = rows(base, row * sh + column * sw, query, D, DP, WINDOW)
            g, o = rows(grad_here, query_to, query, D, DP, WINDOW), rows(out_here, query_to, query, D, DP, WINDOW)
            lse_q = tl.load(lse_here + query, mask=query < tokens, other=0.0)
            g_q = tl.zeros((BLOCK, DP), tl.float32)
            for key_start in range(0, tokens, BLOCK):
                key = key_start + tl.arange(0, BLOCK)
                row, column, key_region = place(at, key, HEIGHT, WIDTH, WINDOW, SHIFT)
                k = rows(base + channels, row * sh + column * sw, key, D, DP, WINDOW)
                v = rows(base + 2 * channels, row * sh + column * sw, key, D, DP, WINDOW)
                more = added(table, head, query, key, query_region, key_region, WINDOW, MASKED, BIAS, BLOCK)
                _, g_s = block_gradients(q, k, v, g, o, lse_q, more, D)
                g_q += dot(g_s.to(k.dtype), k)
                if BIAS:
                    pair = g_bias + query[:, None] * tokens + key[None, :]
                    inside = (query < tokens)[:, None] & (key < tokens)[None, :]
                    tl.store(pair, g_s + tl.load(pair, mask=inside & (i > 0), other=0.0), mask=inside)
            put_rows(g_base, query_to * 3, query, g_q * scale, D, DP, WINDOW)
        for key_start in range(0, tokens, BLOCK):
            key = key_start + tl.arange(0, BLOCK)
            row, column, key_region = place(at, key, HEIGHT, WIDTH, WINDOW, SHIFT)
            key_to = (row * WIDTH + column) * channels
            k = rows(base + channels, row * sh + column * sw, key, D, DP, WINDOW)
            v = rows(base + 2 * channels, row * sh + column * sw, key, D, DP, WINDOW)
            g_k, g_v = tl.zeros((BLOCK, DP), tl.float32), tl.zeros((BLOCK, DP), tl.float32)
            for query_start in range(0, tokens, BLOCK):
                query = query_start + tl.arange(0, BLOCK)
                row, column, query_region = place(at, query, HEIGHT, WIDTH, WINDOW, SHIFT)
                query_to = (row * WIDTH + column) * channels
                q = rows(base, row * sh + column * sw, query, D, DP, WINDOW)
                g, o = rows(grad_here, query_to, query, D, DP, WINDOW), rows(out_here, query_to, query, D, DP, WINDOW)
                lse_q = tl.load(lse_here + query, mask=query < tokens, other=0.0)
                more = added(table, head, query, key, query_region, key_region, WINDOW, MASKED, BIAS, BLOCK)
                p, g_s = block_gradients(q, k, v, g, o, lse_q, more, D)
                g_v += dot(tl.trans(p.to(g.dtype)), g)
                g_k += dot(tl.trans(g_s.to(q.dtype)), q)
            put_rows(g_base + channels, key_to * 3, key, g_k * scale, D, DP, WINDOW)
            put_rows(g_base + 2 * channels, key_to * 3, key, g_v, D, DP, WINDOW)
        tl.debug_barrier()  # the next image adds to g_bias
