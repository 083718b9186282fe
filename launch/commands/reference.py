"""`lamabench reference`: the moments of a set of images, against which samples are scored without the images."""

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...harness.progress import Progress
from ...kernels.errors import InputError
from ..compose import choices, compose
from ..output import command

AGAIN = "the same command begins again, because features of so few images are saved at the end of a pass only"
SETTINGS = ("features", "features_path", "batch_size", "reference_count", "download")  # of evaluate


def run(args: argparse.Namespace) -> int:
    taken = ("data=", "data.", "run.", *(f"evaluate.{name}=" for name in SETTINGS))
    if wrong := [word for word in args.words if not word.startswith(taken)]:
        raise InputError(
            f"reference takes data=NAME, settings of data and run, and evaluate.{{{','.join(SETTINGS)}}}, "
            f"not {wrong[0]!r}"
        )
    if not any(word.startswith("data=") for word in args.words):
        raise InputError(f"reference needs data: data=NAME; choices: {', '.join(choices('data'))}")
    config, out = compose(args.words)[0], args.out
    if out is not None and (out.suffix != ".npz" or out.is_dir() or not out.parent.is_dir()):
        raise InputError(f"--out {out} must be a FILE.npz in a folder that exists")
    if out is not None and not os.access(out.parent, os.W_OK):
        raise InputError(f"cannot write --out {out}: {out.parent} is not writable")

    from ...harness.device import pick_device
    from ...harness.scoring import statistics_file
    from ...harness.scoring.features import Extractor, prepare_cache
    from ...harness.scoring.networks import network_of
    from ...harness.scoring.reference import Count, reference_of, short_hash

    settings, progress = config.evaluate, Progress()
    layers = statistics_file.parts(network_of(settings.features))
    extractor = Extractor(settings, [*layers.values()], pick_device(config.run.device))
    reference = reference_of(config, progress.say)
    assert reference.cache is not None
    prepare_cache(reference.cache)
    reference = replace(reference, counted=Count(0, lambda done, total: progress.update("reference", done, total)))
    try:
        moments = {part: reference.moments(extractor, layer) for part, layer in layers.items()}
    except KeyboardInterrupt as error:
        if reference.images is not None and reference.keeps(extractor):
            raise KeyboardInterrupt(*error.args[:1], AGAIN) from None
        raise

    whole, shape = moments[statistics_file.POOLED], reference.shape
    identity = {key: extractor.identity[key] for key in statistics_file.OF_NETWORK}
    facts: dict[str, Any] = {
        "name": f"{reference.name}-{whole.count}",
        "count": whole.count,
        "images": shape,
        "fingerprint": reference.fingerprint,
        "dimensions": {f"mu{part}": len(one.mean) for part, one in moments.items()},
        **identity,
        "checksum": statistics_file.checksum(moments),
        "protocol": short_hash({**extractor.identity, "images": shape, **reference.identity}, 8),
        "file": None if out is None else str(out),
    }
    if out is not None:
        about = {**identity, "name": reference.name, "fingerprint": reference.fingerprint}
        statistics_file.write_statistics(out, moments, about, shape or [])
    print(json.dumps(facts, indent=1) if args.json else "\n".join(_lines(facts)))
    return 0


def _lines(facts: dict[str, Any]) -> Iterator[str]:
    height, width, channels = facts["images"]
    dimensions = ", ".join(f"{name} {size}" for name, size in facts["dimensions"].items())
    yield f"{facts['name']}: {facts['count']:,} images of {height} x {width} x {channels}, {facts['fingerprint']}"
    yield f"network: {facts['network']}, weights {facts['weights'][:8]}, {facts['inputs']}"
    yield f"dimensions: {dimensions}"
    yield f"checksum: {facts['checksum'][:16]}"
    yield f"protocol: {facts['protocol']}"
    if facts["file"]:
        yield f"written; {command('evaluate', 'RUN', 'evaluate.reference=' + facts['file'])}"
    else:
        yield "kept in the cache below run.root; --out FILE.npz writes a file for evaluate.reference"
