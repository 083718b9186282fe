"""The hours that drawing and scoring the samples of a study take, estimated only from earlier samples and scores, and
from forward passes that were measured."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..harness.config import Config
from ..harness.guide import flops, guides, passes
from ..harness.keys import config_from_dict
from ..harness.measure.cost import cost
from ..harness.record import read_records
from ..harness.run import read_info
from ..harness.sections import HELDOUT
from ..kernels.errors import InputError
from ..models.registry import family_of, from_dict
from .gpu_hours import Hours, Line, fastest, of_device, on_gpus, same_model
from .plan import Piece, Planned, pieces


def of_sampling(runs: Sequence[Planned], forward: Sequence[Line], committed: Sequence[Path] = ()) -> list[Hours]:
    """The hours of drawing the samples of each run by name of the device, or why they are unknown. A set that several
    runs share is counted once, for the first of them. `forward` are the measured forward passes of models, `committed`
    the roots of other runs, whose samples tell too."""
    models = {run.name: run.about["model"] for run in runs}
    earlier: dict[str, list[Line]] = {}  # by family

    def hours(piece: Piece) -> Hours:
        config = config_from_dict(piece.task.config)
        family = family_of(config.model).name
        if family not in earlier:
            rows = on_gpus(row for root in committed for row in sample_speeds(root, family))
            earlier[family] = [*sample_speeds(Path(config.run.root), family), *rows]
        return sampling_hours(config, earlier[family], forward, models[piece.run])

    return _of_sets(runs, "sample", hours)


def of_scoring(runs: Sequence[Planned], committed: Sequence[Path] = ()) -> list[Hours]:
    """The hours of scoring the samples of each run, as in `of_sampling`. They come from earlier scores with the same
    network of features, below the same root or those of `committed`, by `of_device`."""
    earlier: dict[str, list[Line]] = {}  # by root

    def hours(piece: Piece) -> Hours:
        config = config_from_dict(piece.task.config)
        if config.run.root not in earlier:
            rows = on_gpus(row for root in committed for row in score_speeds(root))
            earlier[config.run.root] = [*score_speeds(Path(config.run.root)), *rows]
        name = config.evaluate.features
        rows = [row for row in earlier[config.run.root] if row["features"] == name]
        speeds = of_device(rows, config.sample.count)
        if not speeds:
            return f"unknown (no score with {name})"
        return {device: config.sample.count / speed / 3600 for device, speed in speeds.items()}

    return _of_sets(runs, "evaluate", hours)


def _of_sets(runs: Sequence[Planned], stage: str, hours: Callable[[Piece], Hours]) -> list[Hours]:
    """The sums, for each run, of the hours of a stage of its sets of samples."""
    sums: dict[str, Hours] = {run.name: {} for run in runs}
    for piece in pieces(runs):
        if stage not in piece.task.stages or (stage == "evaluate" and not set(piece.task.metrics) - {HELDOUT}):
            continue
        known, more = sums[piece.run], hours(piece)
        if isinstance(known, str) or isinstance(more, str):
            sums[piece.run] = known if isinstance(known, str) else more
        elif known:  # of a device that every set has a measurement on
            both = {device: known[device] + more[device] for device in known if device in more}
            sums[piece.run] = both or "unknown (its sets were measured on different devices)"
        else:
            sums[piece.run] = more
    return list(sums.values())


def score_speeds(root: Path) -> Iterator[Line]:
    """Images per second of every scored set of samples below `root`, for each network of features. Folders that cannot
    be read are left out."""
    for path in sorted(root.glob("trainings/*/samples/*/record.jsonl")):
        try:
            rows = [one.flat() for one in read_records(path) if one.kind == "score" and one.state == "done"]
        except (InputError, OSError):
            continue
        timed = [row for row in rows if row["seconds"] and row["features"]]
        for name in {row["features"] for row in timed}:
            last = max((row for row in timed if row["features"] == name), key=lambda row: row["seconds"])
            yield {**last, "images_per_s": last["count"] / last["seconds"]}


def sample_speeds(root: Path, family: str) -> Iterator[Line]:
    """Passes of the network per second of one process, of every set of samples below `root` that a family drew, each
    with the configuration of its model as `model`. Folders that cannot be read are left out."""
    for path in sorted(root.glob(f"trainings/{family}-*/samples/*/record.jsonl")):
        try:
            rows, model = read_records(path), from_dict(read_info(path.parent)["config"]["model"])
        except (InputError, OSError, KeyError, TypeError, ValueError):
            continue
        for row in (one.flat() for one in rows if one.kind == "sample" and one.state == "done"):
            if seconds := row["process_seconds"] or row["seconds"]:
                speed = row["count"] * passes_of(row, model) / seconds
                yield {**row, "model": model, "images_per_s": speed, "input_size": model.input_size}


def passes_of(row: Line, model: Any) -> float:
    """The passes of a network for one image of a set on record. Those of a guide count by their FLOPs."""
    if row["guide_passes"]:
        return row["sampling_flops"] / cost(model).flops
    return row["passes"] or row["steps"] * (1 if row["guidance"] == 1 else 2)  # an earlier version had no intervals


def sampling_hours(config: Config, earlier: Sequence[Line], forward: Sequence[Line], name: str) -> Hours:
    """The hours of one set of samples, or why they are unknown. They come from earlier sets of the same model,
    precision and compile mode, by `of_device`, or on a device without one, from its fastest forward pass. `name` stands
    for the model in the text."""
    settings = config.sample
    needed = settings.count * (flops(config) / cost(config.model).flops if guides(config) else passes(config)[0])

    def same(row: Line) -> bool:
        how = (row["precision"], row["compile"]) == (settings.precision, settings.compile)
        return how and row["input_size"] == config.model.input_size and same_model(row["model"], config.model)

    drawn = of_device([row for row in earlier if same(row)], settings.count)
    speeds = fastest([row for row in forward if same(row)]) | drawn
    if not speeds:
        side = f"side {config.model.input_size}, {settings.precision}, {settings.compile}"
        return f"unknown (no samples and no bench record of forward passes of {name} at {side})"
    return {device: needed / speed / 3600 for device, speed in speeds.items()}
