"""Whole models with each backend of each operator: golden files hold, and training follows the reference."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lamabench.baselines import adm, dit
from lamabench.baselines.adm import ADMConfig
from lamabench.baselines.dit import DiTConfig
from lamabench.harness.config import Config
from lamabench.harness.device import compiled, exact_float32
from lamabench.harness.disk import read_lines
from lamabench.harness.progress import Progress
from lamabench.harness.sections import BackendConfig, DataConfig, RunConfig, TrainConfig
from lamabench.harness.training.loop import train
from lamabench.kernels import OPERATORS
from lamabench.models import lamamba
from lamabench.models.lamamba import LaMambaConfig
from lamabench.models.registry import preset, select_backends
from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"
HALF_ONLY = ("flash2", "flash3", "flash4")  # backends that take no float32
# Backends of the operators that a test is not about: plain torch that is not too slow.
PLAIN = {name: "torch" if "torch" in op.backends else "reference" for name, op in OPERATORS.items()}


def usable(device: str, *without: str) -> list[tuple[str, str]]:
    """Every operator with each of its backends that run on a kind of device here."""
    return [
        (name, backend.name)
        for name, op in OPERATORS.items()
        for backend in op.backends.values()
        if backend.name not in without and not backend.reasons(device)
    ]


def test_every_operator_can_be_chosen():
    assert {field.name for field in fields(BackendConfig)} == OPERATORS.keys()


def golden(name: str) -> tuple[Any, dict[str, Tensor]]:
    """The network with the golden weights, and everything else in the file."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        meta, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state = {key.removeprefix("model."): value for key, value in tensors.items() if key.startswith("model.")}
    if name == "dit_tiny":
        net = dit.from_reference(state, DiTConfig(8, 4, 10, patch_size=2, hidden_size=48, depth=2, num_heads=3))
    elif name == "adm_tiny":
        net = adm.from_reference(state, ADMConfig(16, 4, 10, 32, 1, [1, 2, 2], [2, 4], num_head_channels=16))
    else:
        numbers = "num_classes dim bottleneck_depth num_heads window_size d_state".split()
        config = LaMambaConfig(
            input_size=int(meta["resolution"]),
            depths=json.loads(meta["depths"]),
            scan=meta["scan"],
            **{key: int(meta[key]) for key in numbers},
        )
        net = lamamba.from_reference(state, config)
    return net, tensors


def reference_name(net: Any, name: str) -> str:
    return lamamba.reference_name(name) if isinstance(net, lamamba.LaMamba) else name


FILES = {"attention": ("dit_tiny", "adm_tiny")}
LAMAMBA_FILES = ("lamamba_tiny_continuous", "lamamba_tiny_cross")
CHOICES = [
    *(pytest.param(file, {**PLAIN, op: name}, "eager", id=f"{file}-{op}={name}")
      for op, name in usable("cuda", *HALF_ONLY) for file in FILES.get(op, LAMAMBA_FILES)),
    *(pytest.param(file, {}, "compile", id=f"{file}-compile") for file in (*FILES["attention"], *LAMAMBA_FILES)),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("file", "backends", "compile"), CHOICES)
def test_golden_files_hold_on_the_gpu(file, backends, compile):
    """In float32. The bounds are looser than on the CPU (3e-6 and 1e-5), because a GPU's fast exponentials have 22 of
    24 bits, and its sums have another order."""
    exact_float32()
    net, tensors = golden(file)
    net = net.cuda().train()
    select_backends(net, backends, "cuda")
    call = compiled(net, compile)
    out = call(*(tensors[f"input.{name}"].cuda() for name in "xty"))
    expected = tensors["output"].cuda()
    assert (out - expected).norm() <= 1e-5 * expected.norm()
    (out * torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out)).sum().backward()
    norms = {reference_name(net, key): p.grad.norm() for key, p in net.named_parameters() if p.requires_grad}
    true = {key.removeprefix("gradnorm."): value for key, value in tensors.items() if key.startswith("gradnorm.")}
    assert norms.keys() == true.keys()
    largest = max(true.values())
    for key, norm in norms.items():
        # A gradient that is only rounding (ADM has six) is not compared with the rounding of another machine.
        assert abs(norm.cpu() - true[key]) <= 1e-4 * true[key] + 1e-7 * largest, key


