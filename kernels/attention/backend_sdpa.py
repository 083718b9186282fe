"""Global attention by torch, which chooses among its fused kernels."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's fused attention, whose default scale is `d^-0.5`; shapes as in `attention`."""
    # The fused CUDA kernels need a dense last axis. Otherwise torch falls back to a kernel that stores every score.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v)
