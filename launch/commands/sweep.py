"""`lamabench sweep`: plan a study, do it here or on SLURM, look at it, collect what came of it."""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ablations import study as studies
from ...ablations.study import Study
from ...harness.measure.speed import stored
from ...harness.record import Row, newest, read_records, write_lines
from ...harness.run import read_run
from ...harness.stages import Task
from ...kernels.errors import InputError
from ...models import registry
from .. import gpu_hours, local, notes, plan, prune
from ..output import show
from ..plan import Planned
from ..slurm import cluster as clusters
from ..slurm import manifest, snapshot, status, submit

LOOK = {"run": "Run", "id": "Id", "state": "State", "to do": "To do", "progress": "Progress", "error": "Error"}
EVERY_S = 10.0  # between two looks of --watch
CHOOSING = ("plan", "run", "submit", "retry", "cancel", "status")  # actions that take --only
OF_STAGES = ("plan", "run", "submit", "retry", "status")  # … and --stages


@dataclass(frozen=True)
class Sweep:
    """What the command is about: a study, all its runs, those that `--only` and `--stages` leave, the cluster's name
    and the settings as typed."""

    args: argparse.Namespace
    study: Study
    whole: list[Planned]
    runs: list[Planned]
    cluster: str | None
    words: list[str]

    @property
    def root(self) -> Path:
        return self.whole[0].root

    @property
    def home(self) -> Path:
        """Where its submissions are kept."""
        return self.root / self.study.name / ".sweep"


def run(args: argparse.Namespace) -> int:
    """Do `args.action` with a study."""
    study = studies.load(args.study)
    if args.debug:
        study = study.debug_size()
    name, words = clusters.split(args.words)
    if name is not None:
        clusters.load(name)  # a typo is an error also where the cluster is of no use, as for status
    for option, actions in (("only", CHOOSING), ("stages", OF_STAGES), ("checkpoints", ("prune",))):
        if getattr(args, option) and args.action not in actions:
            listed = f"{', '.join(actions[:-1])} and {actions[-1]}" if len(actions) > 1 else actions[0]
            raise InputError(f"--{option} is for {listed}, not for {args.action}")
    again = args.action not in ("plan", "run", "submit")  # of what was submitted: with the settings of then
    settings = words
    if again and all(word.startswith(submit.FREE) for word in words):
        kept = manifest.remembered(plan.home(study, words) / ".sweep")
        if kept and not args.json:
            print(f"with the settings of the newest submit: {' '.join(kept)}", file=sys.stderr)
        settings = [*kept, *words]
    whole = plan.plan(study, settings)
    runs = plan.of_stages(whole, args.stages.split(","), study) if args.stages else whole
    runs = plan.only(runs, args.only) if args.only else runs
    actions = {"plan": _plan, "run": _run, "submit": _submit, "retry": _retry, "status": _status, "cancel": _cancel}
    actions |= {"collect": _collect, "prune": _prune}
    return actions[args.action](Sweep(args, study, whole, runs, name, words))


def _question(sweep: Sweep) -> None:
    study = sweep.study
    if not sweep.args.json:
        print(f"{study.name}: {study.question}" + (f"\nClaim: {study.claim}" if study.claim else "") + "\n")


def _plan(sweep: Sweep) -> int:
    args, runs = sweep.args, sweep.runs
    queue = sweep.cluster is not None and clusters.load(sweep.cluster).kind != "local"
    pieces = plan.pieces(runs)
    requests = {one.id: submit.queue_of(sweep.cluster, one.cluster, args.parallel) for one in pieces} if queue else {}
    _question(sweep)
    models = {task.path for run in runs for task in run.tasks if task.kind == "model"}
    own = [read_run(folder) for folder in models if (folder / "config.json").is_file()]
    hours, shared = gpu_hours.of_runs(runs, gpu_hours.measured() + gpu_hours.steps_of(own))
    room = notes.room(runs)
    rows = plan.rows(runs)
    for row, one, cost, other in zip(rows, runs, hours, shared, strict=True):
        row |= {"gpu_hours": cost if args.json else gpu_hours.words(cost, other), "gib": room.get(one.name)}
        row |= {"trained_by": other or None, "problems": one.problems()}
    columns = {key: LOOK[key] for key in ("run", "id", "state", "to do")}
    show(rows, columns | {"gpu_hours": "GPU-hours of training", "gib": "GiB"}, args.json)
    if args.json:
        return 0
    print(f"\n{len(runs)} runs; GPU-hours of training: {gpu_hours.total(hours)}")
    if room:
        print(f"checkpoints and weights: {sum(room.values()):.3g} GiB")
    for line in (*notes.problems(runs), *notes.data(runs), *notes.earlier(runs), *notes.hints(sweep.study, runs)):
        print(line)
    if queue:
        _print_arrays(sweep, requests)
    return 0


