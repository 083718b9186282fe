"""The section `evaluate`: how samples are scored."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from ...kernels.errors import InputError, unknown
from ..checks import check_positive, check_seed
from .limits import MOST_AT_ONCE

FEATURES = ("efficientnet_lite0", "inception_v3", "dinov2_vitl14")
METRICS = ("fd", "kid", "prc", "isc", "sfid")  # of features of samples
SPLITS = ("train", "test")
HELDOUT = "heldout"  # the score of weights, which needs no samples
# Metrics of layers that some networks lack: of a classifier's logits, and of the maps of which ADM computes sFID.
NETWORKS_OF = {"isc": ("efficientnet_lite0", "inception_v3"), "sfid": ("inception_v3",)}


@dataclass
class EvaluateConfig:
    """How samples are scored. `features` names the network and `metrics` what is computed from its features: Fréchet
    distance (`fd`), kernel distance (`kid`), precision and recall (`prc`), inception score (`isc`), and the Fréchet
    distance of spatial features (`sfid`). `fd@train` compares with the training's images, whatever `split` is, and
    `fd@test` with the test split. `heldout` is the loss of the weights on the test split, and needs no samples."""

    # Or inception_v3 (the Inception-2015 network of FID), or dinov2_vitl14 (of FD-DINOv2).
    features: str = "efficientnet_lite0"
    # Weights of inception_v3 or dinov2_vitl14: a file, or a folder with the published file; null: torch's cache.
    features_path: str | None = None
    metrics: list[str] = field(default_factory=lambda: ["fd", "kid", "prc"])
    # A file that samples are compared with in place of the data: moments, as ADM and `lamabench reference --out` write
    # them, or images. Keys have its name without the folder, so give other contents another name.
    reference: str | None = field(default=None, metadata={"since": None})
    reference_count: int | None = None  # size of a fixed random subset of the data; null: all of it
    batch_size: int = 64
    seed: int = 0  # for the subsets of kid and the splits of isc; independent of the training's seed
    # How many reference images, drawn at random once, precision and recall take; null: all. ADM's protocol has 10,000.
    prc_reference_count: int | None = field(default=10_000, metadata={"since": None})
    # Whether weights that are missing may be fetched: true, or the address of a folder that has them. In no key.
    download: Any = field(default=False, metadata={"since": False})
    # The images that samples are compared with: those of the training (train), or the test split that belongs to them.
    split: str = field(default="train", metadata={"since": "train"})
    heldout_count: int = field(default=2048, metadata={"since": 2048})  # most images of the held-out loss

    def __post_init__(self) -> None:
        for name in ("reference_count", "prc_reference_count"):
            if (count := getattr(self, name)) is not None:
                check_positive("evaluate", {name: count})
        check_positive("evaluate", {"batch_size": self.batch_size}, MOST_AT_ONCE)
        check_seed("evaluate.seed", self.seed, bits=32)  # numpy's RandomState, by which torch-fidelity draws
        if self.features not in FEATURES:
            raise unknown("evaluate.features", self.features, FEATURES)
        if not isinstance(self.download, bool) and "://" not in str(self.download):
            raise InputError(
                f"evaluate.download must be true, false or the address of a mirror, such as https://HOST/FOLDER, not "
                f"{self.download!r}"
            )
        if self.split not in SPLITS:
            raise unknown("evaluate.split", self.split, SPLITS)
        check_positive("evaluate", {"heldout_count": self.heldout_count})
        if not self.metrics:
            raise InputError(f"evaluate.metrics is empty; choices: {', '.join((*METRICS, HELDOUT))}")
        own = {f"{metric}@{self.split}": metric for metric in METRICS if metric != "isc"}
        self.metrics = list(dict.fromkeys(own.get(request, request) for request in self.metrics))
        for request in self.metrics:
            metric, at, split = request.partition("@")
            if metric != HELDOUT:
                check_metric(metric, self.features)
            if at and (metric in ("isc", HELDOUT) or self.reference is not None):
                others = {"isc": "the samples alone", HELDOUT: "the test split"}
                whose = others.get(metric, "the file evaluate.reference")
                raise InputError(f"evaluate.metrics {request}: {metric} is of {whose}, so that it takes no @{split}")
            if at and split not in SPLITS:
                raise unknown(f"evaluate.metrics {metric}@", split, SPLITS)

    def of(self, request: str) -> tuple[str, "EvaluateConfig"]:
        """The metric of a request such as `fd` or `fd@train`, and the section whose `split` it is compared with."""
        metric, _, split = request.partition("@")
        return metric, replace(self, metrics=[metric], split=split or self.split)

    def by_split(self, requests: Iterable[str]) -> list[tuple["EvaluateConfig", dict[str, str]]]:
        """Requests by the split that they compare with: the section with that split, and each request by its metric."""
        groups: dict[str, tuple[EvaluateConfig, dict[str, str]]] = {}
        for request in requests:
            metric, settings = self.of(request)
            groups.setdefault(settings.split, (settings, {}))[1][metric] = request
        return list(groups.values())


def check_metric(metric: str, features: str) -> None:
    """Raise InputError for an unknown metric, and for one that a network of features cannot give."""
    choices = (*METRICS, HELDOUT)
    if metric == "fid":  # by its letters, sfid is nearer
        raise InputError(f"unknown evaluate.metrics 'fid' (did you mean 'fd'?); choices: {', '.join(choices)}")
    if metric not in METRICS:
        raise unknown("evaluate.metrics", metric, choices)
    if features not in (networks := NETWORKS_OF.get(metric, FEATURES)):
        raise InputError(
            f"evaluate.metrics={metric} cannot be computed with evaluate.features={features}; choices of "
            f"evaluate.features: {', '.join(networks)}"
        )
