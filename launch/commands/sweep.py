"""`lamabench sweep`: plan a study, run it here or on SLURM, show its state, and collect its records."""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...ablations.study import Study, load
from ...harness.measure.speed import stored
from ...harness.record import STAGE_OF, Row, newest, read_records, write_lines
from ...harness.run import STUDY, check_study, read_run, read_study
from ...harness.stages import Task
from ...kernels.errors import InputError
from ...models import registry
from .. import gpu_hours, local, notes, plan, prune
from ..compose import compose
from ..output import number, show
from ..plan import Planned
from ..slurm import cluster, manifest, snapshot, status, submit
from ..slurm.cluster import ClusterConfig

COLUMNS = {"run": "Run", "id": "Id", "state": "State", "to do": "To do", "progress": "Progress", "error": "Error"}
EVERY_S = 10.0  # seconds between refreshes of --watch
# Which actions take an option.
OPTIONS = {
    "only": ("plan", "run", "submit", "retry", "cancel", "status"),
    "stages": ("plan", "run", "submit", "retry", "status"),
    "checkpoints": ("prune",),
    "dirty": ("submit", "retry"),
    "watch": ("status",),
    "yes": ("prune",),
    "out": ("collect",),
}


@dataclass(frozen=True)
class Sweep:
    """The subject of the command: a study, all its runs, the runs that `--only` and `--stages` select, the name of the
    cluster, and the settings as typed."""

    args: argparse.Namespace
    study: Study
    whole: list[Planned]
    runs: list[Planned]
    cluster: str | None
    words: list[str]

    @property
    def root(self) -> Path:
        return self.whole[0].root

    def readable(self) -> list[Planned]:
        """The selected runs whose files can be read. A line on stderr names each of the others. Raises InputError if
        there is no run left."""
        errors = {run.name: error for run in self.runs if (error := run.unreadable())}
        if len(errors) == len(self.runs):
            raise InputError(next(iter(errors.values())))
        for name, error in errors.items():
            print(f"{name}: unreadable, left out: {error}", file=sys.stderr)
        return [run for run in self.runs if run.name not in errors]

    @property
    def home(self) -> Path:
        """The folder of its submissions."""
        return self.root / self.study.name / ".sweep"


def run(args: argparse.Namespace) -> int:
    """Do `args.action` with a study."""
    study = load(args.study)
    if args.debug:
        study = study.debug_size()
    name, words = cluster.split(args.words)
    if name is not None:
        cluster.load(name)  # so that a typo is an error even for actions that need no cluster, such as status
    for option, actions in OPTIONS.items():
        if getattr(args, option) not in (None, False) and args.action not in actions:
            names = f"{', '.join(actions[:-1])} and {actions[-1]}" if len(actions) > 1 else actions[0]
            raise InputError(f"--{option} is for {names}, not for {args.action}")
    settings = _settings(args, study, words)
    if args.action == "cancel" and args.only is None:  # without a plan, which a damaged file would prevent
        compose([text for text in words if text.startswith("run.")])  # a typo in run.root would end other jobs
        return _cancel(args, plan.home(study, settings), study)
    whole = plan.plan(study, settings)
    runs = plan.select_stages(whole, args.stages.split(","), study) if args.stages is not None else whole
    runs = plan.select_variants(runs, args.only) if args.only is not None else runs
    actions = {"plan": _plan, "run": _run, "submit": _submit, "retry": _retry, "status": _status}
    actions["cancel"] = _cancel_some
    actions |= {"collect": _collect, "prune": _prune}
    return actions[args.action](Sweep(args, study, whole, runs, name, words))


def _settings(args: argparse.Namespace, study: Study, words: list[str]) -> list[str]:
    """The settings of the runs. Commands that follow a submit take those of the newest one."""
    if args.action in ("plan", "run", "submit") or not all(word.startswith(submit.FREE) for word in words):
        return words
    try:
        earlier = manifest.remembered(plan.home(study, words) / ".sweep")
    except InputError as error:
        if args.action not in ("status", "cancel"):
            raise
        print(error, file=sys.stderr)
        return words
    if earlier and not args.json:
        print(f"with the settings of the newest submit: {' '.join(earlier)}", file=sys.stderr)
    return [*earlier, *words]


