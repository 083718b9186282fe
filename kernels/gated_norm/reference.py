"""The gated norm step by step as it is defined, in float32 or float64."""

import torch
from torch import Tensor


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See `lamabench.kernels.gated_norm.gated_norm`."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    centred = y.to(dtype) - y.to(dtype).mean(-1, keepdim=True)
    deviation = torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    normed = centred / deviation * weight.to(dtype) + bias.to(dtype)
    return (normed * z.to(dtype) * torch.sigmoid(z.to(dtype))).to(y.dtype)
