"""Scores of samples against a reference: images, features, and one row per number."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import numpy as np

from ...kernels.errors import InputError
from ..config import Config
from ..data.encoder import load_images
from ..device import pick_device
from ..progress import Progress
from ..record import read_records
from ..sections import HELDOUT, EvaluateConfig, check_metric
from ..shards import Samples, set_of
from ..training.checkpoint import check_data
from .counts import OF_MOMENTS, WITHOUT_REFERENCE, reference_images, shortage
from .features import SPOOL_BYTES, Extractor, Features, collect, prepare_cache, spooled, spooled_again
from .floor import floor, floor_count, note
from .heldout import score_weights
from .kept import FeatureSet, open_set
from .networks import Network, network_of
from .protocol import fields_of, generation_of
from .reference import Count, Reference, reference_of, short_hash
from .statistics import Moments, compute, definition, metric_name

Line = dict[str, Any]


class Unscored(InputError):
    """Some metrics cannot be computed: `reasons` says why, by metric."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__("; ".join(reasons.values()))
        self.reasons = reasons


def score_set(
    folder: Path, training: Path, step: int, config: Config, metrics: Sequence[str], progress: Progress
) -> Iterator[Line]:
    """Score the samples in a folder, drawn from the weights of a step of `training`, by some of `sections.METRICS`:
    rows as `evaluate` yields them, with the moment of the weights and how the samples were drawn. The held-out loss is
    of the weights and needs no samples (heldout.py).

    After the last row, raises Unscored if a metric could not be computed. Raises InputError as `score` does, and for
    other data than the training had.
    """
    reasons: dict[str, str] = {}
    if HELDOUT in metrics:
        try:
            yield {"request": HELDOUT, **score_weights(training, config, step, progress)}
        except InputError as error:
            reasons[HELDOUT] = str(error)
    try:
        if sampled := [metric for metric in metrics if metric != HELDOUT]:
            yield from _score_samples(folder, training, config, sampled, progress)
    except Unscored as error:
        reasons |= error.reasons
    if reasons:
        raise Unscored(reasons)


def _score_samples(
    folder: Path, training: Path, config: Config, metrics: Sequence[str], progress: Progress
) -> Iterator[Line]:
    # The record of a score would not tell that it was computed against other images than those of the training.
    if config.evaluate.reference is None:
        check_data(training, load_images(config, config.data, progress.say).fingerprint)
    rows = [one.flat() for one in read_records(folder / "record.jsonl") if one.kind == "sample"]
    names = ("checkpoint_step", "weights", "weights_error", "images_seen", "training_flops", "training_seconds")
    facts = {name: rows[-1][name] for name in names} if rows else {}
    facts |= fields_of(generation_of(folder))
    begun = time.perf_counter()
    for line in score(set_of(folder), config, metrics, Path(config.run.root) / ".cache", progress):
        yield facts | line | {"seconds": round(time.perf_counter() - begun, 3)}


