"""A table and how it is written: csv in full precision, Markdown and LaTeX rounded for reading."""

import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from html import escape
from math import floor, log10

import pandas as pd
from tabulate import tabulate

from .latex import TexColumn, latex
from .runs import Line

WIDTH = 120  # columns of a terminal
BEST = "*: the best, distinguishable from the second."

DISTURBED = " ‡"  # marks a time that was measured beside other work
BAD = " §"  # marks a row that is not done, in LaTeX
MOST_BAD = 8  # such rows that are explained


@dataclass(frozen=True)
class Column:
    """A column: `name` is its heading in the csv (None: not there), `title` elsewhere (None: csv only).

    Elsewhere a cell is the value of `key` (by default `name`) divided by `scale`, to `digits` significant digits (0: an
    integer, None: text), and after a ± the value of `interval`: half a 95 % interval over training seeds. The text of
    `mark` follows, or stands in place of a missing value. A true value of `bold` makes the cell bold. On a narrow
    terminal the column of the highest `rank` is left out first; one of rank 0 always stays. There a text is wrapped to
    `width` letters. The table in LaTeX has no column without `tex`, and those of the highest ranks only if they fit.
    There are at most `places` digits after the point, unless an interval needs more.
    A `sign` "+" marks differences: it stands before positive ones, and their digits are two of the interval.
    """

    name: str | None
    title: str | None = None
    scale: float = 1.0
    digits: int | None = None
    interval: str = ""
    bold: str = ""
    mark: str = ""
    rank: int = 0
    key: str = ""
    width: int | None = None
    tex: bool = True
    sign: str = ""
    places: int | None = None

    @property
    def source(self) -> str:
        return self.key or self.name or ""

    def cell(self, row: Line) -> str:
        value = row.get(self.source)
        if value is None or value == "":
            return (row.get(self.mark) or "").strip() or "-"
        if self.digits is None:
            return str(value)
        style = style_of(value / self.scale, self.digits)
        if self.places is not None:
            style = min(style, f",.{self.places}f", key=places_of)
        if half := row.get(self.interval):  # at least one digit of it
            least = style_of(half / self.scale, 2 if self.sign else 1)
            style = least if self.sign else max(style, least, key=places_of)
        text = format(value / self.scale, self.sign + style)
        if row.get(self.interval) is not None:
            text += f" ± {format(row[self.interval] / self.scale, style)}"
        seeds = row.get(f"{self.source.removesuffix('_mean')}_n")
        text = text if seeds in (None, row.get("n")) else f"{text} (n={seeds})"
        return text + (row.get(self.mark) or "")


