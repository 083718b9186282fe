"""`lamabench bench --profile`: the kernels of one call of each model, by class, in place of measurements."""

import argparse
import sys

from ...harness.caches import keep_compiled
from ...harness.device import WHOLE_STEP, pick_device
from ...harness.measure.models import check_bench, model_at
from ...harness.measure.profiling import profiled, totals
from ...harness.measure.search import Point
from ...kernels.errors import InputError
from ..output import show
from .bench import asked_of

CALL = {"model": "Model", "input_size": "Input", "mode": "Mode", "compile": "Compile", "batch_size": "Batch"}
CLASSES = {"class": "Class", "count": "Kernels", "ms": "ms", "share": "Share"}
KERNELS = {"class": "Class", "count": "Count", "ms": "ms", "kernel": "Kernel", "operator": "Of", "shapes": "Inputs"}
WIDTH = 90  # characters of a name that are printed; --json has all


def run(args: argparse.Namespace) -> int:
    """Profile every call that the settings of `bench` name. Nothing is recorded."""
    every, subjects = [], asked_of(args, "bench")
    device, settings = pick_device(subjects[0][0].run.device), subjects[0][0].bench
    if settings.batch_size == "auto":
        raise InputError("--profile lists the kernels of a given batch: bench.batch_size=N")
    for config, _ in subjects:  # all, before the first is profiled
        check_bench(config.model, settings, config.backend, device)
    for config, task in subjects:
        keep_compiled(config.run.root, device)
        points = [
            Point(size, mode, checkpointing, kind, batch)
            for size in settings.input_sizes or [config.model.input_size]
            for mode in settings.modes
            for checkpointing in (settings.checkpointing if mode == "train" else [False])
            for kind in settings.compile
            if (mode, kind) != ("forward", WHOLE_STEP)
            for batch in settings.batch_size
        ]
        for point in points:
            model = model_at(config.model, point.input_size)
            rows = profiled(model, point, settings.precision, config.backend, config.objective, device)
            call = {"model": task.about["name"], **point._asdict()}
            every += [{**call, **row} for row in rows]
            if not args.json:
                checkpointed = ", checkpointed" if point.checkpointing else ""
                print(", ".join(f"{title} {call[name]}" for name, title in CALL.items()) + checkpointed)
                show(totals(rows), CLASSES, False)
                print()
                show(
                    [{**row, **{key: row[key][:WIDTH] for key in ("kernel", "shapes")}} for row in rows], KERNELS, False
                )
                print()
    if args.json:
        show(every, KERNELS, True)
    elif not every:
        print("no kernel ran", file=sys.stderr)
    return 0
