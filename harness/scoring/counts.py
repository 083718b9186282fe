"""How many images each metric needs. Planning reads this too, so that it imports no torch."""

NEIGHBOURS = 3  # for improved precision and recall
SPLITS = 10  # for the inception score
KID_REFERENCE = 50_000  # reference images from which KID's subsets are drawn, at most, because features fill memory
OF_MOMENTS = ("fd", "sfid")  # metrics that read mean and covariance only
WITHOUT_REFERENCE = ("isc",)  # metrics of the samples' logits only


def reference_images(metric: str, reference: int | None, prc_reference_count: int | None) -> int | None:
    """How many of the reference images a metric of `sections.METRICS` takes: all, or a fixed random subset. None if
    their number is unknown."""
    most = {"prc": prc_reference_count, "kid": KID_REFERENCE}.get(metric)
    return reference if most is None or reference is None else min(most, reference)


def kid_subset_size(samples: int, reference: int) -> int:
    """Images in each of KID's 100 subsets: 1000 if both sets have that many, else 100."""
    return 1000 if min(samples, reference) >= 1000 else 100


def shortage(metric: str, samples: int, reference: int | None) -> str | None:
    """Why a metric of `sections.METRICS` cannot be computed from this many samples and reference images, or None if it
    can. A `reference` of None is unknown and suffices."""
    size = kid_subset_size(samples, samples if reference is None else reference)
    needed = {"kid": size, "prc": NEIGHBOURS + 1, "isc": SPLITS}.get(metric, 2)
    if samples < needed:
        return f"{metric} needs at least {needed} samples, {samples} given"
    if metric not in WITHOUT_REFERENCE and reference is not None and reference < needed:
        return f"{metric} needs at least {needed} reference images, {reference} given"
    return None
