"""The gated residual, the norm and the modulation step by step as they are defined, in float32 or float64."""

import torch
from torch import Tensor


def types(x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, *_: object) -> dict[str, torch.dtype]:
    """The outputs of a backend, with their types: y, after x' if there is a branch."""
    if branch is None or gate is None:
        return {"y": shift.dtype}
    return {"x'": torch.promote_types(x.dtype, torch.promote_types(branch.dtype, gate.dtype)), "y": shift.dtype}


def modulated_norm(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor | tuple[Tensor, Tensor]:
    """See `lamabench.kernels.modulated_norm.modulated_norm`: y alone without a branch, else x' and y."""
    dtype = torch.promote_types(x.dtype, torch.float32)

    def of_images(v: Tensor) -> Tensor:
        return v.to(dtype).view(v.shape[0], *(1 for _ in x.shape[1:-1]), v.shape[-1])

    stream = x.to(dtype)
    if branch is not None and gate is not None:
        stream = stream + of_images(gate) * branch.to(dtype)
    centred = stream - stream.mean(-1, keepdim=True)
    normed = centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps)
    if weight is not None and bias is not None:
        normed = normed * weight.to(dtype) + bias.to(dtype)
    y = normed * (1 + of_images(scale)) + of_images(shift)
    wanted = types(x, branch, gate, shift)
    return y.to(wanted["y"]) if branch is None else (stream.to(wanted["x'"]), y.to(wanted["y"]))
