"""The SSD scan as matrix products over chunks, in plain torch (Mamba-2, arXiv 2405.21060, section 6).

Within a chunk, tokens meet in a matrix of scores as in attention. Each chunk hands its state [N, P] of every head to
the next one. The products have operands in the type of x, so that bfloat16 runs on tensor cores; step sizes, decays,
states and sums are float32, as in Mamba-2's kernels. In float32 and float64 everything has that type.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad, softplus

CHUNK = 64  # tokens: N = P = Q, section 6.3


def ssd(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    skip: Tensor,
    order: Tensor,
    inverse: Tensor,
) -> Tensor:
    """See `lamabench.kernels.ssd.ssd`."""
    length, channels = x.shape[1:]
    paths, heads = a.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    size = min(CHUNK, length)
    count = -(-length // size)

    def chunks(v: Tensor) -> Tensor:
        """[B, K, L, …] -> [B, K, Z, Q, …] with zeros at the end: step sizes of 0, which change no state."""
        padding = (0,) * (2 * (v.ndim - 3) + 1) + (count * size - length,)
        return pad(v, padding).unflatten(2, (count, size))

    # Autocast would lower float32 products to bfloat16. It does not know the device "meta".
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        delta = softplus(along(dt.to(dtype).transpose(1, 2), order) + dt_bias.to(dtype)[:, None])
        delta = chunks(delta)  # [B, K, Z, Q, H]
        u = chunks(along(x[:, None].expand(-1, paths, -1, -1), order)).unflatten(-1, (heads, -1))
        b, c = (chunks(along(v.to(x.dtype).transpose(1, 2), order)) for v in (b, c))  # [B, K, Z, Q, N]
        # Decays as sums of exponents from the start of a chunk. Their differences are short sums of long ones.
        exponents = (delta.double() * a.double()[:, None, None]).cumsum(3)  # [B, K, Z, Q, H]
        entering = (delta[..., None] * u).to(x.dtype)  # [B, K, Z, Q, H, P]
        y = _within(exponents, entering, b, c, dtype)
        if count > 1:
            y = torch.cat([y[:, :, :1], y[:, :, 1:] + _between(exponents, entering, b, c, dtype)], dim=2)
    y = along(y.flatten(2, 3)[:, :, :length].flatten(3), inverse).sum(1)  # [B, L, E]
    return (y + skip.to(dtype).sum(0).repeat_interleave(channels // heads) * x).to(x.dtype)


def along(v: Tensor, index: Tensor) -> Tensor:
    """v [B, K, L, …] in the order of `index` [K, L]."""
    return v.gather(2, index.view(1, *index.shape, *(1,) * (v.ndim - 3)).expand_as(v))


def _within(exponents: Tensor, entering: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """What tokens add to later ones of their chunk: [B, K, Z, Q, H, P]."""
    size = b.shape[3]
    scores = c @ b.transpose(-1, -2)  # [B, K, Z, Q, Q], the same for all heads
    exponents = exponents.transpose(3, 4)  # [B, K, Z, H, Q]
    later = torch.ones(size, size, dtype=torch.bool, device=b.device).triu(1)
    decay = (exponents[..., :, None] - exponents[..., None, :]).masked_fill(later, -torch.inf).to(dtype).exp()
    weights = (scores[:, :, :, None] * decay).to(b.dtype)  # [B, K, Z, H, Q, Q]
    return (weights @ entering.transpose(3, 4)).transpose(3, 4).to(dtype)


def _between(exponents: Tensor, entering: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """What earlier chunks add to the tokens of every chunk but the first: [B, K, Z - 1, Q, H, P]."""
    heads, width = entering.shape[4:]
    ends = exponents[:, :, :, -1:]  # [B, K, Z, 1, H]
    left = ((ends - exponents)[:, :, :-1].to(dtype).exp()[..., None] * entering[:, :, :-1]).to(b.dtype)
    own = (b[:, :, :-1].transpose(-1, -2) @ left.flatten(4)).to(dtype)  # [B, K, Z - 1, N, E]
    decay = ends[:, :, 1:].to(dtype).exp().repeat_interleave(width, dim=4)  # [B, K, Z - 1, 1, E]
    states = [own[:, :, 0]]
    for chunk in range(1, own.shape[2]):
        states.append(decay[:, :, chunk - 1] * states[-1] + own[:, :, chunk])
    y = (c[:, :, 1:] @ torch.stack(states, dim=2).to(b.dtype)).to(dtype)  # [B, K, Z - 1, Q, E]
    return y.unflatten(4, (heads, width)) * exponents[:, :, 1:].to(dtype).exp()[..., None]
