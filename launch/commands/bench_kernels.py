"""`lamabench bench-kernels`: measures every backend of the operators that models call, one operator at a time."""

import argparse
from dataclasses import replace

from ...harness.device import device_name, pick_device
from ...harness.keys import operator_speed_key
from ...harness.measure.models import WrongOutput, check_bench
from ...harness.measure.operators import bench_operators
from ...harness.provenance import provenance
from ...harness.run import locked
from ...harness.stages import write
from ..output import show
from .bench import asked_of, begin, end, speaker

COLUMNS = {"operator": "Operator", "shape": "Shape", "pass": "Pass", "backend": "Backend", "p50_ms": "Median (ms)"}
COLUMNS |= {"floor_ms": "Floor (ms)", "floor": "Floor of", "times_floor": "Time ÷ floor", "state": "State"}


def run(args: argparse.Namespace) -> int:
    rows, wrong = [], []
    for config, task in asked_of(args, "bench-kernels"):
        device = pick_device(config.run.device)
        check_bench(config.model, config.bench, config.backend, device)
        folder, origin = begin(task, config), provenance(device)
        batches = config.bench.batch_size
        with locked(folder):
            for batch in [batches] if batches == "auto" else [[batch] for batch in batches]:
                settings = replace(config.bench, batch_size=batch)
                try:
                    for row in bench_operators(config.model, settings, config.backend, device, speaker(task)):
                        key = operator_speed_key(config.model, row, device_name(device))
                        line = write(folder, {"kind": "operator_speed", "key": key, "provenance": origin, **row})
                        backend = line["backend"][line["operator"]]
                        rows.append({"model": task.about["name"], **line, "backend": backend, "run": str(folder)})
                except WrongOutput as error:
                    wrong.append(f"{task.about['name']}: {error}")
    show(rows, COLUMNS, args.json)
    return end(args, rows, wrong)
