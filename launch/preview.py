"""`sweep plan`: the runs of a study, what they take, and the jobs that a submit would queue. Nothing is written."""

import sys
from collections.abc import Sequence
from typing import Any

from ..harness.run import read_run
from ..kernels.errors import InputError
from . import gpu_hours, notes, plan, set_hours
from .output import number, show
from .slurm import cluster, jobs, requests, status, submit
from .subject import Sweep, print_question

COLUMNS = {"run": "Run", "id": "Id", "state": "State", "to do": "To do"}
COLUMNS |= {"gpu_hours": "Hours of training", "gib": "GiB"}


def show_plan(sweep: Sweep) -> int:
    args = sweep.args
    queue = sweep.cluster is not None and cluster.load(sweep.cluster).kind != "local"
    rows = plan.rows(sweep.runs)
    runs = [run for run, row in zip(sweep.runs, rows, strict=True) if row["state"] != "unreadable"]
    pieces, known = plan.pieces(runs), notes.contents(runs)
    asked = requests.requests_of(pieces, sweep.cluster, args.parallel) if queue else {}
    requests.check_requests(pieces, asked)
    print_question(sweep, whole=True)
    models = {task.path for run in runs for task in run.tasks if task.kind == "model"}
    own = [read_run(folder) for folder in models if (folder / "config.json").is_file()]
    committed, configs = gpu_hours.committed_roots(), [run.config for run in runs]
    speeds = [*gpu_hours.committed_speeds(), *gpu_hours.speeds(own)]
    speeds += gpu_hours.trained({run.root for run in runs}, configs)
    speeds += gpu_hours.on_gpus(gpu_hours.trained(committed, configs))
    hours, shared = gpu_hours.of_runs(runs, speeds)
    forward = gpu_hours.committed_speeds(mode="forward") + gpu_hours.speeds(own, "forward")
    sampling, scoring = set_hours.of_sampling(runs, forward, committed), set_hours.of_scoring(runs, committed)
    room = notes.room(runs)
    by_name = {row["run"]: row for row in rows}
    for one, cost, other, drawing, judging in zip(runs, hours, shared, sampling, scoring, strict=True):
        row = by_name[one.name]
        row |= {"sampling_hours": drawing or None, "scoring_hours": judging or None}
        row |= {"gpu_hours": cost if args.json else gpu_hours.cell(cost, other), "gib": room.get(one.name)}
        row |= {"trained_by": other or None, "problems": [*one.problems(), *notes.scoring(one, known)]}
    show(rows, COLUMNS, args.json)
    if args.json:
        return 0
    print(f"\n{number(len(runs), 'run')}; hours of training: {gpu_hours.total(hours)}")
    if any(sampling):
        lack = "no samples and no bench record of forward passes"
        print(f"hours of sampling: {gpu_hours.total([one for one in sampling if one], lack)}")
    if any(scoring):
        lack = "no score with this network"
        print(f"hours of scoring: {gpu_hours.total([one for one in scoring if one], lack)}")
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
    for line in dict.fromkeys((*notes.problems(runs, known), *notes.data(runs, known), *notes.earlier(runs), *hints)):
        print(line)
    if queue:
        _print_arrays(sweep, pieces, asked)
    return 0


def _print_arrays(sweep: Sweep, pieces: list[plan.Piece], asked: requests.Requests) -> None:
    """Print what a submit would request, and the files that sbatch would get."""
    home = sweep.home.resolve()
    chosen = jobs.choose(pieces, status.UNSEEN, ("planned", "stopped"), asked)
    limits = "(time limits; a job that needs more is queued again)"
    print(f"asked for: {number(len(chosen), 'job')}, {_hours(chosen)} {limits}")
    by_stages: dict[str, list[jobs.Choice]] = {}
    for one in chosen:
        by_stages.setdefault(", ".join(one.piece.task.stages), []).append(one)
    for stages, several in by_stages.items() if len(by_stages) > 1 else ():
        print(f"  {stages}: {number(len(several), 'job')}, {_hours(several)}")
    for line in requests.idle(pieces, asked):
        print(line)
    code: dict[str, Any] = {"path": str(home / "code" / "TREE")}
    for index, draft in enumerate(jobs.drafts(chosen, sys.maxsize)):
        name, folder = f"{sweep.study.name}-NUMBER-{index}-TOKEN", home / "NUMBER"
        after = f", after array {', '.join(map(str, draft.after))}" if draft.after else ""
        after += f", each task after that of array {draft.pair}" if draft.pair is not None else ""
        print(f"\narray {index}{after}:")
        print(submit.batch_file(draft, name, folder, index, code), end="")


def _hours(chosen: Sequence[jobs.Choice]) -> str:
    """The GPU-hours of the time limits of jobs, and the CPU-hours of those without a GPU."""
    gpus = cpus = 0.0
    for one in (choice.cluster for choice in chosen):
        hours = one.nodes * one.on_a_node * one.time_min / 60
        gpus, cpus = (gpus + hours, cpus) if one.gpus else (gpus, cpus + hours * one.cpus)
    return " and ".join([f"{gpus:g} GPU-hours", *([f"{cpus:g} CPU-hours"] if cpus else [])])
