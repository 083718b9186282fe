"""The compiled scan of the package mamba-ssm as a backend, called as released codes call it: the rival to beat.

Its extension takes tokens along each path, [B, K·E, L], and complete step sizes before the softplus. So x, the step
sizes and the paths' outputs all go through memory: gather, scan, scatter, sum. It computes in float32, but its inputs
and outputs have one type, that of x. In bfloat16, the step sizes and every path's output are rounded to it.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

STEPS = 2048  # the extension stores two states at the end of each run of so many steps
# Looked up once, at import, because torch.compile traces through `reasons`.
PACKAGE, INSTALLED = (importlib.util.find_spec(name) is not None for name in ("mamba_ssm", "selective_scan_cuda"))
# The main branch of mamba-ssm is built without its extension unless the first variable is set. The second one and the
# flags build the package again if it is there.
CURE = (
    "MAMBA_KEEP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation --force-reinstall --no-deps "
    "--no-cache-dir mamba-ssm"
)


def reasons(device_type: str) -> list[str]:
    """Every reason why the extension cannot run on a kind of device here; empty where it can."""
    refusals = []
    if not INSTALLED:
        state = "was built without its CUDA extension" if PACKAGE else "is not installed"
        refusals.append(f"mamba-ssm {state} (there is no module selective_scan_cuda); this builds it: {CURE}")
    if device_type != "cuda":
        refusals.append(f"it runs on CUDA GPUs only, not on {device_type!r}")
    return refusals


def extension() -> Any:
    """The compiled module."""
    import selective_scan_cuda  # pyright: ignore[reportMissingImports]

    return selective_scan_cuda


@torch.library.custom_op("lamabench::selective_scan_mamba_ssm", mutates_args=())
def scan_forward(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """u and delta [B, K·E, L], a [K·E, N], b and c [B, K, N, L], skip and bias [K·E] -> the output, in the shape of u,
    and the states that the backward pass needs."""
    out, states, *_ = extension().fwd(u, delta, a, b, c, skip, None, bias, True)
    return out, states


@torch.library.custom_op("lamabench::selective_scan_mamba_ssm_backward", mutates_args=())
def scan_backward(
    grad: Tensor,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u, delta, a, b, c, skip and bias."""
    grads = extension().bwd(u, delta, a, b, c, skip, None, bias, grad, states, None, None, True, False)
    return tuple(grads[:7])  # type: ignore[return-value]


@scan_forward.register_fake
def _(u, delta, a, b, c, skip, bias):
    batch, channels, length = u.shape
    return torch.empty_like(delta), a.new_empty(batch, channels, -(-length // STEPS), 2 * a.shape[1])


@scan_backward.register_fake
def _(grad, states, u, delta, a, b, c, skip, bias):
    return tuple(torch.empty_like(v) for v in (u, delta, a, b, c, skip, bias))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1], *inputs)


def _backward(ctx, grad, _):
    return scan_backward(grad.contiguous(), *ctx.saved_tensors)


scan_forward.register_autograd(_backward, setup_context=_setup_context)


def selective_scan(
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
    pairs: Sequence[int] = (),
) -> Tensor:
    """See `lamabench.kernels.selective_scan.selective_scan`. `pairs` is not read.

    Raises InputError for float64 and for more than 256 states, which the extension does not take.
    """
    if torch.float64 in [v.dtype for v in (x, dt, b, c, dt_weight, dt_bias, a, skip)]:
        raise InputError(
            "selective_scan: backend 'mamba_ssm' computes in float32, not in float64; use 'torch' or 'reference'"
        )
    batch, length, channels = x.shape
    directions, _, states = a.shape
    if states > 256:
        raise InputError(f"selective_scan: backend 'mamba_ssm' takes at most 256 states, not {states}")
    y, _ = scan_forward(*prepare(x, dt, b, c, dt_weight, dt_bias, a, skip, order))
    y = along(y.view(batch, directions, channels, length), inverse).sum(1)
    return y.transpose(1, 2).contiguous()


def prepare(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    skip: Tensor,
    order: Tensor,
) -> tuple[Tensor, ...]:
    """The arguments of `scan_forward`: tokens gathered along the paths, and complete step sizes."""
    u = x.transpose(1, 2)[:, None].expand(-1, order.shape[0], -1, -1)  # [B, K, E, L]
    u, dt, b, c = (along(v, order) for v in (u, *(v.to(x.dtype).permute(0, 2, 3, 1) for v in (dt, b, c))))
    with torch.autocast(x.device.type, enabled=False):
        delta = dt_weight.to(x.dtype) @ dt  # [K, E, r] @ [B, K, r, L]
    rates = a.float().flatten(0, 1).contiguous()
    return u.flatten(1, 2), delta.flatten(1, 2), rates, b, c, skip.float().flatten(), dt_bias.float().flatten()


def along(v: Tensor, index: Tensor) -> Tensor:
    """A dense copy of v [B, K, …, L] in the order of `index` [K, L]."""
    return v.gather(3, index[None, :, None].expand_as(v))
