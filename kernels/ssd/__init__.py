"""Mamba-2's scan (SSD, arXiv 2405.21060): one decay a head, so that chunks of a path are matrix products."""

import torch
from torch import Tensor

from ..cross_scan import ScanPaths
from ..errors import InputError
from ..operator import Backend, Operator, Work
from . import backend_mamba_ssm, backend_torch, reference
from .backend_torch import CHUNK


def macs(batch: int, length: int, paths: int, heads: int, width: int, states: int) -> int:
    """Multiply-adds of the products over chunks of Q = min(CHUNK, length) tokens, for T tokens in whole chunks:
    scores T·Q·N, which the heads share, their sums T·Q·E, and states in and out, 2·(T - Q)·N·E."""
    chunk = min(CHUNK, length)
    tokens, channels = -(-length // chunk) * chunk, heads * width
    return batch * paths * (tokens * chunk * (states + channels) + 2 * (tokens - chunk) * states * channels)


def work(x: Tensor, dt: Tensor, b: Tensor, *_: Tensor) -> Work:
    """The work of one call, from the arguments of a backend. Each step size has a softplus and a decay. (The products
    over chunks take more exponentials: the decays between any two tokens of a chunk.)"""
    batch, length, channels = x.shape
    paths, heads, states = *dt.shape[2:], b.shape[3]
    return Work(
        macs=macs(batch, length, paths, heads, channels // heads, states),
        exponentials=2 * dt.numel(),
    )


OPERATOR = Operator(
    "ssd",
    [
        Backend("torch", backend_torch.ssd),
        Backend("mamba_ssm", backend_mamba_ssm.ssd, backend_mamba_ssm.reasons, auto_on=()),
        Backend("reference", reference.ssd),
    ],
    work,
    exact="torch",  # the reference loops over tokens
)


def ssd(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    skip: Tensor,
    paths: ScanPaths,
    backend: str = "auto",
) -> Tensor:
    """Scan K paths through every image with H heads of width P = E / H, and add up their outputs.

    x        [B, L, E]     tokens in image order
    dt       [B, L, K, H]  step sizes before bias and softplus; b and c [B, L, K, N] input and output projections, which
             the heads share; all in image order
    dt_bias  [K, H]
    a        [K, H]        negative; skip [K, H]
    paths    `scan_paths(…)`, on the device of x
    returns  [B, L, E], in the type of x

    Along path k, in each head: delta = softplus(dt + bias_k), h_l = exp(delta_l a) h_{l-1} + delta_l b_l x_lᵀ [N, P],
    y_l = c_lᵀ h_l + skip x_l. Step sizes, decays and states are float32, or float64 where x is.
    Raises InputError for float16 and where H does not divide E.
    """
    if torch.float16 in (x.dtype, dt.dtype, b.dtype, c.dtype):
        raise InputError(
            "ssd: float16 is not supported: sums along a path pass its largest number (65504); use bfloat16 or float32"
        )
    if x.shape[-1] % dt.shape[-1]:
        raise InputError(f"ssd: {dt.shape[-1]} heads do not divide {x.shape[-1]} channels")
    return OPERATOR.resolve(backend, x.device.type).run(x, dt, b, c, dt_bias, a, skip, paths.order, paths.inverse)
