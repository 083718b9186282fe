"""mamba-ssm's compiled scan without what our operator has around it, as a yardstick of time: x is gathered along the
paths and the step sizes are formed before the clock starts, the paths' outputs stay where they are."""

import importlib
from typing import Any

import torch
from torch import Tensor


def output_weights(shape: torch.Size) -> Tensor:
    """Random numbers that the output is weighted with before the backward pass, the same in every precision."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


class ScanAlone:
    """The scan at the arguments of `lamabench.kernels.selective_scan.selective_scan`."""

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        b: Tensor,
        c: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor,
        a: Tensor,
        skip: Tensor,
        order: Tensor,
        inverse: Tensor,
    ) -> None:
        self.extension: Any = importlib.import_module("selective_scan_cuda")
        self.inverse, (directions, channels) = inverse, dt_bias.shape

        def along(v: Tensor) -> Tensor:
            """[B, K, …, L] in image order -> dense, in the order of the paths."""
            return v.gather(3, order[None, :, None].expand_as(v)).contiguous()

        u = along(x.transpose(1, 2)[:, None].expand(-1, directions, -1, -1)).flatten(1, 2)
        rank_first, b, c = (along(v.to(x.dtype).permute(0, 2, 3, 1)) for v in (dt, b, c))
        delta = (dt_weight.to(x.dtype) @ rank_first).flatten(1, 2)
        self.inputs = (u, delta, a.float().flatten(0, 1).contiguous(), b, c, skip.float().flatten())
        self.bias = dt_bias.float().flatten()
        gradient = output_weights(x.shape).to(x)
        self.gradients = along(gradient.transpose(1, 2)[:, None].expand(-1, directions, -1, -1)).flatten(1, 2)
        self.shape = (x.shape[0], directions, channels, x.shape[1])

    def forward(self) -> Any:
        return self.extension.fwd(*self.inputs, None, self.bias, True)

    def both(self) -> Any:
        out, states, *_ = self.forward()
        grads = self.extension.bwd(*self.inputs, None, self.bias, self.gradients, states, None, None, True, False)
        return out, grads

    def output_and_gradient(self) -> list[Tensor]:
        """The operator's output and its gradient of x, summed over the paths in image order: [B, L, E]."""
        out, grads = self.both()
        index = self.inverse[None, :, None].expand(self.shape)
        return [v.view(self.shape).float().gather(3, index).sum(1).transpose(1, 2) for v in (out, grads[0])]
