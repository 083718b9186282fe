"""`lamabench evaluate RUN --neighbours`: the nearest training image of each of the first samples."""

from collections.abc import Sequence
from pathlib import Path

from ...harness.data.images import load
from ...harness.progress import Progress
from ...harness.record import read_records
from ...harness.shards import images_of, open_samples
from ...harness.stages import missing
from ...harness.tasks import Task
from ...harness.training.checkpoint import check_data
from ...kernels.errors import InputError
from ..output import command, show
from .sample import asked_of, gone

COLUMNS = {"step": "Step", "space": "Distance in", "samples": "Samples", "low": "5 %", "median": "50 %"}
COLUMNS |= {"test_low": "Test 5 %", "test_median": "Test 50 %", "nearer": "Nearer", "picture": "Picture"}


def run(path: Path, overrides: Sequence[str], count: int, as_json: bool) -> int:
    """Compare the first `count` samples of a run with its training images, and print quantiles and pictures."""
    from ...harness.scoring.neighbours import neighbours, write
    from ...harness.scoring.networks import find_weights
    from .evaluate import adopt

    if path.suffix == ".npz":
        raise InputError(f"--neighbours compares samples with the training images of a run, and {path} is a file")

    def other(task: Task) -> Path:
        return path.resolve() / "samples" / task.key

    def check(task: Task) -> None:
        words = [text for text in overrides if text.startswith(("sample.", "run."))]
        there = "sample" not in missing(task) or "sample" not in missing(
            task, read_records(other(task) / "record.jsonl")
        )
        if not there or gone(task):
            raise InputError(f"{path} has no samples to compare; draw them first: {command('sample', path, *words)}")
        find_weights(*(task.config["evaluate"][name] for name in ("features", "features_path", "download")))

    words = [*overrides, "sample.keep=features"]  # of which the first images are kept
    config, wanted = asked_of(path, words, ("sample", "evaluate", "run"), ["sample"], check, adds=False)
    progress, rows = Progress(), []
    data = load(config.data, progress.say)
    for task in wanted:
        check_data(Path(task.training), data.fingerprint)
        adopt(task, other(task))
        samples = open_samples(images_of(task.path))[:count]
        spaces = neighbours(samples, data, config, Path(config.run.root) / ".cache", progress)
        pictures = write(task.path, samples, data, spaces)
        for space, result in spaces.items():
            about = {"step": task.step, "space": space, "samples": len(samples)}
            rows.append({**about, **result.row(), "picture": str(pictures[space])})
    columns = {key: title for key, title in COLUMNS.items() if any(key in row for row in rows)}
    show(rows, columns, as_json)
    if not as_json and "nearer" in columns:
        print("Nearer: the share of samples that are nearer to a training image than 95 % of test images are")
    return 0
