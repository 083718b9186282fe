"""One step of training. `train` runs it and `bench` times it, so that the benchmark measures the training."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...models.registry import Backbone
from ..device import autocast, is_cuda
from ..diffusion.objective import Objective
from ..random import RANKS, Stream, generator
from ..sections import TrainConfig
from .checkpoint import Checkpoint
from .ema import EMA
from .graph import Update


class TrainStep:
    """Forward, loss, backward, clipping, AdamW and EMA, and the state that they change: weights, their averages, Adam's
    moments, `updates`, the number of steps so far, and `window`, the sums [len(objective.metrics)] of metrics that are
    not yet logged. `grad_norm` is the norm of the last step's gradients before clipping, a tensor without dimensions,
    None without `train.clip`.

    `call` is `net`, or `net` compiled or wrapped. The caller sets the net's training mode and checkpointing.
    """

    def __init__(
        self,
        net: Backbone,
        objective: Objective,
        settings: TrainConfig,
        *,
        call: Callable[..., Tensor],
        device: str,
        micro_batch: int | None = None,
        seed: int = 0,
        rank: int = 0,
        graph: Callable[[Update], Update] | None = None,
    ) -> None:
        """`micro_batch` is the number of images in one pass, a divisor of the batch. None: the whole batch. Dropout
        follows from `seed`, the step and `rank`, the number of this process in its training, and from `micro_batch`.
        `graph` is what runs the work on a GPU, such as `WholeStep`. None: the work runs directly."""
        self.net, self.objective, self.call = net, objective, call
        self.device, self.precision, self.micro_batch = device, settings.precision, micro_batch
        self.lr, self.warmup, self.clip = settings.lr, settings.warmup, settings.clip
        self.seed, self.rank, self.updates = seed, rank, 0
        self.ema = EMA(net, settings.ema_decay, settings.ema_decays, settings.ema_rampup, settings.ema_powers)
        self.trained = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=torch.tensor(self.lr, device=device) if is_cuda(device) else self.lr,  # a captured step reads a tensor
            betas=(settings.betas[0], settings.betas[1]),
            weight_decay=settings.weight_decay,
            fused=True,
            capturable=graph is not None,
        )
        self._run = self._update if graph is None else graph(self._update)
        self.window = torch.zeros(len(objective.metrics), device=device)
        self.grad_norm = None if self.clip is None else torch.zeros((), device=device)

    def __call__(self, batch: Mapping[str, Tensor]) -> None:
        """One step on a batch of `x0` and `noise` [B, C, S, S], `t` [B] and `y` [B]."""
        self._step(batch, self._run)

    def without_graph(self, batch: Mapping[str, Tensor]) -> None:
        """As a call, but the work runs directly."""
        self._step(batch, self._update)

    def _step(self, batch: Mapping[str, Tensor], update: Update) -> None:
        inputs = [batch[key].to(self.device, non_blocking=True) for key in ("x0", "y", "t", "noise")]
        self._set_rate()
        if self.net.draws:  # dropout of a step depends on nothing before it, so that a continued training repeats it
            draw = generator(self.seed, Stream.DROPOUT, self.updates * RANKS + self.rank)
            torch.manual_seed(int(draw.integers(2**63)))
        update(inputs)
        self.ema.update(self.updates)
        self.updates += 1

    def rate(self) -> float:
        """The learning rate of the next step: `lr`, after a linear rise over the first `warmup` steps."""
        return self.lr * min(1, (self.updates + 1) / self.warmup) if self.warmup else self.lr

    def _set_rate(self) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.rate())
            else:
                group["lr"] = self.rate()

    def _update(self, inputs: Sequence[Tensor]) -> None:
        """Gradients and AdamW: what a CUDA graph may capture, so no number of Python's changes here between steps.

        `inputs` are x0, y, t and noise on the device.
        """
        self.optimizer.zero_grad(set_to_none=True)
        size = self.micro_batch or len(inputs[0])
        passes = len(inputs[0]) // size
        for x0, y, t, noise in zip(*(tensor.split(size) for tensor in inputs), strict=True):
            x_t = self.objective.corrupt(x0, t, noise)
            with autocast(self.device, self.precision):
                out = self.call(x_t, t, y)
            losses = self.objective.loss(out.float(), x0, x_t, t, noise)
            (losses["loss"].mean() / passes).backward()
            means = [losses[name].detach().mean() / passes for name in self.objective.metrics]
            self.window += torch.stack(means).to(self.window)
        if self.clip is not None and self.grad_norm is not None:
            self.grad_norm.copy_(torch.nn.utils.clip_grad_norm_(self.trained, self.clip, foreach=True))
        self.optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name in a checkpoint."""
        named = {f"model/{name}": v for name, v in self.net.state_dict().items()}
        for kind, net in self.ema.nets.items():
            named |= {f"{kind}/{name}": v for name, v in net.state_dict().items()}
        for name, parameter in self.net.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq"):
                if parameter in self.optimizer.state:
                    named[f"{moment}/{name}"] = self.optimizer.state[parameter][moment]
        return named | {"window": self.window}

    def restore(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint, bit for bit."""
        self.net.load_state_dict(saved.group("model"))
        for kind, net in self.ema.nets.items():
            net.load_state_dict(saved.group(kind))
        first, second = saved.group("exp_avg"), saved.group("exp_avg_sq")
        for name, parameter in self.net.named_parameters():
            if name in first:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(saved.step), device=parameter.device),
                    "exp_avg": first[name].to(parameter.device),
                    "exp_avg_sq": second[name].to(parameter.device),
                }
        self.window.copy_(saved.tensors["window"])
        self.updates = saved.step
