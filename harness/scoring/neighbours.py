"""The nearest training image of each sample, in pixels and in the features that score images. If samples are copies of
training images, they are nearer to them than images of the test split, which the training has never seen."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ...kernels.errors import InputError
from ..config import Config
from ..data.images import ImageData, load_held_out
from ..data.items import epoch_order
from ..device import pick_device
from ..disk import write_atomically
from ..grid import paste
from ..progress import Progress
from ..sections import EvaluateConfig
from .features import Extractor, prepare_cache
from .networks import network_of
from .reference import Count, Reference

CHUNK = 2**24  # values of training images that are compared at a time
TESTS = 128  # images of the test split
PAIRS = 4  # in a row of a picture
QUANTILES = (0.05, 0.5)

Images = NDArray[np.uint8]
Vectors = NDArray[Any]  # [N, D]


@dataclass(frozen=True)
class Neighbours:
    """The nearest training image of each of N samples in a space: its `index` int64 [N] and its `distance` float64 [N].
    `test` are the distances [M] of test images to their nearest training images, None without a test split."""

    index: NDArray[np.int64]
    distance: NDArray[np.float64]
    test: NDArray[np.float64] | None

    def row(self) -> dict[str, float]:
        """Quantiles of the distances and, with test images, theirs and the share of samples that are nearer to a
        training image than 95 % of the test images are: 5 % if samples are as far from them as new images."""
        low, median = np.quantile(self.distance, QUANTILES).tolist()
        row = {"low": low, "median": median}
        if self.test is not None:
            low, median = np.quantile(self.test, QUANTILES).tolist()
            row |= {"test_low": low, "test_median": median, "nearer": float((self.distance < low).mean())}
        return row


def nearest(
    queries: Vectors, count: int, vectors: Callable[[int, int], Vectors], device: str = "cpu"
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Of `count` vectors, the one with the least Euclidean distance to each query [N, D]: its index, the first one if
    several are as near, and the distance, 0 for an equal vector. `vectors(start, stop)` returns some of them.

    Memory: `CHUNK` values of vectors, and their distances to all queries.
    """
    wanted = torch.from_numpy(queries).to(device, torch.float32).flatten(1)
    best = torch.full((len(wanted),), torch.inf, device=device)
    index = torch.zeros(len(wanted), dtype=torch.int64, device=device)
    size = max(1, CHUNK // wanted.shape[1])
    for start in range(0, count, size):
        part = torch.from_numpy(vectors(start, min(start + size, count))).to(device, torch.float32).flatten(1)
        # Differences, not products of matrices, by which equal vectors would have a distance.
        distances = torch.cdist(wanted, part, compute_mode="donot_use_mm_for_euclid_dist")
        least, place = distances.min(dim=1)
        index = torch.where(least < best, place + start, index)
        best = torch.minimum(best, least)
    return index.cpu().numpy(), best.double().cpu().numpy()


def neighbours(
    samples: Images, data: ImageData, config: Config, cache: Path, progress: Progress
) -> dict[str, Neighbours]:
    """The nearest training images, of `data`, of samples uint8 [N, H, W, C] and of `TESTS` test images, a fixed random
    choice: {space: result}.

    The spaces are `pixels`, with the root of the mean square difference in grey levels (0 … 255) as distance, and
    `evaluate.features`, with the Euclidean distance. If a training flips images (`data.flip`), the mirror image of a
    sample counts too. The features of the training images are in the `cache`, or are put there. Raises InputError for
    samples of another shape and for a network without weights.
    """
    shape = [data.size, data.size, data.channels]
    if list(samples.shape[1:]) != shape:
        raise InputError(f"samples are {list(samples.shape[1:])} [H, W, C], but training images are {shape}")
    prepare_cache(cache)
    device, count = pick_device(config.run.device), len(samples)
    held = held_images(data, config)
    queries = np.concatenate([samples.transpose(0, 3, 1, 2), *([] if held is None else [held])])
    views = 2 if config.data.flip else 1
    queries = np.concatenate([queries, queries[..., ::-1]][:views])

    def pixels(start: int, stop: int) -> Vectors:
        progress.update("neighbours", stop, len(data))
        return data.images_at(np.arange(start, stop)).numpy()

    def split(index: NDArray[np.int64], distance: NDArray[np.float64]) -> Neighbours:
        index, distance = index.reshape(views, -1), distance.reshape(views, -1)
        view = distance.argmin(axis=0)[None]
        index, distance = (np.take_along_axis(values, view, 0)[0] for values in (index, distance))
        return Neighbours(index[:count], distance[:count], None if held is None else distance[count:])

    index, distance = nearest(queries, len(data), pixels, device)
    spaces = {"pixels": split(index, distance / np.sqrt(queries[0].size))}
    vectors, theirs = _features(queries, data, config.evaluate, cache, device, progress)
    index, distance = nearest(vectors, len(theirs), lambda start, stop: theirs[start:stop], device)
    return spaces | {config.evaluate.features: split(index, distance)}


def held_images(data: ImageData, config: Config) -> Images | None:
    """`TESTS` images of the test split, or all that there are, uint8 [M, C, S, S]; None if there is no test split."""
    try:
        held = load_held_out(config.data, data.class_names)
    except InputError:
        return None
    return held.images_at(epoch_order(0, 0, len(held))[:TESTS]).numpy()


def _features(
    queries: Images, data: ImageData, settings: EvaluateConfig, cache: Path, device: str, progress: Progress
) -> tuple[Vectors, Vectors]:
    """The pooled features of queries uint8 [N, C, H, W] and of the training images, the latter as scores cache them."""
    layer = network_of(settings.features).pooled
    extractor = Extractor(settings, [layer], device)
    count = Count(len(queries), lambda done, total: progress.update("features", done, total))
    theirs = Reference(data, "", data.fingerprint, cache=cache, counted=count).features(extractor, layer)
    own = extractor.features(lambda start, stop: torch.from_numpy(queries[start:stop]), len(queries), count.add)
    return own[layer], theirs


def write(folder: Path, samples: Images, data: ImageData, spaces: Mapping[str, Neighbours]) -> dict[str, Path]:
    """Write neighbours.json, the indices and distances, and a picture of each space, neighbours-SPACE.png, into a
    folder. A picture has pairs, sample and nearest training image, the nearest pair first. Returns the pictures."""
    white, count = np.full_like(samples[:1], 255), len(samples)
    pictures, table = {}, {}
    for space, result in spaces.items():
        theirs = data.images_at(result.index).permute(0, 2, 3, 1).numpy()
        order = np.argsort(result.distance, kind="stable")
        triples = np.stack([order, order + count, np.full(count, 2 * count)], axis=1)  # with white after each pair
        rows = [triples[start : start + PAIRS].ravel()[:-1] for start in range(0, count, PAIRS)]
        buffer = BytesIO()
        Image.fromarray(paste(np.concatenate([samples, theirs, white]), rows)).save(buffer, "PNG")
        pictures[space] = folder / f"neighbours-{space}.png"
        write_atomically(pictures[space], buffer.getvalue())
        table[space] = {
            "training_image": result.index.tolist(),
            "distance": result.distance.tolist(),
            "test_distance": None if result.test is None else result.test.tolist(),
        }
    write_atomically(folder / "neighbours.json", json.dumps(table, indent=1).encode())
    return pictures