@dataclass(frozen=True)
class Table:
    """Named rows and columns; a column without any value is left out. The notes stand below, except in the csv."""

    name: str
    caption: str
    columns: list[Column]
    rows: list[Line]
    notes: list[str] = field(default_factory=list)

    def shown(self) -> list[Column]:
        return [column for column in self.columns if column.title and filled(self.rows, column)]

    def records(self) -> list[Line]:
        """The rows in full precision, with the headings of the csv."""
        names = [column.name for column in self.columns if column.name and filled(self.rows, column)]
        return [{name: row.get(name) for name in names} for row in self.rows]

    def csv(self) -> str:
        return pd.DataFrame(self.records(), dtype=object).to_csv(index=False, lineterminator="\n")

    def markdown(self) -> str:
        shown = self.shown()
        sides = ["left" if column.digits is None else "right" for column in shown]
        frame = self._frame(shown, markdown_escaped, "**{}**")
        text = frame.to_markdown(index=False, colalign=sides, disable_numparse=True) + "\n"
        return text + "".join(f"\n- {markdown_escaped(note)}" for note in self.notes) + "\n" * bool(self.notes)

    def latex(self) -> str:
        """A table for an article, with the columns that `tex` chooses. Rows that are not done are marked and explained
        below, because there is no column of states."""
        shown = [column for column in self.shown() if column.tex]
        bad = [row for row in self.rows if is_bad(row)]
        columns = []
        stay = [column for column in shown if not column.rank] or shown  # these are never left out
        marked = next((column for column in stay if column.name == "label"), stay[0])
        for column in shown:
            cells = [column.cell(row) + BAD * (column is marked and is_bad(row)) for row in self.rows]
            bold = [bool(row.get(column.bold)) for row in self.rows]
            columns.append(TexColumn(column.title or "", cells, bold, column.digits is None, column.rank))
        notes = [f"{BAD.strip()} {marked.cell(row)}: {row.get('status') or row['state']}." for row in bad]
        if len(notes) > MOST_BAD:
            notes[MOST_BAD:] = [f"{BAD.strip()} And {len(notes) - MOST_BAD} more rows are not done."]
        return latex(self.name, self.caption, columns, [*notes, *self.notes])

    def html(self) -> str:
        """A `<table>`, with `data-sort` on its cells (numbers in full precision) and, as their `title`, where a number
        comes from: the provenance of a row, or of its `records` by the key of a column. The notes follow as a list."""
        shown = self.shown()
        head = "".join(
            f'<th scope="col" class="{kind_of(column)}">{escape(column.title or "")}</th>' for column in shown
        )
        rows = []
        for row in self.rows:
            state = str(row.get("state") or "done").replace(" ", "-")
            cells = "".join(f"<td{_attributes(row, column)}>{escape(column.cell(row))}</td>" for column in shown)
            rows.append(f'<tr class="{escape(state)}">{cells}</tr>')
        body = "\n".join(rows)
        notes = "".join(f"\n<li>{escape(note)}</li>" for note in self.notes)
        return (
            f'<table class="table" id="table-{escape(self.name)}">\n<caption>{escape(self.caption)}</caption>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n"
        ) + (f'<ul class="notes">{notes}\n</ul>\n' if notes else "")

    def terminal(self, notes: Iterable[str] = ()) -> str:
        """The table for a terminal of `WIDTH` columns, with `notes` and its own below. Columns that do not fit are left
        out and named."""
        columns = [column for column in self.columns if column.title and column.name and filled(self.rows, column)]
        columns += [column for column in self.columns if column.name == "state"]
        omitted: list[str] = []
        while True:
            heads = [textwrap.fill(column.title or "State", 13, break_long_words=False) for column in columns]
            cells = [[column.cell(row) + " *" * bool(row.get(column.bold)) for column in columns] for row in self.rows]
            sides = ["left" if column.digits is None else "right" for column in columns]
            limits = [column.width or (34 if column.name in ("label", "shape") else None) for column in columns]
            text = tabulate(cells, heads, colalign=sides, disable_numparse=True, maxcolwidths=limits)
            last = max(columns, key=lambda column: column.rank)
            if max(map(len, text.splitlines())) <= WIDTH or not last.rank:
                break
            columns.remove(last)
            omitted.append(last.title or "")
        below = [*notes, *([BEST] if any(row.get(column.bold) for row in self.rows for column in columns) else [])]
        below += self.notes + ([f"Columns omitted to fit the terminal: {', '.join(omitted)}"] if omitted else [])
        whole = {"break_long_words": False, "break_on_hyphens": False}  # a path can be copied
        wrap = partial(textwrap.fill, width=WIDTH, subsequent_indent="  ", **whole)
        return "\n".join([text, *map(wrap, below)])

    def _frame(self, shown: list[Column], escaped: Callable[[str], str], bold: str) -> pd.DataFrame:
        cells = []
        for row in self.rows:
            texts = [escaped(column.cell(row)) for column in shown]
            marks = [bool(row.get(column.bold)) for column in shown]
            cells.append([bold.format(text) if mark else text for text, mark in zip(texts, marks, strict=True)])
        return pd.DataFrame(cells, columns=[escaped(column.title or "") for column in shown], dtype=object)


def filled(rows: list[Line], column: Column) -> bool:
    return any(row.get(column.source) not in (None, "") or row.get(column.mark) for row in rows)


def style_of(value: float, digits: int) -> str:
    """The format of a number with so many significant digits; 0 digits: as an integer."""
    if not digits or not value:
        return ",.0f"
    places = digits - 1 - floor(log10(abs(value)))
    return f".{digits - 1}e" if places > 7 else f",.{max(places, 0)}f"


def places_of(style: str) -> int:
    """The digits after the point of a format; none for powers of ten, which have their own."""
    return int(style[2:-1]) if style.startswith(",.") else 0


def shortened(text: str, limit: int = 70) -> str:
    return text if len(text) <= limit else text[: limit - 3].rstrip() + "..."


def markdown_escaped(text: str) -> str:
    return re.sub(r"([\\|*`<])", r"\\\1", text)


def is_bad(row: Line) -> bool:
    """Whether a row is of something that failed or is not finished."""
    return row.get("state") not in (None, "done")


def kind_of(column: Column) -> str:
    return "text" if column.digits is None else "number"


def _attributes(row: Line, column: Column) -> str:
    """The attributes of a cell in HTML."""
    value = row.get(column.source)
    classes = kind_of(column) + " best" * bool(row.get(column.bold))
    text = f' class="{classes}" data-sort="{escape("" if value is None else str(value))}"'
    record = (row.get("records") or {}).get(column.source) or row
    if value is None or not record.get("provenance"):
        return text
    where = record["provenance"]
    words = [f"commit {str(where.get('commit'))[:12]}{' + dirty' if where.get('dirty') else ''}", where.get("device")]
    return text + f' title="{escape(", ".join(filter(None, [*words, record.get("time", "")[:10]])))}"'
