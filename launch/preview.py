"""`sweep plan`: the runs of a study, what they take, and the jobs that a submit would queue. Nothing is written."""

import sys
from typing import Any

from ..harness.run import read_run
from ..kernels.errors import InputError
from . import gpu_hours, notes, plan
from .output import number, show
from .slurm import cluster, status, submit
from .slurm.cluster import ClusterConfig
from .subject import Sweep, print_question

COLUMNS = {"run": "Run", "id": "Id", "state": "State", "to do": "To do"}
COLUMNS |= {"gpu_hours": "GPU-hours of training", "gib": "GiB"}


def show_plan(sweep: Sweep) -> int:
    args = sweep.args
    queue = sweep.cluster is not None and cluster.load(sweep.cluster).kind != "local"
    rows = plan.rows(sweep.runs)
    runs = [run for run, row in zip(sweep.runs, rows, strict=True) if row["state"] != "unreadable"]
    pieces, known = plan.pieces(runs), notes.contents(runs)
    requests = {one.id: submit.queue_of(sweep.cluster, one.cluster, args.parallel) for one in pieces} if queue else {}
    submit.check_batches(pieces, requests)
    print_question(sweep)
    models = {task.path for run in runs for task in run.tasks if task.kind == "model"}
    own = [read_run(folder) for folder in models if (folder / "config.json").is_file()]
    hours, shared = gpu_hours.of_runs(runs, gpu_hours.committed_speeds() + gpu_hours.training_speeds(own))
    room = notes.room(runs)
    by_name = {row["run"]: row for row in rows}
    for one, cost, other in zip(runs, hours, shared, strict=True):
        row = by_name[one.name]
        row |= {"gpu_hours": cost if args.json else gpu_hours.cell(cost, other), "gib": room.get(one.name)}
        row |= {"trained_by": other or None, "problems": [*one.problems(), *notes.scoring(one, known)]}
    show(rows, COLUMNS, args.json)
    if args.json:
        return 0
    print(f"\n{number(len(runs), 'run')}; GPU-hours of training: {gpu_hours.total(hours)}")
    if room:
        print(f"checkpoints and weights: {sum(room.values()):.3g} GiB")
    for row in rows:
        if row["state"] == "unreadable":
            print(f"{row['run']}: unreadable, left out: {row['error']}")
    try:
        notes.devices(runs, here=not queue)
    except InputError as error:
        print(error)
    hints = notes.hints(sweep.study, sweep.whole)
    for line in (*notes.problems(runs, known), *notes.data(runs, known), *notes.earlier(runs), *hints):
        print(line)
    if queue:
        _print_arrays(sweep, pieces, requests)
    return 0


def _print_arrays(sweep: Sweep, pieces: list[plan.Piece], requests: dict[tuple[str, str], ClusterConfig]) -> None:
    """Print what a submit would request, and the files that sbatch would get."""
    home = sweep.home.resolve()
    jobs = submit.choose(pieces, status.UNSEEN, ("planned", "stopped"), requests)
    hours = sum(job.cluster.gpus * job.cluster.nodes * job.cluster.time_min / 60 for job in jobs)
    print(
        f"asked for: {number(len(jobs), 'job')}, {hours:g} GPU-hours "
        "(GPUs × time limit; a job that needs more is queued again)"
    )
    code: dict[str, Any] = {"path": str(home / "code" / "TREE")}
    for index, draft in enumerate(submit.drafts(jobs, sys.maxsize)):
        name, folder = f"{sweep.study.name}-NUMBER-{index}-TOKEN", home / "NUMBER"
        after = f", after array {', '.join(map(str, draft.after))}" if draft.after else ""
        print(f"\narray {index}{after}:")
        print(submit.batch_file(draft, name, folder, index, code), end="")
