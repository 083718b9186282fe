"""Global attention as its equation says it. Nobody optimises this."""

import torch
from torch import Tensor


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`softmax(q kᵀ · d^-0.5) v` (Vaswani et al., 2017, equation 1), in float32, or float64 where q is.

    q [B, heads, Lq, d], k and v [B, heads, Lk, d] -> [B, heads, Lq, d] in q's type.
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    # Autocast would lower the products to bfloat16. It does not know the device "meta".
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
        scores = q.to(exact) @ k.to(exact).transpose(-1, -2) * q.shape[-1] ** -0.5
        return (scores.softmax(dim=-1) @ v.to(exact)).to(q.dtype)
