"""The selective scan in plain torch, vectorised over everything but time, with a hand-written backward pass.

Time is cut into chunks that fit the cache. The forward pass stores only the state at the start of each chunk, and the
backward pass runs the chunk again from there, so that no tensor of size K·E·L·N exists. The scan is a custom operator,
so that torch.compile and the cost count see one node.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

CHUNK = 16


@torch.library.custom_op("lamabench::selective_scan", mutates_args=())
def scan_forward(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    skip: Tensor,
    order: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, Tensor]:
    """The output [B, L, E] and the states at the start of every chunk [L / CHUNK, K, N, B, E]."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    u, dt, b, c = (_along_paths(v.to(dtype), order) for v in (x, dt, b, c))
    b, c = b.transpose(2, 3)[..., None], c.transpose(2, 3)[..., None]  # [L, K, N, B, 1]
    delta = _delta(dt, dt_weight.to(dtype), dt_bias.to(dtype))
    du, a = delta * u, a.to(dtype).transpose(1, 2)[:, :, None]  # [K, N, 1, E]
    y = torch.empty_like(u)
    h = u.new_zeros(a.shape[0], a.shape[1], u.shape[2], u.shape[3])
    decay, states = _buffers(h, len(u), 2)
    starts = []
    for at in range(0, len(u), CHUNK):
        now = slice(at, at + CHUNK)
        steps = len(u[now])
        starts.append(h)
        _run_chunk(delta[now], du[now], b[now], a, h, decay[:steps], states[:steps])
        h = states[steps - 1].clone()
        torch.sum(states[:steps].mul_(c[now]), dim=2, out=y[now])
    y += skip.to(dtype)[:, None] * u
    return _to_image(y, inverse).sum(2).to(x.dtype), torch.stack(starts)


