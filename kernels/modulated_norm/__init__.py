"""A gated residual, LayerNorm, shift and scale: what stands between the mixers of a block whose condition acts by
adaLN-Zero (DiT, arXiv 2212.09748, figure 3; LaMamba-Diff, SPEC.md, section 1)."""

from torch import Tensor

from ..errors import InputError
from ..operator import Backend, Operator, Work
from ..triton_support import triton_reasons
from . import backend_torch, backend_triton, reference
from .reference import types


def work(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    *_: object,
) -> Work:
    """The work of one call, from the arguments of a backend or of the custom operator: every element is normalised."""
    return Work(plain_normalised=x.numel()) if weight is None else Work(normalised=x.numel())


OPERATOR = Operator(
    "modulated_norm",
    [
        Backend("triton", backend_triton.modulated_norm, triton_reasons, auto_on=("cuda",)),
        Backend("torch", backend_torch.modulated_norm),
        Backend("reference", reference.modulated_norm),
    ],
    work,
    traced={"lamabench::modulated_norm": work},
    outputs=types,
    since="torch",
)


def modulated_norm(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The stream x' = x + gate · branch, or x if there is no branch, and y = LN(x') · (1 + scale) + shift.

    x, branch  [B, ..., D], may be strided
    gate, shift, scale  [B, D], may be strided, such as parts of a projection [B, 9D]
    weight, bias  [D], as in `nn.LayerNorm`, or None
    eps     added to the variance, above 0
    returns x' [B, ..., D], in the widest type of x, branch and gate, and y [B, ..., D], in the type of shift (backend
            `torch`: in the widest type of both, which is float32 under CUDA's autocast)

    Raises InputError where the shapes do not fit together, one of two that belong together is missing, or eps is not
    above 0.
    """
    vectors = [v for v in (gate, shift, scale) if v is not None]
    affine = [v for v in (weight, bias) if v is not None]
    fits = (
        x.ndim >= 2
        and x.shape[-1] > 0
        and all(v.shape == (x.shape[0], x.shape[-1]) for v in vectors)
        and all(v.shape == x.shape[-1:] for v in affine)
        and (branch is None or branch.shape == x.shape)
    )
    if not fits:
        given = [v for v in (x, branch, gate, shift, scale, weight, bias) if v is not None]
        raise InputError(
            "modulated_norm: x and branch must be [B, ..., D], gate, shift and scale [B, D], weight and bias [D], "
            f"with D above 0, not {', '.join(str(list(v.shape)) for v in given)}"
        )
    if (branch is None) != (gate is None) or len(affine) == 1:
        raise InputError("modulated_norm: branch and gate, and weight and bias, are both given or both None")
    if not eps > 0:
        raise InputError(f"modulated_norm: eps must be above 0, not {eps}")
    run = OPERATOR.resolve(backend, x.device.type).run
    out = run(x, branch, gate, shift, scale, weight, bias, eps)
    return (x, out) if branch is None else out
