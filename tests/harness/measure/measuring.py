"""Small measurements, for the tests beside this file."""

from dataclasses import replace

import torch
from lamabench.baselines.dit import DiT, DiTConfig
from lamabench.harness.config import BenchConfig, Config, DataConfig, RunConfig
from lamabench.harness.measure import operators
from lamabench.harness.measure.models import WrongOutput, bench
from lamabench.kernels import OPERATORS
from lamabench.models.registry import preset

DIT = DiTConfig(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=16, depth=2, num_heads=2)


def make(model=DIT, device="cpu", **settings):
    quick = {"batch_size": 2, "repeats": 2, "seconds": 0.05, "warmup": 1, "precision": "float32"}
    shape = {"size": model.input_size, "channels": model.in_channels, "num_classes": model.num_classes}
    data = DataConfig(kind="synthetic", **shape)
    return Config(model=model, data=data, bench=BenchConfig(**{**quick, **settings}), run=RunConfig(device=device))


def rows_of(config, rows=()):
    """What `bench` gives for the sections of a configuration."""
    return bench(config.model, config.bench, config.backend, config.objective, config.run.device, rows=rows)


def operator_rows_of(config):
    """What `bench_operators` gives for the sections of a configuration."""
    return operators.bench_operators(config.model, config.bench, config.backend, config.run.device)


def collect(config, rows=()):
    """Every row, and the error at the end or None."""
    found = []
    try:
        for row in rows_of(config, rows):
            found.append(row)
    except WrongOutput as error:
        return found, str(error)
    return found, None


NANO = replace(preset("lamamba_nano").config, input_size=8, depths=[2, 1], bottleneck_depth=0, dim=8, num_heads=2)


def kernel_rows(config):
    found = []
    try:
        for row in operator_rows_of(config):
            found.append(row)
    except WrongOutput as error:
        return found, str(error)
    return found, None


def planted(monkeypatch, run, operator="attention", backend="sdpa", **more):
    """Put another function in the place of a backend's."""
    backends = OPERATORS[operator].backends
    monkeypatch.setitem(backends, backend, replace(backends[backend], run=run(backends[backend].run), **more))
    monkeypatch.setattr(OPERATORS[operator], "_resolved", {})  # what it has answered so far


def out_of_memory_above(monkeypatch, batch):
    forward = DiT.forward

    def limited(self, x, t, y):
        if len(x) > batch and not x.is_meta:  # the cost is counted without memory
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return forward(self, x, t, y)

    monkeypatch.setattr(DiT, "forward", limited)
