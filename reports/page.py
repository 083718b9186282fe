"""The page of a report: index.html, one file that needs no network, with the report's tables and figures."""

import base64
import hashlib
import os
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .claims import claims
from .contents import FIGURES, TABLES, sample_names
from .evidence import Evidence
from .names import value_word
from .runs import Line, Run
from .table import Column, Table
from .verdicts import headline, sentences

FILES = Path(__file__).with_suffix("")  # the folder page/: template, style and scripts
SORTABLE = "sortable-tablesort 4.1.7"  # the npm package of sortable.min.js
SCALE = 0.8  # CSS pixels to a pixel of a figure: letters of 7 points at 150 dpi have 12 pixels
LIMIT = 5_000_000  # bytes of the page
ROWS = (500, 100, 20)  # most rows of a table on the page: the first number with which all tables take half the limit
# The sections after the studies: the tables and figures whose names begin with these words, in this order. The first
# section has also those that no section names.
SECTIONS: dict[str, tuple[str, ...]] = {
    "Scale and quality": ("scale", "state_of_the_art", "seeds", "quality", "scaling", "pareto"),
    "Training": ("loss", "during"),
    "Speed": ("speed", "bench", "kernels", "throughput", "crossover", "roofline"),
    "Cost": ("cost",),
    "Runs": ("summary", "runs", "samples"),
}
VERDICTS = "verdicts"  # the table that stands at the head of the page
QUESTION = {"question": "Question", "claim": "Claim"}
DESIGN = {"answer": "What would count as an answer", "per": "Settings of single values", "budget": "Budget"}
LINKED = ("label", "name")  # columns whose cells link to the folder of the row's run
COSTS = ("params", "macs", "flops", "paper_gflops")


class Cell(NamedTuple):
    """A cell: its text, the value that it is sorted by (None: its text), where the value comes from, and its look."""

    text: str
    sort: str | None
    origin: str
    link: str
    bold: bool
    look: str


class Picture(NamedTuple):
    """A figure: `source` is a data URI; `width` and `height` are in CSS pixels (0: unknown)."""

    name: str
    source: str
    about: str
    width: int
    height: int


def page(
    evidence: Evidence,
    tables: list[Table],
    figures: Mapping[str, bytes],
    absent: Mapping[str, str],
    folder: Path | None = None,
) -> str:
    """The HTML of a report, of at most `LIMIT` bytes.

    `figures` are PNG or SVG files by name, and `absent` says why a table or figure is missing. Links to the folders of
    runs are relative to `folder`, where the page will be; None: no links. Figures that exceed the limit are listed with
    the absent ones; the samples of single runs are the first to go. The HTML may hold surrogates of file names.
    """
    about = {name: _about_study(study) for name, study in evidence.studies.items()}
    shown, bare = {}, ""
    for most in ROWS:
        shown = {table.name: _table(evidence, table, most, folder) for table in tables}
        bare = _rendered(evidence, about, shown, {}, absent)
        if _size(bare) <= LIMIT / 2:
            break
    pictures, left_out = _that_fit(figures, LIMIT - _size(bare))
    return _rendered(evidence, about, shown, pictures, {**absent, **left_out}) if figures else bare


def _size(text: str) -> int:
    return len(text.encode(errors="backslashreplace"))


def _that_fit(figures: Mapping[str, bytes], room: int) -> tuple[dict[str, Picture], dict[str, str]]:
    """The figures that fit into so many bytes, in their order, and why the others are left out."""
    kept = set()
    for name in sorted(figures, key=lambda name: name.startswith("samples_")):
        size = 4 * len(figures[name]) / 3 + 2_000  # base64, and what stands around the picture
        if size <= room:
            kept.add(name)
            room -= int(size)
    why = f"left out of this page, which is limited to {LIMIT // 1_000_000} MB; the file stands beside it"
    pictures = {name: _picture(name, content) for name, content in figures.items() if name in kept}
    return pictures, {name: why for name in figures if name not in kept}


def _picture(name: str, content: bytes) -> Picture:
    png = content.startswith(b"\x89PNG")
    sides = struct.unpack(">II", content[16:24]) if png else (0, 0)  # PNG specification, 11.2.2
    width, height = (round(SCALE * side) for side in sides)
    source = f"data:image/{'png' if png else 'svg+xml'};base64,{base64.b64encode(content).decode()}"
    return Picture(name, source, _about(name), width, height)


