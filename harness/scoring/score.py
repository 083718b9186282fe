"""Scores of generated images against a reference: every number by torch-fidelity, every name by DESIGN.md, rule 8."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch_fidelity
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from ...kernels.errors import InputError, unknown
from ..config import METRICS, EvaluateConfig
from .features import INCEPTION_2015, NETWORKS, build, extract, find_weights, read_cache, sha256, write_cache

KID_SUBSETS = 100
NEIGHBOURS = 3  # of improved precision and recall
SPLITS = 10  # of the inception score
FULL_COUNT = 50_000  # what FID, KID and IS without a suffix mean
AnyFeatures = NDArray[np.floating]


class Reference(Protocol):
    """A map-style dataset: item i is (uint8 [C, S, S], label)."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int, /) -> tuple[Tensor, Any]: ...


@dataclass(frozen=True)
class Score:
    """One number: `quantity` is fd, kid, precision, recall or isc; `std` is over KID's subsets or IS's splits."""

    quantity: str
    value: float
    std: float | None = None


def kid_subset_size(samples: int, reference: int) -> int:
    """Images in each of KID's 100 subsets: 1000 where both sets have as many, else 100."""
    return 1000 if min(samples, reference) >= 1000 else 100


def metric_name(quantity: str, network: str, count: int) -> str:
    """What a table calls a quantity (of `Score`) of `count` samples: `FID`, `FID-10k`, `FD-EffNetLite0-512`.

    FID, KID and IS belong to network 'Inception'; without a suffix they mean 50,000 samples.
    """
    suffix = f"{count // 1000}k" if count % 1000 == 0 else str(count)
    canonical = {"fd": "FID", "kid": "KID", "isc": "IS"}
    if network == "Inception" and quantity in canonical:
        return canonical[quantity] if count == FULL_COUNT else f"{canonical[quantity]}-{suffix}"
    general = {"fd": "FD", "kid": "KD", "isc": "IS"}
    return f"{general.get(quantity, quantity)}-{network}-{suffix}"


def settings(metric: str, samples: int, reference: int) -> dict[str, Any]:
    """The arguments of torch-fidelity that define a metric of `config.METRICS`. The seed of its draws does not."""
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


def check_counts(metric: str, samples: int, reference: int) -> None:
    """Raises InputError where a metric of `config.METRICS` needs more samples or more reference images."""
    needed = {"fd": 2, "kid": kid_subset_size(samples, reference), "prc": NEIGHBOURS + 1, "isc": SPLITS}[metric]
    if samples < needed:
        raise InputError(f"{metric} needs at least {needed} samples, {samples} given")
    if metric != "isc" and reference < needed:
        raise InputError(f"{metric} needs at least {needed} reference images, {reference} given")


