"""`lamabench evaluate`: scores the samples of a run, or any .npz of images."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ...harness.keys import config_from_dict, score_key
from ...harness.progress import Progress
from ...harness.record import newest, read_records
from ...harness.stages import Task, execute, missing
from ...kernels.errors import InputError
from ..compose import compose
from ..output import show
from .sample import asked_of, run_and_overrides

COLUMNS = {"metric": "Metric", "value": "Value", "std": "±", "count": "Images", "reference": "Reference"}
COLUMNS |= {"reference_count": "Reference images", "checkpoint_step": "Step", "protocol": "Protocol"}


def run(args: argparse.Namespace) -> int:
    from ...harness.scoring.score import Unscored, score

    path, overrides = run_and_overrides(args.words)
    rows: list[dict[str, Any]] = []
    reasons: dict[str, str] = {}
    if path.suffix == ".npz":
        config, _ = compose(overrides)
        try:
            for row in score(path, config, config.evaluate.metrics, Path(config.run.root) / ".cache", Progress()):
                rows.append(row)
        except Unscored as error:
            reasons = error.reasons
    else:
        from ...harness.data.images import load
        from ...harness.training.checkpoint import check_data

        def check(task: Task) -> None:
            if "sample" in missing(task):
                words = " ".join([str(path), *(text for text in overrides if text.startswith(("sample.", "run.")))])
                raise InputError(f"{path} has no samples to score; draw them first: lamabench sample {words}")
            if missing(task):
                check_data(Path(task.training), load(config_from_dict(task.config).data).fingerprint)

        config, wanted = asked_of(path, overrides, ("sample", "evaluate", "run"), ["sample", "evaluate"], check)
        for task in wanted:
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
    for text in reasons.values():
        print(f"lamabench evaluate: {text}", file=sys.stderr)
    return 1 if reasons else 0