def _print_question(sweep: Sweep) -> None:
    study = sweep.study
    if not sweep.args.json:
        print(f"{study.name}: {study.question}" + (f"\nClaim: {study.claim}" if study.claim else "") + "\n")


def _plan(sweep: Sweep) -> int:
    args = sweep.args
    queue = sweep.cluster is not None and cluster.load(sweep.cluster).kind != "local"
    rows = plan.rows(sweep.runs)
    runs = [run for run, row in zip(sweep.runs, rows, strict=True) if row["state"] != "unreadable"]
    pieces, known = plan.pieces(runs), notes.contents(runs)
    requests = {one.id: submit.queue_of(sweep.cluster, one.cluster, args.parallel) for one in pieces} if queue else {}
    submit.check_batches(pieces, requests)
    _print_question(sweep)
    models = {task.path for run in runs for task in run.tasks if task.kind == "model"}
    own = [read_run(folder) for folder in models if (folder / "config.json").is_file()]
    hours, shared = gpu_hours.of_runs(runs, gpu_hours.committed_speeds() + gpu_hours.training_speeds(own))
    room = notes.room(runs)
    by_name = {row["run"]: row for row in rows}
    for one, cost, other in zip(runs, hours, shared, strict=True):
        row = by_name[one.name]
        row |= {"gpu_hours": cost if args.json else gpu_hours.cell(cost, other), "gib": room.get(one.name)}
        row |= {"trained_by": other or None, "problems": [*one.problems(), *notes.scoring(one, known)]}
    columns = {key: COLUMNS[key] for key in ("run", "id", "state", "to do")}
    show(rows, columns | {"gpu_hours": "GPU-hours of training", "gib": "GiB"}, args.json)
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


def _run(sweep: Sweep) -> int:
    from ...reports.report import build, summary_text  # pandas and matplotlib, which only this action needs

    if sweep.cluster is not None and cluster.load(sweep.cluster).kind != "local":
        raise InputError(f"sweep run works on this machine; to queue on cluster {sweep.cluster}, use sweep submit")
    runs = sweep.readable()
    notes.check(runs, here=True)
    folder = plan.write(sweep.study, sweep.whole)
    done = local.run_local(plan.pieces(runs), sweep.args.parallel) and len(runs) == len(sweep.runs)
    out = folder / "report"
    build([folder], out, say=partial(print, file=sys.stderr))
    if sweep.args.json:
        show(plan.rows(sweep.runs), COLUMNS, True)
    else:
        print(summary_text([folder]))
        print(f"\ntables and figures: {out}")
    return 0 if done else 1


def _submit(sweep: Sweep) -> int:
    args, runs = sweep.args, sweep.readable()
    notes.check(runs, here=False)
    submission = submit.submit(runs, sweep.study, sweep.words, sweep.cluster, args.parallel, args.dirty, sweep.whole)
    return _print_submission(sweep, runs, submission)


def _retry(sweep: Sweep) -> int:
    args, runs = sweep.args, sweep.readable()
    notes.check(runs, here=False)
    submission = submit.retry(runs, sweep.study, sweep.words, sweep.cluster, args.parallel, args.dirty)
    return _print_submission(sweep, runs, submission)


