"""What must hold before scores of a study are compared: no training diverged, waited for its data or learned images by
heart, and the order of the variants no longer changes."""

import json
from collections.abc import Collection, Iterable
from itertools import combinations
from pathlib import Path
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from .moments import images_of, moments
from .names import few, joined
from .queries import better
from .runs import Run
from .variants import Variants

WAITING = 0.02  # share of a training's time; above it, time says more about the host than about the model
LATE = 2 / 3  # of the images of a training
LOST = 2.0  # times the lowest loss of a training, or the last one of another seed; above it, it has not learned
NEAR = 0.05  # share of test images that are nearer to a training image than the others


def checks(study: Variants) -> list[str]:
    """Sentences about the trainings of a study: how many diverged, which ended with more than twice their lowest loss
    or that of another seed, which waited for their data for more than 2 % of their time, what they took, how near their
    samples are to training images (`lamabench evaluate --neighbours`), and whether the order of the variants was stable
    over the last third of the training. Nothing is said of what is not on record."""
    return [*_diverged(study), *_lost(study), *_waiting(study), *_cost(study), *_neighbours(study), *_order(study)]


def _diverged(study: Variants) -> list[str]:
    states = {run: study.states[run][0] for run in study.evidence.runs}
    ended = _once(run for run, state in states.items() if state == "diverged" or run.last("train", "done"))
    wrong = _once(run for run, state in states.items() if state == "diverged")
    if not ended:
        return []
    if wrong:
        return [f"{len(wrong)} of {_trainings(ended)} diverged: {_listed(study, wrong)}."]
    return [f"None of {_trainings(ended)} diverged."]


def _lost(study: Variants) -> list[str]:
    """A loss that rises, or never falls, and stays finite ends no training."""
    logs = {
        run: [line["loss"] for line in run.metrics if line.get("loss") is not None]
        for run in _once(study.evidence.runs) if run.last("train", "done")
    }  # fmt: skip
    ends: dict[str, float] = {}  # the lowest end of a variant
    for run, losses in logs.items():
        if losses:
            ends[run.group] = min(losses[-1], ends.get(run.group, losses[-1]))
    lost = [run for run, losses in logs.items() if losses and losses[-1] > LOST * min(*losses, ends[run.group])]
    if not lost:
        return []
    words = "ended with more than twice its lowest loss, or that of another seed"
    return [f"{len(lost)} of {_trainings(logs)} {words}: {_listed(study, lost)}."]


def _waiting(study: Variants) -> list[str]:
    rows = {run: run.last("train", "done") for run in _once(study.evidence.runs)}
    shares = {run: row["waiting_share"] for run, row in rows.items() if row and row.get("waiting_share") is not None}
    if not shares:
        return []
    if slow := [run for run, share in shares.items() if share > WAITING]:
        words = f"{len(slow)} of {_trainings(shares)} waited for data for more than {_percent(WAITING, 0)} of the time"
        return [f"{words}: {_listed(study, slow)} ({_percent(max(shares.values()), 1)} at most)."]
    most = f"{_percent(max(shares.values()), 1)} at most"
    return [f"None of {_trainings(shares)} waited for data for more than {_percent(WAITING, 0)} of the time ({most})."]


def _neighbours(study: Variants) -> list[str]:
    """One sentence for each space in which distances to training images were measured: the share of the samples that
    are nearer than nearly all test images, together and by training, and which trainings with samples have none."""
    found: dict[str, dict[Run, list[tuple[int, int, int]]]] = {}  # nearer, samples, test images
    text = []
    for run in _once(study.evidence.runs):
        for file in sorted(Path(run.info["folder"]).glob("samples/*/neighbours.json")):
            try:
                spaces = json.loads(file.read_text(encoding="utf-8"))
                pairs = {
                    name: (_numbers(one["distance"]), _numbers(one["test_distance"])) for name, one in spaces.items()
                }
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                text.append(f"{file} is damaged: `lamabench evaluate --neighbours` writes it again.")
                continue
            for space, (own, test) in pairs.items():
                if own.size and test.size:
                    nearer = int((own < np.quantile(test, NEAR)).sum())
                    found.setdefault(space, {}).setdefault(run, []).append((nearer, own.size, test.size))
    for space, of_run in found.items():
        sums = {run: np.sum(counts, axis=0) for run, counts in of_run.items()}
        nearer, samples = sum(one[0] for one in sums.values()), sum(one[1] for one in sums.values())
        ends = [one[0] / one[1] for one in sums.values()]
        each = f", {_percent(min(ends), 1)} to {_percent(max(ends), 1)} by training" if len(ends) > 1 else ""
        tests = max(count[2] for counts in of_run.values() for count in counts)
        where = "in pixels" if space == "pixels" else f"in the features of {space}"
        sampled = (run for run in _once(study.evidence.runs) if run.last("sample", "done"))
        rest = few([_listed(study, [run]) for run in sampled if run not in of_run])
        text.append(
            f"Of {samples} samples of {_trainings(of_run)}, {_percent(nearer / samples, 1)} are nearer to a training "
            f"image, {where}, than {_percent(1 - NEAR, 0)} of {tests} test images are{each}; of new images it would be "
            f"about {_percent(NEAR, 0)}{f' (not measured: {joined(rest)})' if rest else ''}."
        )
    return text


