"""The Triton kernels of `backend_triton.py`.

A program walks down `span` tokens of one image, R at a time, with the vectors of the image in its registers. A row of
D channels is a tuple of tiles [R, BE], the last one padded: 320 channels are 5 · 64, where one tile would be 512. The
sums of a row are taken in float32: the mean first, then the squares around it.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportPossiblyUnboundVariable=false

import triton
import triton.language as tl


@triton.jit
def columns(channels: tl.constexpr, size: tl.constexpr):
    """The channels of every tile, each [1, size]."""
    out = ()
    for start in tl.static_range(0, channels, size):
        out += ((start + tl.arange(0, size))[None, :],)
    return out


@triton.jit
def filled(value: tl.constexpr, rows: tl.constexpr, size: tl.constexpr, count: tl.constexpr):
    """`count` tiles of one value."""
    out = ()
    for _ in tl.static_range(count):
        out += (tl.full((rows, size), value, tl.float32),)
    return out


@triton.jit
def read(x, e, channels: tl.constexpr, live):
    """The tiles of the rows at x [R, 1]; zero beyond their channels, and in rows that are not live [R, 1]."""
    out = ()
    for i in tl.static_range(len(e)):
        mask = live & (e[i] < channels) if (i + 1) * e[i].shape[1] > channels else live
        out += (tl.load(x + e[i], mask=mask, other=0.0).to(tl.float32),)
    return out


@triton.jit
def read_vector(x, e, channels: tl.constexpr, missing: tl.constexpr):
    """The tiles [1, BE] of a vector at x, or of `missing` if there is none."""
    if x is None:  # noqa: SIM108 — Triton compiles both sides of an expression
        out = filled(missing, 1, e[0].shape[1], len(e))
    else:
        out = read(x, e, channels, tl.full((1, 1), 1, tl.int1))
    return out


@triton.jit
def write(x, values, e, channels: tl.constexpr, live):
    for i in tl.static_range(len(e)):
        mask = live & (e[i] < channels) if (i + 1) * e[i].shape[1] > channels else live
        tl.store(x + e[i], values[i].to(x.dtype.element_ty), mask=mask)


@triton.jit
def mean(values, channels: tl.constexpr):
    """The mean of every row, [R, 1]."""
    total = values[0]
    for i in tl.static_range(1, len(values)):
        total += values[i]
    return tl.sum(total, 1, keep_dims=True) / channels


@triton.jit
def normalise(x, e, eps, channels: tl.constexpr):
    """Rows minus their mean, divided by their deviation (zero beyond the channels), and 1 / deviation [R, 1]."""
    middle = mean(x, channels)
    centred, squares, out = (), (), ()
    for i in tl.static_range(len(e)):
        value = x[i] - middle
        if (i + 1) * e[i].shape[1] > channels:
            value = tl.where(e[i] < channels, value, 0.0)
        centred += (value,)
        squares += (value * value,)
    rate = tl.rsqrt(mean(squares, channels) + eps)
    for i in tl.static_range(len(e)):
        out += (centred[i] * rate,)
    return out, rate


@triton.jit
def factors(scale, weight):
    """(1 + scale) · weight, by which the normalised channels are multiplied."""
    out = ()
    for i in tl.static_range(len(scale)):
        out += ((1.0 + scale[i]) * weight[i],)
    return out


@triton.jit
def forward(
    x, branch, gate, shift, scale, weight, bias, stream, y,
    x_image, x_row, branch_image, branch_row, gate_image, shift_image, scale_image, tokens, span, eps,
    D: tl.constexpr, BE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """stream = x + gate · branch if there is a branch, and y = LN(stream) · (1 + scale) + shift. Images and rows of the
    inputs lie …_image and …_row apart; the outputs are dense. The grid is [images, spans]."""
    image, start = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * span
    e = columns(D, BE)
    s = read_vector(scale + image * scale_image, e, D, 0.0)
    t = read_vector(shift + image * shift_image, e, D, 0.0)
    b = read_vector(bias, e, D, 0.0)
    factor, offset = factors(s, read_vector(weight, e, D, 1.0)), ()
    for i in tl.static_range(len(e)):
        offset += ((1.0 + s[i]) * b[i] + t[i],)
    r = tl.arange(0, R)[:, None]
    x += image * x_image + start * x_row
    y += (image * tokens + start) * D
    if branch is not None:
        g = read_vector(gate + image * gate_image, e, D, 0.0)
        branch += image * branch_image + start * branch_row
        stream += (image * tokens + start) * D
    count = tl.minimum(span, tokens - start)
    for first in range(0, count, R):
        row = (first + r).to(tl.int64)
        live = row < count
        values = read(x + row * x_row, e, D, live)
        if branch is not None:
            added, sums = read(branch + row * branch_row, e, D, live), ()
            for i in tl.static_range(len(e)):
                # As it is written, because the backward pass normalises what was written.
                sums += ((values[i] + g[i] * added[i]).to(stream.dtype.element_ty).to(tl.float32),)
            values = sums
            write(stream + row * D, values, e, D, live)
        normed, _ = normalise(values, e, eps, D)
        out = ()
        for i in tl.static_range(len(e)):
            out += (normed[i] * factor[i] + offset[i],)
        write(y + row * D, out, e, D, live)


@triton.jit
def backward(
    g_stream, g_y, stream, branch, gate, scale, weight, g_x, g_branch, partial,
    g_stream_image, g_stream_row, g_y_image, g_y_row, stream_image, stream_row, branch_image, branch_row,
    gate_image, scale_image, tokens, span, eps,
    D: tl.constexpr, BE: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The gradients g_x and, if there is a branch, g_branch, both dense; and `partial` [images, spans, 3 or 2, D], to
    be summed over the spans: the sums over tokens of g_y, of g_y times the normalised row and, if there is a branch, of
    g_x · branch. gate and g_stream, the gradient of the stream from elsewhere, are there if there is a branch."""
    image, start = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * span
    e = columns(D, BE)
    factor = factors(read_vector(scale + image * scale_image, e, D, 0.0), read_vector(weight, e, D, 1.0))
    r = tl.arange(0, R)[:, None]
    g_y += image * g_y_image + start * g_y_row
    stream += image * stream_image + start * stream_row
    g_x += (image * tokens + start) * D
    if branch is not None:
        g = read_vector(gate + image * gate_image, e, D, 0.0)
        g_stream += image * g_stream_image + start * g_stream_row
        branch += image * branch_image + start * branch_row
        g_branch += (image * tokens + start) * D
    g_shift = filled(0.0, R, BE, len(e))
    g_scale, g_gate = g_shift, g_shift
    count = tl.minimum(span, tokens - start)
    for first in range(0, count, R):
        row = (first + r).to(tl.int64)
        live = row < count
        values, g_out = read(stream + row * stream_row, e, D, live), read(g_y + row * g_y_row, e, D, live)
        if branch is not None:
            passed = read(g_stream + row * g_stream_row, e, D, live)
            added = read(branch + row * branch_row, e, D, live)
        normed, rate = normalise(values, e, eps, D)
        g_normed, products, new_shift, new_scale = (), (), (), ()
        for i in tl.static_range(len(e)):
            new_shift += (g_shift[i] + g_out[i],)
            new_scale += (g_scale[i] + g_out[i] * normed[i],)
            g_normed += (g_out[i] * factor[i],)
            products += (g_normed[i] * normed[i],)
        g_shift, g_scale = new_shift, new_scale
        middle, along = mean(g_normed, D), mean(products, D)
        out = ()
        for i in tl.static_range(len(e)):
            out += (rate * (g_normed[i] - middle - normed[i] * along),)
        if branch is not None:
            whole, of_branch, new_gate = (), (), ()
            for i in tl.static_range(len(e)):
                whole += (out[i] + passed[i],)
                of_branch += (whole[i] * g[i],)
                new_gate += (g_gate[i] + whole[i] * added[i],)
            out, g_gate = whole, new_gate
            write(g_branch + row * D, of_branch, e, D, live)
        write(g_x + row * D, out, e, D, live)
    partial += (image * tl.num_programs(1) + tl.program_id(1)) * ((2 if branch is None else 3) * D)
    one = tl.full((1, 1), 1, tl.int1)
    write(partial, added_up(g_shift), e, D, one)
    write(partial + D, added_up(g_scale), e, D, one)
    if branch is not None:
        write(partial + 2 * D, added_up(g_gate), e, D, one)


@triton.jit
def added_up(values):
    """The sums over the rows, each [1, BE]."""
    out = ()
    for i in tl.static_range(len(values)):
        out += (tl.sum(values[i], 0, keep_dims=True),)
    return out
