"""The report: all tables and figures of some runs, written completely or not at all."""

import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure

from ..kernels.errors import InputError
from .claims import claims
from .contents import FIGURES, TABLES
from .evidence import Evidence
from .frame import frame
from .frame import write as write_records
from .names import shared
from .page import page
from .progress import over
from .published import read as published_rows
from .queries import setting_words, timings
from .runs import read
from .speed import MODES
from .style import STYLE
from .summary import TIMED
from .table import Table
from .verdicts import sentences

KIND = "lamabench report"  # marks index.json as that of a report
ESCAPED = "backslashreplace"  # bytes of a file's name that are not UTF-8
FORMATS: dict[str, Callable[[Table], str]] = {
    "terminal": lambda table: table.terminal([table.caption]),
    "markdown": Table.markdown,
    "csv": Table.csv,
    "latex": Table.latex,
    "html": Table.html,
}
MOST_NAMES = 4  # figures of one kind that README.md lists by name
ENDINGS = {"markdown": "md", "csv": "csv", "latex": "tex"}  # of the files of a table


def evidence_of(
    paths: list[Path],
    baseline: str | None = None,
    say: Callable[[str], object] = lambda text: None,
    published: Path | None = None,
) -> Evidence:
    """Every run at or below `paths`, to be shown.

    `baseline` is the model that others are compared with in speed; None: DiT-XL/2 if it was measured. `say` gets a line
    about samples that cannot be read. `published` is a file of published rows that join those of the suite
    (published.py). Raises InputError if there is no run or none can be read, or the published rows cannot be read.
    """
    rows = published_rows(published)
    return Evidence(read(paths), baseline, say, rows)


def overview_text(evidence: Evidence) -> str:
    """The summary for a terminal of 120 columns. Below it come speeds of models that were timed in several ways,
    benchmarks of operators, and means over training seeds if there are several. Columns that do not fit are named."""
    runs, table, over_seeds = evidence.runs, evidence.overview, evidence.over_seeds
    errors = [f"{row['label']}: {row['error']}" for row in table.rows if row["error"]]
    first = replace(table, notes=[]) if over_seeds.rows else table  # the other table has these notes too
    parts = [first.terminal([*([table.caption] if shared(runs) else []), *errors])]
    single = {(mode, run) for mode in MODES for rows in timings(runs, "speed", mode).values() for run in rows}
    several = any((row["mode"], run) not in single for run in runs for row in run.rows if row.get("mode"))
    for name in ("speed", "kernels"):
        if several or name == "kernels":
            parts += [FORMATS["terminal"](each) for each in tables_of(evidence, name)]
    parts += [over_seeds.terminal()] if over_seeds.rows else []
    return "\n\n".join(parts)


def tables_of(evidence: Evidence, name: str) -> list[Table]:
    """The tables of an entry of `TABLES` that have rows."""
    tables = TABLES[name].make(evidence)
    return [table for table in (tables if isinstance(tables, list) else [tables]) if table.rows]


def table_text(evidence: Evidence, name: str, form: str = "terminal") -> str:
    """The table of a name in a form of `FORMATS`; a name of `TABLES` may stand for several. Raises InputError, with the
    names there are, for another one, and if the table has no rows."""
    return "\n".join(FORMATS[form](table).rstrip("\n") + "\n" for table in named_tables(evidence, name)).rstrip("\n")