def score(samples: Path, config: Config, metrics: Sequence[str], cache: Path, progress: Progress) -> Iterator[Line]:
    """Score samples (a file or a folder, as `open_set` takes them) against the images of `config.data` by some of
    `sections.METRICS`, each alone or with a split (`fd@train`): rows as `evaluate` yields them.

    Raises InputError if there are no samples, and if the reference is missing. After the last row, raises Unscored if a
    metric could not be computed.
    """
    reasons: dict[str, str] = {}
    for settings, requests in config.evaluate.by_split(metrics):
        lines = evaluate(
            open_set(samples),
            reference_of(replace(config, evaluate=settings), progress.say),
            settings,
            list(requests),
            cache=cache,
            device=pick_device(config.run.device),
            progress=lambda done, total: progress.update("evaluate", done, total),
        )
        try:
            for line in lines:
                yield line | {"request": requests[line["request"]]}
        except Unscored as error:
            reasons |= {requests[metric]: text for metric, text in error.reasons.items()}
    if reasons:
        raise Unscored(reasons)


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
    None), `sampling_error` (sampling_error.py; None for recall), `count` N, `reference`, `reference_count` (the images
    that the metric takes of it; None for the inception score, which has no reference), `features` (the network),
    `evaluation` (plain data that say how samples were scored), `protocol`, its hash: 8 hex digits, equal if and only if
    two rows are comparable, and `floor` and `note` (see floor.py). `settings.seed` draws KID's subsets and IS's splits.
    Grey images are repeated to three channels. The features of an image are computed once for all metrics, in one pass
    that holds only what metrics need: moments for the Fréchet distances, whose features are read once more from a
    temporary file. Those of the reference are cached in the folder `cache`.
    `progress(done, total)` counts images. After the last row, raises Unscored if a metric could not be computed,
    because a set is too small or the result is not finite. Raises InputError for unknown metrics, networks or
    weights, for wrong shapes, and for a cache that cannot be written.
    """
    metrics = list(dict.fromkeys(metrics))
    for metric in metrics:
        check_metric(metric, settings.features)
    network = network_of(settings.features)
    shape = _check_shapes(samples, reference)
    images = {one: reference_images(one, reference.count(one), settings.prc_reference_count) for one in metrics}
    shortages = {one: reference.lack(one) or shortage(one, len(samples), images[one]) for one in metrics}
    reasons = {metric: text for metric, text in shortages.items() if text is not None}
    if isinstance(samples, FeatureSet) and "sfid" in metrics:
        reasons["sfid"] = (
            f"sfid needs spatial features, and only pooled features of {samples.folder} were kept: draw its images "
            "again (lamabench sample … sample.keep=images)"
        )
    layers = {metric: layer_of(metric, network) for metric in metrics if metric not in reasons}
    if not layers:
        raise Unscored(reasons)
    prepare_cache(cache)
    extractor = Extractor(settings, list(dict.fromkeys(layers.values())), device)
    count = Count(0, progress)
    reference = replace(reference, cache=cache, counted=count)
    if isinstance(samples, FeatureSet):
        samples.check(extractor.identity)
        batches = samples.batches(network, settings.batch_size)
    else:
        count.total += len(samples)
        batches = extractor.of_samples(samples, count.add)
    # Features of the reference come first, so that what they lack is known before samples are read.
    expected: dict[str, Moments | Features | None] = {
        metric: None
        if metric in WITHOUT_REFERENCE
        else reference.moments(extractor, layer)
        if metric in OF_MOMENTS
        else reference.features(extractor, layer, images[metric])
        for metric, layer in layers.items()
    }
    whole = {layer for metric, layer in layers.items() if metric not in OF_MOMENTS}
    summed = {layer for metric, layer in layers.items() if metric in OF_MOMENTS}
    with ExitStack() as stack:
        # The error of a distance needs a second pass over the features. Images go through the network once.
        files = {
            layer: stack.enter_context(SpooledTemporaryFile(SPOOL_BYTES, dir=str(cache))) for layer in summed - whole
        }
        wholes, moments = collect(spooled(batches, files), whole, summed)

        def again(layer: str) -> Iterable[Features]:
            return [wholes[layer]] if layer in whole else spooled_again(files[layer], len(moments[layer].mean))

        for metric, layer in layers.items():
            actual = moments[layer] if metric in OF_MOMENTS else wholes[layer]
            evaluation = {
                **extractor.identity,
                "images": shape,
                "metric": metric,
                "layer": layer,
                "settings": definition(metric, len(samples), images[metric] or len(samples), settings.seed),
                "count": len(samples),
                "reference": None if metric in WITHOUT_REFERENCE else {"name": reference.name, **reference.identity},
            }
            if images[metric] != reference.count(metric) and metric not in WITHOUT_REFERENCE:
                evaluation["reference_images"] = images[metric]  # a subset that is drawn at random once
            facts = {
                "request": metric,
                "count": len(samples),
                "reference": None if metric in WITHOUT_REFERENCE else reference.name,
                "reference_count": None if metric in WITHOUT_REFERENCE else images[metric],
                "data_fingerprint": None if metric in WITHOUT_REFERENCE else reference.fingerprint.split("-")[0],
                "features": settings.features,
                "protocol": short_hash(evaluation, 8),
                "evaluation": evaluation,
            }
            try:
                quantities = compute(metric, actual, expected[metric], settings.seed, partial(again, layer), device)
                facts["floor"] = floor(reference, extractor, layer, len(samples), metric)
            except InputError as error:
                reasons[metric] = str(error)
                continue
            width = len(actual.mean) if isinstance(actual, Moments) else 0
            of_floor = None if facts["floor"] is None else floor_count(reference, len(samples))
            facts["note"] = note(metric, len(samples), width, images[metric], of_floor)
            for one in quantities:
                name = metric_name(one.name, extractor.title, len(samples))
                yield {"metric": name, "value": one.value, "std": one.std, "sampling_error": one.error} | facts
    if reasons:
        raise Unscored(reasons)


def layer_of(metric: str, network: Network) -> str:
    """The layer of a network that a metric reads. Raises InputError if it has none."""
    layer = {"isc": network.logits, "sfid": network.spatial}.get(metric, network.pooled)
    if layer is None:
        raise InputError(f"{metric} cannot be computed with features of {network.title}")
    return layer


def _check_shapes(samples: Samples | FeatureSet, reference: Reference) -> list[int]:
    """[H, W, C] of both sets. Raises InputError if they differ or are not images."""
    if samples.dtype != np.uint8 or len(samples.shape) != 4 or samples.shape[3] not in (1, 3):
        raise InputError(f"samples must be uint8 [N, H, W, C] with C 1 or 3, not {samples.dtype} {list(samples.shape)}")
    shape, other = list(samples.shape[1:]), reference.shape
    if other is not None and other != shape:
        raise InputError(f"samples are {shape} [H, W, C], but reference images are {other}")
    return shape
