"""`lamabench sweep`: plan a study, do it here or on SLURM, look at it, collect what came of it."""

import argparse
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...ablations import study as studies
from ...ablations.study import Study
from ...harness.record import read_run, write_lines
from ...harness.run import is_locked
from ...kernels.errors import InputError
from .. import gpu_hours, local, plan
from ..plan import Planned
from ..slurm import cluster as clusters
from ..slurm import manifest, snapshot, status, submit
from .runs import show

LOOK = {"run": "Run", "id": "Id", "state": "State", "to do": "To do", "progress": "Progress", "error": "Error"}
EVERY_S = 10.0  # between two looks of --watch


def sweep_command(args: argparse.Namespace) -> int:
    """Do `args.action` with a study."""
    study = studies.load(args.study)
    if args.debug:
        study = study.debug_size()
    name, words = clusters.split(args.words)
    if name is not None:
        clusters.load(name)  # a typo is an error also where the cluster is of no use, as for status
    again = args.action not in ("plan", "run", "submit")  # of what was submitted: with the settings of then
    settings = words
    if again and all(word.startswith(submit.FREE) for word in words):
        first = plan.plan(study, [word for word in words if word.startswith("run.root=")])
        kept = manifest.remembered(manifest.home_of(first[0].folder))
        if kept and not args.json:
            print(f"with the settings of the newest submit: {' '.join(kept)}", file=sys.stderr)
        settings = [*kept, *words]
    runs = plan.plan(study, settings)
    if args.stages and args.action in ("cancel", "collect", "prune"):
        raise InputError(f"--stages is for plan, run, submit, retry and status, not for {args.action}")
    if args.stages:
        runs = plan.only(runs, args.stages.split(","), study)
    actions = {"plan": _plan, "run": _run, "submit": _submit, "retry": _retry, "status": _status, "cancel": _cancel}
    actions |= {"collect": _collect, "prune": _prune}
    return actions[args.action](args, study, runs, name, words)


def _question(args: argparse.Namespace, study: Study) -> None:
    if not args.json:
        print(f"{study.name}: {study.question}" + (f"\nClaim: {study.claim}" if study.claim else "") + "\n")


def _plan(args: argparse.Namespace, study: Study, runs: list[Planned], cluster: str | None, words: list[str]) -> int:
    queue = cluster is not None and clusters.load(cluster).kind != "local"
    requests = {run.info["id"]: submit.queue_of(cluster, run.cluster, args.parallel) for run in runs} if queue else {}
    _question(args, study)
    known = gpu_hours.measured() + gpu_hours.steps_of(read_run(run.folder) for run in runs if run.exists())
    found = [gpu_hours.gpu_hours(run.info, run.stages, known) for run in runs]
    cells = found if args.json else [gpu_hours.words(cost) for cost in found]
    rows = [row | {"gpu_hours": cell} for row, cell in zip(plan.rows(runs), cells, strict=True)]
    for row, run in zip(rows, runs, strict=True):
        if queue:
            asked = requests[run.info["id"]]
            row["gpu_hours_asked"] = asked.gpus * asked.time_min / 60
    columns = {key: LOOK[key] for key in ("run", "id", "state", "to do")} | {"gpu_hours": "GPU-hours of training"}
    show(rows, columns, args.json)
    if args.json:
        return 0
    print(f"\n{len(runs)} runs; GPU-hours of training: {gpu_hours.total(found)}")
    if queue:
        _print_arrays(study, runs, requests)
    return 0


def _print_arrays(study: Study, runs: Sequence[Planned], requests: dict[str, clusters.ClusterConfig]) -> None:
    """What a submit would ask for, and what sbatch would get."""
    home = manifest.home_of(runs[0].folder).resolve()
    missing = [status.Standing(run, "planned") for run in runs if run.missing()]
    asked = [requests[one.run.info["id"]] for one in missing]
    hours_asked = sum(one.gpus * one.time_min / 60 for one in asked)
    print(
        f"asked for: {len(missing)} runs, {hours_asked:g} GPU-hours "
        "(GPUs × time limit; a run that needs more is queued again)"
    )
    code: dict[str, Any] = {"path": str(home / "code" / "TREE")}
    for index, draft in enumerate(submit.drafts(missing, missing, requests, sys.maxsize)):
        name, folder = f"{study.name}-NUMBER-{index}-TOKEN", home / "NUMBER"
        print(f"\narray {index}{f', after array {draft.after[0]}' if draft.after else ''}:")
        print(submit.batch_file(draft, name, folder, index, code), end="")


def _run(args: argparse.Namespace, study: Study, runs: list[Planned], cluster: str | None, words: list[str]) -> int:
    from ...reports.report import build, summary_text  # pandas and matplotlib, for this command alone

    if cluster is not None and clusters.load(cluster).kind != "local":
        raise InputError(f"sweep run works on this machine; sweep submit queues on cluster {cluster}")
    done = local.run_local(runs, args.parallel)
    folders = [run.folder for run in runs if run.exists()]
    out = folders[0].parent / "report"
    build(folders, out)
    if args.json:
        show(plan.rows(runs), LOOK, True)
    else:
        print(summary_text(folders))
        print(f"\ntables and figures: {out}")
    return 0 if done else 1


def _submit(args: argparse.Namespace, study: Study, runs: list[Planned], cluster: str | None, words: list[str]) -> int:
    return _said(args, submit.submit(runs, study.name, words, cluster, args.parallel, args.dirty))


