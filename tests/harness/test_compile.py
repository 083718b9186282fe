"""torch.compile takes every backbone in one graph, with and without checkpointing, with the same results as eager."""

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from lamabench.baselines.adm import ADMConfig, Layers, ResBlock
from lamabench.baselines.dit import Block as DiTBlock
from lamabench.baselines.dit import DiTConfig
from lamabench.baselines.uvit import Block as UViTBlock
from lamabench.baselines.uvit import UViTConfig
from lamabench.harness.device import compiled
from lamabench.kernels import OPERATORS
from lamabench.kernels.operator import Operator
from lamabench.models.lamamba import Block as LaMambaBlock
from lamabench.models.lamamba import LaMambaConfig
from lamabench.models.registry import build, families, select_backends
from torch import Tensor, nn
from torch._dynamo import lookup_backend

BLOCK = LaMambaConfig(
    input_size=4, in_channels=1, num_classes=3, dim=8, depths=[1, 1], num_heads=2, window_size=2, d_state=2,
    layout="isotropic",
    mixers=[["ssm", "window", "global", "conv"], ["window", {"kind": "ssd", "d_state": 3, "head_dim": 4}]],
)  # fmt: skip
CONFIGS: dict[str, Any] = {
    "lamamba": BLOCK,
    "lamamba-unet": replace(BLOCK, layout="unet", depths=[1, 1, 1], bottleneck_depth=0, skip="concat", mixers=["none"]),
    "dit": DiTConfig(4, 1, 3, patch_size=2, hidden_size=16, depth=1, num_heads=2),
    "modern": DiTConfig(4, 1, 3, 2, 16, 1, 2, qk_norm=True, rope=True, swiglu=True, rms_norm=True),
    "uvit": UViTConfig(4, 1, 3, patch_size=2, hidden_size=16, depth=3, num_heads=2),
    # 64 channels, because with one channel per group the gradient of some biases is only rounding noise.
    "adm": ADMConfig(4, 1, 3, 64, 1, [1, 1], [], num_head_channels=16, null_class=True),
}
BLOCKS = (LaMambaBlock, DiTBlock, UViTBlock, Layers, ResBlock)


class Graphs:
    """A backend of torch.compile that counts graphs and runs each as traced by autograd."""

    def __init__(self) -> None:
        self.count = 0
        self.run = lookup_backend("aot_eager")

    def __call__(self, graph, inputs):
        self.count += 1
        return self.run(graph, inputs)


def network(config, device="cpu"):
    """A network without zeros, so that every branch reaches the output, and a batch of two images."""
    torch.manual_seed(0)
    net = build(config)
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else parameter.data.add_(0.1)
    x = torch.randn(2, config.in_channels, config.input_size, config.input_size)
    return net.to(device), [v.to(device) for v in (x, torch.tensor([3, 900]), torch.tensor([0, 1]))]


def train_step(net, call, batch, dtype=torch.float32) -> list[Tensor]:
    """The output and every gradient."""
    net.train()
    with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = call(*batch)
    trained = [p for p in net.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out.detach().double(), *(g.double() for g in torch.autograd.grad(out, trained, weights))]


