"""The Triton kernels of `backend_triton.py`.

A thread owns a channel or two and T neighbouring columns. It walks down the rows of an image with a window of pixels in
its registers. A row of the window is a tuple of tiles [G, BE], one for each column. The columns are constants when the
kernel is compiled, so that a neighbour is another register. The G groups of T columns of a program share their reads
through the cache.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl

from .. import triton_support

LOG2E = tl.constexpr(triton_support.LOG2E)


@triton.jit
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp2(z * -LOG2E))


@triton.jit
def repeat(value, count: tl.constexpr):
    out = ()
    for _ in tl.static_range(count):
        out += (value,)
    return out


@triton.jit
def take(values, start: tl.constexpr, count: tl.constexpr, step: tl.constexpr):
    """`count` of the values, from `start` on, at distance `step`."""
    out = ()
    for i in tl.static_range(count):
        out += (values[start + i * step],)
    return out


@triton.jit
def read_taps(weight, e, here, k: tl.constexpr):
    """The k² weights of the channels, each [1, BE], row by row."""
    out = ()
    for i in tl.static_range(k * k):
        out += (tl.load(weight + e * (k * k) + i, mask=here, other=0.0).to(tl.float32)[None, :],)
    return out


@triton.jit
def read_row(line, column, end, here, stride: tl.constexpr, count: tl.constexpr):
    """`count` pixels of a row from `column` [G] on, where `line` points; zero outside of columns 0 … end - 1."""
    out = ()
    for j in tl.static_range(count):
        mask = ((column + j >= 0) & (column + j < end))[:, None] & here[None, :]
        out += (tl.load(line + j * stride, mask=mask, other=0.0).to(tl.float32),)
    return out


@triton.jit
def add_row(pending, row, w, fresh, k: tl.constexpr, t: tl.constexpr):
    """The k rows of t sums that a row of t + k - 1 pixels belongs to, with that row added. The first one is complete.

    `pending` has the k - 1 rows of sums that earlier pixels belong to. A sum starts as `fresh`.
    """
    out = ()
    for i in tl.static_range(k):
        for c in tl.static_range(t):
            value = pending[i * t + c] if i < k - 1 else fresh
            for j in tl.static_range(k):
                value += w[(k - 1 - i) * k + j] * row[c + j]
            out += (value,)
    return out


@triton.jit
def forward(
    x, weight, bias, out, xb, xh, height, width, rows,
    E: tl.constexpr, XW: tl.constexpr, K: tl.constexpr, T: tl.constexpr, G: tl.constexpr, BE: tl.constexpr,
    SPANS: tl.constexpr,
):  # fmt: skip
    """SiLU of the convolution for `rows` rows of T · G columns of an image. x has strides xb, xh, XW and 1."""
    e, image = tl.program_id(0) * BE + tl.arange(0, BE), tl.program_id(2).to(tl.int64)
    start, span = tl.program_id(1) // SPANS * rows, tl.program_id(1) % SPANS
    column = (span * G + tl.arange(0, G)) * T
    here = e < E
    w = read_taps(weight, e, here, K)
    fresh = tl.zeros((G, BE), tl.float32)
    if bias is not None:
        fresh += tl.load(bias + e, mask=here, other=0.0).to(tl.float32)[None, :]
    pending = repeat(fresh, (K - 1) * T)
    x += image * xb + ((column - K // 2) * XW)[:, None] + e[None, :]
    out += image * height * width * E + (column * E)[:, None] + e[None, :]
    for r in range(tl.maximum(start - K // 2, 0), tl.minimum(start + rows, height) + K // 2):
        row = read_row(x + r * xh, column - K // 2, tl.where(r < height, width, 0), here, XW, T + K - 1)
        sums = add_row(pending, row, w, fresh, K, T)
        done = r - K // 2
        end = tl.where(done >= start, width, 0)
        for c in tl.static_range(T):
            value = (sums[c] * sigmoid(sums[c])).to(out.dtype.element_ty)
            mask = (column + c < end)[:, None] & here[None, :]
            tl.store(out + done * width * E + c * E, value, mask=mask)
        pending = take(sums, T, (K - 1) * T, 1)


@triton.jit
def backward(
    grad, x, weight, bias, g_x, g_weight, xb, xh, height, width,
    E: tl.constexpr, XW: tl.constexpr, K: tl.constexpr, T: tl.constexpr, G: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """The gradients for T · G columns: g_x [B, H, W, E], and g_weight [B · column programs, K² + 1, E], to be summed
    over the first dimension. The last of the K² + 1 is the bias's.

    Row r of x completes the convolution at row r - K // 2, which completes the gradient of x at row r - (K - 1). The
    convolution is also needed in the K // 2 columns on either side of the program's own.
    """
    e, image = tl.program_id(0) * BE + tl.arange(0, BE), tl.program_id(2).to(tl.int64)
    column = (tl.program_id(1) * G + tl.arange(0, G)) * T
    here = e < E
    w = read_taps(weight, e, here, K)
    flipped = take(w, K * K - 1, K * K, -1)
    none = tl.zeros((G, BE), tl.float32)
    fresh = none
    if bias is not None:
        fresh += tl.load(bias + e, mask=here, other=0.0).to(tl.float32)[None, :]
    wide: tl.constexpr = T + K - 1
    before = repeat(none, (K - 1) * wide)
    pending, g_pending = repeat(fresh, (K - 1) * wide), repeat(none, (K - 1) * T)
    g_bias, g_w = none, repeat(none, K * K)
    grad += image * height * width * E + ((column - K // 2) * E)[:, None] + e[None, :]
    x += image * xb + ((column - (K - 1)) * XW)[:, None] + e[None, :]
    g_x += image * height * width * E + (column * E)[:, None] + e[None, :]
    for r in range(0, height + K - 1):
        row = read_row(x + r * xh, column - (K - 1), tl.where(r < height, width, 0), here, XW, wide + K - 1)
        middle, done = r - K // 2, r - (K - 1)
        end = tl.where((middle >= 0) & (middle < height), width, 0)
        g_row = read_row(grad + middle * width * E, column - K // 2, end, here, E, wide)
        sums = add_row(pending, row, w, fresh, K, wide)
        g_pre = ()
        for c in tl.static_range(wide):
            s = sigmoid(sums[c])
            g_pre += (g_row[c] * (s * (1.0 + sums[c] * (1.0 - s))),)
        g_sums = add_row(g_pending, g_pre, flipped, none, K, T)
        end = tl.where(done >= 0, width, 0)
        for c in tl.static_range(T):
            mask = (column + c < end)[:, None] & here[None, :]
            tl.store(g_x + done * width * E + c * E, g_sums[c].to(g_x.dtype.element_ty), mask=mask)
        for c in tl.static_range(T):
            g_bias += g_pre[K // 2 + c]
        window, g_new = before + take(row, K // 2, wide, 1), ()
        for i in tl.static_range(K * K):
            value = g_w[i]
            for c in tl.static_range(T):
                value += g_pre[K // 2 + c] * window[i // K * wide + i % K + c]
            g_new += (value,)
        g_w = g_new
        before = take(window, wide, (K - 1) * wide, 1)
        pending, g_pending = take(sums, wide, (K - 1) * wide, 1), take(g_sums, T, (K - 1) * T, 1)
    g_weight += (image * tl.num_programs(1) + tl.program_id(1)) * (K * K + 1) * E + e
    for i in tl.static_range(K * K):
        tl.store(g_weight + i * E, tl.sum(g_w[i], 0), mask=here)
    tl.store(g_weight + K * K * E, tl.sum(g_bias, 0), mask=here)
