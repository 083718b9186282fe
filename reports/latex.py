"""A table in LaTeX that fits the width of an article's text: columns are measured, wrapped and, last, left out."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil, inf
from pathlib import Path

TEXTWIDTH = 345.0  # points, of \documentclass{article}; wider in its larger sizes and in most other classes
GAP = 3.0  # \tabcolsep, on both sides of a column
MARGIN = 2.0  # what is left free, because widths are estimates
NARROWEST = 88.0  # a column of text is wrapped to no less while others can be left out
LEAST = 44.0  # and to no less where only columns of rank 0 can be left out
LONG = 12  # letters of a word that a heading breaks
LONGEST = 24  # letters of a word that is not broken in a text as wide as the page
LINES = 40  # of a page, with some to spare for odd words; a table that is longer with its notes goes over several
FOOTNOTE = 8 * 1.066  # \footnotesize: letters of 8 pt are 6.6 % wider than those of 10 pt, which are measured, at 8 pt
LETTER = 7.2  # most letters are narrower
BOLD = 1.16  # bold letters are so much wider

TEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "`": r"\textasciigrave{}", '"': "''", "[": "{[}", "*": "{*}",
    **{sign: "\\" + sign for sign in "{}$&#_%"},
    "±": r"$\pm$", "×": r"$\times$", "÷": r"$\div$", "−": "$-$", "·": r"$\cdot$", "≤": r"$\leq$", "≥": r"$\geq$",
    "≈": r"$\approx$", "√": r"$\surd$", "∞": r"$\infty$", "→": r"$\rightarrow$", "←": r"$\leftarrow$", "°": r"$^\circ$",
    "†": r"$\dagger$", "‡": r"$\ddagger$", "§": r"$\mathsection$", "…": r"\ldots{}",
    "–": "--", "—": "---", "‘": "`", "’": "'",
    "“": "``", "”": "''", "ß": r"\ss{}", "æ": r"\ae{}", "Æ": r"\AE{}", "ø": r"\o{}", "Ø": r"\O{}", "ł": r"\l{}",
    "Ł": r"\L{}", "µ": r"$\mu$", "²": r"$^2$", "³": r"$^3$", "¹": r"$^1$",
}  # fmt: skip
ACCENTS = {
    "\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0306": "u", "\u0307": ".",
    "\u0308": '"', "\u030a": "r", "\u030b": "H", "\u030c": "v", "\u0323": "d", "\u0327": "c", "\u0328": "k",
}  # fmt: skip
GREEK = """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi psi
omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega""".split()
BREAKS = "_=,;:/+-.×@|"  # a long word is broken after one of these first
UNKNOWN = "?"  # for letters that pdflatex's fonts lack, such as Chinese ones


@dataclass(frozen=True)
class TexColumn:
    """The heading and the cells of a column, as plain text. Text is wrapped where it must be, numbers never. The column
    of the highest rank is left out first, and that of rank 0 last."""

    title: str
    cells: list[str]
    bold: list[bool]
    text: bool
    rank: int


def escaped(text: str, letters: int = 0) -> str:
    """Text for LaTeX, in ASCII. Letters that its standard fonts lack become question marks. With `letters`, TeX breaks
    words if it must: after signs such as _ and =, and within those of more letters."""
    return " ".join(_escaped(word, letters) for word in _signed(unicodedata.normalize("NFC", text)).split())


def _signed(text: str) -> str:
    """The text with the minus of numbers; other signs like it are hyphens."""
    return re.sub(r"(?<![\w-])-(?=[\d.])", "−", text)


def _escaped(word: str, letters: int) -> str:
    parts = []
    inside = 0  # letters since the last place to break
    for sign, following in zip(word, [*word[1:], ""], strict=True):
        parts.append(_sign(sign))
        if sign == following and sign in "-'`,<>":  # two of them would become one sign
            parts.append("{}")
        inside = inside + 1 if sign not in BREAKS else 0
        if letters and following and (not inside or inside >= letters):
            parts.append(r"\penalty500{}" if inside else r"\penalty100{}")
            inside = 0
    return "".join(parts)


def _sign(sign: str) -> str:
    if sign in TEX:
        return TEX[sign]
    if sign.isascii():
        return sign if sign.isprintable() else UNKNOWN
    base, *marks = unicodedata.normalize("NFD", sign)
    if marks and base.isascii() and all(mark in ACCENTS for mark in marks):
        for mark in marks:
            base = f"\\{ACCENTS[mark]}{{{base if base not in 'ij' else chr(92) + base}}}"
        return base
    script, _, name = unicodedata.name(sign, "").partition(" ")
    if script == "GREEK":
        size, _, letter = name.partition(" LETTER ")
        letter = letter.lower() if size == "SMALL" else letter.capitalize()
        letter = letter.replace("amda", "ambda") if letter.endswith("amda") else letter
        if letter in GREEK:
            return f"$\\{letter}$"
    plain = unicodedata.normalize("NFKD", sign)
    return plain if plain.isascii() and plain.isalnum() else UNKNOWN


@cache
def _advance(sign: str) -> float:
    """The width of a sign in Computer Modern Roman, in sizes of the font."""
    import matplotlib  # only here, because tables on a terminal need no Matplotlib
    from matplotlib.font_manager import get_font

    font = get_font(str(Path(matplotlib.get_data_path(), "fonts/ttf/cmr10.ttf")))
    font.set_size(100, 72)
    sign = "+" if sign == "−" else sign  # of the font of symbols, and as wide
    if ord(sign) not in font.get_charmap():
        return 0.86  # of signs from other fonts
    return font.load_char(ord(sign)).linearHoriAdvance / 65536 / 100


def width_of(text: str, bold: bool = False) -> float:
    """The width of a text in points, at the size of footnotes."""
    letters = unicodedata.normalize("NFKD", _signed(text))
    return FOOTNOTE * (BOLD if bold else 1) * sum(_advance(sign) for sign in letters if not unicodedata.combining(sign))


def lines_of(text: str, width: float) -> list[str]:
    """The text in lines of at most so many points, broken between words and, within long ones, after a hyphen or a
    similar sign."""
    lines = [""]
    for word in re.findall(r"\s*\S+", text):
        for piece in re.findall(r"[^_@/-]*[_@/-]+|[^_@/-]+", word) if len(word) > LONG else [word]:
            if width_of(lines[-1] + piece) <= width or not lines[-1]:
                lines[-1] += piece
            else:
                lines.append(piece)
    return [line.strip() for line in lines]


def latex(name: str, caption: str, columns: Sequence[TexColumn], notes: Sequence[str]) -> str:
    """A table with booktabs in the size of footnotes, at most as wide as the text of an article, with notes below.

    Text is wrapped if that is needed. Then columns of the highest rank are left out, which a comment names. A comment
    also says which packages are needed. A table that is too long for a page becomes a longtable.
    """
    shown, omitted = _fitted(columns)
    limit = _limit(shown)
    pairs = [(column, limit if column.text and _natural(column) > limit else None) for column in shown]
    one_line = sum(max(_natural(column), width_of(column.title)) for column in shown) <= _room(shown)
    head = (
        " & ".join(escaped(column.title) if one_line else _heading(column, width) for column, width in pairs) + r" \\"
    )
    rows = [
        " & ".join(_cell(column, width, place) for column, width in pairs) + r" \\"
        for place in range(len(columns[0].cells))
    ]
    form = f"@{{}}{''.join(_side(column, width) for column, width in pairs)}@{{}}"
    height = sum(_height(pairs, place) for place in range(len(rows)))
    height += sum(ceil(width_of(note) / TEXTWIDTH) for note in [caption, *notes])
    long = height > LINES
    packages = ["array", "booktabs", *(["longtable"] if long else [])]
    comments = [f"% Needs \\usepackage{{{','.join(packages)}}}. At most {TEXTWIDTH:.0f} pt wide."]
    if omitted:
        comments.append(f"% Columns left out to fit: {', '.join(escaped(title) for title in omitted)}.")
    size = rf"\footnotesize\setlength{{\tabcolsep}}{{{GAP:g}pt}}"
    label = f"\\caption{{{escaped(caption, LONGEST)}}}\\label{{tab:{name}}}"
    below = [rf"{{\raggedright\noindent {escaped(note, LONGEST)}\par}}" for note in notes]
    below = [r"\par\smallskip", *below] if below else []
    if long:
        top = [rf"\begin{{longtable}}{{{form}}}", rf"{label} \\", r"\toprule", head, r"\midrule", r"\endfirsthead"]
        again = [r"\toprule", head, r"\midrule", r"\endhead", r"\bottomrule", r"\endfoot"]
        text = [
            "{" + size + r"\setlength{\LTcapwidth}{\linewidth}",
            *top,
            *again,
            *rows,
            r"\end{longtable}",
            *below,
            "}",
        ]
    else:
        table = [
            rf"\begin{{tabular}}{{{form}}}",
            r"\toprule",
            head,
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
        ]
        text = [
            r"\begin{table}[htbp]",
            r"\centering\setlength{\belowcaptionskip}{4pt}",
            label,
            size,
            *table,
            *below,
            r"\end{table}",
        ]
    return "\n".join([*comments, *text]) + "\n"


def _fitted(columns: Sequence[TexColumn]) -> tuple[list[TexColumn], list[str]]:
    """The columns that fit, and the titles of the others."""
    shown, omitted = list(columns), []
    while len(shown) > 1 and _limit(shown) < (NARROWEST if any(column.rank for column in shown) else LEAST):
        last = max(reversed(shown), key=lambda column: (column.rank, column is not shown[0]))
        shown.remove(last)
        omitted.append(last.title)
    return shown, omitted


def _room(shown: Sequence[TexColumn]) -> float:
    """The points that some columns may share."""
    return TEXTWIDTH - MARGIN - 2 * GAP * (len(shown) - 1)


def _limit(shown: Sequence[TexColumn]) -> float:
    """The width to which the wider columns of text are wrapped so that all fit; infinite if nothing is wrapped."""
    room = _room(shown) - sum(_natural(column) for column in shown if not column.text)
    texts = sorted(_natural(column) for column in shown if column.text)
    if sum(texts) <= room:
        return inf
    for place, width in enumerate(texts):
        share = room / (len(texts) - place)
        if width > share:
            return share
        room -= width
    return 0.0


def _natural(column: TexColumn) -> float:
    """The width of a column whose cells have one line each."""
    cells = [width_of(text, bold) for text, bold in zip(column.cells, column.bold, strict=True)]
    return max([*cells, *(width_of(line) for line in lines_of(column.title, 0))])


def _heading(column: TexColumn, width: float | None) -> str:
    """The title in lines of the width of the cells."""
    lines = [escaped(line) for line in lines_of(column.title, width or _natural(column))]
    side = "l" if column.text else "r"
    return (
        lines[0]
        if len(lines) == 1
        else rf"\begin{{tabular}}[b]{{@{{}}{side}@{{}}}}" + r"\\".join(lines) + r"\end{tabular}"
    )


def _cell(column: TexColumn, width: float | None, place: int) -> str:
    text = escaped(column.cells[place], 0 if width is None else int(width / LETTER))
    return rf"\textbf{{{text}}}" if column.bold[place] else text


def _side(column: TexColumn, width: float | None) -> str:
    if width is None:
        return "l" if column.text else "r"
    return rf">{{\raggedright\arraybackslash\hspace{{0pt}}}}p{{{width:.1f}pt}}"


def _height(pairs: Sequence[tuple[TexColumn, float | None]], place: int) -> int:
    """The lines of a row."""
    return max(1 if width is None else len(lines_of(column.cells[place], width)) for column, width in pairs)
