"""How many images each metric needs. Planning reads this too, so that it imports no torch."""

NEIGHBOURS = 3  # for improved precision and recall
SPLITS = 10  # for the inception score
WITHOUT_REFERENCE = ("isc",)  # metrics of the samples' logits only; the others compare pooled features


def kid_subset_size(samples: int, reference: int) -> int:
    """Images in each of KID's 100 subsets: 1000 if both sets have that many, else 100."""
    return 1000 if min(samples, reference) >= 1000 else 100


def shortage(metric: str, samples: int, reference: int | None) -> str | None:
    """Why a metric of `sections.METRICS` cannot be computed from this many samples and reference images, or None if it
    can. A `reference` of None is unknown and suffices."""
    size = kid_subset_size(samples, samples if reference is None else reference)
    needed = {"fd": 2, "kid": size, "prc": NEIGHBOURS + 1, "isc": SPLITS}[metric]
    if samples < needed:
        return f"{metric} needs at least {needed} samples, {samples} given"
    if metric not in WITHOUT_REFERENCE and reference is not None and reference < needed:
        return f"{metric} needs at least {needed} reference images, {reference} given"
    return None
