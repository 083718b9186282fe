"""The selective scan as its equations say it, one step after the other, in float32 or float64."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus


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
    """See `lamabench.kernels.selective_scan.selective_scan`. `inverse` and `pairs` are not read."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    u, dt, b, c, dt_weight, dt_bias, a, skip = (v.to(dtype) for v in (x, dt, b, c, dt_weight, dt_bias, a, skip))
    out = torch.zeros_like(u)
    for k, path in enumerate(order):
        # Autocast would lower the product to bfloat16. It does not know the device "meta".
        with torch.autocast("cpu" if u.is_meta else u.device.type, enabled=False):
            delta = softplus(dt[:, :, k] @ dt_weight[k].T + dt_bias[k])  # [B, L, E], in image order
        h = u.new_zeros(*u[:, 0].shape, a.shape[-1])  # [B, E, N]
        steps = []
        for token in path.tolist():
            decay = torch.exp(delta[:, token, :, None] * a[k])
            h = decay * h + (delta[:, token] * u[:, token])[..., None] * b[:, token, k, None, :]
            steps.append((h * c[:, token, k, None, :]).sum(-1) + skip[k] * u[:, token])
        out = out.index_add(1, path, torch.stack(steps, dim=1))
    return out.to(x.dtype)
