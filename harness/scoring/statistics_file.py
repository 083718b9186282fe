"""Moments of a reference in an .npz file, with the keys of ADM's evaluator.

    mu, sigma       float [D], [D, D]: mean and unbiased covariance of the pooled features
    mu_s, sigma_s   the same of the spatial features, where the network has them
    count           the number of images
    network, weights, inputs       the extractor's name, the SHA-256 of its weights, and its preprocessing
    name, fingerprint, images      of the data: name, fingerprint, and [H, W, C] of an image
    checksum        SHA-256 of all moments, 64 hex digits

ADM's own files have only the first two lines. Their network is Inception-2015, with the weights that torch-fidelity
publishes.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...kernels.errors import InputError
from ..data.archive import npz_headers, read_npz
from ..data.files import sha256
from ..disk import access, write_atomically
from .features import Extractor
from .networks import NETWORKS, Network
from .statistics import Moments

POOLED, SPATIAL = "", "_s"  # what follows mu and sigma
OF_NETWORK = ("network", "weights", "inputs")  # of an extractor's identity
OF_DATA = ("name", "fingerprint")
ADM = {"network": NETWORKS["inception_v3"].extractor, "weights": str(NETWORKS["inception_v3"].sha256)}


@dataclass(frozen=True)
class Statistics:
    """What a file of moments contains: `moments` by `POOLED` and `SPATIAL` (their count is 0 where it is unknown), what
    is known of the `network`, the `name` and `fingerprint` of the data, and `shape` [H, W, C] of an image or None."""

    path: Path
    moments: Mapping[str, Moments]
    network: Mapping[str, str]
    name: str
    fingerprint: str
    shape: list[int] | None = None

    @property
    def count(self) -> int | None:
        """The number of images, None if the file does not say."""
        return self.moments[POOLED].count or None

    def of(self, extractor: Extractor, layer: str) -> Moments:
        """The moments of a layer. Raises InputError as `check` does, and if the file has none of the layer."""
        self.check(extractor.identity)
        part = next((part for part, one in parts(extractor.network).items() if one == layer), None)
        if part is None or part not in self.moments:
            name = extractor.identity["network"]
            raise InputError(f"evaluate.reference {self.path} has no moments of layer {layer} of {name}")
        return self.moments[part]

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raise InputError if the moments are of another network, other weights or other inputs than an extractor of
        this identity has, as far as it says them."""
        for key, value in self.network.items():
            if identity.get(key, value) != value:
                what = "" if key == "network" else f" with {key} {{}}"
                this, that = (f"{_name(one)}{what.format(_short(one[key]))}" for one in (self.network, identity))
                raise InputError(
                    f"evaluate.reference {self.path} has moments of {this}, which cannot be compared with features of "
                    f"{that}: set evaluate.features={_name(self.network)}"
                    f"{' and its weights (evaluate.features_path)' if what else ''}, or make another reference "
                    "(lamabench reference … --out FILE.npz)"
                )


def _name(identity: Mapping[str, Any]) -> str:
    """The name of a network in `evaluate.features`, from an extractor's identity; that of the extractor if no network
    has it."""
    extractor = identity["network"]
    return next((name for name, one in NETWORKS.items() if one.extractor == extractor), extractor)


def _short(value: str) -> str:
    """A checksum as its first eight digits; anything else as it is."""
    return value[:8] if len(value) == 64 else value


def parts(network: Network) -> dict[str, str]:
    """The layers of a network whose moments a file has, by what follows `mu` and `sigma`."""
    return {POOLED: network.pooled} | ({SPATIAL: network.spatial} if network.spatial else {})


def checksum(moments: Mapping[str, Moments]) -> str:
    """The SHA-256 of moments, 64 hex digits."""
    digest = hashlib.sha256()
    for part in sorted(moments):
        digest.update(f"{part}{moments[part].count}".encode())
        digest.update(moments[part].mean.astype("<f8").tobytes())
        digest.update(moments[part].covariance.astype("<f8").tobytes())
    return digest.hexdigest()