def _retry(args: argparse.Namespace, study: Study, runs: list[Planned], cluster: str | None, words: list[str]) -> int:
    return _said(args, submit.retry(runs, study.name, words, cluster, args.parallel, args.dirty))


def _said(args: argparse.Namespace, made: submit.Submission) -> int:
    if args.json:
        arrays = [{"job": job, "name": array.name, "runs": len(array.tasks)} for array, job in made.arrays]
        print(json.dumps({"arrays": arrays, "code": made.code, "left": made.left}, indent=1))
        return 0
    for array, job in made.arrays:
        print(f"job {job}: {len(array.tasks)} runs, logs {array.folder / 'logs'}")
    if made.arrays:
        print(f"code: {snapshot.words(made.code)}")
    else:
        print("nothing to queue")
    failed = sum(made.left.get(state, 0) for state in status.FAILED)
    left = ", ".join(f"{count} {state}" for state, count in sorted(made.left.items()))
    print(f"left as they are: {left or 'none'}" + ("; sweep retry does those again that failed" if failed else ""))
    if made.left.get("diverged"):
        print("a run that diverged would diverge again: change the study")
    return 0


def _status(args: argparse.Namespace, study: Study, runs: list[Planned], cluster: str | None, words: list[str]) -> int:
    home = manifest.home_of(runs[0].folder)
    while True:
        found, seen = status.standings(runs, home)
        rows = status.rows(found)
        if args.watch and not args.json and sys.stdout.isatty():
            print("\033[H\033[2J", end="")
        _question(args, study)
        columns = {key: LOOK[key] for key in LOOK if key != "error"}
        columns |= ({"job": "Job"} if any(row["job"] for row in rows) else {}) | {"error": LOOK["error"]}
        if not args.json:  # an error comes last and is cut: the logs below have all of it
            rows = [row | {"state": row["shown"], "error": _cut(row["error"])} for row in rows]
        show(rows, columns, args.json)
        for note in seen.notes:
            print(note, file=sys.stderr)
        if not args.json:
            _print_summary(found)
            if not args.stages:  # runs that have none of them are not among `runs`, but in the study
                ids = {run.info["id"] for run in runs}
                queued = {job: info["name"] for job, info in seen.queued.items() if info["id"] not in ids}
                _print_strays(status.strays(runs, home), queued)
        if not args.watch or not any(one.state in status.ACTIVE for one in found):
            return 0
        time.sleep(EVERY_S)


def _cut(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:99]}…"


def _print_summary(found: Sequence[status.Standing]) -> None:
    counts = Counter(one.state for one in found)
    print(f"\n{len(found)} runs: {', '.join(f'{count} {state}' for state, count in counts.items())}")
    for one in found:
        if one.state in (*status.FAILED, "diverged") and one.log and one.log.is_file():
            print(f"{one.run.name}: {one.log}")


def _print_strays(folders: Sequence[Path], queued: Mapping[str, str]) -> None:
    if folders:
        print(f"{len(folders)} folders of runs that are not in the study; sweep prune lists them")
    if queued:
        jobs = ", ".join(f"{job} ({name})" for job, name in list(queued.items())[:5])
        more = ", …" if len(queued) > 5 else ""
        print(f"{len(queued)} runs that are not in the study are in the queue: {jobs}{more}; scancel JOB ends one")


def _cancel(args: argparse.Namespace, study: Study, runs: list[Planned], cluster: str | None, words: list[str]) -> int:
    jobs = submit.cancel(runs)
    text = f"cancelled: job {', '.join(jobs)}" if jobs else "nothing is queued or running"
    print(json.dumps(jobs) if args.json else text)
    return 0


def _collect(args: argparse.Namespace, study: Study, runs: list[Planned], cluster: str | None, words: list[str]) -> int:
    """Every record of exactly the study's runs in one file, each with what it is a record of."""
    about = ("study", "id", "name", "model", "family", "title", "variant", "seed", "overrides")
    lines = [{**{k: run.info[k] for k in about}, **line} for run in runs for line in run.records()]
    out = args.out or runs[0].folder.parent / "records.jsonl"
    missing = [run.name for run in runs if run.missing()]
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


def _prune(args: argparse.Namespace, study: Study, runs: list[Planned], cluster: str | None, words: list[str]) -> int:
    """Delete the folders of runs that are not in the study; done work only after its name was shown."""
    home = manifest.home_of(runs[0].folder)
    _, seen = status.look(list(manifest.arrays(home)), need_queue=True)
    busy = {info["id"] for info in seen.queued.values()}
    folders = []
    for folder in status.strays(runs, home):
        run = read_run(folder)
        if is_locked(folder) or run.info["id"] in busy:
            print(f"{folder}: left, it is queued or running (sweep cancel)", file=sys.stderr)
            continue
        done = [line["kind"] for line in run.records if line["state"] == "done"]
        print(f"{folder}: done {' '.join(done) or 'nothing'}", file=sys.stderr)
        folders.append(folder)
    if not folders:
        print("[]" if args.json else "nothing to prune")
        return 0
    if not args.yes:
        if not sys.stdin.isatty():
            raise InputError(f"{len(folders)} folders would be deleted; --yes deletes them")
        if input(f"delete these {len(folders)} folders? [y/N] ").strip().lower() not in ("y", "yes"):
            print("nothing deleted")
            return 1
    for folder in folders:
        shutil.rmtree(folder)
    print(json.dumps([str(f) for f in folders]) if args.json else f"deleted {len(folders)} folders")
    return 0