def _print_arrays(sweep: Sweep, requests: dict[tuple[str, str], clusters.ClusterConfig]) -> None:
    """What a submit would ask for, and what sbatch would get."""
    home = sweep.home.resolve()
    chosen = submit.choose(plan.pieces(sweep.runs), status.UNSEEN, ("planned", "stopped"), requests)
    hours_asked = sum(one.cluster.gpus * one.cluster.time_min / 60 for one in chosen)
    print(
        f"asked for: {len(chosen)} jobs, {hours_asked:g} GPU-hours "
        "(GPUs × time limit; a job that needs more is queued again)"
    )
    code: dict[str, Any] = {"path": str(home / "code" / "TREE")}
    for index, draft in enumerate(submit.drafts(chosen, sys.maxsize)):
        name, folder = f"{sweep.study.name}-NUMBER-{index}-TOKEN", home / "NUMBER"
        after = f", after array {', '.join(map(str, draft.after))}" if draft.after else ""
        print(f"\narray {index}{after}:")
        print(submit.batch_file(draft, name, folder, index, code), end="")


def _run(sweep: Sweep) -> int:
    from ...reports.report import build, summary_text  # pandas and matplotlib, for this command alone

    if sweep.cluster is not None and clusters.load(sweep.cluster).kind != "local":
        raise InputError(f"sweep run works on this machine; sweep submit queues on cluster {sweep.cluster}")
    pieces = plan.pieces(sweep.runs)
    local.check_devices(pieces, local.gpus())
    folder = plan.write(sweep.study, sweep.whole)
    done = local.run_local(pieces, sweep.args.parallel)
    out = folder / "report"
    build([folder], out)
    if sweep.args.json:
        show(plan.rows(sweep.runs), LOOK, True)
    else:
        print(summary_text([folder]))
        print(f"\ntables and figures: {out}")
    return 0 if done else 1


def _submit(sweep: Sweep) -> int:
    args = sweep.args
    made = submit.submit(sweep.runs, sweep.study, sweep.words, sweep.cluster, args.parallel, args.dirty, sweep.whole)
    return _tell(sweep, made)


def _retry(sweep: Sweep) -> int:
    args = sweep.args
    return _tell(sweep, submit.retry(sweep.runs, sweep.study, sweep.words, sweep.cluster, args.parallel, args.dirty))


def _tell(sweep: Sweep, made: submit.Submission) -> int:
    if sweep.args.json:
        arrays = [{"job": job, "name": array.name, "tasks": len(array.tasks)} for array, job in made.arrays]
        print(json.dumps({"arrays": arrays, "code": made.code, "left": made.left}, indent=1))
        return 0
    for array, job in made.arrays:
        kinds = Counter(one["task"]["kind"] for one in array.tasks)
        print(f"job {job}: {', '.join(f'{n} × {kind}' for kind, n in kinds.items())}, logs {array.folder / 'logs'}")
    if made.arrays:
        print(f"code: {snapshot.words(made.code)}")
    else:
        print("nothing to queue")
    failed = sum(made.left.get(state, 0) for state in status.FAILED)
    left = ", ".join(f"{count} {state}" for state, count in sorted(made.left.items()))
    again = f"; sweep retry queues {failed} of them again" if failed else ""
    print(f"runs left as they are: {left or 'none'}{again}")
    if made.left.get("diverged"):
        print("a run that diverged would diverge again: change the study")
    for line in notes.problems(sweep.runs):
        print(line)
    return 0


def _status(sweep: Sweep) -> int:
    args, runs = sweep.args, sweep.runs
    while True:
        found, seen = status.standings(runs, sweep.home)
        rows = status.rows(found)
        if args.watch and not args.json and sys.stdout.isatty():
            print("\033[H\033[2J", end="")
        _question(sweep)
        columns = {key: LOOK[key] for key in LOOK if key != "error"}
        columns |= ({"job": "Job"} if any(row["job"] for row in rows) else {}) | {"error": LOOK["error"]}
        if not args.json:  # an error comes last and is cut: the logs below have all of it
            rows = [row | {"state": row["shown"], "error": _cut(row["error"])} for row in rows]
        show(rows, columns, args.json)
        for note in seen.notes:
            print(note, file=sys.stderr)
        if not args.json:
            _print_summary(found)
            _print_strays(sweep, seen)
        if not args.watch or not any(one.state in status.ACTIVE for one in found):
            return 0
        time.sleep(EVERY_S)


def _cut(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:99]}…"


def _print_summary(found: Sequence[status.RunStanding]) -> None:
    counts = Counter(one.state for one in found)
    print(f"\n{len(found)} runs: {', '.join(f'{count} {state}' for state, count in counts.items())}")
    for one in found:
        if one.state in (*status.FAILED, "diverged") and one.main.log and one.main.log.is_file():
            print(f"{one.run.name}: {one.main.log}")


