"""Trainings with noise of a GPU, interpreted on the CPU and (marked gpu) on a GPU."""

from dataclasses import replace

import pytest
import torch
from lamabench.harness.data.images import load
from lamabench.harness.data.items import batches, check_noise
from lamabench.harness.diffusion.objective import objective
from lamabench.harness.sections import TrainConfig
from lamabench.kernels.errors import InputError
from trainings import assert_same, longer, make, metrics, trained


@pytest.mark.interpreted
def test_a_training_has_this_noise_and_goes_on_bit_for_bit(tmp_path):
    from lamabench.harness.data.noise import noise

    config = make(steps=4, noise="gpu")
    data, goal = load(config.data), objective(config.objective)
    plain = batches(data, goal, make(steps=4), 10, 2, "cpu")
    for step, (batch, other) in enumerate(zip(batches(data, goal, config, 10, 2, "cpu"), plain, strict=True), start=2):
        assert list(batch) == ["x0", "y", "t", "noise"]
        assert all(torch.equal(batch[name], other[name]) for name in ("x0", "y", "t"))
        assert torch.equal(batch["noise"], noise(config.seed, torch.arange(4 * step, 4 * step + 4), (1, 8, 8)))
    whole = trained(tmp_path / "whole", config)
    broken = trained(trained(tmp_path / "broken", longer(config, 2)), config)
    assert_same(whole, broken)
    other = trained(tmp_path / "other", make(steps=4))
    assert metrics(whole)[0]["loss"] != metrics(other)[0]["loss"]


def test_it_needs_a_gpu(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    check_noise(TrainConfig(), "cpu")
    with pytest.raises(InputError, match=r"train.noise=gpu cannot be drawn on the device cpu: Triton needs a GPU"):
        trained(tmp_path / "run", make(noise="gpu"))
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.gpu
def test_a_training_on_a_gpu_has_the_same_steps_with_and_without_a_graph(tmp_path):
    config = make(steps=8, noise="gpu", compile="whole-step", log_every=1)
    on_gpu = replace(config, run=replace(config.run, device="cuda", workers=2))
    eager = replace(on_gpu, train=replace(on_gpu.train, compile="eager"), run=replace(on_gpu.run, workers=0))
    whole, plain = trained(tmp_path / "whole", on_gpu), trained(tmp_path / "plain", eager)
    losses = [[line["loss"] for line in metrics(folder)] for folder in (whole, plain)]
    assert len(losses[0]) == 8 and losses[0] == pytest.approx(losses[1], rel=1e-3)
