"""The hours that drawing the samples of a study takes, estimated only from earlier samples and from forward passes that
were measured. No record has the time of a score."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..harness.config import Config
from ..harness.keys import config_from_dict
from ..harness.record import read_records
from ..harness.run import read_info
from ..kernels.errors import InputError
from ..models.registry import family_of, from_dict
from .gpu_hours import Hours, Line, fastest, same_model
from .plan import Planned, pieces

SCORES = "unknown (no record has the time of a score)"


def of_runs(runs: Sequence[Planned], forward: Sequence[Line]) -> list[Hours]:
    """The hours of the samples of each run by name of the device, or why they are unknown. A set that several runs
    share is counted once, for the first of them. `forward` are the measured forward passes of models."""
    hours: dict[str, Hours] = {run.name: {} for run in runs}
    models = {run.name: run.about["model"] for run in runs}
    earlier: dict[str, list[Line]] = {}  # by family
    for piece in pieces(runs):
        if "sample" not in piece.task.stages:
            continue
        config = config_from_dict(piece.task.config)
        family = family_of(config.model).name
        if family not in earlier:
            earlier[family] = list(sample_speeds(Path(config.run.root), family))
        known, more = hours[piece.run], sampling_hours(config, earlier[family], forward, models[piece.run])
        if isinstance(known, str) or isinstance(more, str):
            hours[piece.run] = known if isinstance(known, str) else more
        elif known:  # of a device that every set has a measurement on
            both = {device: known[device] + more[device] for device in known if device in more}
            hours[piece.run] = both or "unknown (its sets were measured on different devices)"
        else:
            hours[piece.run] = more
    return list(hours.values())


def sample_speeds(root: Path, family: str) -> Iterator[Line]:
    """Passes of the network per second of one process, of every set of samples below `root` that a family drew, each
    with the configuration of its model as `model`. Folders that cannot be read are left out."""
    for path in sorted(root.glob(f"trainings/{family}-*/samples/*/record.jsonl")):
        try:
            rows, model = read_records(path), from_dict(read_info(path.parent)["config"]["model"])
        except (InputError, OSError, KeyError, TypeError):
            continue
        for row in (one.flat() for one in rows if one.kind == "sample" and one.state == "done"):
            if seconds := row["process_seconds"] or row["seconds"]:
                speed = row["count"] * passes(row["steps"], row["guidance"]) / seconds
                yield {**row, "model": model, "images_per_s": speed, "input_size": model.input_size}


def passes(steps: int, guidance: float) -> int:
    """The passes of the network for one image: a step takes two with guidance."""
    return steps * (1 if guidance == 1 else 2)


def sampling_hours(config: Config, earlier: Sequence[Line], forward: Sequence[Line], name: str) -> Hours:
    """The hours of one set of samples, or why they are unknown. They come from the fastest earlier set of the same
    model, precision and compile mode, or on a device without one, from its fastest forward pass. `name` stands for the
    model in the text."""
    settings = config.sample
    needed = settings.count * passes(settings.steps, settings.guidance)

    def same(row: Line) -> bool:
        how = (row["precision"], row["compile"]) == (settings.precision, settings.compile)
        return how and row["input_size"] == config.model.input_size and same_model(row["model"], config.model)

    speeds = fastest([row for row in forward if same(row)]) | fastest([row for row in earlier if same(row)])
    if not speeds:
        side = f"side {config.model.input_size}, {settings.precision}, {settings.compile}"
        return f"unknown (no samples and no bench record of forward passes of {name} at {side})"
    return {device: needed / speed / 3600 for device, speed in speeds.items()}
