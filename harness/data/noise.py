"""Noise of training drawn on a GPU (`train.noise=gpu`): one Triton kernel around Triton's own Philox4x32-10.

A number follows from the seed, the image's index and its place in the image alone: the key is the seed (64 bits), and
the counter is the number of four elements, the stream, and the index (64 bits). The rest is arithmetic whose rounding
IEEE 754 or CUDA's libdevice fixes, so that every GPU has the same numbers.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...kernels.triton_support import launched_on
from ..random import Stream

BLOCK = 256  # counters in a program, of four elements each
UNIT = tl.constexpr(2.0**-32)
TURN = tl.constexpr(2 * math.pi * 2.0**-32)


@triton.jit
def _pair(a, b):
    """Two normal numbers from two words (Box and Muller, 1958). The radius is from (0, 1], the angle from [-π, π]."""
    radius = tl.sqrt_rn(-2.0 * tl.log(a.to(tl.float32) * UNIT + 0.5 * UNIT))
    angle = b.to(tl.int32, bitcast=True).to(tl.float32) * TURN
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit(do_not_specialize=["seed", "stream"])
def kernel(out, indices, seed, stream, size, programs, BLOCK: tl.constexpr):
    """`size` elements of each image, by so many programs."""
    image = tl.program_id(0) // programs
    four = tl.program_id(0) % programs * BLOCK + tl.arange(0, BLOCK)
    index, zero = tl.load(indices + image), tl.zeros([BLOCK], tl.uint32)
    low, high = (index & 0xFFFFFFFF).to(tl.uint32), (index >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(seed, zero + four.to(tl.uint32), zero + stream.to(tl.uint32), zero + low, zero + high)
    first, second = _pair(a, b)
    third, fourth = _pair(c, d)
    place, start = 4 * four, out + image.to(tl.int64) * size
    tl.store(start + place, first, mask=place < size)
    tl.store(start + place + 1, second, mask=place + 1 < size)
    tl.store(start + place + 2, third, mask=place + 2 < size)
    tl.store(start + place + 3, fourth, mask=place + 3 < size)


def noise(seed: int, indices: Tensor, shape: Sequence[int]) -> Tensor:
    """The noise of images, float32 [B, *shape] on the GPU of `indices`, int64 [B]. `seed` has at most 64 bits."""
    out = torch.empty((len(indices), *shape), dtype=torch.float32, device=indices.device)
    size = math.prod(shape)
    programs = triton.cdiv(size, 4 * BLOCK)
    run: Any = kernel  # Any, because type checkers take a kernel for a function
    with launched_on(indices):
        run[(len(indices) * programs,)](
            out, indices, seed, int(Stream.TRAIN), size, programs, BLOCK=BLOCK, enable_fp_fusion=False
        )  # without the compiler's choice of what to fuse, which would change the last bit
    return out
