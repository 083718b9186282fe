"""Small trainings and their files, for the tests beside this file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lamabench.baselines.dit import DiTConfig
from lamabench.baselines.uvit import UViTConfig
from lamabench.harness.config import Config
from lamabench.harness.disk import append, read_lines
from lamabench.harness.progress import Progress
from lamabench.harness.sections import DataConfig, RunConfig, TrainConfig
from lamabench.harness.training.checkpoint import files, load
from lamabench.harness.training.loop import train
from lamabench.models.lamamba import LaMambaConfig
from lamabench.models.registry import preset
from torch import Tensor

LAMAMBA = LaMambaConfig(
    input_size=8, in_channels=1, num_classes=10, dim=8, depths=[1, 1, 1], bottleneck_depth=1, num_heads=2,
    window_size=4, d_state=2, patch_size=2,
)  # fmt: skip
DIT = DiTConfig(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=16, depth=1, num_heads=2)
ADM = replace(preset("unet_nano").config, input_size=8)
UVIT = UViTConfig(input_size=8, in_channels=1, num_classes=10, patch_size=2, hidden_size=16, depth=3, num_heads=2)
MODERN = replace(DIT, qk_norm=True, rope=True, swiglu=True, rms_norm=True)
FAMILIES = {"lamamba": LAMAMBA, "dit": DIT, "adm": ADM}
EVERY = {**FAMILIES, "uvit": UVIT, "modern": MODERN}  # those of the tests that need no training on the CPU


def make(model: Any = DIT, steps: int = 6, log_every: int = 2, checkpoint_every: int = 2, **settings: Any) -> Config:
    """The configuration of a small training."""
    small = {"steps": steps, "batch_size": 4, "lr": 1e-3, "ema_decay": 0.9, "precision": "float32", **settings}
    return Config(
        model=model,
        data=DataConfig(kind="digits", size=8, channels=1, num_classes=10),
        train=TrainConfig(**small),
        run=RunConfig(device="cpu", log_every=log_every, checkpoint_every=checkpoint_every),
    )


def longer(config: Config, steps: int, **settings: Any) -> Config:
    """The same training with another number of steps."""
    return replace(config, train=replace(config.train, steps=steps, **settings))


def trained(folder: Path, config: Config, *moments: int) -> Path:
    """A training folder, new or existing, after `train`."""
    folder.mkdir(parents=True, exist_ok=True)
    train(folder, config, Progress(), moments)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the newest checkpoint."""
    return load(files(folder / "checkpoints")[0]).tensors


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics without their times."""
    times = ("seconds", "images_per_s", "waited")
    return [{k: v for k, v in line.items() if k not in times} for line in read_lines(folder / "metrics.jsonl")]


def assert_same(a: Path, b: Path) -> None:
    """Assert that both folders end with the same tensors, bit for bit, and the same metrics."""
    first, second = tensors(a), tensors(b)
    assert first.keys() == second.keys() and any(name.startswith("exp_avg_sq/") for name in first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert metrics(a) == metrics(b)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, folder: Path, config: Config) -> None:
    """Train until the line of a step is written."""

    def stop(path: Path, line: dict[str, Any]) -> None:
        append(path, line)
        if line["step"] == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lamabench.harness.training.folder.append", stop)
        trained(folder, config)
