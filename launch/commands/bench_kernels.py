"""`lamabench bench-kernels`: measures every backend of the operators that models call, one operator at a time."""

import argparse

from ...harness.caches import keep_compiled
from ...harness.device import device_name, pick_device
from ...harness.keys import operator_speed_key
from ...harness.measure.gpus import derived
from ...harness.measure.models import WrongOutput, check_bench
from ...harness.measure.operators import bench_operators, check_only
from ...harness.provenance import provenance
from ...harness.run import locked
from ...harness.stages import write
from ..output import show
from .bench import asked_of, begin, end, speaker

COLUMNS = {"model": "Model", "operator": "Operator", "shape": "Shape", "pass": "Pass", "backend": "Backend"}
COLUMNS |= {"p50_ms": "Median (ms)", "floor_ms": "Floor (ms)", "floor": "Floor of", "times_floor": "Time ÷ floor"}
COLUMNS |= {"clock_mhz": "Clock (MHz)", "power_w": "Power (W)", "throttled": "Held down by", "state": "State"}


def run(args: argparse.Namespace) -> int:
    rows, wrong, only = [], [], args.operator or []
    subjects = asked_of(args, "bench-kernels")
    device = pick_device(subjects[0][0].run.device)
    for config, _ in subjects:  # all, before the first is measured
        check_bench(config.model, config.bench, config.backend, device)
        check_only(config.model, only, config.backend)
    for config, task in subjects:
        keep_compiled(config.run.root, device)
        folder, origin = begin(task, config), provenance(device)
        with locked(folder):
            try:
                rows_of_model = bench_operators(config.model, config.bench, config.backend, device, speaker(task), only)
                for row in rows_of_model:
                    key = operator_speed_key(config.model, row, device_name(device))
                    line = write(folder, {"kind": "operator_speed", "key": key, "provenance": origin, **row})
                    line |= derived(line)
                    backend = line["backend"][line["operator"]]
                    rows.append({"model": task.about["name"], **line, "backend": backend, "run": str(folder)})
            except WrongOutput as error:
                wrong.append(f"{task.about['name']}: {error}")
    show(rows, COLUMNS, args.json)
    return end(args, rows, wrong)