def _about(name: str) -> str:
    """What a figure shows: that of its name, or of the longest name that it begins with."""
    names = [key for key in FIGURES if name == key or name.startswith(key.rstrip("*").rstrip("_") + "_")]
    about = FIGURES[max(names, key=len)].about if names else name.replace("_", " ")
    return about[:1].upper() + about[1:] + ("" if about.endswith(".") else ".")


def _rendered(
    evidence: Evidence,
    about: Mapping[str, Line],
    tables: Mapping[str, Line],
    pictures: Mapping[str, Picture],
    absent: Mapping[str, str],
) -> str:
    samples = {name: run.info["study"] for name, run in sample_names(evidence.runs).items()}
    of_study = {name: _study_of(name, about) for name in (*tables, *pictures)}
    studies = [
        {
            **texts,
            "tables": [table for one, table in tables.items() if of_study[one] == name],
            "figures": [picture for one, picture in pictures.items() if one not in samples and of_study[one] == name],
            "samples": [picture for one, picture in pictures.items() if samples.get(one) == name],
        }
        for name, texts in about.items()
    ]
    shared = [name for name, study in of_study.items() if study is None and name not in (*samples, VERDICTS)]
    sections = [
        {
            "id": re.sub(r"\W+", "-", title.lower()),
            "title": title,
            "tables": [tables[name] for name in _in_section(title, shared) if name in tables],
            "figures": [pictures[name] for name in _in_section(title, shared) if name in pictures],
        }
        for title in SECTIONS
    ]
    reasons: dict[str, list[str]] = {}
    for name, reason in absent.items():
        reasons.setdefault(reason, []).append(name)
    names = ("page.css", "sortable.min.js", "page.js", "sortable.LICENSE")
    style, *scripts, licence = ((FILES / name).read_text(encoding="utf-8") for name in names)
    words = {run.info[key] for run in evidence.runs for key in ("family", "study")}
    environment = Environment(
        loader=FileSystemLoader(FILES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(
        title=_title(evidence),
        facts=facts(evidence),
        claims=[claim for texts in about.values() for claim in texts["claims"]],
        verdicts=tables.get(VERDICTS),
        studies=studies,
        sections=[section for section in sections if section["tables"] or section["figures"]],
        absent=reasons,
        words=sorted(words),
        style=style,
        scripts=scripts,
        hashes={"style": _hash(style), "scripts": [_hash(script) for script in scripts]},
        sortable=SORTABLE,
        licence=licence,
    )


def _hash(text: str) -> str:
    """As a Content-Security-Policy names the only style or script that may run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _title(evidence: Evidence) -> str:
    names = list(evidence.studies)
    return "Report: " + (", ".join(names) if len(names) < 4 else f"{len(names)} studies")


def _study_of(name: str, studies: Iterable[str]) -> str | None:
    """The study of a table or figure whose name is, such as ablation_STUDY or ablation_STUDY_METRIC, that of an item
    and of a study."""
    end = "" if name in (*TABLES, *FIGURES) else name.partition("_")[2]
    return max((study for study in studies if f"{end}_".startswith(f"{_file_name(study)}_")), key=len, default=None)


def _file_name(study: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", study)


def _in_section(title: str, names: Iterable[str]) -> list[str]:
    """Those of some tables or figures that a section has, in its order."""
    words = SECTIONS[title]
    own = [name for word in words for name in names if name.startswith(word)]
    others = tuple(word for every in SECTIONS.values() for word in every)
    return own + [name for name in names if title == next(iter(SECTIONS)) and not name.startswith(others)]


def facts(evidence: Evidence) -> list[tuple[str, str]]:
    """What was read: studies, runs, commits, devices and dates."""
    runs = evidence.runs
    records = [row for run in runs for row in run.rows]
    commits, devices, days = _origins(records)
    when = " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "no date"
    counts = Counter(run.info["study"] for run in runs)
    return [
        ("Studies", ", ".join(f"{name} ({count} {'run' if count == 1 else 'runs'})" for name, count in counts.items())),
        ("Runs", _states(evidence)),
        ("Commits", ", ".join(commits) or "none on record"),
        ("Devices", ", ".join(devices) or "none on record"),
        ("Recorded", when),
    ]


def _about_study(study: Evidence) -> Line:
    """The texts of a study: question and claim, verdict, and what else its records say about it."""
    info = study.runs[0].info
    about = info.get("about") or {}
    question, design = (
        [(title, str(about[key])) for key, title in titles.items() if about.get(key)] for titles in (QUESTION, DESIGN)
    )
    axes = [(f"Axis {axis}", ", ".join(map(value_word, values))) for axis, values in (about.get("axes") or {}).items()]
    return {
        "name": info["study"],
        "question": question or [("Question", "not on record")],
        "claims": [(claim.title, claim.text) for claim in claims(study)],
        "headline": headline(study),
        "verdict": sentences(study),
        "design": [*design, *axes, ("Runs", _states(study))],
    }


def _states(evidence: Evidence) -> str:
    states = Counter(row["state"] for row in evidence.overview.rows)
    return f"{len(evidence.runs)}: " + ", ".join(f"{count} {state}" for state, count in sorted(states.items()))


def _table(evidence: Evidence, table: Table, most: int, folder: Path | None) -> Line:
    """A table for the template, with at most so many rows."""
    columns = table.shown()
    groups: dict[str, list[Run]] = {}
    for run in evidence.runs:
        groups.setdefault(run.group, []).append(run)
    rows = []
    for row in table.rows[:most]:  # a row has a `run`, a `group` or `runs` if its numbers are theirs
        runs = [row["run"]] if row.get("run") else row.get("runs") or groups.get(row.get("group") or "", [])
        infos = [row, *(run.info for run in runs)]
        words = dict.fromkeys(str(info[key]) for info in infos for key in ("family", "study") if info.get(key))
        cells = [_cell(evidence, row, column, runs, folder) for column in columns]
        bad = row.get("state") not in (None, "done") or bool(row.get("disturbed"))
        rows.append({"cells": cells, "words": " ".join(words), "bad": bad})
    left = len(table.rows) - len(rows)
    notes = [*table.notes, *([f"{left} more rows are in {table.name}.csv."] if left else [])]
    heads = [{"title": column.title, "number": column.digits is not None} for column in columns]
    name = re.sub(r"\W+", "-", table.name)
    return {"name": table.name, "id": name, "caption": table.caption, "heads": heads, "rows": rows, "notes": notes}


def _cell(evidence: Evidence, row: Line, column: Column, runs: list[Run], folder: Path | None) -> Cell:
    value, text = row.get(column.source), column.cell(row)
    number = column.digits is not None
    sort = "" if value is None or value == "" else repr(float(value)) if number else None
    place = runs[0].info.get("folder") if folder and row.get("run") and column.source in LINKED else None
    link = quote(os.fsencode(Path(os.path.relpath(place, folder)).as_posix())) if place and folder else ""
    origin = origin_words(_records(evidence, row, column.source, runs)) or str(row.get("source") or "")
    origin = "" if sort == "" else origin
    look = "number" if number else "long" if len(text) > 40 else ""
    return Cell(text, sort, origin, link, bool(row.get(column.bold)), look)


def _records(evidence: Evidence, row: Line, name: str, runs: list[Run]) -> list[Line]:
    """The records that the value of a column comes from; all those of its runs if it cannot be told which."""
    if record := (row.get("records") or {}).get(name):
        return [record]
    if row.get("provenance"):
        return [row]
    metrics = [metric for metric in evidence.scores if name == metric or name.startswith(f"{metric}_")]
    if metrics:
        lines = evidence.scores[max(metrics, key=len)]
        return [lines[run] for run in runs if run in lines]
    kind = "cost" if name in COSTS else "train" if name.startswith("final_loss") else ""
    if "_images_per_s" in name or "_gib" in name:
        kind = "sample" if name.startswith("sample_") else "speed"
    if kind:
        return [line for run in runs if (line := run.last(kind, state="done"))]
    return [{**line, "protocol": None} for run in runs for line in run.rows]


def origin_words(records: Iterable[Line]) -> str:
    """Commits, devices, days and protocols of records in a line."""
    records = list(records)
    commits, devices, days = _origins(records)
    protocols = sorted({str(row["protocol"]) for row in records if row.get("protocol")})
    named = [("commit", commits), ("", devices), ("", days), ("protocol", protocols)]
    return " · ".join(f"{name} {', '.join(values)}".strip() for name, values in named if values)


def _origins(records: Iterable[Line]) -> tuple[list[str], list[str], list[str]]:
    """The commits, devices and days of records, each once and in order."""
    commits, devices, days = set(), set(), set()
    for row in records:
        where = row.get("provenance") or {}
        if where:
            commits.add(f"{(where.get('commit') or 'none')[:12]}{' + dirty' if where.get('dirty') else ''}")
            devices.add(str(where.get("device")))
        if row.get("time"):
            days.add(row["time"][:10])
    return sorted(commits), sorted(devices), sorted(days)