def write_statistics(path: Path, moments: Mapping[str, Moments], facts: Mapping[str, Any], shape: list[int]) -> None:
    """Write moments by `POOLED` and `SPATIAL`, with `facts`: `OF_NETWORK` and `OF_DATA`. Raises InputError for a place
    where nothing can be written."""
    arrays: dict[str, Any] = {"count": moments[POOLED].count, "images": shape, "checksum": checksum(moments)}
    for part, one in moments.items():
        arrays |= {f"mu{part}": one.mean, f"sigma{part}": one.covariance}
    arrays |= {key: facts[key] for key in (*OF_NETWORK, *OF_DATA)}
    content = io.BytesIO()
    np.savez(content, **arrays)
    with access("write", path, missing=True):
        write_atomically(path, content.getvalue())


def has_moments(path: Path) -> bool:
    """Whether an .npz file has moments. Raises InputError if it is missing or no readable .npz."""
    if not path.exists():
        raise InputError(f"evaluate.reference {path} does not exist")
    return bool(npz_headers(path, ("mu", "sigma")))


def check_same(name: str | None, digest: str) -> None:
    """Raise InputError if a file has another SHA-256 than when the scores against it were asked for. Without a file or
    without a SHA-256 there is nothing to compare."""
    if name is None or not digest:
        return
    path = Path(name)
    with access("read", path, missing=True):
        now = sha256(path)
    if now != digest:
        raise InputError(
            f"evaluate.reference {path} is not the file that it was when this job was queued: its SHA-256 is "
            f"{now[:12]}, not {digest[:12]}; sweep retry scores against the file as it is then"
        )


def read_statistics(path: Path) -> Statistics:
    """The moments in an .npz file. Raises InputError for arrays that are missing, of wrong shapes or not finite, for a
    covariance that is not symmetric, and for a file that does not match its checksum."""
    names = [f"{name}{part}" for part in (POOLED, SPATIAL) for name in ("mu", "sigma")]
    arrays = read_npz(path, (*names, "count", "images", "checksum", *OF_NETWORK, *OF_DATA))
    count = _count(path, arrays)
    there = [part for part in (POOLED, SPATIAL) if part == POOLED or f"mu{part}" in arrays or f"sigma{part}" in arrays]
    moments = {part: _moments(path, arrays, part, count) for part in there}
    texts = {key: str(arrays[key]) for key in (*OF_NETWORK, *OF_DATA, "checksum") if key in arrays}
    if "checksum" not in texts:
        return Statistics(path, moments, ADM, path.stem, sha256(path)[:16])
    if missing := [key for key in (*OF_NETWORK, *OF_DATA, "images") if key not in arrays]:
        raise InputError(f"evaluate.reference {path} lacks {', '.join(missing)}")
    if texts["checksum"] != checksum(moments):
        raise InputError(f"evaluate.reference {path} is damaged: its moments do not match its checksum")
    network = {key: texts[key] for key in OF_NETWORK}
    shape = [int(side) for side in arrays["images"]]
    return Statistics(path, moments, network, texts["name"], texts["fingerprint"], shape)


def _count(path: Path, arrays: Mapping[str, NDArray[Any]]) -> int:
    if "count" not in arrays:
        return 0
    count = arrays["count"]
    if count.shape != () or count.dtype.kind not in "iu" or count < 2:
        raise InputError(f"evaluate.reference {path}: count must be one number of 2 or more")
    return int(count)


def _moments(path: Path, arrays: Mapping[str, NDArray[Any]], part: str, count: int) -> Moments:
    where = f"evaluate.reference {path}"
    for name in (f"mu{part}", f"sigma{part}"):
        if name not in arrays:
            raise InputError(f"{where} has no array {name}: moments are mu [D] and sigma [D, D]")
        if arrays[name].dtype.kind != "f" or not np.isfinite(arrays[name]).all():
            raise InputError(f"{where}: {name} must be finite floating-point numbers, not {arrays[name].dtype}")
    mean, covariance = (arrays[f"{name}{part}"].astype(np.float64) for name in ("mu", "sigma"))
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise InputError(
            f"{where}: mu{part} {list(mean.shape)} and sigma{part} {list(covariance.shape)} must be [D] and [D, D]"
        )
    if np.abs(covariance - covariance.T).max(initial=0) > 1e-6 * np.abs(covariance).max(initial=0):
        raise InputError(f"{where}: sigma{part} is not symmetric, so it is no covariance")
    return Moments(count, mean, covariance)
