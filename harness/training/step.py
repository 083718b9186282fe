"""One step of training. `train` runs it and `bench` times it, so that the benchmark measures the training."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ...models.registry import Backbone
from ..device import autocast, is_cuda
from ..diffusion.objective import Objective
from .checkpoint import Checkpoint
from .ema import EMA
from .graph import Update


class TrainStep:
    """Forward, loss, backward, AdamW and EMA, and the state that they change: weights, their average, Adam's moments,
    and `window`, the sums [len(objective.metrics)] of metrics that are not yet logged.

    `call` is `net`, or `net` compiled or wrapped. The caller sets the net's training mode and checkpointing.
    """

    def __init__(
        self,
        net: Backbone,
        objective: Objective,
        *,
        call: Callable[..., Tensor],
        device: str,
        precision: str,
        lr: float,
        weight_decay: float = 0.0,
        ema_decay: float = 0.9999,
        micro_batch: int | None = None,
        no_sync: Callable[[], AbstractContextManager[object]] = nullcontext,
        graph: Callable[[Update], Update] | None = None,
    ) -> None:
        """`micro_batch` is the number of images in one pass, a divisor of the batch. None: the whole batch. Every pass
        but the last runs in `no_sync()`, so that a wrapper of the net exchanges gradients once a step. `graph` is what
        runs the work on a GPU, such as `WholeStep`. None: the work runs directly."""
        self.net, self.objective, self.call = net, objective, call
        self.device, self.precision, self.micro_batch, self.no_sync = device, precision, micro_batch, no_sync
        self.lr = lr
        self.ema = EMA(net, ema_decay)
        trained = [p for p in net.parameters() if p.requires_grad]
        # On a GPU a tensor, which a captured step reads anew.
        rate = torch.tensor(lr, device=device) if is_cuda(device) else lr
        adam = {"weight_decay": weight_decay, "fused": True, "capturable": graph is not None}
        self.optimizer = torch.optim.AdamW(trained, lr=rate, **adam)
        self._run = self._update if graph is None else graph(self._update)
        self.window = torch.zeros(len(objective.metrics), device=device)

    def __call__(self, batch: Mapping[str, Tensor]) -> None:
        """One step on a batch of `x0` and `noise` [B, C, S, S], `t` [B] and `y` [B]."""
        self._set_rate()
        self._run(self._inputs(batch))
        self.ema.update()

    def without_graph(self, batch: Mapping[str, Tensor]) -> None:
        """As a call, but the work runs directly."""
        self._set_rate()
        self._update(self._inputs(batch))
        self.ema.update()

    def _inputs(self, batch: Mapping[str, Tensor]) -> list[Tensor]:
        return [batch[key].to(self.device, non_blocking=True) for key in ("x0", "y", "t", "noise")]

    def _set_rate(self) -> None:
        """Give the optimizer the learning rate of this step."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.lr)
            else:
                group["lr"] = self.lr

    def _update(self, inputs: Sequence[Tensor]) -> None:
        """Gradients and AdamW: what a CUDA graph may capture, so no number of Python's changes here between steps.

        `inputs` are x0, y, t and noise on the device.
        """
        self.optimizer.zero_grad(set_to_none=True)
        size = self.micro_batch or len(inputs[0])
        passes = len(inputs[0]) // size
        for i, (x0, y, t, noise) in enumerate(zip(*(tensor.split(size) for tensor in inputs), strict=True)):
            with nullcontext() if i + 1 == passes else self.no_sync():
                x_t = self.objective.corrupt(x0, t, noise)
                with autocast(self.device, self.precision):
                    out = self.call(x_t, t, y)
                losses = self.objective.loss(out.float(), x0, x_t, t, noise)
                (losses["loss"].mean() / passes).backward()
            means = [losses[name].detach().mean() / passes for name in self.objective.metrics]
            self.window += torch.stack(means).to(self.window)
        self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name in a checkpoint."""
        named = {f"model/{name}": v for name, v in self.net.state_dict().items()}
        named |= {f"ema/{name}": v for name, v in self.ema.net.state_dict().items()}
        for name, parameter in self.net.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                if parameter in self.optimizer.state:
                    named[f"{moment}/{name}"] = self.optimizer.state[parameter][moment]
        return named | {"window": self.window}

    def restore(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint, bit for bit."""
        self.net.load_state_dict(saved.group("model"))
        self.ema.net.load_state_dict(saved.group("ema"))
        first, second = saved.group("exp_avg"), saved.group("exp_avg_sq")
        for name, parameter in self.net.named_parameters():
            if name in first:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(saved.step), device=parameter.device),
                    "exp_avg": first[name].to(parameter.device),
                    "exp_avg_sq": second[name].to(parameter.device),
                }
        self.window.copy_(saved.tensors["window"])