def evaluate(net, call, batch, dtype=torch.float32) -> list[Tensor]:
    net.eval()
    with torch.no_grad(), torch.autocast(batch[0].device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        return [call(*batch).double()]


def assert_close(got: list[Tensor], plain: list[Tensor], exact: list[Tensor], floor: float) -> None:
    """Assert rule 4 of DESIGN.md: at most twice the error of plain torch in the same precision, plus a floor."""
    for one, base, true in zip(got, plain, exact, strict=True):
        scale = true.norm().clamp_min(1e-9)
        assert (one - true).norm() <= 2 * (base - true).norm() + floor * scale, ((one - true).norm() / scale).item()


def test_every_family_is_tested():
    assert {family.config_type for family in families().values()} == {type(config) for config in CONFIGS.values()}


# A U-Net of lamamba has the levels that adm compiles and the layers that lamamba compiles. Without gradients, modern
# blocks are traced as dit's, with the layers that their training step compiles.
LONG = [("lamamba-unet", train_step), ("lamamba-unet", evaluate), ("modern", evaluate)]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        pytest.param(name, step, marks=pytest.mark.soak if (name, step) in LONG else ())
        for name in CONFIGS
        for step in (train_step, evaluate)
    ],
)
def test_one_graph_with_the_results_of_eager(name, step):
    """bfloat16 with checkpointing and float32 without, so that each is compiled once."""
    net, batch = network(CONFIGS[name])
    select_backends(net, {}, "cpu")
    wide = copy.deepcopy(net).double()
    exact = step(wide, wide, [batch[0].double(), *batch[1:]])
    for dtype, floor in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):  # a few roundings; one rounding
        torch.compiler.reset()
        net.checkpointing = dtype == torch.bfloat16
        graphs = Graphs()
        call = torch.compile(net, fullgraph=True, dynamic=False, backend=graphs)
        got = step(net, call, batch, dtype)
        assert graphs.count == 1
        assert_close(got, step(net, net, batch, dtype), exact, floor)
        step(net, call, [v.clone() for v in batch], dtype)
        assert graphs.count == 1  # the same shapes use the same graph


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_backend_is_resolved_within_a_traced_call(operator):
    """A network may resolve its backends in its first call. On a GPU this also asks Triton and NVRTC."""

    def name_length(x: Tensor) -> Tensor:
        fresh = Operator(operator, list(OPERATORS[operator].backends.values()), OPERATORS[operator].work)
        return x + len(fresh.resolve("auto", "cuda").name)

    torch.compiler.reset()
    traced = torch.compile(name_length, fullgraph=True, backend="eager")
    assert torch.equal(traced(torch.zeros(1)), name_length(torch.zeros(1)))


def relative_rms(outcome: list[Tensor], exact: list[Tensor]) -> float:
    """The root mean square, over tensors, of their relative errors."""
    errors = [(one - true).norm() / true.norm().clamp_min(1e-9) for one, true in zip(outcome, exact, strict=True)]
    return torch.stack(errors).square().mean().sqrt().item()


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_for_the_gpu(name, checkpointing):
    """As with `train.compile`: torch generates code for the whole graph, around the backends of `auto`.

    float32 is compared tensor by tensor. Compiled bfloat16 rounds as often as eager, but in other places. The error of
    a gradient of eight numbers is then a random draw, up to three times another one, so all tensors are compared
    together.
    """
    net, batch = network(CONFIGS[name], "cuda")
    select_backends(net, {}, "cuda")
    wide = copy.deepcopy(net).double()
    select_backends(wide, dict.fromkeys(OPERATORS, "reference"), "cuda")
    net.checkpointing = checkpointing
    call = compiled(net, "compile")
    for step in (train_step, evaluate):
        exact = step(wide, wide, [batch[0].double(), *batch[1:]])
        assert_close(step(net, call, batch), step(net, net, batch), exact, 1e-5)  # exponentials of 22 bits
        got, plain = step(net, call, batch, torch.bfloat16), step(net, net, batch, torch.bfloat16)
        assert relative_rms(got, exact) <= 2 * relative_rms(plain, exact) + 2**-8


def measured(net, batch, step=train_step) -> tuple[list[Tensor], int, Counter]:
    """The results of a step, the bytes that autograd saves between its passes, and how often each block runs."""
    calls, saved = Counter(), {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    blocks = [module for module in net.modules() if isinstance(module, BLOCKS)]
    hooks = [block.register_forward_pre_hook(lambda block, _: calls.update([block])) for block in blocks]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = step(net, net, batch)
    for hook in hooks:
        hook.remove()
    assert len(calls) == len(blocks)
    return results, sum(saved.values()), calls


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_only_changes_memory(name):
    """Every block runs once more, only in training. Output and gradients are the same bit for bit."""
    net, batch = network(CONFIGS[name])
    assert not net.checkpointing
    plain, whole, once = measured(net, batch)
    net.checkpointing = True
    got, part, twice = measured(net, batch)
    assert all(torch.equal(one, other) for one, other in zip(got, plain, strict=True))
    assert set(once.values()) == {1} and set(twice.values()) == {2}
    assert part < whole
    assert set(measured(net, batch, evaluate)[2].values()) == {1}