def named_tables(evidence: Evidence, name: str) -> list[Table]:
    """The tables of a name, as `table_text` takes it."""
    if name in TABLES:
        if tables := tables_of(evidence, name):
            return tables
        raise InputError(f"the table {name} has no rows: {TABLES[name].nothing}")
    every = {table.name: table for item in TABLES for table in tables_of(evidence, item)}
    if name in every:
        return [every[name]]
    names = list(dict.fromkeys([*TABLES, *every]))
    close = get_close_matches(name, names, 1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise InputError(f"no table {name!r}{hint}; choices: {', '.join(names)}")


def build(
    paths: list[Path],
    out: Path,
    baseline: str | None = None,
    say: Callable[[str], object] = lambda text: None,
    published: Path | None = None,
    pdf: bool = True,
) -> list[Path]:
    """`write` the report on every run at or below `paths`, as `evidence_of` reads them."""
    _files_of_report(out)
    return write(evidence_of(paths, baseline, say, published), out, pdf)


def write(evidence: Evidence, out: Path, pdf: bool = True) -> list[Path]:
    """Write a report into the folder `out` and return its files, sorted. Without `pdf`, which takes half of the time,
    figures are PNG alone.

    It is first rendered in a folder beside `out`. Then an earlier report in `out` is replaced file by file. Samples
    that cannot be read are not shown, and README.md lists them. Raises InputError and leaves `out` untouched if the
    baseline was not measured, or `out` is a file or holds something that is not a report.
    """
    _files_of_report(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    except OSError as error:
        raise InputError(f"cannot write a report at {out}: {error.strerror}") from None
    try:
        _write(evidence, temporary, out, pdf)
        old = _files_of_report(out)  # only now, because another report may have been written meanwhile
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


def _write(evidence: Evidence, folder: Path, out: Path, pdf: bool) -> None:
    """Write the report into `folder`, which will be `out`."""
    absent: dict[str, str] = {}
    about: dict[str, str] = {"index.html": "all of this on one page, which needs no network"}
    shown: list[Table] = []
    for name, item in over(list(TABLES.items()), "tables"):
        tables = tables_of(evidence, name)
        absent |= {} if tables else {name: item.nothing}
        for table in tables:
            for form, ending in ENDINGS.items():
                _write_text(folder / f"{table.name}.{ending}", FORMATS[form](table))
            about[f"{table.name}.{', .'.join(ENDINGS.values())}"] = item.about
        shown += tables
    pictures: dict[str, bytes] = {}
    with matplotlib.rc_context(), warnings.catch_warnings():
        # A letter that the font lacks is drawn as a box. Nobody can act on that.
        warnings.filterwarnings("ignore", "Glyph|constrained_layout", UserWarning)
        matplotlib.rcdefaults()  # ignore the user's matplotlibrc
        matplotlib.rcParams.update(STYLE)
        for item_name, item in over(list(FIGURES.items()), "drawing"):
            figures = item.draw(evidence)
            for name, figure in figures.items() if isinstance(figures, Mapping) else [(item_name, figures)]:
                if isinstance(figure, str):
                    absent[name] = figure
                else:
                    pictures[name] = _write_figure(figure, folder / name, pdf)
                    about[f"{name}.png{', .pdf' if pdf else ''}"] = item.about
    records = ", ".join(write_records(frame(evidence.runs), folder))
    about[records] = "all records with their units (reports/COLUMNS.md)"
    _write_text(folder / "README.md", _readme(evidence, about, absent))
    _write_text(folder / "index.html", page(evidence, shown, pictures, absent, out))
    files = sorted([*(path.name for path in folder.iterdir()), "index.json"])
    ids = [run.info["id"] for run in evidence.runs]
    index = {"kind": KIND, "schema": 1, "runs": ids, "files": files, "absent": absent}
    _write_text(folder / "index.json", json.dumps(index, indent=1) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors=ESCAPED)


def _write_figure(figure: Figure, path: Path, pdf: bool) -> bytes:
    """Write a figure as PNG and, with `pdf`, as PDF. Returns the PNG."""
    files = {"png": io.BytesIO()} | ({"pdf": io.BytesIO()} if pdf else {})
    figure.set_dpi(150)
    FigureCanvasAgg(figure).print_png(files["png"], metadata={"Software": None})  # `savefig` would draw twice
    if pdf:  # through memory, because on a full disk Matplotlib's PDF would hide the error
        figure.set_layout_engine("none")  # it has the layout of the PNG
        metadata = {"CreationDate": None, "Creator": None, "Producer": None}
        FigureCanvasPdf(figure).print_pdf(files["pdf"], metadata=metadata)
    for kind, buffer in files.items():
        path.with_name(f"{path.name}.{kind}").write_bytes(buffer.getvalue())
    return files["png"].getvalue()


def _claims(evidence: Evidence) -> list[str]:
    """A line for each claim: its verdict, the claim, and why."""
    return [f"- **{one.title}**: {one.text}" for one in claims(evidence)]


def _readme(evidence: Evidence, about: dict[str, str], absent: dict[str, str]) -> str:
    runs, overview, over_seeds = evidence.runs, evidence.overview, evidence.over_seeds
    lines = [row for run in runs for row in run.rows]
    origin = [row["provenance"] for row in lines if row["provenance"]]
    commits = sorted({f"{where.get('commit') or 'none'}{' + dirty' if where.get('dirty') else ''}" for where in origin})
    devices = sorted({str(where.get("device")) for where in origin})
    days = sorted({line["time"][:10] for line in lines})
    when = " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "no date"
    text = [f"# Report: {', '.join(dict.fromkeys(run.info['study'] for run in runs))}", ""]
    text += [f"Commits: {', '.join(commits) or 'none'}. Devices: {', '.join(devices) or 'none'}. Recorded: {when}.", ""]
    shown = replace(overview, notes=[]) if over_seeds.rows else overview  # the other table has these notes too
    if lines := _claims(evidence):
        text += ["## Verdicts", "", *lines, ""]
    for name, study in evidence.studies.items():
        question = (study.runs[0].info.get("about") or {}).get("question")
        findings = [*_claims(study), *(f"- {one}" for one in sentences(study))]
        if question or findings:
            text += [f"## Study {name}", "", *([f"*{question}*", ""] if question else []), *findings, ""]
    text += ["## Runs", "", shown.markdown()]
    text += ["## Over training seeds", "", over_seeds.markdown()] if over_seeds.rows else []
    notes = []
    for kind, mode, title, _ in TIMED:
        for setting in timings(runs, kind, mode):
            notes.append(f"{title}: throughput with {setting_words(kind, setting)}.")
    notes.append("MACs: multiply-adds of one forward pass of one image. FLOPs: 2 × MACs plus all other operations.")
    notes.append("Paper Gflops: what the paper of the model would print, by its own convention.")
    text += [f"- {note}" for note in notes]
    text += ["", "## Files", ""]
    for what in dict.fromkeys(about.values()):
        names = [files for files, words in about.items() if words == what]
        files = ", ".join(names) if len(names) <= MOST_NAMES else f"{names[0]} and {len(names) - 1} more such files"
        text.append(f"- {files}: {what}")
    for reason in dict.fromkeys(absent.values()):
        text.append(f"- not included: {', '.join(name for name, why in absent.items() if why == reason)} ({reason})")
    return "\n".join(text) + "\n"
