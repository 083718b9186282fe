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


# Looked up once, at import, for torch.compile traces through `reasons`. Folders do not tell 2 from 4: both have a
# `flash_attn/cute`, and 4 has nothing else in `flash_attn`.
INSTALLED = {
    "flash2": importlib.util.find_spec("flash_attn_2_cuda") is not None,
    "flash3": importlib.util.find_spec("flash_attn_interface") is not None,
    "flash4": _installed("flash-attn-4"),
}
PACKAGES = {"flash2": "flash-attn", "flash3": "flash-attn-3 (flash_attn_interface)", "flash4": "flash-attn-4"}


def reasons(backend: str) -> Callable[[str], list[str]]:
    """What a `Backend` of that name asks: why it cannot run on a kind of device here; empty when it can."""

    def ask(device_type: str) -> list[str]:
        found = []
        if not INSTALLED[backend]:
            found.append(f"the package {PACKAGES[backend]} is not installed")
        if device_type != "cuda":
            found.append(f"it runs on CUDA GPUs only, not on {device_type!r}")
        elif backend == "flash3" and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
            found.append("it needs a GPU of the Hopper generation (compute capability 9)")
        return found

    return ask


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
    from flash_attn.cute import flash_attn_func  # pyright: ignore[reportMissingImports]

    return _run("flash4", flash_attn_func, q, k, v)


def _run(backend: str, call: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    types = {x.dtype for x in (q, k, v)}
    if types not in ({torch.bfloat16}, {torch.float16}):
        got = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))
        raise InputError(
            f"attention: backend {backend!r} takes queries, keys and values of one type, bfloat16 or float16, "
            f"not {got}; use 'sdpa' or 'reference'"
        )
    width = q.shape[-1]
    widest = 128 if backend == "flash4" and q.is_cuda and torch.cuda.get_device_capability(q.device)[0] > 9 else 256
    if width > widest:
        raise InputError(f"attention: backend {backend!r} takes heads of at most {widest} channels, not {width}")
    # [B, heads, L, d] -> [B, L, heads, d]; d must divide by 8, and zeros change no score.
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if width % 8:
        q, k, v = (pad(x, (0, -width % 8)) for x in (q, k, v))
    out = call(q, k, v, softmax_scale=width**-0.5)
    out = out[0] if isinstance(out, tuple) else out  # some versions give the sums of the softmax as well
    return out[..., :width].transpose(1, 2)
