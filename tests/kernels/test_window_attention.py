"""Shifted-window attention against a mask over all pairs of tokens, which cuts no windows, in float64."""

import pytest
import torch
from lamabench.kernels import window_attention as op
from lamabench.kernels.errors import InputError


def by_pairs(qkv, heads, window, shift, table):
    """Attention of every token to every other, without the pairs of different windows or regions."""
    batch, height, width, channels = qkv.shape
    dim = channels // (3 * heads)
    q, k, v = qkv.reshape(batch, height * width, 3, heads, dim).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) / dim**0.5
    token = torch.arange(height * width, device=qkv.device)
    row, column = token // width, token % width

    def cell(place, side):
        """Window of a token after the shift, its side of the seam, and its place in the window."""
        moved = (place - shift) % side
        return moved // window, place < shift, moved % window

    (wr, sr, ir), (wc, sc, ic) = cell(row, height), cell(column, width)
    same_window = (wr[:, None] == wr) & (wc[:, None] == wc)
    same_side = (sr[:, None] == sr) & (sc[:, None] == sc)
    if table is not None:
        index = (ir[:, None] - ir + window - 1) * (2 * window - 1) + ic[:, None] - ic + window - 1
        scores = scores + table[index.clamp(0, len(table) - 1)].permute(2, 0, 1)
    scores = (scores + torch.where(same_side, 0.0, -100.0)).masked_fill(~same_window, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, height, width, channels // 3)


def make(batch, height, width, heads, dim, window, bias, dtype):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, height, width, 3 * heads * dim, generator=generator, dtype=torch.float64)
    table = torch.randn((2 * window - 1) ** 2, heads, generator=generator, dtype=torch.float64) if bias else None
    return [v.to(dtype).requires_grad_() for v in (qkv, table) if v is not None]


SIZES = [
    # batch, height, width, heads, head width, window, shift, bias
    (1, 4, 4, 1, 3, 4, 0, True),
    (2, 8, 8, 2, 16, 4, 2, True),
    (1, 9, 6, 3, 5, 3, 1, True),
    (2, 8, 4, 2, 7, 2, 1, False),
    (1, 10, 10, 1, 80, 5, 2, True),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_output_and_gradients(size, backend, dtype, bound):
    batch, height, width, heads, dim, window, shift, bias = size
    inputs = make(batch, height, width, heads, dim, window, bias, dtype)
    index = op.relative_position_index(window) if bias else None
    mask = op.shift_mask(height, width, window, shift) if shift else None
    table = inputs[1] if bias else None
    out = op.window_attention(inputs[0], heads, window, shift, table, index, mask, backend)
    exact_inputs = [v.detach().double().requires_grad_() for v in inputs]
    exact = by_pairs(exact_inputs[0], heads, window, shift, exact_inputs[1] if bias else None)
    weights = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = [out, *torch.autograd.grad((out * weights.to(dtype)).sum(), inputs)]
    want = [exact, *torch.autograd.grad((exact * weights).sum(), exact_inputs)]
    for name, fast, slow in zip(("out", "qkv", "table"), got, want, strict=False):
        assert (fast.double() - slow).norm() <= bound * slow.norm(), name


def test_the_reference_is_exact_under_autocast():
    qkv, table = make(1, 8, 8, 2, 16, 4, True, torch.float32)
    arguments = (qkv, 2, 4, 2, table, op.relative_position_index(4), op.shift_mask(8, 8, 4, 2), "reference")
    with torch.autocast("cpu", torch.bfloat16):
        out = op.window_attention(*arguments)
    assert torch.equal(out, op.window_attention(*arguments))


def test_relative_index_by_hand():
    assert op.relative_position_index(2).tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


def test_macs_by_hand():
    # 16 tokens of width 6, each with 4 keys: 16 · 4 · 6 for the scores and as much for the values.
    assert op.macs(1, 4, 4, 6, 2) == 2 * 16 * 4 * 6


def test_unknown_backend_lists_the_choices():
    with pytest.raises(
        InputError, match="unknown window_attention backend 'flash'; choices: auto, triton, sdpa, reference"
    ):
        op.window_attention(torch.zeros(1, 2, 2, 6), 1, 2, backend="flash")