def _print_submission(sweep: Sweep, runs: Sequence[Planned], submission: submit.Submission) -> int:
    arrays, left, unreadable = submission.arrays, dict(submission.left), len(sweep.runs) - len(runs)
    if unreadable:
        left["unreadable"] = unreadable
    code = 1 if unreadable else 0
    if sweep.args.json:
        rows = [{"job": job, "name": array.name, "tasks": len(array.tasks)} for array, job in arrays]
        answer = {"arrays": rows, "code": submission.code, "left": left, "rest": submission.rest}
        print(json.dumps(answer, indent=1))
        return code
    for array, job in arrays:
        kinds = Counter(one["task"]["kind"] for one in array.tasks)
        print(f"job {job}: {', '.join(f'{n} × {kind}' for kind, n in kinds.items())}, logs {array.folder / 'logs'}")
    if arrays:
        print(f"code: {snapshot.words(submission.code)}")
    elif not submission.rest:
        print("nothing to queue")
    if submission.rest:
        print(submission.rest)
    failed = sum(left.get(state, 0) for state in status.FAILED)
    counts = ", ".join(f"{count} {state}" for state, count in sorted(left.items()))
    again = f"; sweep retry queues {failed} of them again" if failed else ""
    print(f"runs left as they are: {counts or 'none'}{again}")
    if left.get("diverged"):
        print("a run that diverged would diverge again: change the study")
    for line in (f"{run.name}: {text}" for run in runs for text in run.problems()):
        print(line)
    return code


def _status(sweep: Sweep) -> int:
    args, runs = sweep.args, sweep.runs
    while True:
        standings, look = status.standings(runs, sweep.home)
        rows = status.rows(standings)
        if args.watch and not args.json and sys.stdout.isatty():
            print("\033[H\033[2J", end="")
        _print_question(sweep)
        columns = {key: COLUMNS[key] for key in COLUMNS if key != "error"}
        columns |= ({"job": "Job"} if any(row["job"] for row in rows) else {}) | {"error": COLUMNS["error"]}
        if not args.json:  # errors are cut, because the logs listed below hold all of them
            rows = [row | {"state": row["shown"], "error": _cut(row["error"])} for row in rows]
        show(rows, columns, args.json)
        for note in look.notes:
            print(note, file=sys.stderr)
        if not args.json:
            _print_summary(standings)
            _print_strays(sweep, look)
        if not args.watch or not any(part.state in status.ACTIVE for one in standings for part in one.parts):
            return 0
        time.sleep(EVERY_S)


def _cut(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:99]}…"


def _print_summary(standings: Sequence[status.RunStanding]) -> None:
    counts = Counter(one.state for one in standings)
    print(f"\n{number(len(standings), 'run')}: {', '.join(f'{count} {state}' for state, count in counts.items())}")
    for one in standings:
        if one.state == "unreadable":
            print(f"{one.run.name}: {one.main.error}")
        if one.state in (*status.FAILED, "diverged") and one.main.log and one.main.log.is_file():
            print(f"{one.run.name}: {one.main.log}")


def _print_strays(sweep: Sweep, look: status.Look) -> None:
    """Print the folders that no study names, and the jobs of this study that none of its runs asks for."""
    try:
        named = prune.named_folders(sweep.root, {sweep.study.name: plan.listing(sweep.whole)})
        if folders := list(prune.unnamed_folders(sweep.root, named)):
            print(f"{number(len(folders), 'folder')} below {sweep.root} that no study names; sweep prune lists them")
    except (InputError, OSError) as error:  # the listing of another study is damaged, or a folder cannot be read
        print(error, file=sys.stderr)
    keys = {(task.kind, task.key) for one in sweep.whole for task in one.tasks}
    arrays = {str(array.job) for array in manifest.arrays(sweep.home)[0]}
    queued = {
        job: entry["name"]
        for job, entry in look.queued.items()
        if status.key_of(entry) not in keys and job.split("_")[0] in arrays
    }
    if queued:
        jobs = ", ".join(f"{job} ({name})" for job, name in list(queued.items())[:5])
        more = ", …" if len(queued) > 5 else ""
        count = number(len(queued), "job")
        print(f"{count} in the queue for runs that are not in the study: {jobs}{more}; scancel JOB ends one")


def _cancel_some(sweep: Sweep) -> int:
    """End the jobs of the selected runs. Tasks that other runs need go on."""
    names = {one.name for one in sweep.runs}
    others = {(task.kind, task.key) for one in sweep.whole if one.name not in names for task in one.tasks}
    keys = {(task.kind, task.key) for one in sweep.runs for task in one.tasks} - others
    return _cancel(sweep.args, sweep.home.parent, sweep.study, keys)


