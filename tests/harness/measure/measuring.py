"""Small measurements for the tests beside this file."""

from dataclasses import replace

import torch
from lamabench.baselines.dit import DiT, DiTConfig
from lamabench.harness.config import Config
from lamabench.harness.measure import operators
from lamabench.harness.measure.models import WrongOutput, bench
from lamabench.harness.sections import BenchConfig, DataConfig, RunConfig
from lamabench.kernels import OPERATORS
from lamabench.models.registry import preset

DIT = DiTConfig(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=16, depth=2, num_heads=2)


def make(model=DIT, device="cpu", **settings):
    quick = {"batch_size": 2, "repeats": 2, "seconds": 0.05, "warmup": 1, "precision": "float32"}
    bench_settings = BenchConfig(**{**quick, **settings})
    return Config(model=model, data=DataConfig(), bench=bench_settings, run=RunConfig(device=device))


def rows_of(config, rows=()):
    """The rows of `bench` for a configuration."""
    return bench(config.model, config.bench, config.backend, config.objective, config.run.device, rows=rows)


def operator_rows_of(config):
    """The rows of `bench_operators` for a configuration."""
    return operators.bench_operators(config.model, config.bench, config.backend, config.run.device)


def collect(config, rows=()):
    """Every row of `bench`, and the error at the end or None."""
    return until_wrong(rows_of(config, rows))


def until_wrong(measurements):
    rows = []
    try:
        for row in measurements:
            rows.append(row)
    except WrongOutput as error:
        return rows, str(error)
    return rows, None


NANO = replace(preset("lamamba_nano").config, input_size=8, depths=[2, 1], bottleneck_depth=0, dim=8, num_heads=2)


def kernel_rows(config):
    """Every row of `bench_operators`, and the error at the end or None."""
    return until_wrong(operator_rows_of(config))


def planted(monkeypatch, run, operator="attention", backend="sdpa", **more):
    """Replace the function of a backend."""
    backends = OPERATORS[operator].backends
    monkeypatch.setitem(backends, backend, replace(backends[backend], run=run(backends[backend].run), **more))
    monkeypatch.setattr(OPERATORS[operator], "_resolved", {})  # forget earlier choices


def out_of_memory_above(monkeypatch, batch):
    forward = DiT.forward

    def limited(self, x, t, y):
        if len(x) > batch and not x.is_meta:  # counting the cost needs no memory
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return forward(self, x, t, y)

    monkeypatch.setattr(DiT, "forward", limited)
