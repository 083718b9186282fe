"""Scores of samples against a reference: images, features, and one row per number."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...kernels.errors import InputError, unknown
from ..config import Config
from ..data.images import load
from ..device import pick_device
from ..progress import Progress
from ..record import read_records
from ..sections import METRICS, EvaluateConfig
from ..shards import Samples, set_of
from ..training.checkpoint import check_data
from .counts import WITHOUT_REFERENCE, shortage
from .features import Extractor, Features, network_of, prepare_cache
from .floor import floor, floor_count, note
from .kept import FeatureSet, open_set
from .reference import MOMENTS, Count, Reference, reference_of, short_hash
from .statistics import Moments, Quantity, compute, definition, frechet, metric_name

Line = dict[str, Any]


class Unscored(InputError):
    """Some metrics cannot be computed: `reasons` says why, by metric."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__("; ".join(reasons.values()))
        self.reasons = reasons


def score_set(
    folder: Path, training: Path, config: Config, metrics: Sequence[str], progress: Progress
) -> Iterator[Line]:
    """Score the samples in a folder, drawn from the weights of `training`, by some of `sections.METRICS`: rows as
    `evaluate` yields them, with the moment of the weights. Raises InputError as `score` does, and for other data than
    the training had."""
    # The record of a score would not tell that it was computed against other images than those of the training.
    if config.evaluate.reference is None:
        check_data(training, load(config.data, progress.say).fingerprint)
    rows = [one.flat() for one in read_records(folder / "record.jsonl") if one.kind == "sample"]
    names = ("checkpoint_step", "weights", "weights_error", "images_seen", "training_flops", "training_seconds")
    weights = {name: rows[-1][name] for name in names} if rows else {}
    for line in score(set_of(folder), config, metrics, Path(config.run.root) / ".cache", progress):
        yield weights | line


def score(samples: Path, config: Config, metrics: Sequence[str], cache: Path, progress: Progress) -> Iterator[Line]:
    """Score samples (a file or a folder, as `open_set` takes them) against the images of `config.data` by some of
    `sections.METRICS` (see `evaluate`).

    Raises InputError if there are no samples, and if the reference is missing.
    """
    yield from evaluate(
        open_set(samples),
        reference_of(config, progress.say),
        config.evaluate,
        metrics,
        cache=cache,
        device=pick_device(config.run.device),
        progress=lambda done, total: progress.update("evaluate", done, total),
    )


def evaluate(
    samples: Samples | FeatureSet,
    reference: Reference,
    settings: EvaluateConfig,
    metrics: Sequence[str],
    *,
    cache: Path,
    device: str,
    progress: Callable[[int, int], object] | None = None,
) -> Iterator[Line]:
    """Score samples uint8 [N, H, W, C] (C 1 or 3), or what was kept of them, against a reference of the same H, W and
    C, by `metrics` only. Images are read one batch at a time.

    Yields one row per number: `metric` (its name), `request` (its metric in `sections.METRICS`), `value`, `std` (or
    None), `count` N, `reference`, `reference_count` (None for the inception score, which has no reference), `features`
    (the network), and `protocol`: 8 hex digits, equal if and only if two rows are comparable. `settings.seed` draws
    KID's subsets and IS's splits. Grey images are repeated to three channels. The features of an image are computed
    once for all metrics, and those of the reference are cached in the folder `cache`. `progress(done, total)` counts
    images. After the last row, raises Unscored if a metric could not be computed, because a set is too small or the
    result is not finite. Raises InputError for unknown metrics, networks or weights, for wrong shapes, and for a cache
    that cannot be written.
    """
    metrics = list(dict.fromkeys(metrics))
    for metric in metrics:
        if metric not in METRICS:
            raise unknown("evaluate.metrics", metric, METRICS)
    count = Count(0, progress)
    reference = replace(reference, cache=cache, counted=count)
    shape = _check_shapes(samples, reference)
    shortages = {
        metric: reference.lack(metric) or shortage(metric, len(samples), reference.count(metric)) for metric in metrics
    }
    reasons = {metric: text for metric, text in shortages.items() if text is not None}
    metrics = [metric for metric in metrics if metric not in reasons]
    if not metrics:
        raise Unscored(reasons)
    network = network_of(settings.features)
    layers = list(
        dict.fromkeys(network.logits if metric in WITHOUT_REFERENCE else network.pooled for metric in metrics)
    )
    prepare_cache(cache)
    extractor = Extractor(settings, layers, device)
    basis = {**extractor.identity, "images": shape}

    if reference.statistics is not None and set(metrics) & {*MOMENTS}:
        reference.moments(extractor, network.pooled)  # of another network is said before the samples are read
    if isinstance(samples, FeatureSet):
        samples.check(extractor.identity)
    else:
        count.total += len(samples)
    if network.pooled in layers and reference.images is not None:
        reference.features(extractor, network.pooled)
    kept = isinstance(samples, FeatureSet)
    actual = samples.features(network) if kept else extractor.of_samples(samples, count.add)
    for metric in metrics:
        try:
            rows = _rows(metric, actual, reference, settings, extractor, basis)
        except InputError as error:
            reasons[metric] = str(error)
        else:
            yield from rows
    if reasons:
        raise Unscored(reasons)


def _rows(
    metric: str,
    actual: dict[str, Features],
    reference: Reference,
    settings: EvaluateConfig,
    extractor: Extractor,
    basis: dict[str, Any],
) -> list[Line]:
    """The rows of one metric."""
    no_reference, network = metric in WITHOUT_REFERENCE, extractor.network
    layer = network.logits if no_reference else network.pooled
    count, against = len(actual[layer]), None if no_reference else reference.count(metric)
    protocol = {
        **basis,
        "metric": metric,
        "layer": layer,
        "settings": definition(metric, count, against or count),
        "count": count,
        "reference": None if no_reference else {"name": reference.name, **reference.identity},
    }
    if metric == "fd":
        moments = reference.moments(extractor, layer)
        if not np.isfinite(actual[layer]).all():
            raise InputError("fd cannot be computed: features of the samples are not finite")
        quantities = [Quantity("fd", frechet(Moments.of(actual[layer]), moments))]
    else:
        expected = None if no_reference else reference.features(extractor, layer)
        quantities = compute(metric, actual[layer], expected, settings.seed)
    return [
        {
            "metric": metric_name(quantity.name, extractor.title, count),
            "request": metric,
            "value": quantity.value,
            "std": quantity.std,
            "count": count,
            "reference": None if no_reference else reference.name,
            "reference_count": against,
            "data_fingerprint": None if no_reference else reference.fingerprint.split("-")[0],
            "features": settings.features,
            "protocol": short_hash(protocol, 8),
            "floor": floor(reference, extractor, layer, count, metric),
            "note": note(metric, count, actual[layer].shape[1], against, floor_count(reference, count)),
        }
        for quantity in quantities
    ]


def _check_shapes(samples: Samples | FeatureSet, reference: Reference) -> list[int]:
    """[H, W, C] of the samples. Raises InputError if they are no images, or if the reference is of others."""
    if samples.dtype != np.uint8 or len(samples.shape) != 4 or samples.shape[3] not in (1, 3):
        raise InputError(f"samples must be uint8 [N, H, W, C] with C 1 or 3, not {samples.dtype} {list(samples.shape)}")
    shape, other = list(samples.shape[1:]), reference.shape
    if other is not None and other != shape:
        raise InputError(f"samples are {shape} [H, W, C], but reference images are {other}")
    return shape
