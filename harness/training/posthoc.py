"""Averages of the weights with power-function profiles, and the reconstruction of others after the training.

Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models" (arXiv 2312.02696), section 3 and
appendix C. The average of the exponent γ at step t gives the weights of step τ the share p(τ) = (γ + 1) τ^γ / t^(γ+1)
(equation 121), so that its width is a fixed part of the training: the relative width σ is the standard deviation of p
over t (equation 123). Averages of a few widths that are kept at many moments span those of all widths.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from decimal import Context, Decimal, localcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Profile = tuple[int, float]  # step, and relative width
# The squared distance of a kept profile (of length 1) from the span of the others below which it is left out. It would
# add the rounding of the weights, times the inverse of the distance, and next to nothing else.
LEAST = 1e-6


class Fit(NamedTuple):
    """A linear combination of profiles, and the length of its difference from the target over that of the target."""

    coefficients: list[float]
    error: float


def exponent(width: float) -> float:
    """The γ of a relative width σ from 0 to 12^-0.5: the largest root of (γ + 2)² (γ + 3) = (γ + 1) / σ² (equation 126,
    algorithm 2). Newton's method from the right of the root, where the cubic is convex, takes arithmetic that is the
    same on any machine."""
    inverse = width**-2
    x = 1 / width
    while True:
        value = ((x + 7) * x + 16 - inverse) * x + 12 - inverse
        following = x - value / ((3 * x + 14) * x + 16 - inverse)
        if following >= x:
            return x
        x = following


def share(gamma: float, step: int) -> float:
    """1 - β of a step, counted from 1: the share of its weights in the average, with β = (1 - 1/t)^(γ+1) (section 3.1).
    So the average is the integral of p over weights that are constant from step to step, exactly."""
    return 1.0 if step == 1 else -math.expm1((gamma + 1) * math.log1p(-1 / step))


def fit(profiles: Sequence[Profile], target: Profile) -> Fit:
    """The combination of kept profiles with the least squared distance from a target (appendix C), whose coefficients
    add up to 1: then weights that never changed stay as they are, which matters because the networks here, unlike the
    paper's, do not normalise their weights.

    The numbers are the same on any machine. Logarithms and exponentials are decimal, because those of the system are
    not, and the solution in float64 takes no library of linear algebra.
    """
    gammas = {width: exponent(width) for _, width in (*profiles, target)}
    order = sorted(range(len(profiles)), key=lambda index: profiles[index], reverse=True)  # the latest first
    kept = [(step, gammas[width]) for step, width in (profiles[index] for index in order)]
    last = (target[0], gammas[target[1]])
    with localcontext(Context(prec=28)):
        logarithms = {step: Decimal(step).ln() for step, _ in (*kept, last)}
        matrix = np.ones((len(kept), len(kept)))
        for row, one in enumerate(kept):
            for column, other in enumerate(kept[:row]):
                matrix[row, column] = matrix[column, row] = _cosine(one, other, logarithms)
        products = np.array([_cosine(one, last, logarithms) for one in kept])
    # Coefficients of profiles of length 1 are called z here. Those that are asked for add up to the sum of scales · z.
    scales = np.array([_length(*last) / _length(*one) for one in kept])
    first, second = _solve(matrix, np.stack([products, scales], 1)).T
    multiplier = (1 - _dot(scales, first)) / _dot(scales, second)
    z = first + multiplier * second
    coefficients = [0.0] * len(kept)
    for index, value in zip(order, scales * z, strict=True):
        coefficients[index] = float(value)
    return Fit(coefficients, math.sqrt(max(0.0, 1 - _dot(products, z) + multiplier)))


def _length(step: int, gamma: float) -> float:
    """The square root of the integral of p²."""
    return (gamma + 1) / math.sqrt((2 * gamma + 1) * step)


def _cosine(one: tuple[int, float], other: tuple[int, float], logarithms: Mapping[int, Decimal]) -> float:
    """The integral of the product of two profiles (step, γ), over their lengths."""
    (early, a), (late, b) = sorted((one, other), key=lambda profile: profile[0])
    power = ((logarithms[early] - logarithms[late]) * Decimal(b + 0.5)).exp()
    return math.sqrt((2 * a + 1) * (2 * b + 1)) / (a + b + 1) * float(power)


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return math.fsum((a * b).tolist())


def _solve(matrix: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Solve a symmetric system with ones on its diagonal by Gauss-Jordan elimination, elementwise. A row whose pivot is
    below LEAST is left out, and its solution is 0."""
    count = len(matrix)
    rows = np.concatenate([matrix, sides], 1)
    solution = np.zeros_like(sides)
    used = []
    for k in range(count):
        if rows[k, k] < LEAST:
            continue
        used.append(k)
        rows[k] /= rows[k, k]
        factors = rows[:, k].copy()
        factors[k] = 0
        rows -= np.multiply.outer(factors, rows[k])
    solution[used] = rows[used, count:]
    return solution


def combined(terms: Iterable[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """The linear combination of tensors by name, added up in float64, in the type of the first. What is not of floating
    point is that of the first."""
    sums: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    for coefficient, tensors in terms:
        for name, value in tensors.items():
            if name not in sums:
                kinds[name] = value.dtype
                sums[name] = value.double() * coefficient if value.is_floating_point() else value
            elif value.is_floating_point():
                sums[name] += value.double() * coefficient  # a product and a sum, which no machine fuses
    return {name: value.to(kinds[name]) for name, value in sums.items()}
