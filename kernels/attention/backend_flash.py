"""Adapters to the FlashAttention packages: 2 (arXiv 2307.08691), 3 (2407.08608) and 4 (`flash_attn.cute`)."""

import importlib.util
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..errors import InputError


def _installed(package: str) -> bool:
    try:
        return bool(metadata.version(package))
    except metadata.PackageNotFoundError:
        return False


# Looked up once, at import, because torch.compile traces through `reasons`. Folders do not tell 2 from 4: both have
# `flash_attn/cute`, and 4 has nothing else in `flash_attn`.
INSTALLED = {
    "flash2": importlib.util.find_spec("flash_attn_2_cuda") is not None,
    "flash3": importlib.util.find_spec("flash_attn_interface") is not None,
    "flash4": _installed("flash-attn-4"),
}
PACKAGES = {"flash2": "flash-attn", "flash3": "flash-attn-3 (flash_attn_interface)", "flash4": "flash-attn-4"}


def reasons(backend: str) -> Callable[[str], list[str]]:
    """The `reasons` of the `Backend` of that name: why it cannot run on a kind of device here; empty where it can."""

    def of_device(device_type: str) -> list[str]:
        refusals = []
        if not INSTALLED[backend]:
            refusals.append(f"the package {PACKAGES[backend]} is not installed")
        if device_type != "cuda":
            refusals.append(f"it runs on CUDA GPUs only, not on {device_type!r}")
        elif backend == "flash3" and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
            refusals.append("it needs a GPU of the Hopper generation (compute capability 9)")
        return refusals

    return of_device


def flash2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 2; shapes as in `attention`. Raises InputError for other types and for heads above 256."""
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    return _run("flash2", flash_attn_func, q, k, v)


def flash3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 3; shapes as in `attention`. Raises InputError for other types and for heads above 256."""
    from flash_attn_interface import flash_attn_func  # pyright: ignore[reportMissingImports]

    return _run("flash3", flash_attn_func, q, k, v)


def flash4(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """FlashAttention 4; shapes as in `attention`. Raises InputError for other types and for heads above 256 (128 on
    GPUs after Hopper)."""
    return _run("flash4", flash4_forward, q, k, v)


# The package's passes as torch operators. The package's own function runs a compiler where torch.compile would trace,
# and breaks the graph. The functions called here are those that torch's own adapter (`torch.nn.attention`) calls.
@torch.library.custom_op("lamabench::flash4", mutates_args=())
def flash4_forward(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """q, k and v [B, L, heads, d] -> the output [B, L, heads, d], and the log-sum-exp of the scores [B, heads, L] in
    float32."""
    interface = importlib.import_module("flash_attn.cute.interface")
    out, sums, *_ = interface._flash_attn_fwd(q, k, v, softmax_scale=softmax_scale, return_lse=True)
    return out.contiguous(), sums.contiguous()


@torch.library.custom_op("lamabench::flash4_backward", mutates_args=())
def flash4_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, softmax_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v [B, L, heads, d].

    Heads are padded with zeros to a multiple of 32 channels. For other widths, such as 72, the package reads a part of
    dq on Hopper GPUs that it never wrote (4.0.0b36, Dao-AILab/flash-attention #2896).
    """
    interface = importlib.import_module("flash_attn.cute.interface")
    width = q.shape[-1]
    q, k, v, out, grad = (_padded(x, 32) for x in (q, k, v, out, grad.contiguous()))
    gradients = interface._flash_attn_bwd(q, k, v, out, grad, sums, softmax_scale=softmax_scale)[:3]
    g_q, g_k, g_v = (x[..., :width].contiguous() for x in gradients)
    return g_q, g_k, g_v


@flash4_forward.register_fake
def _(q, k, v, softmax_scale):
    batch, length, heads, _ = q.shape
    return v.new_empty(batch, length, heads, v.shape[-1]), q.new_empty(batch, heads, length, dtype=torch.float32)


@flash4_backward.register_fake
def _(grad, q, k, v, out, sums, softmax_scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ctx.softmax_scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 4
    return *flash4_backward(grad, *ctx.saved_tensors, ctx.softmax_scale), None


flash4_forward.register_autograd(_backward, setup_context=_setup_context)


def _run(backend: str, call: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    types = {x.dtype for x in (q, k, v)}
    if types not in ({torch.bfloat16}, {torch.float16}):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))
        raise InputError(
            f"attention: backend {backend!r} takes queries, keys and values of one type, bfloat16 or float16, "
            f"not {names}; use 'sdpa' or 'reference'"
        )
    width = q.shape[-1]
    widest = 128 if backend == "flash4" and q.is_cuda and torch.cuda.get_device_capability(q.device)[0] > 9 else 256
    if width > widest:
        raise InputError(f"attention: backend {backend!r} takes heads of at most {widest} channels, not {width}")
    # [B, heads, L, d] -> [B, L, heads, d]; d must be a multiple of 8, and zeros change no score.
    q, k, v = (_padded(x.transpose(1, 2), 8) for x in (q, k, v))
    out = call(q, k, v, softmax_scale=width**-0.5)
    out = out[0] if isinstance(out, tuple) else out  # some versions also return the sums of the softmax
    return out[..., :width].transpose(1, 2)


def _padded(x: Tensor, multiple: int) -> Tensor:
    """`x` with zeros at the end of its last axis, up to a multiple of `multiple` channels."""
    return pad(x, (0, -x.shape[-1] % multiple)) if x.shape[-1] % multiple else x
