"""The SSD scan as its equations say it, one step after the other, in float32 or float64."""

import torch
from torch import Tensor
from torch.nn.functional import softplus


def ssd(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    skip: Tensor,
    order: Tensor,
    inverse: Tensor,
) -> Tensor:
    """See `lamabench.kernels.ssd.ssd`. `inverse` is not read."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    u, dt, b, c, dt_bias, a, skip = (v.to(dtype) for v in (x, dt, b, c, dt_bias, a, skip))
    u = u.unflatten(-1, (a.shape[1], -1))  # [B, L, H, P]
    out = torch.zeros_like(u)
    for k, path in enumerate(order):
        delta = softplus(dt[:, :, k] + dt_bias[k])  # [B, L, H]
        h = u.new_zeros(*u[:, 0].shape, b.shape[-1])  # [B, H, P, N]
        steps = []
        for token in path.tolist():
            decay = torch.exp(delta[:, token] * a[k])[..., None, None]
            entering = (delta[:, token, :, None] * u[:, token])[..., None] * b[:, token, k, None, None, :]
            h = decay * h + entering
            steps.append((h * c[:, token, k, None, None, :]).sum(-1) + skip[k, :, None] * u[:, token])
        out = out.index_add(1, path, torch.stack(steps, dim=1))
    return out.flatten(2).to(x.dtype)
