"""Global attention: every query sees every key, no mask, no bias."""

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..operator import Backend, Operator
from . import backend_flash
from .reference import reference


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's fused attention, whose default scale is `d^-0.5`; shapes as in `attention`."""
    # Its fused CUDA kernels need a dense last axis; without it torch falls back to the one that stores every score.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v)


OPERATOR = Operator(
    "attention",
    [
        Backend("sdpa", sdpa),
        # Never `auto`: what a record says must not depend on which packages happen to be installed.
        Backend("flash2", backend_flash.flash2, backend_flash.reasons("flash2"), auto_on=()),
        Backend("flash3", backend_flash.flash3, backend_flash.reasons("flash3"), auto_on=()),
        Backend("flash4", backend_flash.flash4, backend_flash.reasons("flash4"), auto_on=()),
        Backend("reference", reference),
    ],
)


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """`softmax(q kᵀ · d^-0.5) v` (Vaswani et al., 2017, equation 1).

    q [B, heads, Lq, d], k and v [B, heads, Lk, d] -> [B, heads, Lq, d]. Raises InputError for an unknown backend.
    """
    return OPERATOR.resolve(backend, q.device.type).run(q, k, v)


def macs(batch: int, heads: int, queries: int, keys: int, head_dim: int) -> int:
    """Multiply-adds of the two matrix products; the softmax has none."""
    return 2 * batch * heads * queries * keys * head_dim


def traced_cost(q: Tensor, k: Tensor, *_: object) -> tuple[int, int]:
    """MACs, and operations of a scan (none), of one call of the custom operator, from its arguments."""
    batch, queries, heads, width = q.shape
    return macs(batch, heads, queries, k.shape[1], width), 0


# What a traced count needs to know about the operators registered here.
TRACED = {"lamabench::flash4": traced_cost}
