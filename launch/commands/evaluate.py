"""`lamabench evaluate`: scores the samples of a run, or any .npz of images."""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from ...harness.keys import config_from_dict, score_key
from ...harness.progress import Progress
from ...harness.record import newest, read_records, write_lines
from ...harness.run import is_locked, locked
from ...harness.shards import features_of, set_of
from ...harness.stages import Task, execute, missing, missing_metrics, prepare
from ...kernels.errors import InputError
from ..compose import compose
from ..output import command, show
from .sample import asked_of, gone, run_and_overrides

COLUMNS = {
    "metric": "Metric",
    "value": "Value",
    "std": "±",
    "floor": "Floor",
    "count": "Images",
    "reference": "Reference",
}
COLUMNS |= {"reference_count": "Reference images", "checkpoint_step": "Step", "protocol": "Protocol"}


def run(args: argparse.Namespace) -> int:
    from ...harness.scoring.score import Unscored, score

    path, overrides = run_and_overrides(args.words)
    rows: list[dict[str, Any]] = []
    reasons: dict[str, str] = {}
    if path.suffix == ".npz":
        if path.is_dir():
            raise InputError(f"{path} is not a readable .npz file: it is a folder")
        config, _ = compose(overrides)
        try:
            for row in score(path, config, config.evaluate.metrics, Path(config.run.root) / ".cache", Progress()):
                rows.append(row)
        except Unscored as error:
            reasons = error.reasons
    else:
        from ...harness.scoring.counts import shortage
        from ...harness.scoring.networks import find_weights
        from ...harness.scoring.reference import check_contents, reference_of
        from ...harness.training.checkpoint import check_data

        def other(task: Task) -> Path:  # where samples of another user lie
            return path.resolve() / "samples" / task.key

        def check(task: Task) -> None:
            words = [text for text in overrides if text.startswith(("sample.", "run."))]
            draw = command("sample", path, *words)
            if "sample" in missing(task) and (network := features_of(task.path)):
                again = [text for text in overrides if text.startswith(("sample.", "run.", "evaluate.features"))]
                raise InputError(
                    f"the images in {set_of(task.path)} were not kept, only their features of {network}; draw them "
                    f"again: {command('sample', path, *again)}"
                )
            if "sample" in missing(task) and "sample" in missing(task, read_records(other(task) / "record.jsonl")):
                if is_locked(task.path):
                    raise InputError(
                        f"{path}: its samples are being drawn; {draw} helps, and returns when they are there"
                    )
                raise InputError(f"{path} has no samples to score; draw them first: {draw}")
            if missing(task) and gone(task):
                raise InputError(f"{set_of(task.path)} was deleted or damaged; draw the samples again: {draw}")
            config = config_from_dict(task.config)
            if config.evaluate.reference is not None:
                keys = {score_key(config, task.key, metric) for metric in task.metrics}
                check_contents(config, (row for row in read_records(task.path / "record.jsonl") if row.key in keys))
            if missing(task):
                reference = reference_of(config)
                if config.evaluate.reference is None:
                    check_data(Path(task.training), reference.fingerprint.split("-")[0])
                few = {
                    one: reference.lack(one) or shortage(one, config.sample.count, reference.count(one))
                    for one in missing_metrics(task)
                }
                if len(few) == len(task.metrics) and all(few.values()):  # else some scores can be shown
                    raise InputError("; ".join(text for text in few.values() if text))
                find_weights(config.evaluate.features, config.evaluate.features_path, config.evaluate.download)

        # Features serve as well as images.
        words = [*overrides, "sample.keep=features"]
        config, wanted = asked_of(path, words, ("sample", "evaluate", "run"), ["sample", "evaluate"], check)
        for task in wanted:
            adopt(task, other(task))
            try:
                execute(task, Progress(task.path))
            except Unscored as error:
                reasons |= error.reasons
            keys = [score_key(config, task.key, metric) for metric in task.metrics]
            newest_rows = newest(read_records(task.path / "record.jsonl")).values()
            rows += [row.flat() for row in newest_rows if row.key in keys and row.state == "done"]
    if reasons and not rows:
        raise Unscored(reasons)
    columns = {key: title for key, title in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    show(rows, columns, args.json)
    for text in dict.fromkeys(f"{row['metric']}: {row['note']}" for row in rows if row.get("note")):
        print(f"lamabench evaluate: {text}", file=sys.stderr)
    for text in reasons.values():
        print(f"lamabench evaluate: {text}", file=sys.stderr)
    return 1 if reasons else 0


def adopt(task: Task, other: Path) -> None:
    """Let a task of samples begin with what is done in another folder of its key, which may be of another user: its
    rows, and a link to its images. Does nothing if the task has samples, or the other folder has none."""
    rows = [one for one in read_records(other / "record.jsonl") if one.state == "done"]
    if "sample" not in missing(task) or "sample" in missing(task, rows):
        return
    folder = prepare(task)
    with locked(folder):
        theirs = set_of(other)
        images = folder / theirs.relative_to(other)
        images.parent.mkdir(exist_ok=True)
        if images.is_dir() and not images.is_symlink():  # begun here
            shutil.rmtree(images)
        images.unlink(missing_ok=True)
        images.symlink_to(theirs.resolve())
        write_lines(folder / "record.jsonl", [one.as_dict() for one in rows])
