"""Where and how a network runs: the device, its precision, and torch.compile."""

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.errors import InputError, unknown
from ..models.registry import Backbone


def pick_device(request: str) -> str:
    """A device of this machine: `auto` is cuda where there is one, else cpu. Raises InputError, with the choices, for
    one that is not here."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    choices = ["auto", "cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if request == "auto":
        return "cuda" if gpus else "cpu"
    if is_cuda(request) and not gpus:
        raise InputError(f"run.device={request}, but torch finds no GPU here; choices: {', '.join(choices)}")
    if request not in choices:
        raise unknown("run.device", request, choices)
    return request


def device_type(device: str) -> str:
    """The kind of a device, `cuda` or `cpu`: what backends and autocast ask for."""
    return device.split(":")[0]


def is_cuda(device: str) -> bool:
    """Whether a device is a GPU."""
    return device_type(device) == "cuda"


def device_name(device: str) -> str:
    """The name of the GPU, or the model of the CPU."""
    if is_cuda(device):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def exact_float32() -> None:
    """Let float32 mean float32 in this process: cuDNN's convolutions would round their inputs to TF32 unasked.

    What trains, samples, scores or measures calls it first.
    """
    torch.backends.cudnn.allow_tf32 = False


def autocast(device: str, precision: str) -> torch.autocast:
    """bfloat16 autocast, or none for float32."""
    return torch.autocast(device_type(device), dtype=torch.bfloat16, enabled=precision == "bfloat16")


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
    "max-autotune": {"fullgraph": True, "dynamic": False, "mode": "max-autotune"},
}


def compiled(net: Backbone, kind: str) -> Callable[..., Tensor]:
    """`net` itself (`eager`) or through torch.compile, as one graph for the shapes of its first call.

    On a GPU, `reduce-overhead` and `max-autotune` (`config.CUDA_GRAPHS`) replay CUDA graphs from the third call on:
    nothing of Python is left of a pass. Its result lies where the next call writes, so it must be read before;
    gradients must be gone before the next forward pass.

    `net` stays as it is and keeps the weights; the function returned follows them. What breaks the graph, or fails to
    compile, is an error at the first call, never a plain call in its place.
    """
    if kind == "eager":
        return net
    torch.compiler.reset()  # torch keeps a bounded number of graphs of a forward method, whichever net it was called on
    return torch.compile(net, **COMPILE[kind])
