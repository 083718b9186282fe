"""Depthwise convolution and SiLU as a sum of shifted images, in float32 or float64."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def depthwise_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `lamabench.kernels.depthwise_conv.depthwise_conv_silu`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    height, width, k = x.shape[1], x.shape[2], weight.shape[-1]
    padded, weight = pad(x.to(dtype), (0, 0, k // 2, k // 2, k // 2, k // 2)), weight.to(dtype)
    y = x.new_zeros(x.shape, dtype=dtype) if bias is None else bias.to(dtype).expand(x.shape)
    for i in range(k):
        for j in range(k):
            y = y + padded[:, i : i + height, j : j + width] * weight[:, 0, i, j]
    return (y * torch.sigmoid(y)).to(x.dtype)
