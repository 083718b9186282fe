"""Metrics from features, and names of metrics (DESIGN.md, rule 8). torch-fidelity computes all but two: the Fréchet
distance, of which it loses digits where a set has fewer images than features, and the kernel distance, which it has
on the CPU alone, where it takes longer than all else of a score."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from ...kernels.errors import InputError
from . import sampling_error
from .counts import NEIGHBOURS, OF_MOMENTS, SPLITS, kid_subset_size, shortage
from .sampling_error import cubic_kernel

KID_SUBSETS = 100
BLOCK = 1024  # features whose moments are taken at once
# Arguments of torch-fidelity. `_distances` computes the same.
_KID: dict[str, Any] = {
    "kid_kernel": "poly",
    "kid_kernel_poly_degree": 3,
    "kid_kernel_poly_gamma": None,
    "kid_kernel_poly_coef0": 1,
}
_ISC: dict[str, Any] = {"splits": SPLITS, "shuffle": True}
FULL_COUNT = 50_000  # the samples of FID, KID and IS without a suffix
AnyFeatures = NDArray[np.floating]


@dataclass(frozen=True)
class Moments:
    """Mean float64 [D] and unbiased covariance float64 [D, D] of `count` features."""

    count: int
    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]

    @classmethod
    def of(cls, features: AnyFeatures) -> "Moments":
        """The moments of features [N, D] of any floating type. Raises InputError for fewer than two."""
        running = RunningMoments()
        running.add(features)
        return running.moments()


class RunningMoments:
    """Moments in float64 of features that come batch by batch, for any order and size of batches and any number of
    processes, equal except for rounding (Chan, Golub & LeVeque, 1979)."""

    def __init__(self) -> None:
        self._joined = 0
        self._mean: NDArray[np.float64] = np.zeros(0)
        self._scatter: NDArray[np.float64] = np.zeros((0, 0))  # the sum of outer products of deviations from the mean
        self._waiting: list[AnyFeatures] = []  # because joining moments costs as much as some hundred features

    @property
    def count(self) -> int:
        """The number of features so far."""
        return self._joined + sum(map(len, self._waiting))

    def add(self, features: AnyFeatures) -> None:
        """Take in features [B, D]."""
        self._waiting.append(features)
        if sum(map(len, self._waiting)) >= BLOCK:
            self._join_waiting()

    def _join_waiting(self) -> None:
        if any(map(len, self._waiting)):
            features = np.concatenate(self._waiting).astype(np.float64)
            mean = features.mean(0)
            features -= mean
            self._join(len(features), mean, features.T @ features)
        self._waiting = []

    def merge(self, other: Moments) -> None:
        """Take in the moments of other features, for example of another process."""
        self._join(other.count, other.mean, other.covariance * (other.count - 1))

    def _join(self, count: int, mean: NDArray[np.float64], scatter: NDArray[np.float64]) -> None:
        if not self._joined:
            self._joined, self._mean, self._scatter = count, mean, scatter
            return
        total, distance = self._joined + count, mean - self._mean
        self._mean = self._mean + distance * (count / total)
        self._scatter += scatter
        self._scatter += np.outer(distance * (self._joined * count / total), distance)
        self._joined = total

    def moments(self) -> Moments:
        """The moments of everything so far. Raises InputError for fewer than two features."""
        self._join_waiting()
        if self._joined < 2:
            raise InputError(f"moments need at least 2 images, {self._joined} given")
        return Moments(self._joined, self._mean, self._scatter / (self._joined - 1))


def frechet(a: Moments, b: Moments) -> float:
    """The squared Fréchet distance |μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½) (Heusel et al., 2017, equation 6).

    It is at least 0. With Σ = F Fᵀ, the trace of (Σa Σb)^½ is the sum of the singular values of Faᵀ Fb. That is exact
    for singular covariances too, because directions without variance have no column in F. Raises InputError if sizes
    differ or a number is not finite.
    """
    first, second = _factors(a, b)
    return _distance(a, b, np.linalg.svd(first.T @ second, compute_uv=False))


def frechet_and_map(a: Moments, b: Moments) -> tuple[float, NDArray[np.float64]]:
    """`frechet`, and W [D, R] of the map W Wᵀ = Σb^½ (Σb^½ Σa Σb^½)^-½ Σb^½ from Σa to Σb, with the pseudo-inverse if
    that is singular: of Faᵀ Fb = U S Vᵀ, W is Fb V S^-½."""
    first, second = _factors(a, b)
    _, values, vectors = np.linalg.svd(first.T @ second, full_matrices=False)
    limit = len(a.mean) * np.finfo(np.float64).eps * values.max(initial=0)
    present = values > limit
    return _distance(a, b, values), second @ vectors[present].T / np.sqrt(values[present])


def _factors(a: Moments, b: Moments) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if a.mean.shape != b.mean.shape:
        raise InputError(f"moments of {len(a.mean)} features cannot be compared with those of {len(b.mean)}")
    if not all(np.isfinite(values).all() for one in (a, b) for values in (one.mean, one.covariance)):
        raise InputError("moments are not finite")
    return _factor(a.covariance), _factor(b.covariance)


def _distance(a: Moments, b: Moments, cross: NDArray[Any]) -> float:
    distance = a.mean - b.mean
    traces = np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross.sum()
    return max(0.0, float(distance @ distance + traces))


def _factor(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """F [D, R] with F Fᵀ = covariance [D, D], of its numerical rank R."""
    values, vectors = np.linalg.eigh(covariance)
    rounding = len(values) * np.finfo(np.float64).eps * values[-1]  # numpy.linalg.matrix_rank has the same limit
    present = values > max(rounding, 0)
    return vectors[:, present] * np.sqrt(values[present])


@dataclass(frozen=True)
class Quantity:
    """One number. `name` is fd, sfid, kid, precision, recall or isc; `std` is over KID's subsets or IS's splits.
    `error` is the standard error from the choice of the samples alone (sampling_error.py). Recall has none, because
    its regions are balls around samples: a binomial error, with fixed balls, would be too small by up to a factor 3."""

    name: str
    value: float
    std: float | None = None
    error: float | None = None


def metric_name(quantity: str, network: str, count: int) -> str:
    """The name of a quantity of `count` samples in tables: `FID`, `FID-10k`, `FD-EffNetLite0-512`.

    FID, sFID, KID and IS are names for the network 'Inception'. Without a suffix they mean 50,000 samples.
    """
    suffix = f"{count // 1000}k" if count % 1000 == 0 else str(count)
    canonical = {"fd": "FID", "sfid": "sFID", "kid": "KID", "isc": "IS"}
    if network == "Inception" and quantity in canonical:
        return canonical[quantity] if count == FULL_COUNT else f"{canonical[quantity]}-{suffix}"
    general = {"fd": "FD", "sfid": "sFD", "kid": "KD", "isc": "IS"}
    return f"{general.get(quantity, quantity)}-{network}-{suffix}"


def definition(metric: str, samples: int, reference: int, seed: int = 0) -> dict[str, Any]:
    """What defines a metric of `sections.METRICS`: arguments of torch-fidelity, and the `seed` of those that draw."""
    if metric == "kid":
        return _KID | {"kid_subsets": KID_SUBSETS, "kid_subset_size": kid_subset_size(samples, reference), "seed": seed}
    return {"prc": {"prc_neighborhood": NEIGHBOURS}, "isc": _ISC | {"seed": seed}}.get(metric, {})


def compute(
    metric: str,
    samples: AnyFeatures | Moments,
    reference: AnyFeatures | Moments | None,
    seed: int,
    again: Callable[[], Iterable[AnyFeatures]] | None = None,
    device: str = "cpu",
) -> list[Quantity]:
    """A metric of `sections.METRICS` from features [N, D] of the samples and [M, D] of the reference, in float64.

    `fd` and `sfid` are Fréchet distances (Heusel et al., 2017), which take moments too, `kid` is the kernel distance
    (Bińkowski et al., 2018), `prc` improved precision and recall (Kynkäänniemi et al., 2019), `isc` the inception score
    (Salimans et al., 2016), from the samples' logits only. `seed`, below 2^32, draws KID's subsets and IS's splits.
    With `again`, which returns the features of the samples once more, batch by batch, numbers have an `error`. What
    compares images with images (`kid`, `prc`) runs on `device`. Raises InputError if sets are too small or the result
    is not finite.
    """
    sets = [("samples", samples)] + ([] if reference is None else [("reference", reference)])
    counts = [one.count if isinstance(one, Moments) else len(one) for _, one in sets]
    if text := shortage(metric, counts[0], counts[1] if len(counts) > 1 else None):
        raise InputError(text)
    for name, one in sets:
        if not all(np.isfinite(x).all() for x in ((one.mean, one.covariance) if isinstance(one, Moments) else (one,))):
            raise InputError(f"{metric} cannot be computed: features of the {name} are not finite")
    try:
        try:
            quantities = _quantities(metric, [one for _, one in sets], seed, again, device)
        except torch.OutOfMemoryError:  # the sampler and other processes have memory too
            torch.cuda.empty_cache()
            quantities = _quantities(metric, [one for _, one in sets], seed, again, "cpu")
    except np.linalg.LinAlgError as error:
        raise InputError(f"{metric} cannot be computed: {error}") from None
    for one in quantities:
        if not all(math.isfinite(number or 0.0) for number in (one.value, one.std, one.error)):
            raise InputError(f"{metric} is not finite: {one.name} {one.value}, std {one.std}")
    return quantities


def _quantities(
    metric: str,
    sets: list[AnyFeatures | Moments],
    seed: int,
    again: Callable[[], Iterable[AnyFeatures]] | None,
    device: str,
) -> list[Quantity]:
    if metric in OF_MOMENTS:
        a, b = (one if isinstance(one, Moments) else Moments.of(one) for one in sets)
        if again is None:
            return [Quantity(metric, frechet(a, b))]
        value, root = frechet_and_map(a, b)
        return [Quantity(metric, value, error=sampling_error.of_frechet(again(), a.mean, b.mean, root))]
    arrays = [one for one in sets if not isinstance(one, Moments)]
    x, y = (torch.from_numpy(arrays[i]).double() for i in (0, -1))
    if metric == "kid":
        distances = _distances(x, y, kid_subset_size(len(x), len(y)), seed, device)
        mean, std = float(distances.mean()), float(distances.std())
        error = None if again is None else sampling_error.of_kernel(x, y, std, KID_SUBSETS, device)
        return [Quantity("kid", mean, std, error)]
    if metric == "prc":
        # In parts of 2000 rows, because 50,000 x 50,000 distances would take 20 GB.
        kwargs = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": 2000}
        out = prc_features_to_metric(x.to(device), y.to(device), save_cpu_ram=True, verbose=False, **kwargs)
        error = None if again is None else sampling_error.of_share(out["precision"], len(x))
        return [Quantity("precision", out["precision"], error=error), Quantity("recall", out["recall"])]
    out = isc_features_to_metric(x, rng_seed=seed, **_ISC)
    mean, std = out["inception_score_mean"], out["inception_score_std"]
    return [Quantity("isc", mean, std, None if again is None else sampling_error.of_splits(std, SPLITS))]


def _distances(x: Tensor, y: Tensor, size: int, seed: int, device: str) -> NDArray[np.float64]:
    """The kernel distances [KID_SUBSETS] between random subsets of `size` rows of x [N, D] and y [M, D], by the
    unbiased estimate (Bińkowski et al., 2018, equation 4). The subsets are those that torch-fidelity draws."""
    draw, distances = np.random.RandomState(seed), []
    for _ in range(KID_SUBSETS):
        a, b = (v[torch.from_numpy(draw.choice(len(v), size, replace=False))].to(device) for v in (x, y))
        within = sum(kernel.sum() - kernel.trace() for kernel in (cubic_kernel(a, a), cubic_kernel(b, b)))
        distances.append(within / (size * (size - 1)) - 2 * cubic_kernel(a, b).mean())
    return torch.stack(distances).cpu().numpy()