def _print_strays(sweep: Sweep, seen: status.Look) -> None:
    """Folders that no study names, and jobs of this study that no run of it asks for."""
    kept = prune.named(sweep.root, {sweep.study.name: plan.listing(sweep.whole)})
    if folders := list(prune.unnamed(sweep.root, kept)):
        print(f"{len(folders)} folders that no study below {sweep.root} names; sweep prune lists them")
    asked = {(task.kind, task.key) for one in sweep.whole for task in one.tasks}
    ours = {str(array.job) for array in manifest.arrays(sweep.home)}
    queued = {
        job: entry["name"]
        for job, entry in seen.queued.items()
        if status.key_of(entry) not in asked and job.split("_")[0] in ours
    }
    if queued:
        jobs = ", ".join(f"{job} ({name})" for job, name in list(queued.items())[:5])
        more = ", …" if len(queued) > 5 else ""
        print(f"{len(queued)} jobs of runs that are not in the study are queued: {jobs}{more}; scancel JOB ends one")


def _cancel(sweep: Sweep) -> int:
    keys = None
    if sweep.args.only:  # what others of its runs need goes on
        names = {one.name for one in sweep.runs}
        others = {(task.kind, task.key) for one in sweep.whole if one.name not in names for task in one.tasks}
        keys = {(task.kind, task.key) for one in sweep.runs for task in one.tasks} - others
    jobs = submit.cancel(sweep.runs, sweep.study, keys)
    text = f"cancelled: job {', '.join(jobs)}" if jobs else "nothing is queued or running"
    print(json.dumps(jobs) if sweep.args.json else text)
    return 0


def _collect(sweep: Sweep) -> int:
    """Every record of exactly the study's runs in one file, each with what it is a record of."""
    args, runs = sweep.args, sweep.runs
    lines = [{**one.about, **row.as_dict()} for one in runs for task in one.tasks for row in _asked(task)]
    out = args.out or sweep.home.parent / "records.jsonl"
    missing = [one.name for one in runs if one.missing()]
    if not out.parent.is_dir():
        raise InputError(f"no such folder: {out.parent}" + ("" if args.out else "; nothing of the study ran yet"))
    if out.is_dir():
        raise InputError(f"{out} is a folder: --out names a file")
    try:
        write_lines(out, lines)
    except OSError as error:  # a full disk, a folder of somebody else's
        raise InputError(f"cannot write {out}: {error.strerror}") from None
    text = f"{out}: {len(lines)} records of {len(runs)} runs"
    if missing:
        text += f"; not done: {len(missing)} ({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''})"
    print(json.dumps({"file": str(out), "records": len(lines), "missing": missing}) if args.json else text)
    return 1 if missing else 0


def _asked(task: Task) -> list[Row]:
    """The records of a task's folder that answer the task, failures too."""
    rows = read_records(task.path / "record.jsonl")
    keys = plan.keys_of(task)
    model = registry.from_dict(task.config["model"])
    for bench in task.plans:
        keys |= {line["key"] for line in stored(model, bench, newest(rows).values())}
    return [row for row in rows if row.key in keys and plan.STAGE_OF[row.kind] in task.stages]


def _prune(sweep: Sweep) -> int:
    """Delete what no study names, or full checkpoints of finished runs; only after each was shown."""
    args, root = sweep.args, sweep.root
    if sweep.home.parent.is_dir():  # a study that did nothing yet names nothing
        plan.write(sweep.study, sweep.whole)
    _, seen = status.look(status.submitted(root), need_queue=True)
    queued = {Path(folder).resolve() for entry in seen.queued.values() for folder in _folders(entry) if folder}
    if args.checkpoints:
        found = list(prune.checkpoints(sweep.runs))
    else:
        found = [prune.leftover(folder) for folder in prune.unnamed(root, prune.named(root))]
    idle = []
    for one in found:
        if prune.busy(one.folder, queued):
            print(f"{one.folder}: left, it is queued or running (sweep cancel)", file=sys.stderr)
            continue
        what = f"{len(one.files)} checkpoints" if one.files else f"{one.hours:.3g} hours of training"
        print(f"{one.folder}: {what}, {one.gib:.3g} GiB", file=sys.stderr)
        idle.append(one)
    if not idle:
        print("[]" if args.json else "nothing to prune")
        return 0
    size = f"{sum(one.gib for one in idle):.3g} GiB"
    count = f"checkpoints of {len(idle)} trainings" if args.checkpoints else f"{len(idle)} folders"
    if not args.yes:
        if not sys.stdin.isatty():
            raise InputError(f"{count} would be deleted, {size}; --yes deletes them")
        if input(f"delete {count}, {size}? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing deleted")
            return 1
    for one in idle:
        one.delete()
    print(json.dumps([str(one.folder) for one in idle]) if args.json else f"deleted {count}, {size}")
    return 0


def _folders(entry: Mapping[str, Any]) -> tuple[str, str]:
    """The folder of a task in a manifest, and that of the training it reads."""
    return entry["task"]["folder"], entry["task"]["training"]
