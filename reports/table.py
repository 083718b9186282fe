"""A table and how it is written: csv in full precision, Markdown and LaTeX rounded for reading."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import floor, log10

import pandas as pd

from .runs import Line

TEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
    "×": r"$\times$", "÷": r"$\div$",
    "<": r"\textless{}", ">": r"\textgreater{}", **{sign: "\\" + sign for sign in "{}$&#_%"},
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A column: `name` is its heading in the csv (None: not there), `title` elsewhere (None: csv only).

    Elsewhere a cell is the value of `key` (by default `name`) divided by `scale`, to `digits` significant digits (0: an
    integer, None: text), and the value of `spread` after a ±. `best` marks the smallest ("min") or the largest ("max").
    On a narrow terminal the column of the highest `rank` is left out first; one of rank 0 always stays.
    """

    name: str | None
    title: str | None = None
    scale: float = 1.0
    digits: int | None = None
    best: str = ""
    spread: str = ""
    rank: int = 0
    key: str = ""

    @property
    def source(self) -> str:
        return self.key or self.name or ""

    def cell(self, row: Line) -> str:
        value = row.get(self.source)
        if value is None or value == "":
            return "-"
        if self.digits is None:
            return str(value)
        style = style_of(value / self.scale, self.digits)
        text = format(value / self.scale, style)
        if row.get(self.spread) is not None:
            text += f" ± {format(row[self.spread] / self.scale, style)}"
        seeds = row.get(f"{self.source.removesuffix('_mean')}_n")
        return text if seeds in (None, row.get("n")) else f"{text} (n={seeds})"


@dataclass(frozen=True)
class Table:
    """Named rows and columns; a column without any value is left out."""

    name: str
    caption: str
    columns: list[Column]
    rows: list[Line]

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
        return frame.to_markdown(index=False, colalign=sides, disable_numparse=True) + "\n"

    def latex(self) -> str:
        shown = self.shown()
        sides = "".join("l" if column.digits is None else "r" for column in shown)
        frame = self._frame(shown, tex_escaped, r"\textbf{{{}}}")
        caption, label = tex_escaped(self.caption), f"tab:{self.name}"
        return frame.to_latex(index=False, escape=False, column_format=sides, caption=caption, label=label)

    def _frame(self, shown: list[Column], escaped: Callable[[str], str], bold: str) -> pd.DataFrame:
        cells = []
        for row in self.rows:
            texts = [escaped(column.cell(row)) for column in shown]
            marks = [is_best(self.rows, row, column) for column in shown]
            cells.append([bold.format(text) if mark else text for text, mark in zip(texts, marks, strict=True)])
        return pd.DataFrame(cells, columns=[escaped(column.title or "") for column in shown], dtype=object)


def filled(rows: list[Line], column: Column) -> bool:
    return any(row.get(column.source) not in (None, "") for row in rows)


def is_best(rows: list[Line], row: Line, column: Column) -> bool:
    """Whether a row has the best value of a quality column. A single value is not marked."""
    values = [other[column.source] for other in rows if other.get(column.source) is not None]
    if not column.best or len(values) < 2:
        return False
    return row.get(column.source) == (min(values) if column.best == "min" else max(values))


def style_of(value: float, digits: int) -> str:
    """The format of a number with so many significant digits; 0 digits: as an integer."""
    if not digits or not value:
        return ",.0f"
    places = digits - 1 - floor(log10(abs(value)))
    return f".{digits - 1}e" if places > 7 else f",.{max(places, 0)}f"


def shortened(text: str, limit: int = 70) -> str:
    return text if len(text) <= limit else text[: limit - 3].rstrip() + "..."


def markdown_escaped(text: str) -> str:
    return re.sub(r"([\\|*`<])", r"\\\1", text)


def tex_escaped(text: str) -> str:
    return "".join(TEX.get(sign, sign) for sign in text)
