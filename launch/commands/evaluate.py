"""`lamabench evaluate`: scores the samples of a run, any .npz of images, or other people's samples under a name."""

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...harness.config import Config
from ...harness.disk import write_lines
from ...harness.keys import config_from_dict, score_key
from ...harness.progress import Progress
from ...harness.record import newest, read_records
from ...harness.run import is_locked, locked
from ...harness.scoring.protocol import UNKNOWN, fields_of, generation_of, stated, words
from ...harness.sections import HELDOUT
from ...harness.shards import features_of, set_of
from ...harness.stages import execute, missing, missing_metrics, prepare
from ...harness.tasks import Task, only
from ...kernels.errors import InputError
from ...reports.queries import SAMPLING, score_words
from ..compose import compose
from ..output import command, show
from .sample import asked_of, gone, run_and_overrides

COLUMNS = {
    "metric": "Metric",
    "value": "Value",
    "sampling_error": "Sampling s.e.",
    "std": "Std of subsets",
    "floor": "Floor",
    "count": "Images",
    "reference": "Reference",
}
COLUMNS |= {"reference_count": "Reference images", "checkpoint_step": "Step", "protocol": "Protocol"}
COLUMNS |= {"generation_protocol": "Generation"}
Row = dict[str, Any]


def run(args: argparse.Namespace) -> int:
    from ...harness.scoring.score import Unscored

    path, overrides = run_and_overrides(args.words)
    if args.neighbours is not None:
        if (args.name, args.generation, args.study) != (None, None, None):
            raise InputError("--neighbours records no scores, so that it takes no --as, --generation or --study")
        from .neighbours import run as neighbours

        return neighbours(path, overrides, args.neighbours, args.json)
    if args.name is None and (args.generation is not None or args.study is not None):
        raise InputError("--generation and --study say more about other people's samples: give --as NAME too")
    if args.name is not None:
        rows, reasons = _foreign(path, overrides, args)
    elif path.suffix == ".npz":
        rows, reasons = _file(path, overrides)
    else:
        rows, reasons = _run(path, overrides)
    if reasons and not rows:
        raise Unscored(reasons)
    columns = {key: title for key, title in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    show(rows, columns, args.json)
    if not args.json:
        print(*_notes(rows), *([SAMPLING] if "sampling_error" in columns else []), sep="\n")
    for text in dict.fromkeys(f"{row['metric']}: {row['note']}" for row in rows if row.get("note")):
        print(f"lamabench evaluate: {text}", file=sys.stderr)
    for text in reasons.values():
        print(f"lamabench evaluate: {text}", file=sys.stderr)
    return 1 if reasons else 0


def _notes(rows: list[Row]) -> list[str]:
    """What the hashes in the table stand for: how the samples were scored, and how they were drawn."""
    hashes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        scored = f"{score_words(row)}, features {row.get('features') or 'none'}"
        hashes.setdefault(("Protocol", scored), []).append(row["protocol"])
        if row.get("generation"):
            drawn = words(row["generation"])
            hashes.setdefault(("Generation", drawn), []).append(row.get("generation_protocol") or "-")
    return [f"{what} {', '.join(dict.fromkeys(names))}: {text}" for (what, text), names in sorted(hashes.items())][::-1]


def _foreign(path: Path, overrides: list[str], args: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """Scores of other people's samples, which are recorded."""
    from ...harness.scoring.foreign import check_name, score_foreign

    check_name(args.name)
    drawn = None if args.generation is None else stated(args.generation)
    if (path / "config.json").is_file():
        raise InputError(f"{path} is a folder of lamabench, whose samples have a name: --as is for other images")
    return score_foreign(path, args.name, _of_images(path, overrides), drawn, args.study, Progress())


def _of_images(path: Path, overrides: list[str]) -> Config:
    """A configuration that scores images without weights. Raises InputError if it asks for a held-out loss."""
    config, _ = compose(overrides)
    if HELDOUT in config.evaluate.metrics:
        raise InputError(f"evaluate.metrics {HELDOUT} is a score of a run's weights, and {path} has images only")
    return config


def _file(path: Path, overrides: list[str]) -> tuple[list[Row], dict[str, str]]:
    """Scores of an .npz, which are not recorded."""
    from ...harness.scoring.score import Unscored, score

    if path.is_dir():
        raise InputError(f"{path} is not a readable .npz file: it is a folder")
    config = _of_images(path, overrides)
    rows: list[Row] = []
    try:
        for row in score(path, config, config.evaluate.metrics, Path(config.run.root) / ".cache", Progress()):
            rows.append(row | fields_of(UNKNOWN))
    except Unscored as error:
        return rows, error.reasons
    return rows, {}


def _run(path: Path, overrides: list[str]) -> tuple[list[Row], dict[str, str]]:
    """Scores of the samples of a run, one set for each moment that is asked for."""
    from ...harness.data.images import load
    from ...harness.scoring.counts import shortage
    from ...harness.scoring.networks import check_weights, find_weights
    from ...harness.scoring.reference import check_contents, reference_of
    from ...harness.scoring.score import Unscored
    from ...harness.training.checkpoint import check_data

    rows: list[Row] = []
    reasons: dict[str, str] = {}
    if path.is_dir() and not (path / "config.json").exists():
        raise InputError(f"{path} is not a run folder: it has no config.json; --as NAME scores a folder of images")

    def other(task: Task) -> Path:  # where samples of another user lie
        return path.resolve() / "samples" / task.key

    def check(task: Task) -> None:
        config = config_from_dict(task.config)
        keys = {score_key(config, task.key, metric) for metric in task.metrics if metric != HELDOUT}
        known = [row for row in read_records(task.path / "record.jsonl") if row.key in keys]
        if config.evaluate.reference is not None and known:
            check_contents(config, known)
        check_weights(config.evaluate, known)
        if not sampled_metrics(task):
            return check_heldout(task)
        given = [text for text in overrides if text.startswith(("sample.", "run."))]
        draw = command("sample", path, *given)
        if "sample" in missing(task) and (network := features_of(task.path)):
            again = [text for text in overrides if text.startswith(("sample.", "run.", "evaluate.features"))]
            raise InputError(
                f"the images in {set_of(task.path)} were not kept, only their features of {network}; draw them "
                f"again: {command('sample', path, *again)}"
            )
        if "sample" in missing(task) and "sample" in missing(task, read_records(other(task) / "record.jsonl")):
            if is_locked(task.path):
                raise InputError(f"{path}: its samples are being drawn; {draw} helps, and returns when they are there")
            raise InputError(f"{path} has no samples to score; draw them first: {draw}")
        if missing(task) and gone(task):
            raise InputError(f"{set_of(task.path)} was deleted or damaged; draw the samples again: {draw}")
        if missing(task):
            if config.evaluate.reference is None:
                check_data(Path(task.training), load(config.data).fingerprint)
            few: dict[str, str | None] = {}
            for settings, requests in config.evaluate.by_split(sampled_metrics(task)):
                reference = reference_of(replace(config, evaluate=settings))
                for one, request in requests.items():
                    few[request] = reference.lack(one) or shortage(one, config.sample.count, reference.count(one))
            if len(few) == len(task.metrics) and all(few.values()):  # else some scores can be shown
                raise InputError("; ".join(text for text in few.values() if text))
            find_weights(config.evaluate.features, config.evaluate.features_path, config.evaluate.download)

    # Features serve as well as images.
    asked = [*overrides, "sample.keep=features"]
    config, wanted = asked_of(path, asked, ("sample", "evaluate", "run"), ["sample", "evaluate"], check)
    for task in wanted:
        if sampled_metrics(task):
            adopt(task, other(task))
        else:
            task = only(task, ["evaluate"])
        try:
            execute(task, Progress(task.path))
        except Unscored as error:
            reasons |= error.reasons
        keys = [score_key(config, task.key, metric) for metric in task.metrics]
        newest_rows = newest(read_records(task.path / "record.jsonl")).values()
        drawn = fields_of(generation_of(task.path))  # scores of earlier versions do not say it
        done = [row.flat() for row in newest_rows if row.key in keys and row.state == "done"]
        rows += [row | drawn if row.get("samples") else row for row in done]
    return rows, reasons


def sampled_metrics(task: Task) -> list[str]:
    """The metrics of a task that are to be computed from its samples."""
    return [metric for metric in missing_metrics(task) if metric != HELDOUT]


def check_heldout(task: Task) -> None:
    """Raise InputError if a held-out loss is asked for whose weights or test split are not there."""
    from ...harness.data.encoder import load, load_held_out
    from ...harness.training.checkpoint import check_data, load_weights

    if missing_metrics(task):
        config, training = config_from_dict(task.config), Path(task.training)
        load_weights(training, task.step, config.sample.weights, config.model, tensors=False)
        data = load(config)
        check_data(training, data.fingerprint)
        load_held_out(config, data.class_names)


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
