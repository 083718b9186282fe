"""Speed and memory of a backbone, measured; no number where its outputs do not agree with the reference."""

import gc
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from .backbones import Backbone, build, called_operators, select_backends
from .config import BenchConfig, Config
from .provenance import pick_device
from .train import autocast, follow

# How far the output of the measured backends may lie from the reference backends' float32 (RMS error over RMS).
TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2}


class WrongOutput(RuntimeError):
    """The backends to be measured do not compute what the reference does."""


def bench(config: Config, say: Any = lambda text: None) -> list[dict[str, Any]]:
    """One row for each of `config.bench.modes`: the fields of `bench` records.

    Random weights with nothing at zero, random inputs. `forward` is one call without gradients, `train` forward,
    backward, AdamW and EMA as in training. Median, quartiles and 20th and 80th percentile are milliseconds a batch,
    over `repeats` calls after `warmup`; `peak_memory_gib` is the most that torch's CUDA allocator held (null on the
    CPU). An out-of-memory error is a row with `state` "oom". Raises WrongOutput where the outputs do not agree with
    the reference.
    """
    device, settings = pick_device(config.run.device), config.bench
    net = build(config.model)
    _fill_zeros(net)
    net = net.to(device)
    backend = select_backends(net, vars(config.backend), device.split(":")[0])
    error = check_output(net, config, device)
    say(f"outputs agree with the reference: relative RMS error {error:.1e}")
    rows = []
    for mode in settings.modes:
        row = {
            "mode": mode,
            "batch_size": settings.batch_size,
            "input_size": config.model.input_size,
            "precision": settings.precision,
            "compile": "eager",
            "backend": backend,
            "threads": torch.get_num_threads(),
            "output_error": error,
        }
        try:
            row |= {"state": "done", **_measure(net, mode, config, device)}
        except torch.cuda.OutOfMemoryError as out:
            row |= {"state": "oom", "error": str(out).splitlines()[0]}
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
        rows.append(row)
    return rows


def _fill_zeros(net: Backbone) -> None:
    """Perturb every parameter that starts at a constant: zeros hide work and run faster than real data."""
    torch.manual_seed(0)
    for parameter in net.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.02)


def inputs(config: Config, batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random x, t, y for a model."""
    model = config.model
    x = torch.randn(batch, model.in_channels, model.input_size, model.input_size, device=device)
    t = torch.randint(0, 1000, (batch,), device=device)
    return x, t, torch.randint(0, max(model.num_classes, 1), (batch,), device=device)


def check_output(net: Backbone, config: Config, device: str) -> float:
    """Relative RMS error of the measured backends and precision against the reference backends in float32, one image.

    Raises WrongOutput where it is above `TOLERANCE`.
    """
    chosen = [(operators, dict(operators)) for operators in called_operators(net)]
    x, t, y = inputs(config, 1, device)
    with torch.no_grad():
        with autocast(device, config.bench.precision):
            fast = net(x, t, y).float()
        every = {name for operators, _ in chosen for name in operators}
        select_backends(net, dict.fromkeys(every, "reference"), device.split(":")[0])
        exact = net(x, t, y)
    for operators, backends in chosen:
        operators.update(backends)
    error = ((fast - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()
    limit = TOLERANCE[config.bench.precision]
    if not error <= limit:
        raise WrongOutput(
            f"output off by {error:.2e} (relative RMS) from the reference, limit {limit:.0e}: not measured"
        )
    return error


def _measure(net: Backbone, mode: str, config: Config, device: str) -> dict[str, Any]:
    settings = config.bench
    x, t, y = inputs(config, settings.batch_size, device)
    step = _train_step(net, settings) if mode == "train" else _forward(net)
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for index in range(settings.warmup + settings.repeats):
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        with autocast(device, settings.precision):
            step(x, t, y)
        if cuda:
            torch.cuda.synchronize()
        if index >= settings.warmup:
            times.append(1e3 * (time.perf_counter() - started))
    spread = quantiles(times)
    return {
        **spread,
        "images_per_s": 1e3 * settings.batch_size / spread["p50_ms"],
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "repeats": settings.repeats,
    }


def quantiles(times: list[float]) -> dict[str, float]:
    """Median, quartiles, and the 20th and 80th percentile of milliseconds, as fields of a record."""
    cuts = statistics.quantiles(times, n=20, method="inclusive") if len(times) > 1 else times * 19
    return {f"p{percent}_ms": cuts[percent // 5 - 1] for percent in (20, 25, 50, 75, 80)}


def _forward(net: Backbone):
    net.eval()

    @torch.no_grad()
    def step(x: Tensor, t: Tensor, y: Tensor) -> None:
        net(x, t, y)

    return step


def _train_step(net: Backbone, settings: BenchConfig):
    net.train()
    optimizer = torch.optim.AdamW((p for p in net.parameters() if p.requires_grad), lr=1e-6, weight_decay=0.0)
    live = [p.detach() for p in net.parameters()]
    averaged = [p.clone() for p in live]

    def step(x: Tensor, t: Tensor, y: Tensor) -> None:
        loss = net(x, t, y).float().square().mean()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, enabled=False):
            loss.backward()
            optimizer.step()
            follow(averaged, live, 1e-4)

    return step
