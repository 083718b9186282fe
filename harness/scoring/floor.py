"""What a metric would say of samples that are real images, and remarks on scores that cannot be read without it."""

import json
from pathlib import Path

from ..disk import access, write_atomically
from .counts import OF_MOMENTS, shortage
from .features import Extractor, alone, prepare_cache
from .reference import Reference, short_hash
from .statistics import compute, frechet

FLOORS = (*OF_MOMENTS, "kid")  # the metrics that have one


def floor_count(reference: Reference, count: int) -> int | None:
    """How many images of a reference are compared with its others, in place of `count` samples: as many, but at most
    half. None if the reference has no images."""
    return None if reference.images is None else min(count, len(reference.images) // 2)


def floor(reference: Reference, extractor: Extractor, layer: str, count: int, metric: str) -> float | None:
    """A metric of `FLOORS` between the images of a reference: what a model scores whose samples are real.

    As many images as there are samples (`floor_count`) are compared with all the others by a Fréchet distance, whose
    bias depends on both numbers. The kernel distance has no bias, so that it takes as many of the others. Computed once
    and kept in the reference's cache. None for other metrics, for moments only, and for too few images. Raises
    InputError if features are not finite.
    """
    images = floor_count(reference, count)
    if metric not in FLOORS or images is None or shortage("kid" if metric == "kid" else "fd", images, images):
        return None
    if reference.cache is None:
        return _floor(reference, extractor, layer, images, metric)
    content = {
        "fingerprint": reference.fingerprint,
        "reference": len(reference.images or ()),
        "images": reference.shape,
    }
    content |= {**extractor.identity, "layer": layer, "count": images, "metric": metric}
    file = reference.cache / f"floor-{short_hash(content, 16)}.json"
    if (there := _read(file)) is None:
        prepare_cache(file.parent)
        with alone(file):
            if (there := _read(file)) is None:
                there = _floor(reference, extractor, layer, images, metric)
                write_atomically(file, json.dumps({"floor": there, **content}).encode())
    return there


def _floor(reference: Reference, extractor: Extractor, layer: str, count: int, metric: str) -> float:
    if metric != "kid":
        return frechet(*reference.halves(extractor, layer, count))
    both = reference.features(extractor, layer, 2 * count)
    if 2 * count >= len(reference.images or ()):
        both = both[reference.order()]
    return compute("kid", both[:count], both[count : 2 * count], 0, device=extractor.device)[0].value


def _read(file: Path) -> float | None:
    """The floor in a file of the cache, None without a readable one."""
    try:
        with access("read", file):
            value = json.loads(file.read_bytes())["floor"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    return float(value) if isinstance(value, int | float) else None


def note(metric: str, count: int, width: int, reference: int | None, floor_images: int | None) -> str | None:
    """What a reader of a score of `count` samples must know: that a Fréchet distance of `width` features is mostly
    bias, because there are fewer than twice as many samples, or `reference` images; and that its floor is that of fewer
    images (`floor_images`, None: no floor). None if there is nothing to say."""
    texts = []
    few = [(number, what) for number, what in ((count, "samples"), (reference, "reference images")) if number]
    number, what = min(few, key=lambda one: one[0])
    if metric in OF_MOMENTS and number < 2 * width:
        other = "" if shortage("kid", count, reference) else "; compare kid"
        texts.append(f"{number} {what}, fewer than twice the {width} features: bias dominates{other}")
    if metric in FLOORS and floor_images is not None and floor_images < count:
        texts.append(f"the floor is that of {floor_images} images, half of the reference")
    return "; ".join(texts) or None
