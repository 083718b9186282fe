"""Where and how a network runs: the device, its precision, and torch.compile."""

import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.errors import InputError, unknown
from ..models.registry import Backbone
from .launcher import size, variable

WHOLE_STEP = "whole-step"  # torch.compile, and the whole training step as one CUDA graph (training/graph.py)


def pick_device(request: str) -> str:
    """The requested device of this machine: `auto` is cuda if there is a GPU, else cpu. Raises InputError, with the
    choices, for a device that this machine does not have."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    choices = ["auto", "cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if request == "auto":
        return "cuda" if gpus else "cpu"
    if is_cuda(request) and not gpus:
        raise InputError(f"run.device={request}, but torch finds no GPU here; choices: {', '.join(choices)}")
    if request not in choices:
        raise unknown("run.device", request, choices)
    return request


def own_device(device: str) -> str:
    """The device of this process of a run. Of several GPUs that it sees, the one with the number of its local rank
    becomes the current one, which `cuda` means. Raises InputError if there is none, or if `device` is one GPU by
    number."""
    if size() == 1 or not is_cuda(device):
        return device
    if ":" in device:
        raise InputError(f"run.device={device} is one GPU, but the run has {size()} processes: choose run.device=cuda")
    count, local = torch.cuda.device_count(), variable("LOCAL_RANK", 0)
    if 1 < count <= local:
        raise InputError(f"{local + 1} processes or more on {platform.node()}, which has {count} GPUs")
    torch.cuda.set_device(local if count > 1 else 0)
    return device


def device_type(device: str) -> str:
    """The type of a device, `cuda` or `cpu`, as backends and autocast take it."""
    return device.split(":")[0]


def is_cuda(device: str) -> bool:
    """Whether a device is a GPU."""
    return device_type(device) == "cuda"


def wake(device: str) -> None:
    """Begin to set up a GPU, which takes seconds, in a thread of its own, and return at once. Nothing for a CPU."""
    if is_cuda(device):
        Thread(target=_first_use, args=(device,), daemon=True).start()


def _first_use(device: str) -> None:
    with suppress(RuntimeError):  # whoever uses the GPU next meets the same error
        torch.zeros(1, device=device)


def device_name(device: str) -> str:
    """The name of the GPU, or the model of the CPU."""
    if is_cuda(device):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def exact_float32() -> None:
    """Make float32 exact in this process. By default, cuDNN's convolutions round their inputs to TF32.

    Code that trains, samples, scores or measures calls this first.
    """
    torch.backends.cudnn.allow_tf32 = False


def training_mode(compile: str, device: str, section: str = "train") -> str:
    """How a training runs its network and its step: `train.compile`, where `auto` is `whole-step` on a GPU and `eager`
    elsewhere. Raises InputError for `whole-step` without a GPU; `section` asks for it."""
    if compile == "auto":
        return WHOLE_STEP if is_cuda(device) else "eager"
    if compile == WHOLE_STEP and not is_cuda(device):
        raise InputError(f"{section}.compile={WHOLE_STEP} needs a GPU, and the device is {device}: auto is eager there")
    return compile


def autocast(device: str, precision: str) -> torch.autocast:
    """bfloat16 autocast, or none for float32."""
    return torch.autocast(device_type(device), dtype=torch.bfloat16, enabled=precision == "bfloat16")


def round_weights(net: nn.Module, precision: str) -> None:
    """Round the weights of a net for inference to bfloat16, in place, as autocast would do at every call.

    Rounds linear layers and convolutions over all channels, and nothing for float32. Outputs under autocast stay the
    same bit for bit (with weights that require a gradient, but for the order in which torch multiplies transposed
    inputs), and a pass no longer reads and writes every weight before it multiplies.
    """
    if precision == "bfloat16":
        for module in net.modules():
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == 1):
                module.to(torch.bfloat16)


# The arguments of torch.compile. One graph for one shape: a graph break or another shape never goes unnoticed.
COMPILE_OPTIONS: dict[str, dict[str, Any]] = {
    "compile": {"fullgraph": True, "dynamic": False},
    "reduce-overhead": {"fullgraph": True, "dynamic": False, "mode": "reduce-overhead"},
    "max-autotune": {"fullgraph": True, "dynamic": False, "mode": "max-autotune"},
}


def compiled(net: Backbone, kind: str) -> Callable[..., Tensor]:
    """`net` itself (`eager`), or `net` compiled by torch.compile as one graph for the shapes of its first call.

    On a GPU, `reduce-overhead` and `max-autotune` (`sections.CUDA_GRAPHS`) replay CUDA graphs from the third call on,
    and a pass runs no Python. The next call overwrites the result, so read it before. Release gradients before the next
    forward pass. `whole-step` compiles as `compile` does.

    `net` is not changed and keeps the weights, and the compiled function follows them. A graph break or a failed
    compilation is an error at the first call, never a silent fallback to eager.
    """
    if kind == "eager":
        return net
    torch.compiler.reset()  # torch limits the number of graphs of a forward method, over all nets that have it
    return torch.compile(net, **COMPILE_OPTIONS["compile" if kind == WHOLE_STEP else kind])
