"""Standard errors of scores from the choice of their images alone: how far a score moves if other images are drawn in
the same way from the same weights.

The reference is fixed. An error says nothing about other trainings, and the bias of a score is not in it. Images count
as independent draws: if labels are balanced, every class has its fixed share, and the error is rather too large.
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Float64 = NDArray[np.float64]
BLOCK = 1024  # samples whose influences are computed at once
MOST = 4096  # samples, and reference images, from which the error of a kernel distance is estimated


def of_values(values: NDArray[Any]) -> float:
    """The standard error of the mean of independent numbers [N], N of 2 or more: s / √N, with the sample standard
    deviation s."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def of_frechet(batches: Iterable[NDArray[np.floating]], mean: Float64, other: Float64, root: Float64) -> float:
    """The error of a squared Fréchet distance of N samples, whose features come in `batches` [B, D], by the delta
    method.

    A sample x with z = x - μ moves the distance by 2 (μ - m)·z + zᵀ(I - A)z - tr((I - A)Σ), divided by N, because its
    derivative with respect to Σ is I - A, where A = C^½ (C^½ Σ C^½)^-½ C^½ maps the samples' covariance Σ to the
    reference's covariance C (Dowson & Landau, 1982). The error is the standard deviation of these influences over the
    samples, divided by √N. `mean` is μ, `other` is m, and `root` [D, R] is W with A = W Wᵀ.

    With fewer samples than features Σ is singular, and A has the pseudo-inverse: the derivative in the space that the
    samples span. Of Gaussians with half as many samples as features, the error is 0 to 40 % too large, where a
    bootstrap, whose sets have fewer distinct images, is 2 to 3 times too large. If the samples have the distribution of
    the reference, the error is up to √2 too large for any number of them, because the influences vanish.
    """
    shift, influences = 2 * (mean - other), []
    for batch in batches:
        for start in range(0, len(batch), BLOCK):
            z = batch[start : start + BLOCK].astype(np.float64) - mean
            influences.append(z @ shift + np.square(z).sum(1) - np.square(z @ root).sum(1))
    return of_values(np.concatenate(influences))


def of_kernel(samples: Tensor, reference: Tensor, std: float, subsets: int, device: str = "cpu") -> float:
    """The error of a kernel distance (`cubic_kernel`) that is a mean over random subsets, of float64 [N, D] and [M, D].

    The mean over all possible subsets is a U-statistic, in which a sample x counts 2 (mean k(x, x') - mean k(x, y)),
    with x' the other samples and y the reference: the standard deviation of that, divided by √N, is its error
    (Hoeffding, 1948). The choice of the subsets adds `std`² / `subsets` to the variance. If the two sets have one
    distribution, the error is too large by up to √2. Of more than `MOST` images in a set, a fixed random choice serves.
    """
    x, y = (_some(one).to(device) for one in (samples, reference))
    within, across = cubic_kernel(x, x).fill_diagonal_(0), cubic_kernel(x, y)
    counts = 2 * (within.sum(1) / (len(x) - 1) - across.mean(1))
    return math.hypot(float(counts.std()) / math.sqrt(len(samples)), std / math.sqrt(subsets))


def of_share(share: float, count: int) -> float:
    """The error of a share of `count` images that are in a fixed region, binomial: √(p (1 - p) / N). So that 0 and 1 do
    not seem certain, p has one image more of either kind (Laplace)."""
    p = (share * count + 1) / (count + 2)
    return math.sqrt(p * (1 - p) / count)


def of_splits(std: float, splits: int) -> float:
    """The error of a mean over disjoint parts of the samples with the standard deviation `std`, of which the mean of
    squares is divided by their number."""
    return std / math.sqrt(splits - 1)


def cubic_kernel(a: Tensor, b: Tensor) -> Tensor:
    """The kernel (x·y / D + 1)³ of each row of a [N, D] with each row of b [M, D]: [N, M]."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def _some(features: Tensor) -> Tensor:
    if len(features) <= MOST:
        return features
    rows = np.random.default_rng(0).choice(len(features), MOST, replace=False)
    return features[torch.from_numpy(rows)]
