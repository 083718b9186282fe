"""Means of gradients over processes: here a group of one process, whose means are its own gradients."""

import pytest
import torch
from lamabench.harness import parallel
from lamabench.harness.training.averaging import averaging
from torch import nn


class Net(nn.Module):
    """Dropout, and a layer that the output does not depend on."""

    def __init__(self):
        super().__init__()
        self.used, self.unused, self.drop = nn.Linear(3, 3), nn.Linear(3, 3), nn.Dropout()

    def forward(self, x, t, y):
        return self.drop(self.used(x)) * t[:, None] + y[:, None]


@pytest.fixture
def group(monkeypatch):
    monkeypatch.setattr(parallel, "size", lambda: 2)
    store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def gradients(call, net, passes):
    """Those of three steps of several passes each."""
    torch.manual_seed(1)
    steps = []
    for _ in range(3):
        net.zero_grad()
        for _ in range(passes):
            x, t, y = torch.randn(4, 3), torch.rand(4), torch.ones(4)
            call(x, t, y).square().mean().backward()
        steps.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    return steps


@pytest.mark.parametrize("passes", [1, 3])
def test_the_exchange_leaves_out_what_has_no_gradient_and_draws_nothing(group, passes):
    net = Net()
    plain = gradients(net, net, passes)
    for step, expected in zip(gradients(averaging(net, net, passes), net, passes), plain, strict=True):
        assert step.keys() == expected.keys() == {"used.weight", "used.bias"}
        for name, value in expected.items():
            torch.testing.assert_close(step[name], value, rtol=0, atol=0)
    assert not net.unused.weight.requires_grad and net.used.weight.requires_grad