def score(metric: str, samples: AnyFeatures, reference: AnyFeatures | None, seed: int) -> list[Score]:
    """A metric of `config.METRICS` from features [N, D] of the samples and [M, D] of the reference, in float64.

    `fd` is the Fréchet distance (Heusel et al., 2017), `kid` the kernel distance (Bińkowski et al., 2018), `prc`
    improved precision and recall (Kynkäänniemi et al., 2019), `isc` the inception score (Salimans et al., 2016), from
    the samples' logits alone. Raises InputError where sets are too small or the result is not finite.
    """
    check_counts(metric, len(samples), 0 if reference is None else len(reference))
    for name, features in (("samples", samples), ("reference", reference)):
        if features is not None and not np.isfinite(features).all():
            raise InputError(f"{metric} cannot be computed: features of the {name} are not finite")
    ours = torch.from_numpy(samples).double()
    theirs = ours if reference is None else torch.from_numpy(reference).double()
    kwargs = settings(metric, len(ours), len(theirs))
    draw = seed % 2**32  # what numpy's RandomState takes
    try:
        if metric == "fd":
            moments = fid_features_to_statistics(ours), fid_features_to_statistics(theirs)
            found = [Score("fd", fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"])]
        elif metric == "kid":
            out = kid_features_to_metric(ours, theirs, rng_seed=draw, verbose=False, **kwargs)
            found = [Score("kid", out["kernel_inception_distance_mean"], out["kernel_inception_distance_std"])]
        elif metric == "prc":
            # In parts of 2000 rows: 50,000 x 50,000 distances would take 20 GB.
            out = prc_features_to_metric(ours, theirs, save_cpu_ram=True, prc_batch_size=2000, verbose=False, **kwargs)
            found = [Score("precision", out["precision"]), Score("recall", out["recall"])]
        else:
            out = isc_features_to_metric(ours, rng_seed=draw, **kwargs)
            found = [Score("isc", out["inception_score_mean"], out["inception_score_std"])]
    except np.linalg.LinAlgError as error:
        raise InputError(f"{metric} cannot be computed: {error}") from None
    for one in found:
        if not math.isfinite(one.value) or not math.isfinite(one.std or 0.0):
            raise InputError(f"{metric} is not finite: {one.quantity} {one.value}, std {one.std}")
    return found


def evaluate(
    samples: NDArray[np.uint8],
    reference: Reference,
    config: EvaluateConfig,
    *,
    reference_name: str,
    reference_fingerprint: str,
    cache_dir: Path,
    device: str,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Score samples uint8 [N, H, W, C] (C 1 or 3) against a reference of the same H, W and C.

    One row a number: `metric` (its name), `value`, `std` (or None), `count` N, `reference`, `reference_count` (None for
    the inception score, which has no reference), `features` (the network), and `protocol`: 8 hex digits that agree if
    and only if two rows may be compared. `seed` draws KID's subsets and IS's splits. Grey images are repeated to three
    channels. Every image is featurised once; the reference's features are kept in `cache_dir`. `progress(done, total)`
    counts images. Raises InputError for unknown metrics, networks or weights, wrong shapes, short sets and results that
    are not finite.
    """
    metrics = list(dict.fromkeys(config.metrics))
    for metric in metrics:
        if metric not in METRICS:
            raise unknown("evaluate.metrics", metric, METRICS)
        check_counts(metric, len(samples), len(reference))
    shape = _check_shapes(samples, reference)
    weights = find_weights(config.features, config.features_path)
    digest = sha256(weights)
    network = NETWORKS[config.features]
    title = network.title
    if config.features == "inception_v3" and digest != INCEPTION_2015:
        title += f"-{digest[:8]}"  # not Inception-2015 as published, hence no FID
    layers = [network.pooled, network.logits] if "isc" in metrics else [network.pooled]
    extractor = build(config.features, weights, layers, device)

    basis = {
        "torch_fidelity": torch_fidelity.__version__,
        "network": network.extractor,
        "weights": digest,
        "inputs": network.inputs,
        "images": shape,
    }
    against = {"fingerprint": reference_fingerprint, "count": len(reference)}
    cache = cache_dir / f"{config.features}-{_hash({**basis, **against, 'layer': network.pooled}, 16)}.safetensors"
    known = read_cache(cache, (len(reference), network.width)) if metrics != ["isc"] else None
    missing = metrics != ["isc"] and known is None
    total = len(samples) + missing * len(reference)

    def batches(images: Callable[[int, int], Tensor], count: int, before: int) -> Iterator[Tensor]:
        for start in range(0, count, config.batch_size):
            stop = min(start + config.batch_size, count)
            yield images(start, stop).to(device)
            if progress is not None:
                progress(before + stop, total)

    def reference_images(start: int, stop: int) -> Tensor:
        return torch.stack([reference[i][0] for i in range(start, stop)])

    def sample_images(start: int, stop: int) -> Tensor:
        return torch.tensor(samples[start:stop]).permute(0, 3, 1, 2)

    if missing:
        known = extract(extractor, batches(reference_images, len(reference), 0))[network.pooled]
        write_cache(cache, known)
    ours = extract(extractor, batches(sample_images, len(samples), total - len(samples)))

    rows = []
    for metric in metrics:
        alone = metric == "isc"
        definition = {
            **basis,
            "metric": metric,
            "layer": network.logits if alone else network.pooled,
            "settings": settings(metric, len(samples), len(reference)),
            "count": len(samples),
            "reference": None if alone else {"name": reference_name, **against},
        }
        for one in score(metric, ours[definition["layer"]], None if alone else known, seed):
            rows.append(
                {
                    "metric": metric_name(one.quantity, title, len(samples)),
                    "value": one.value,
                    "std": one.std,
                    "count": len(samples),
                    "reference": None if alone else reference_name,
                    "reference_count": None if alone else len(reference),
                    "features": config.features,
                    "protocol": _hash(definition, 8),
                }
            )
    return rows


def _check_shapes(samples: NDArray[np.uint8], reference: Reference) -> list[int]:
    """[H, W, C] of both sets. Raises InputError where they differ or are no images."""
    if samples.dtype != np.uint8 or samples.ndim != 4 or samples.shape[3] not in (1, 3):
        raise InputError(f"samples must be uint8 [N, H, W, C] with C 1 or 3, not {samples.dtype} {list(samples.shape)}")
    first, shape = reference[0][0], list(samples.shape[1:])
    if first.dtype != torch.uint8 or first.ndim != 3:
        raise InputError(f"reference images must be uint8 [C, S, S], not {first.dtype} {list(first.shape)}")
    theirs = [*first.shape[1:], first.shape[0]]
    if theirs != shape:
        raise InputError(f"samples are {shape} [H, W, C], but reference images are {theirs}")
    return shape


def _hash(definition: dict[str, Any], digits: int) -> str:
    text = json.dumps(definition, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:digits]
