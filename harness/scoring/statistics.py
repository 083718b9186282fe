"""Metrics from features. torch-fidelity computes every number; names follow DESIGN.md, rule 8."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from ...kernels.errors import InputError
from .counts import NEIGHBOURS, SPLITS, kid_subset_size, shortage

KID_SUBSETS = 100
FULL_COUNT = 50_000  # the samples of FID, KID and IS without a suffix
AnyFeatures = NDArray[np.floating]


@dataclass(frozen=True)
class Quantity:
    """One number. `name` is fd, kid, precision, recall or isc; `std` is over KID's subsets or IS's splits."""

    name: str
    value: float
    std: float | None = None


def metric_name(quantity: str, network: str, count: int) -> str:
    """The name of a quantity of `count` samples in tables: `FID`, `FID-10k`, `FD-EffNetLite0-512`.

    FID, KID and IS are names for the network 'Inception'. Without a suffix they mean 50,000 samples.
    """
    suffix = f"{count // 1000}k" if count % 1000 == 0 else str(count)
    canonical = {"fd": "FID", "kid": "KID", "isc": "IS"}
    if network == "Inception" and quantity in canonical:
        return canonical[quantity] if count == FULL_COUNT else f"{canonical[quantity]}-{suffix}"
    general = {"fd": "FD", "kid": "KD", "isc": "IS"}
    return f"{general.get(quantity, quantity)}-{network}-{suffix}"


def definition(metric: str, samples: int, reference: int) -> dict[str, Any]:
    """The arguments of torch-fidelity that define a metric of `sections.METRICS`, without the seed of its draws."""
    return {
        "fd": {},
        "kid": {
            "kid_subsets": KID_SUBSETS,
            "kid_subset_size": kid_subset_size(samples, reference),
            "kid_kernel": "poly",
            "kid_kernel_poly_degree": 3,
            "kid_kernel_poly_gamma": None,
            "kid_kernel_poly_coef0": 1,
        },
        "prc": {"prc_neighborhood": NEIGHBOURS},
        "isc": {"splits": SPLITS, "shuffle": True},
    }[metric]


def compute(metric: str, samples: AnyFeatures, reference: AnyFeatures | None, seed: int) -> list[Quantity]:
    """A metric of `sections.METRICS` from features [N, D] of the samples and [M, D] of the reference, in float64.

    `fd` is the Fréchet distance (Heusel et al., 2017), `kid` the kernel distance (Bińkowski et al., 2018), `prc`
    improved precision and recall (Kynkäänniemi et al., 2019), `isc` the inception score (Salimans et al., 2016), from
    the samples' logits only. `seed`, below 2^32, draws KID's subsets and IS's splits. Raises InputError if sets are too
    small or the result is not finite.
    """
    if text := shortage(metric, len(samples), None if reference is None else len(reference)):
        raise InputError(text)
    for name, features in (("samples", samples), ("reference", reference)):
        if features is not None and not np.isfinite(features).all():
            raise InputError(f"{metric} cannot be computed: features of the {name} are not finite")
    x = torch.from_numpy(samples).double()
    y = x if reference is None else torch.from_numpy(reference).double()
    try:
        quantities = _by_torch_fidelity(metric, x, y, seed)
    except np.linalg.LinAlgError as error:
        raise InputError(f"{metric} cannot be computed: {error}") from None
    for one in quantities:
        if not math.isfinite(one.value) or not math.isfinite(one.std or 0.0):
            raise InputError(f"{metric} is not finite: {one.name} {one.value}, std {one.std}")
    return quantities


def _by_torch_fidelity(metric: str, x: Tensor, y: Tensor, seed: int) -> list[Quantity]:
    kwargs = definition(metric, len(x), len(y))
    if metric == "fd":
        moments = fid_features_to_statistics(x), fid_features_to_statistics(y)
        distance = fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]
        return [Quantity("fd", max(0.0, distance))]  # rounding can make that of nearly equal sets negative
    if metric == "kid":
        out = kid_features_to_metric(x, y, rng_seed=seed, verbose=False, **kwargs)
        return [Quantity("kid", out["kernel_inception_distance_mean"], out["kernel_inception_distance_std"])]
    if metric == "prc":
        # In parts of 2000 rows, because 50,000 x 50,000 distances would take 20 GB.
        out = prc_features_to_metric(x, y, save_cpu_ram=True, prc_batch_size=2000, verbose=False, **kwargs)
        return [Quantity("precision", out["precision"]), Quantity("recall", out["recall"])]
    out = isc_features_to_metric(x, rng_seed=seed, **kwargs)
    return [Quantity("isc", out["inception_score_mean"], out["inception_score_std"])]