def _numbers(values: list[float] | None) -> NDArray[np.float64]:
    return np.array(values or [], dtype=np.float64)


def _order(study: Variants) -> list[str]:
    """What the metrics with two moments or more in the last third of the longest training say, a sentence for those
    with the same order or the same changes. The order is that of means over the runs that reached its end, at the
    moments that all of them have."""
    names: dict[tuple[str, ...], list[str]] = {}  # {the rest of the sentence, and what it is about: its metrics}
    for name, lines in moments(study.evidence.runs).items():
        if not better(name):
            continue
        curves: dict[str, list[dict[int, float]]] = {}
        for run, rows in lines.items():
            curve = {images: row["value"] for row in rows if (images := images_of(run, row)) is not None}
            curves.setdefault(run.group, []).append(curve)
        end = max((images for each in curves.values() for curve in each for images in curve), default=0)
        curves = {group: whole for group, each in curves.items() if (whole := [one for one in each if end in one])}
        every = [set(curve) for each in curves.values() for curve in each]
        late = sorted(images for images in (set.intersection(*every) if every else ()) if images >= LATE * end)
        if len(curves) < 2 or len(late) < 2:
            continue
        means = {group: [fmean(curve[images] for curve in each) for images in late] for group, each in curves.items()}
        swaps = [pair for pair in combinations(means, 2) if _swap(*(means[group] for group in pair))]
        where = f"over the last {len(late)} moments of the training ({late[0]:,} to {late[-1]:,} images)"
        if swaps:
            pairs = [joined([f"`{study.labels[group]}`" for group in pair]) for pair in swaps]
            key = (f"the order of some variants changes {where}: {'; '.join(few(pairs))}.", *pairs)
        else:
            order = sorted(means, key=lambda group: means[group][-1], reverse=better(name) == "max")
            key = (f"the order of {len(order)} variants is the same {where}.", *order)
        names.setdefault(key, []).append(name)
    return [f"In {joined(each)}, {rest}" for (rest, *_), each in names.items()]


def _cost(study: Variants) -> list[str]:
    """One sentence for each device: the hours of all trainings, compilation and restarts included."""
    hours: dict[str, list[float]] = {}
    for run in _once(study.evidence.runs):
        row = run.last("train", "done") or {}
        devices = {one.get("device"): None for one in row.get("stretches") or ()}
        devices = devices or {(row.get("provenance") or {}).get("device"): None}
        if None not in devices and (seconds := row.get("process_seconds") or row.get("seconds")):
            hours.setdefault(" and ".join(devices), []).append(seconds / 3600)
    return [
        f"{_trainings(each).capitalize()} took {sum(each):.3g} hours of {device} in all, compilation included."
        for device, each in hours.items()
    ]


def _percent(share: float, places: int) -> str:
    return f"{100 * share:.{places}f} %"


def _swap(one: list[float], two: list[float]) -> bool:
    return len({a < b for a, b in zip(one, two, strict=True)}) > 1


def _once(runs: Iterable[Run]) -> list[Run]:
    """The first run of each training. Runs share one that differ in how their samples were drawn, or in their root."""
    first: dict[str, Run] = {}
    for run in runs:
        first.setdefault(run.info["id"], run)
    return list(first.values())


def _trainings(runs: Collection[object]) -> str:
    return f"{len(runs)} training{'s' * (len(runs) != 1)}"


def _listed(study: Variants, runs: list[Run]) -> str:
    return ", ".join(f"`{study.labels[run.group]}` seed {run.info.get('seed')}" for run in runs)
