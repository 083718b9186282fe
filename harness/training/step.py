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
from .graph import Update, WholeStep
from .sharding import local, own_rows, whole
from .window import new_window, restore_window, sums


def seed_dropout(seed: int, updates: int, rank: int) -> None:
    """Seed the dropout of the step after `updates` others, in one of the processes of a training."""
    draw = generator(seed, Stream.DROPOUT, updates * RANKS + rank)
    torch.manual_seed(int(draw.integers(2**63)))


class TrainStep:
    """Forward, loss, backward, clipping, AdamW and EMA, and the state that they change: weights, their averages, Adam's
    moments, `updates`, the number of steps so far, and `window` (window.py), the sums of what is not yet logged: the
    metrics, the loss by quarter of t, and the norm of the gradients before clipping; and the largest loss of a step.

    `call` is `net`, or `net` compiled or wrapped. The caller sets the net's training mode and checkpointing. If the
    parameters of `net` are in shards (sharding.py), so is all that has their shapes.
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
        self.window = new_window(objective.metrics, device)

    def __call__(self, batch: Mapping[str, Tensor]) -> None:
        """One step on a batch of `x0` and `noise` [B, C, S, S], `t` [B] and `y` [B]."""
        self._step(batch, self._run)

    def without_graph(self, batch: Mapping[str, Tensor]) -> None:
        """As a call, but the work runs directly."""
        self._step(batch, self._update)

    def close(self) -> None:
        """Free the graph of the step, if it has one. The step cannot be called again."""
        if isinstance(self._run, WholeStep):
            self._run.close()

    def _step(self, batch: Mapping[str, Tensor], update: Update) -> None:
        inputs = [batch[key].to(self.device, non_blocking=True) for key in ("x0", "y", "t", "noise")]
        self._set_rate()
        if self.net.draws:  # dropout of a step depends on nothing before it, so that a continued training repeats it
            seed_dropout(self.seed, self.updates, self.rank)
        update(inputs)
        self.ema.update(self.updates)  # after the graph, because its share is another at each step; it starts meanwhile
        self.updates += 1

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1: `lr`, after a linear rise over the first `warmup` steps."""
        return self.lr * min(1, step / self.warmup) if self.warmup else self.lr

    def _set_rate(self) -> None:
        rate = self.rate(self.updates + 1)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _update(self, inputs: Sequence[Tensor]) -> None:
        """Gradients and AdamW: what a CUDA graph may capture, so no number of Python's changes here between steps.

        `inputs` are x0, y, t and noise on the device.
        """
        self.optimizer.zero_grad(set_to_none=True)
        size = self.micro_batch or len(inputs[0])
        passes = len(inputs[0]) // size
        loss, place = torch.zeros_like(self.window[-1]), self.objective.metrics.index("loss")
        for x0, y, t, noise in zip(*(tensor.split(size) for tensor in inputs), strict=True):
            x_t = self.objective.corrupt(x0, t, noise)
            with autocast(self.device, self.precision):
                out = self.call(x_t, t, y)
            losses = self.objective.loss(out.float(), x0, x_t, t, noise)
            (losses["loss"].mean() / passes).backward()
            part = sums(losses, self.objective.metrics, t, self.objective.span) / passes
            self.window[:-2].add_(part)
            loss += part[place]
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None], foreach=True)
        self.window[-2].add_(whole(norm))
        self.window[-1].clamp_(min=loss)
        if self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.trained, self.clip, norm, foreach=True)
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

    @torch.no_grad()
    def restore(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint, bit for bit. Only the own rows are read of a file whose tensors are sharded here
        and not in memory."""
        for name, parameter in self.net.named_parameters():
            if f"exp_avg/{name}" in saved.tensors:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(saved.step), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        tensors = {name: tensor for name, tensor in self.tensors().items() if name != "window"}
        values = saved.rows(own_rows(tensors))
        for name, tensor in tensors.items():
            if local(tensor).numel():
                local(tensor).copy_(values[name])
        restore_window(self.window, values["window"], saved.step > saved.window_start)
        self.updates = saved.step
