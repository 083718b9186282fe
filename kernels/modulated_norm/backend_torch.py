"""The gated residual, the norm and the modulation by torch, and the first and the last of them alone."""

from torch import Tensor
from torch.nn.functional import layer_norm


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`x · (1 + scale) + shift`; x [B, …, C], shift and scale [B, C] (DiT, adaLN)."""
    lead = (shift.shape[0],) + (1,) * (x.ndim - 2) + (shift.shape[-1],)
    return x * (1 + scale.view(lead)) + shift.view(lead)


def gate(x: Tensor, g: Tensor) -> Tensor:
    """`g · x`; x [B, …, C], g [B, C] (adaLN-Zero)."""
    return x * g.view((g.shape[0],) + (1,) * (x.ndim - 2) + (g.shape[-1],))


def modulated_norm(
    x: Tensor,
    branch: Tensor | None,
    g: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `lamabench.kernels.modulated_norm.modulated_norm`: y alone without a branch, else x' and y."""
    if branch is not None and g is not None:
        x = x + gate(branch, g)
    y = modulate(layer_norm(x, x.shape[-1:], weight, bias, eps), shift, scale)
    return y if branch is None else (x, y)
