"""`lamabench sweep`: plan a study, run it here or on SLURM, show its state, and collect its records."""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...ablations.study import Study, load
from ...harness.disk import write_lines
from ...harness.measure.speed import stored
from ...harness.record import STAGE_OF, Row, newest, read_records
from ...harness.run import STUDY, check_study, read_study
from ...harness.tasks import Task
from ...kernels.errors import InputError
from ...models import registry
from .. import local, notes, plan, prune
from ..compose import compose
from ..output import number, show
from ..plan import Planned
from ..preview import show_plan
from ..slurm import cluster, manifest, snapshot, status, submit
from ..subject import Sweep, print_question

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
        _check_owner((home := plan.home(study, settings)).parent, study.name, study.file)
        return _cancel(args, home)
    whole = plan.plan(study, settings, _check_owner if args.action in ("status", "cancel") else check_study)
    runs = plan.select_stages(whole, args.stages.split(","), study) if args.stages is not None else whole
    runs = plan.select_variants(runs, args.only) if args.only is not None else runs
    actions = {"plan": show_plan, "run": _run, "submit": _submit, "retry": _retry, "status": _status}
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


def _run(sweep: Sweep) -> int:
    # pandas and matplotlib, which only this action needs
    from ...reports.report import evidence_of, overview_text, write

    if sweep.cluster is not None and cluster.load(sweep.cluster).kind != "local":
        raise InputError(f"sweep run works on this machine; to queue on cluster {sweep.cluster}, use sweep submit")
    if typed := [word for word in sweep.words if cluster.of_cluster(word)]:  # a study may have some for its jobs
        raise InputError(
            f"sweep run gives each job one GPU of this machine, if it has any: {typed[0]} is for sweep submit"
        )
    runs = sweep.readable()
    notes.check(runs, here=True)
    folder = plan.write(sweep.study, sweep.whole)
    done = local.run_local(plan.pieces(runs), sweep.args.parallel) and len(runs) == len(sweep.runs)
    out = folder / "report"
    evidence = evidence_of([folder], say=partial(print, file=sys.stderr))
    write(evidence, out)
    if sweep.args.json:
        show(plan.rows(sweep.runs), COLUMNS, True)
    else:
        print(overview_text(evidence))
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
    for line in notes.without_networks(runs):
        print(line, file=sys.stderr)
    arrays, left, unreadable = submission.arrays, dict(submission.left), len(sweep.runs) - len(runs)
    if unreadable:
        left["unreadable"] = unreadable
    code = 1 if unreadable else 0
    if sweep.args.json:
        rows = [{"job": job, "name": array.name, "tasks": len(array.tasks)} for array, job in arrays]
        answer = {"arrays": rows, "code": submission.code, "left": left, "rest": submission.rest}
        print(json.dumps(answer, indent=1))
        return code
    stages: dict[str, set[tuple[str, ...]]] = {}  # a kind of task whose stages are in several jobs is named with them
    for one in (one["task"] for array, _ in arrays for one in array.tasks):
        stages.setdefault(one["kind"], set()).add(tuple(one["stages"]))
    for array, job in arrays:
        tasks = [one["task"] for one in array.tasks]
        kinds = Counter(
            one["kind"] + (f" ({', '.join(one['stages'])})" if len(stages[one["kind"]]) > 1 else "") for one in tasks
        )
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
        print_question(sweep)
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
    except InputError as error:  # the listing of another study is damaged
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"cannot read {error.filename}: {error.strerror}", file=sys.stderr)
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
    return _cancel(sweep.args, sweep.home.parent, keys)


def _check_owner(root: Path, study: str, file: str | None) -> None:
    """`check_study`, except that a damaged listing is only named. It is not needed to tell of jobs and to end them."""
    try:
        if (root / study / STUDY).exists():
            read_study(root / study)
    except InputError as error:
        print(error, file=sys.stderr)
    else:
        check_study(root, study, file)


def _cancel(args: argparse.Namespace, folder: Path, keys: Container[tuple[str, str]] | None = None) -> int:
    """End the jobs of the study in `folder`, or some of them. Damaged files are named, and do not keep it from that."""
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
