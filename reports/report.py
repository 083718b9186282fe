"""The report: all tables and figures of some runs, written completely or not at all."""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from ..kernels.errors import InputError
from .contents import FIGURES, TABLES
from .evidence import Evidence
from .frame import frame, write
from .queries import setting_words, timings
from .runs import Line, read
from .seeds import seeds
from .speed import MODES, bench, kernels
from .style import STYLE
from .summary import TIMED, summary
from .table import Table

KIND = "lamabench report"  # marks index.json as that of a report
ESCAPED = "backslashreplace"  # bytes of a file's name that are not UTF-8


def summary_rows(paths: list[Path]) -> list[Line]:
    """The summary table as plain data, with the keys of its csv. Raises InputError where the folders hold no runs."""
    return summary(read(paths)).records()


def summary_text(paths: list[Path], baseline: str | None = None) -> str:
    """The summary for a terminal of 120 columns. Below it come benchmarks of operators, those of models that were timed
    in several ways, and means over training seeds if there are several. Columns that do not fit are named. Raises
    InputError as `build` does."""
    runs = read(paths)
    table = summary(runs)
    errors = [f"{row['label']}: {row['error']}" for row in table.rows if row["error"]]
    over_seeds = seeds(table)
    first = replace(table, notes=[]) if over_seeds.rows else table  # the other table has these notes too
    parts = [first.terminal(errors)]
    single = {(mode, run) for mode in MODES for rows in timings(runs, "speed", mode).values() for run in rows}
    several = any((row["mode"], run) not in single for run in runs for row in run.rows if row.get("mode"))
    more = [bench(runs, baseline) if several else None, kernels(runs)]
    parts += [table.terminal([table.caption]) for table in more if table is not None and table.rows]
    parts += [over_seeds.terminal()] if over_seeds.rows else []
    return "\n\n".join(parts)


def build(
    paths: list[Path], out: Path, baseline: str | None = None, say: Callable[[str], object] = lambda text: None
) -> list[Path]:
    """Write the report on every run at or below `paths` into the folder `out` and return the files, sorted.

    `baseline` is the model that others are compared with in speed; None: DiT-XL/2 if it was measured. The report is
    first rendered in a folder beside `out`. Then an earlier report in `out` is replaced file by file. Samples that
    cannot be read are not shown: `say` gets a line about them, and README.md lists them. Raises InputError and leaves
    `out` untouched where there is no run that can be read, the baseline was not measured, or `out` is a file or holds
    something that is not a report.
    """
    old = _files_of_report(out)
    runs = read(paths)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    except OSError as error:
        raise InputError(f"cannot write a report at {out}: {error.strerror}") from None
    try:
        _write(Evidence(runs, baseline, say), temporary)
        out.mkdir(exist_ok=True)
        names = sorted(path.name for path in temporary.iterdir())
        for name in sorted(names, key=lambda name: name == "index.json"):  # the marker last
            os.replace(temporary / name, out / name)
        for name in set(old) - set(names):
            (out / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(temporary)
    return [out / name for name in names]


def _files_of_report(out: Path) -> list[str]:
    """The files of an earlier report in `out`; none where `out` is empty or does not exist."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; a report needs its own folder")
    if not out.is_dir() or not any(out.iterdir()):
        return []
    try:
        index = json.loads((out / "index.json").read_text(encoding="utf-8"))
        if index["kind"] == KIND:
            return [Path(name).name for name in index["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not the index of a report
    raise InputError(f"{out} is neither empty nor an earlier report (it has no index.json of one); name another folder")


def _write(evidence: Evidence, folder: Path) -> None:
    absent: dict[str, str] = {}
    about: dict[str, str] = {}
    for name, item in TABLES.items():
        tables = item.make(evidence)
        for table in tables if isinstance(tables, list) else [tables]:
            if table.rows:
                _write_table(table, folder)
                about[f"{table.name}.md, .csv, .tex"] = item.about
            else:
                absent[name] = item.nothing
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # ignore the user's matplotlibrc
        matplotlib.rcParams.update(STYLE)
        for item_name, item in FIGURES.items():
            figures = item.draw(evidence)
            for name, figure in figures.items() if isinstance(figures, Mapping) else [(item_name, figures)]:
                if isinstance(figure, str):
                    absent[name] = figure
                else:
                    _write_figure(figure, folder / name)
                    about[f"{name}.png, .pdf"] = item.about
    about[", ".join(write(frame(evidence.runs), folder))] = "all records with their units (reports/COLUMNS.md)"
    (folder / "README.md").write_text(_readme(evidence, about, absent), encoding="utf-8", errors=ESCAPED)
    files = sorted([*(path.name for path in folder.iterdir()), "index.json"])
    ids = [run.info["id"] for run in evidence.runs]
    index = {"kind": KIND, "schema": 1, "runs": ids, "files": files, "absent": absent}
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _write_table(table: Table, folder: Path) -> None:
    for ending, text in (("md", table.markdown()), ("csv", table.csv()), ("tex", table.latex())):
        (folder / f"{table.name}.{ending}").write_text(text, encoding="utf-8", errors=ESCAPED)


def _write_figure(figure: Figure, path: Path) -> None:
    no_dates = {"CreationDate": None, "Creator": None, "Producer": None}
    for kind, metadata in (("png", {"Software": None}), ("pdf", no_dates)):
        buffer = io.BytesIO()  # on a full disk, Matplotlib's PDF would hide the error
        figure.savefig(buffer, format=kind, dpi=150 if kind == "png" else "figure", metadata=metadata)
        path.with_name(f"{path.name}.{kind}").write_bytes(buffer.getvalue())


def _readme(evidence: Evidence, about: dict[str, str], absent: dict[str, str]) -> str:
    runs, overview, over_seeds = evidence.runs, evidence.overview, evidence.over_seeds
    speeds = bench(runs, evidence.baseline)
    lines = [row for run in runs for row in run.rows]
    origin = [row["provenance"] for row in lines if row["provenance"]]
    commits = sorted({f"{where.get('commit') or 'none'}{' + dirty' if where.get('dirty') else ''}" for where in origin})
    devices = sorted({str(where.get("device")) for where in origin})
    days = sorted({line["time"][:10] for line in lines})
    when = " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "no date"
    text = [f"# Report: {', '.join(dict.fromkeys(run.info['study'] for run in runs))}", ""]
    text += [f"Commits: {', '.join(commits) or 'none'}. Devices: {', '.join(devices) or 'none'}. Recorded: {when}.", ""]
    shown = replace(overview, notes=[]) if over_seeds.rows else overview  # the other table has these notes too
    text += [shown.markdown()]
    text += ["## Over training seeds", "", over_seeds.markdown()] if over_seeds.rows else []
    notes = []
    for kind, mode, title, _ in TIMED:
        for setting in timings(runs, kind, mode):
            notes.append(f"{title} throughput: {setting_words(kind, setting)}.")
    notes.append("MACs: multiply-adds of one forward pass of one image. FLOPs: 2 × MACs plus all other operations.")
    notes.append("Paper Gflops: what the paper of the model would print, by its own convention.")
    notes += [f"bench.md: {speeds.caption}"] if speeds.rows else []
    text += [f"- {note}" for note in notes]
    text += ["", "## Files", ""]
    text += [f"- {files}: {what}" for files, what in about.items()]
    for reason in dict.fromkeys(absent.values()):
        text.append(f"- not included: {', '.join(name for name, why in absent.items() if why == reason)} ({reason})")
    return "\n".join(text) + "\n"
