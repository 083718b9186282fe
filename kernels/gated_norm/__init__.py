"""LayerNorm times SiLU of a gate: the step after the scan in SS2D (VMamba, arXiv 2401.10166; SPEC.md, section 1)."""

from torch import Tensor

from ..errors import InputError
from ..operator import Backend, Operator, Work
from ..triton_support import triton_reasons
from . import backend_torch, backend_triton, reference


def work(y: Tensor, *_: Tensor | float) -> Work:
    """The work of one call, from the arguments of a backend or of the custom operator: every element of y is normalised
    and has a SiLU."""
    return Work(exponentials=y.numel(), normalised=y.numel())


OPERATOR = Operator(
    "gated_norm",
    [
        Backend("triton", backend_triton.gated_norm, triton_reasons, auto_on=("cuda",)),
        Backend("torch", backend_torch.gated_norm),
        Backend("reference", reference.gated_norm),
    ],
    work,
    traced={"lamabench::gated_norm": work},
)


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, backend: str = "auto") -> Tensor:
    """LayerNorm of y over its last dimension, with `weight` and `bias`, times SiLU(z).

    y, z    [..., E], may be strided, such as half of the channels of [B, H, W, 2E]
    weight, bias  [E], as in `nn.LayerNorm`; may be float32 where y is bfloat16
    eps     added to the variance, above 0
    returns [..., E], in the type of y (backend `torch`: float32 under CUDA's autocast, whose LayerNorm is float32)

    Raises InputError where the shapes do not fit together or eps is not above 0.
    """
    if y.ndim == 0 or y.shape[-1] == 0 or y.shape != z.shape or not weight.shape == bias.shape == y.shape[-1:]:
        shapes = ", ".join(str(list(v.shape)) for v in (y, z, weight, bias))
        raise InputError(
            f"gated_norm: y and z must be [..., E], weight and bias [E], with E the same and above 0, not {shapes}"
        )
    if not eps > 0:
        raise InputError(f"gated_norm: eps must be above 0, not {eps}")
    return OPERATOR.resolve(backend, y.device.type).run(y, z, weight, bias, eps)
