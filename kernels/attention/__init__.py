"""Global attention: every query sees every key, without a mask or a bias."""

from torch import Tensor

from ..operator import Backend, Operator, Work
from . import backend_flash
from .backend_sdpa import sdpa
from .plain import PlainAttention
from .reference import reference


def macs(batch: int, heads: int, queries: int, keys: int, head_dim: int) -> int:
    """Multiply-adds of the two matrix products; the softmax has none."""
    return 2 * batch * heads * queries * keys * head_dim


def work(q: Tensor, k: Tensor, *_: Tensor) -> Work:
    """The work of one call, from the arguments of a backend: both products, and an exponential for each score."""
    batch, heads, queries, head_dim = q.shape
    scores = batch * heads * queries * k.shape[2]
    return Work(macs=macs(batch, heads, queries, k.shape[2], head_dim), exponentials=scores)


def _traced(q: Tensor, k: Tensor, *_: Tensor | float) -> Work:
    """The work of one call of the custom operator, whose tokens come before its heads."""
    return work(q.transpose(1, 2), k.transpose(1, 2))


OPERATOR = Operator(
    "attention",
    [
        Backend("sdpa", sdpa),
        # `auto` takes none of these, so that records do not depend on which packages happen to be installed.
        Backend("flash2", backend_flash.flash2, backend_flash.reasons("flash2"), auto_on=()),
        Backend("flash3", backend_flash.flash3, backend_flash.reasons("flash3"), auto_on=()),
        Backend("flash4", backend_flash.flash4, backend_flash.reasons("flash4"), auto_on=()),
        Backend("reference", reference),
    ],
    work,
    traced={"lamabench::flash4": _traced},
    exact="sdpa",  # the reference stores every score
    rival=PlainAttention.apply,
)


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """`softmax(q kᵀ · d^-0.5) v` (Vaswani et al., 2017, equation 1).

    q [B, heads, Lq, d], k and v [B, heads, Lk, d] -> [B, heads, Lq, d]. Raises InputError for an unknown backend.
    """
    return OPERATOR.resolve(backend, q.device.type).run(q, k, v)