def losses(folder: Path, model: Any, device: str, steps: int, backends: dict[str, str], **settings: Any) -> list[float]:
    """Mean losses of every tenth of a training run on fixed noise images."""
    config = Config(
        model=model,
        data=DataConfig(kind="synthetic", size=model.input_size, channels=1, num_classes=10),
        train=TrainConfig(steps=steps, batch_size=16, lr=1e-3, **settings),
        backend=BackendConfig(**backends),
        run=RunConfig(root=str(folder), device=device, log_every=steps // 10, checkpoint_every=steps),
    )
    folder.mkdir(parents=True, exist_ok=True)
    record = train(folder, config, Progress())
    assert {name: record["backend"][name] for name in backends} == backends
    means = [line["loss"] for line in read_lines(folder / "metrics.jsonl")]
    assert len(means) == 10
    return means


TINY = LaMambaConfig(
    input_size=8, in_channels=1, num_classes=10, dim=8, depths=[1, 1], num_heads=2, window_size=2, d_state=2,
    patch_size=2, layout="isotropic", mixers=[["ssm", "window"], ["ssd", "global"]],
)  # fmt: skip
# Two blocks, because the reference scan goes token by token and takes long on a GPU.
NANO = replace(
    preset("lamamba_nano").config, layout="isotropic", depths=[1, 1], mixers=[["ssm", "window"], ["ssd", "global"]]
)
REFERENCE = dict.fromkeys(OPERATORS, "reference")
# The largest relative difference of a mean loss from the reference backends. On a CPU, plain torch is 5e-7 off within
# 200 steps in float32, and 1e-3 in bfloat16.
BOUNDS = {"float32": 1e-3, "bfloat16": 2e-2}


@pytest.fixture(scope="module")
def reference_on_the_cpu(tmp_path_factory):
    return losses(tmp_path_factory.mktemp("reference"), TINY, "cpu", 40, REFERENCE, precision="float32")


@pytest.mark.parametrize(("operator", "backend"), usable("cpu", "reference"))
def test_training_follows_the_reference(operator, backend, reference_on_the_cpu, tmp_path):
    got = losses(tmp_path, TINY, "cpu", 40, {**PLAIN, operator: backend}, precision="float32")
    assert got == pytest.approx(reference_on_the_cpu, rel=1e-4)
    assert got[-1] < 0.7 * got[0]


@pytest.fixture(scope="module", params=BOUNDS)
def reference_on_the_gpu(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    return request.param, losses(folder, NANO, "cuda", 200, REFERENCE, precision=request.param)


@pytest.mark.gpu
def test_training_follows_the_reference_on_the_gpu(reference_on_the_gpu, tmp_path):
    """200 steps with each installed backend, and compiled with those that `auto` takes."""
    precision, expected = reference_on_the_gpu
    without = ("reference", *HALF_ONLY) if precision == "float32" else ("reference",)
    cases = {f"{op}={name}": ({**PLAIN, op: name}, {}) for op, name in usable("cuda", *without)}
    cases["compile"] = ({}, {"compile": "compile"})
    cases["CUDA graphs"] = ({}, {"compile": "reduce-overhead"})
    cases["compile, checkpointing"] = ({}, {"compile": "compile", "checkpointing": True})
    off = {}
    for name, (backends, settings) in cases.items():
        got = losses(tmp_path / name, NANO, "cuda", 200, backends, precision=precision, **settings)
        off[name] = max(abs(a / b - 1) for a, b in zip(got, expected, strict=True))
    assert max(off.values()) <= BOUNDS[precision], off
