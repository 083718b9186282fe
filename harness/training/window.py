"""The sums of a window, the steps since the last regular line of metrics, and the means that a line has of them."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

QUARTERS = 4  # of the range of t
MORE = 2 * QUARTERS + 2  # numbers beside the sums of the metrics
EARLIER = (0, MORE - 1)  # of earlier versions
LARGEST = "largest"  # among the means: the largest loss of a step


def new_window(metrics: Sequence[str], device: str) -> Tensor:
    """Zeros: the sums over steps of each metric; for each quarter of t the sum of its images' losses, over the batch,
    and their share of the batch; and the norm of the gradients. Last, the largest loss of a step (of several processes,
    about the mean of their largest)."""
    return torch.zeros(len(metrics) + MORE, device=device)


def sums(losses: Mapping[str, Tensor], metrics: Sequence[str], t: Tensor, span: float) -> Tensor:
    """What a pass of B images adds to a window, but for its last two numbers, from the losses [B] and t [B] in
    [0, span]."""
    loss = losses["loss"].detach()
    means = torch.stack([losses[name].detach().mean() for name in metrics])
    quarter = (t * QUARTERS / span).long().clamp(0, QUARTERS - 1)
    inside = quarter[:, None] == torch.arange(QUARTERS, device=t.device)
    of_quarter = loss[:, None].expand(-1, QUARTERS).masked_fill(~inside, 0)
    return torch.cat([means, of_quarter.mean(dim=0), inside.to(loss).mean(dim=0)])


def restore_window(window: Tensor, saved: Tensor, begun: bool) -> None:
    """Continue a window that was saved. If it had `begun`, what an earlier version did not sum is NaN until it ends."""
    if begun:
        window.fill_(math.nan)
    window[: len(saved)] = saved


def window_means(window: Tensor, metrics: Sequence[str], steps: int) -> dict[str, float | None]:
    """The means over a window of so many steps: the metrics, `grad_norm`, and `loss_q1` … `loss_q4`, the loss of the
    images with t in that quarter of its range. None for a quarter without images, and for what was not summed. And the
    largest loss of a step (`LARGEST`), None if it is not known."""
    count = len(metrics)
    values = (window / steps).tolist()
    means: dict[str, float | None] = dict(zip(metrics, values[:count], strict=True))
    losses, shares, norm = values[count : count + QUARTERS], values[count + QUARTERS : -2], values[-2]
    largest = float(window[-1])
    means[LARGEST] = None if math.isnan(largest) else largest
    means["grad_norm"] = None if math.isnan(shares[0]) else norm
    for number, (loss, share) in enumerate(zip(losses, shares, strict=True), start=1):
        means[f"loss_q{number}"] = loss / share if share > 0 else None
    return means