@torch.library.custom_op("lamabench::selective_scan_backward", mutates_args=())
def scan_backward(
    grad: Tensor,
    starts: Tensor,
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    a: Tensor,
    skip: Tensor,
    order: Tensor,
    inverse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, b, c, dt_weight, dt_bias, a and skip."""
    inputs = (x, dt, b, c, dt_weight, dt_bias, a, skip)
    dtype = torch.promote_types(x.dtype, torch.float32)
    gy, u, dt, b, c = (_along_paths(v.to(dtype), order) for v in (grad, x, dt, b, c))
    b, c = b.transpose(2, 3)[..., None], c.transpose(2, 3)[..., None]  # [L, K, N, B, 1]
    dt_weight, skip = dt_weight.to(dtype), skip.to(dtype)
    delta = _delta(dt, dt_weight, dt_bias.to(dtype))
    du, a = delta * u, a.to(dtype).transpose(1, 2)[:, :, None]  # [K, N, 1, E]
    g_du, g_delta = torch.empty_like(u), torch.empty_like(u)
    g_b, g_c = b.new_empty(b.shape[:-1]), c.new_empty(c.shape[:-1])
    g_a = a.new_zeros(a.shape[0], a.shape[1], a.shape[3])
    carry = torch.zeros_like(starts[0])  # the gradient that later chunks pass to the state at the end of a chunk
    buffers = _buffers(starts[0], len(u), 4)
    for index in reversed(range(len(starts))):
        now = slice(index * CHUNK, (index + 1) * CHUNK)
        decay, states, g, product = (buffer[: len(u[now])] for buffer in buffers)
        _run_chunk(delta[now], du[now], b[now], a, starts[index], decay, states)
        torch.sum(torch.mul(states, gy[now, :, None], out=product), dim=-1, out=g_c[now])
        torch.mul(gy[now, :, None], c[now], out=g)  # gradient of the states, [T, K, N, B, E]
        g[-1] += carry
        for t in range(len(g) - 2, -1, -1):
            g[t].addcmul_(decay[t + 1], g[t + 1])
        torch.mul(decay[0], g[0], out=carry)
        torch.sum(torch.mul(g, du[now, :, None], out=product), dim=-1, out=g_b[now])
        torch.sum(torch.mul(g, b[now], out=product), dim=2, out=g_du[now])
        g[1:] *= states[:-1]
        g[0] *= starts[index]
        g *= decay  # gradient of delta · A
        torch.sum(torch.mul(g, a, out=product), dim=2, out=g_delta[now])
        g_a += g.mul_(delta[now, :, None]).sum((0, 3))
    g_b, g_c = g_b.transpose(2, 3), g_c.transpose(2, 3)
    g_delta += g_du * u
    g_u = g_du.mul_(delta).add_(skip[:, None] * gy)
    g_pre = g_delta * -torch.expm1(-delta)  # softplus' = sigmoid = 1 - exp(-softplus)
    g_dt = _einsum("lkbe,ker->lkbr", g_pre, dt_weight)
    g_dt_weight = _einsum("lkbe,lkbr->ker", g_pre, dt)
    g_skip = (gy * u).sum((0, 2))
    grads = (
        _to_image(g_u, inverse).sum(2),
        *(_to_image(v, inverse) for v in (g_dt, g_b, g_c)),
        g_dt_weight,
        g_pre.sum((0, 2)),
        g_a.transpose(1, 2),
        g_skip,
    )
    return tuple(v.to(i.dtype).contiguous() for v, i in zip(grads, inputs, strict=True))  # type: ignore[return-value]


def _along_paths(v: Tensor, order: Tensor) -> Tensor:
    """[B, L, E] or [B, L, K, …] in image order -> [L, K, B, …] in the order of the paths."""
    v = v.transpose(0, 1)
    if v.ndim == 3:
        return v[order.T]
    return v.transpose(1, 2)[order.T, torch.arange(len(order), device=v.device)]


def _to_image(v: Tensor, inverse: Tensor) -> Tensor:
    """[L, K, B, …] in the order of the paths -> [B, L, K, …] in image order."""
    return v[inverse.T, torch.arange(len(inverse), device=v.device)].movedim(2, 0)


def _delta(dt: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return softplus(_einsum("lkbr,ker->lkbe", dt, weight) + bias[:, None])


def _einsum(equation: str, *operands: Tensor) -> Tensor:
    """einsum in the type of the operands, also under autocast."""
    with torch.autocast(operands[0].device.type, enabled=False):
        return torch.einsum(equation, *operands)


def _buffers(state: Tensor, length: int, count: int) -> list[Tensor]:
    """`count` empty tensors [T, K, N, B, E] of one chunk, which every chunk uses again."""
    return [state.new_empty(min(CHUNK, length), *state.shape) for _ in range(count)]


def _run_chunk(delta: Tensor, du: Tensor, b: Tensor, a: Tensor, h: Tensor, decay: Tensor, states: Tensor) -> None:
    """Fill the decays exp(delta · A) and the states of one chunk, both [T, K, N, B, E], from the state h before it."""
    torch.mul(delta[:, :, None], a, out=decay).exp_()
    torch.mul(du[:, :, None], b, out=states)
    for t in range(len(states)):
        states[t].addcmul_(decay[t], h)
        h = states[t]


@scan_forward.register_fake
def _(x, dt, b, c, dt_weight, dt_bias, a, skip, order, inverse):
    dtype = torch.promote_types(x.dtype, torch.float32)
    chunks = -(-x.shape[1] // CHUNK)
    states = x.new_empty(chunks, a.shape[0], a.shape[2], x.shape[0], a.shape[1], dtype=dtype)
    return x.new_empty(x.shape), states


@scan_backward.register_fake
def _(grad, starts, x, dt, b, c, dt_weight, dt_bias, a, skip, order, inverse):
    return tuple(v.new_empty(v.shape) for v in (x, dt, b, c, dt_weight, dt_bias, a, skip))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1], *inputs)


def _backward(ctx, grad, _):
    return *scan_backward(grad.contiguous(), *ctx.saved_tensors), None, None


scan_forward.register_autograd(_backward, setup_context=_setup_context)


def selective_scan(*inputs: Any) -> Tensor:
    """See `lamabench.kernels.selective_scan.selective_scan`. Which paths are pairs is not read."""
    return scan_forward(*inputs[:10])[0]