def _cancel(
    args: argparse.Namespace, folder: Path, study: Study, keys: Container[tuple[str, str]] | None = None
) -> int:
    """End the jobs of the study in `folder`, or some of them. Damaged files are named, and do not keep it from that."""
    try:
        if (folder / STUDY).exists():
            read_study(folder)
    except InputError as error:
        print(error, file=sys.stderr)
    else:
        check_study(folder.parent, study.name, study.file)
    jobs, damaged = submit.cancel(folder / ".sweep", keys)
    for line in damaged:
        print(line, file=sys.stderr)
    text = f"cancelled: job {', '.join(jobs)}" if jobs else "nothing is queued or running"
    print(json.dumps(jobs) if args.json else text)
    return 0


def _collect(sweep: Sweep) -> int:
    """Write every record of exactly the study's runs to one file, each with the run that it belongs to."""
    args, runs = sweep.args, sweep.runs
    readable = sweep.readable()
    lines = [{**one.about, **row.as_dict()} for one in readable for task in one.tasks for row in _records(task)]
    out = args.out or sweep.home.parent / "records.jsonl"
    missing = [one.name for one in runs if one.missing()]
    if not out.parent.is_dir():
        raise InputError(f"no such folder: {out.parent}" + ("" if args.out else "; nothing of the study ran yet"))
    if out.is_dir():
        raise InputError(f"{out} is a folder, but --out must name a file")
    try:
        write_lines(out, lines)
    except OSError as error:  # a full disk, or a folder of another user
        raise InputError(f"cannot write {out}: {error.strerror}") from None
    text = f"{out}: {number(len(lines), 'record')} of {number(len(runs), 'run')}"
    if missing:
        text += f"; not done: {len(missing)} ({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''})"
    print(json.dumps({"file": str(out), "records": len(lines), "missing": missing}) if args.json else text)
    return 1 if missing else 0


def _records(task: Task) -> list[Row]:
    """The records in a task's folder that answer the task, including failures."""
    rows = read_records(task.path / "record.jsonl")
    keys = plan.keys_of(task)
    model = registry.from_dict(task.config["model"])
    for bench in task.plans:
        keys |= {line["key"] for line in stored(model, bench, newest(rows).values())}
    return [row for row in rows if row.key in keys and STAGE_OF[row.kind] in task.stages]


def _prune(sweep: Sweep) -> int:
    """Delete folders that no study names, or full checkpoints of finished runs, after showing each of them."""
    args, root = sweep.args, sweep.root
    if sweep.home.parent.is_dir():  # else no run of the study started, so that it names no folder
        plan.write(sweep.study, sweep.whole)
    submitted, damaged = status.submitted(root)
    _, look = status.look(submitted, need_queue=True, damaged=damaged)
    queued = {Path(folder).resolve() for entry in look.queued.values() for folder in _folders(entry) if folder}
    if args.checkpoints:
        leftovers = list(prune.checkpoints(sweep.runs))
    else:
        unnamed = prune.unnamed_folders(root, prune.named_folders(root))
        leftovers = [prune.leftover(folder) for folder in unnamed]
    idle = []
    for one in leftovers:
        if prune.busy(one.folder, queued):
            print(f"{one.folder}: kept, because it is queued or running (sweep cancel ends it)", file=sys.stderr)
            continue
        content = number(len(one.files), "checkpoint") if one.files else f"{one.hours:.3g} hours of training"
        print(f"{one.folder}: {content}, {one.gib:.3g} GiB", file=sys.stderr)
        idle.append(one)
    if not idle:
        print("[]" if args.json else "nothing to prune")
        return 0
    size = f"{sum(one.gib for one in idle):.3g} GiB"
    count = f"checkpoints of {number(len(idle), 'training')}" if args.checkpoints else number(len(idle), "folder")
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
    """The folder of a task in a manifest, and the folder of the training that it reads."""
    return entry["task"]["folder"], entry["task"]["training"]
