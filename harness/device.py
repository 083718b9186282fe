"""Where and how a network runs: the device, its precision, and torch.compile."""

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.registry import Backbone


def pick_device(request: str) -> str:
    """`auto` is cuda where there is one, else cpu; anything else is what it says."""
    if request == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return request


def device_name(device: str) -> str:
    """The name of the GPU, or of the CPU with its core count."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def autocast(device: str, precision: str) -> torch.autocast:
    """bfloat16 autocast, or none for float32."""
    return torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=precision == "bfloat16")


def round_weights(net: nn.Module, precision: str) -> None:
    """Give a net that is trained no further the bfloat16 weights that autocast would make of them at every call.

    Those of linear layers and of convolutions over all channels, in place; nothing for float32. Outputs under autocast
    stay the same to the bit, a pass no longer reads and writes every weight before it multiplies.
    """
    if precision == "bfloat16":
        for module in net.modules():
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1):
                module.to(torch.bfloat16)


# What torch.compile is given. One graph for one batch: neither a break nor another shape goes by unseen.
COMPILE: dict[str, dict[str, Any]] = {
    "compile": {"fullgraph": True, "dynamic": False},
    "reduce-overhead": {"fullgraph": True, "dynamic": False, "mode": "reduce-overhead"},
    "max-autotune": {"fullgraph": True, "dynamic": False, "mode": "max-autotune-no-cudagraphs"},
}


def compiled(net: Backbone, kind: str) -> Callable[..., Tensor]:
    """`net` itself (`eager`) or through torch.compile, as one graph for the shapes of its first call.

    `reduce-overhead` replays CUDA graphs from the third call on: nothing of Python is left of a pass. Its result lies
    where the next call writes, so it must be read before; gradients must be gone before the next forward pass.

    `net` stays as it is and keeps the weights; the function returned follows them. What breaks the graph, or fails to
    compile, is an error at the first call, never a plain call in its place.
    """
    if kind == "eager":
        return net
    torch.compiler.reset()  # torch keeps a bounded number of graphs of a forward method, whichever net it was called on
    return torch.compile(net, **COMPILE[kind])
