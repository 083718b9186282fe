"""`lamabench evaluate`: scores the samples of a run, or any .npz of images."""

import argparse
from pathlib import Path
from typing import Any

from ...harness.keys import config_from_dict, score_key
from ...harness.progress import Progress
from ...harness.record import newest, read_records
from ...harness.stages import Task, execute, missing
from ...kernels.errors import InputError
from ..compose import compose
from ..output import command, show
from .sample import asked_of, run_and_overrides

COLUMNS = {"metric": "Metric", "value": "Value", "std": "±", "count": "Images", "reference": "Reference"}
COLUMNS |= {"reference_count": "Reference images", "checkpoint_step": "Step", "protocol": "Protocol"}


def run(args: argparse.Namespace) -> int:
    path, overrides = run_and_overrides(args.words)
    rows: list[dict[str, Any]] = []
    if path.suffix == ".npz":
        from ...harness.scoring.score import score

        config, _ = compose(overrides)
        rows = score(path, config, config.evaluate.metrics, Path(config.run.root) / ".cache", Progress())
    else:
        from ...harness.data.images import load
        from ...harness.training.checkpoint import check_data

        def check(task: Task) -> None:
            if "sample" in missing(task):
                words = [text for text in overrides if text.startswith(("sample.", "run."))]
                draw = command("sample", path, *words)
                raise InputError(f"{path} has no samples to score; draw them first: {draw}")
            if missing(task):
                check_data(Path(task.training), load(config_from_dict(task.config).data).fingerprint)

        config, wanted = asked_of(path, overrides, ("sample", "evaluate", "run"), ["sample", "evaluate"], check)
        for task in wanted:
            execute(task, Progress(task.path))
            keys = [score_key(config, task.key, metric) for metric in task.metrics]
            newest_rows = newest(read_records(task.path / "record.jsonl")).values()
            rows += [row.flat() for row in newest_rows if row.key in keys and row.state == "done"]
    columns = {key: title for key, title in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    show(rows, columns, args.json)
    return 0
