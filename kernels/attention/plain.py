"""Global attention in plain torch that rounds as the fused kernels do. Their errors are compared with its error."""

from typing import Any

import torch
from torch import Tensor


class PlainAttention(torch.autograd.Function):
    """Global attention as FlashAttention rounds it (Dao, 2023, arXiv 2307.08691, algorithms 1 and 2), in plain torch.

    The backward pass takes the row sums of the scores' gradients from the output, which is rounded to q's type. In
    bfloat16 the gradient of q is then 3 % off where keys have much in common, and every kernel of this kind must be
    allowed that. q, k, v and the output are [B, heads, tokens, d]. Scores exist for one head at a time. In float64 the
    result is exact.
    """

    @staticmethod
    def _probabilities(q: Tensor, k: Tensor) -> Tensor:
        scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
        return scores.softmax(-1)

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True)
        out = torch.stack([PlainAttention._probabilities(q, k).to(v.dtype) @ v for q, k, v in heads], dim=1)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        gradients = []
        for q, k, v, out, grad in zip(*(t.unbind(1) for t in (*ctx.saved_tensors, *grads)), strict=True):
            p = PlainAttention._probabilities(q, k)
            row_sums = (grad.to(p.dtype) * out).sum(-1, keepdim=True)
            by_scores = (p * ((grad @ v.mT) - row_sums) * q.shape[-1] ** -0.5).to(q.dtype)
            gradients.append((by_scores @ k, by_scores.mT @ q, p.to(q.dtype).mT @ grad))
        return tuple(torch.stack(parts, dim=1) for parts in zip(*gradients, strict=True))
