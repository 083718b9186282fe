"""mamba-ssm's compiled scan without the rest of the operator, as a yardstick of time. x is gathered along the paths and
the step sizes are computed before the clock starts. The outputs of the paths are not added up."""

from typing import Any

from torch import Tensor

from . import backend_mamba_ssm


class ScanAlone:
    """The scan, prepared from weights of the output, [B, L, E], and the arguments of a backend of
    `lamabench.kernels.selective_scan`. A pass returns the paths' outputs and, backward, their gradients of x, both
    [B, K·E, L]."""

    def __init__(self, weights: Tensor, *inputs: Any) -> None:
        x, order, self.inverse = inputs[0], *inputs[8:10]
        *flat, self.bias = backend_mamba_ssm.prepare(*inputs[:9])
        self.inputs = tuple(flat)
        directions, channels = order.shape[0], x.shape[2]
        gradient = weights.to(x).transpose(1, 2)[:, None].expand(-1, directions, -1, -1)
        self.gradients = backend_mamba_ssm.along(gradient, order).flatten(1, 2)
        self.shape = (x.shape[0], directions, channels, x.shape[1])

    def forward(self) -> list[Tensor]:
        return [self._scan()[0]]

    def both(self) -> list[Tensor]:
        out, states, *_ = self._scan()
        backward = backend_mamba_ssm.extension().bwd
        return [out, backward(*self.inputs, None, self.bias, self.gradients, states, None, None, True, False)[0]]

    def results(self, returned: list[Tensor]) -> list[Tensor]:
        """The operator's output and gradient of x, summed over the paths in image order: [B, L, E]."""
        return [
            backend_mamba_ssm.along(v.view(self.shape).float(), self.inverse).sum(1).transpose(1, 2) for v in returned
        ]

    def _scan(self) -> Any:
        return backend_mamba_ssm.extension().fwd(*self.inputs, None, self.bias, True)
