"""The Triton kernels of `backend_triton.py`.

A program holds one whole row at a time in its registers, and its next row lies as many rows further as there are
programs. A row is a tuple of tiles of BE channels, the last one padded: 2560 channels are 5 · 512, where one tile would
be 4096. The sums of a row are taken in float32: the mean first, then the squares around it.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false

import triton
import triton.language as tl

from .. import triton_support

LOG2E = tl.constexpr(triton_support.LOG2E)


@triton.jit
def columns(channels: tl.constexpr, size: tl.constexpr):
    """The channels of every tile."""
    out = ()
    for start in tl.static_range(0, channels, size):
        out += (start + tl.arange(0, size),)
    return out


@triton.jit
def read(x, e, channels: tl.constexpr):
    """The row at x, zero beyond its channels."""
    out = ()
    for i in tl.static_range(len(e)):
        out += (tl.load(x + e[i], mask=e[i] < channels, other=0.0).to(tl.float32),)
    return out


@triton.jit
def write(x, values, e, channels: tl.constexpr):
    for i in tl.static_range(len(e)):
        tl.store(x + e[i], values[i].to(x.dtype.element_ty), mask=e[i] < channels)


@triton.jit
def mean(values, channels: tl.constexpr):
    total = values[0]
    for i in tl.static_range(1, len(values)):
        total += values[i]
    return tl.sum(total, 0) / channels


@triton.jit
def normalise(y, e, eps, channels: tl.constexpr):
    """The row y minus its mean, divided by its deviation (zero beyond the channels), and 1 / deviation."""
    middle = mean(y, channels)
    centred, squares, out = (), (), ()
    for i in tl.static_range(len(e)):
        value = y[i] - middle
        if (i + 1) * e[i].shape[0] > channels:
            value = tl.where(e[i] < channels, value, 0.0)
        centred += (value,)
        squares += (value * value,)
    rate = tl.rsqrt(mean(squares, channels) + eps)
    for i in tl.static_range(len(e)):
        out += (centred[i] * rate,)
    return out, rate


@triton.jit
def forward(
    y, z, weight, bias, out, y_stride, z_stride, rows, eps,
    E: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """LayerNorm(y) · SiLU(z). Rows of y and z lie y_stride and z_stride apart, rows of the output E apart."""
    e = columns(E, BE)
    w, b = read(weight, e, E), read(bias, e, E)
    for r in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(r, tl.int64)
        y_row, gate = read(y + row * y_stride, e, E), read(z + row * z_stride, e, E)
        normed, _ = normalise(y_row, e, eps, E)
        values = ()
        for i in tl.static_range(len(e)):
            values += ((normed[i] * w[i] + b[i]) * (gate[i] / (1.0 + tl.exp2(gate[i] * -LOG2E))),)
        write(out + row * E, values, e, E)


@triton.jit
def backward(
    grad, y, z, weight, bias, g_y, g_z, partial, grad_stride, y_stride, z_stride, rows, eps,
    E: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """The gradients: g_y and g_z, with rows E apart, and `partial` [programs, 2, E] for weight and bias, to be summed
    over the first dimension."""
    e = columns(E, BE)
    w, b = read(weight, e, E), read(bias, e, E)
    g_w = ()
    for _ in tl.static_range(len(e)):
        g_w += (tl.zeros((BE,), tl.float32),)
    g_b = g_w
    for r in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(r, tl.int64)
        g_row = read(grad + row * grad_stride, e, E)
        y_row, gate = read(y + row * y_stride, e, E), read(z + row * z_stride, e, E)
        normed, rate = normalise(y_row, e, eps, E)
        g_gate, g_normed, products, new_w, new_b = (), (), (), (), ()
        for i in tl.static_range(len(e)):
            s = 1.0 / (1.0 + tl.exp2(gate[i] * -LOG2E))
            slope = s * (1.0 + gate[i] * (1.0 - s))
            g_gate += (g_row[i] * (normed[i] * w[i] + b[i]) * slope,)
            g_affine = g_row[i] * (gate[i] * s)
            new_w += (g_w[i] + g_affine * normed[i],)
            new_b += (g_b[i] + g_affine,)
            g_normed += (g_affine * w[i],)
            products += (g_affine * w[i] * normed[i],)
        g_w, g_b = new_w, new_b
        write(g_z + row * E, g_gate, e, E)
        shift, along = mean(g_normed, E), mean(products, E)
        values = ()
        for i in tl.static_range(len(e)):
            values += (rate * (g_normed[i] - shift - normed[i] * along),)
        write(g_y + row * E, values, e, E)
    partial += tl.program_id(0) * 2 * E
    write(partial, g_w, e, E)
    write(partial + E, g_b, e, E)
