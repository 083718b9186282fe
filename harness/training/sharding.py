"""Weights, their averages, gradients and Adam's moments in shards over all processes of a run (torch's FSDP2).

Each process has some rows of each tensor. The whole weights of a block exist only while the block runs.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from itertools import cycle
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...models.registry import Backbone, build
from .. import parallel
from ..device import COMPILE_OPTIONS, device_type, is_cuda


def sharded_mode(compile: str, device: str) -> str:
    """How a training in shards runs its blocks: `train.compile`, where `auto` is `compile` on a GPU and `eager`
    elsewhere."""
    return compile if compile != "auto" else "compile" if is_cuda(device) else "eager"


def shard(net: Backbone, device: str, mode: str) -> None:
    """Shard a network on the CPU over all processes, which have the same weights, and move it to their devices.

    Each block that the network runs through `run_block` is a group, and everything else is one. Parameters become
    torch's DTensors, and stay float32. `mode` is `eager`, or `compile` for compiled blocks. A deep copy of the network
    has parameters in the same shards, but cannot run.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Whoever gets the network's output changes nothing in place.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(\w+\) returned a view tensor")
    mesh = init_device_mesh(device_type(device), (parallel.size(),))
    empty: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in net.parameters()}
    frame = copy.deepcopy(net, empty)
    groups = blocks(net)
    if mode == "compile":
        torch.compiler.reset()
        limits: Any = torch._dynamo.config  # pyright: ignore[reportPrivateImportUsage]
        limits.recompile_limit = max(limits.recompile_limit, len(groups))  # blocks of a class share their limit
        for block in groups:
            block.forward = torch.compile(block.forward, **COMPILE_OPTIONS["compile"])
    for module in (*groups, net):
        fully_shard(module, mesh=mesh)
    net.__dict__["__deepcopy__"] = partial(_copy, frame, net)  # because FSDP2 itself refuses to copy


def blocks(net: Backbone) -> list[nn.Module]:
    """The modules that a network runs through `run_block`, in the order of their first runs."""
    config = net.config
    with torch.device("meta"):
        twin = build(config).eval().to("meta")
        x = torch.empty(1, config.in_channels, config.input_size, config.input_size)
        label = torch.zeros(1, dtype=torch.int64)
    names = {module: name for name, module in twin.named_modules() if name}
    used: dict[str, None] = {}

    def run_block(block: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if block in names:
            used[names[block]] = None
        return block(*inputs)

    twin.run_block = run_block
    with torch.no_grad():
        twin(x, label, label)
    return [net.get_submodule(name) for name in used]


def _copy(frame: nn.Module, net: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of `frame`, the modules of a network without weights, with the shards of the network."""
    values = {id(old): nn.Parameter(p.detach().clone(), p.requires_grad)
              for old, p in zip(frame.parameters(), net.parameters(), strict=True)}  # fmt: skip
    return copy.deepcopy(frame, values)


def passes(net: Backbone, count: int) -> Callable[..., Tensor]:
    """A function like a network in shards that is called `count` times a step. The backward pass of the last call
    replaces gradients by their means over all processes."""
    last = cycle(number == count - 1 for number in range(count))

    def run(*inputs: Tensor) -> Tensor:
        net.set_requires_gradient_sync(next(last))  # pyright: ignore[reportCallIssue]
        return net(*inputs)

    return run


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: its rows if the tensor is sharded, else all of it."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor. If it is sharded, all processes call this together."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def own_rows(tensors: Mapping[str, Tensor]) -> dict[str, range]:
    """The rows that this process has of each sharded tensor."""
    return {name: _rows(len(tensor)) for name, tensor in tensors.items() if hasattr(tensor, "to_local")}


def _rows(count: int) -> range:
    most = -(-count // parallel.size())
    start = min(parallel.rank() * most, count)
    return range(start, min(start + most, count))


def own_part(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this process writes of tensors: its rows of those that are sharded and, in the first process, all others."""
    rows = own_rows(tensors)
    first = parallel.rank() == 0
    return {name: local(tensor) for name, tensor in tensors.items() if rows.get(name, first)}


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In the first process: whole tensors, on the CPU if they were sharded. All processes call this together; in the
    others, the result is empty."""
    result = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if parallel.rank() == 0:
            result[name] = value if value is tensor else value.cpu()
    return result


def assembled(net: Backbone, device: str) -> Backbone | None:
    """In the first process: a network that can run, with the whole weights of `net`, a copy in shards; `net` itself if
    it is not in shards. All processes call this together; in the others, the result is None."""
    sharded = bool(own_rows(net.state_dict()))
    tensors = gathered(dict(net.named_parameters())) if sharded else {}
    if parallel.rank() or not sharded:
        return None if parallel.rank() else net
    parameters = {id(p): nn.Parameter(tensors[name], p.requires_grad) for name, p in net.named_parameters()}
    return copy.deepcopy(net, cast(dict[int, Any], parameters)).to(device)
