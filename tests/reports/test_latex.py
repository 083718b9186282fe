"""LaTeX of tables: escaped, narrow enough, and compiled by pdflatex, which knows what no estimate of ours does."""

import re
import subprocess
from pathlib import Path

import lamabench.reports as reports
import pytest
from lamabench.reports.contents import TABLES
from lamabench.reports.evidence import Evidence
from lamabench.reports.latex import TexColumn, escaped, latex, width_of
from lamabench.reports.runs import read
from lamabench.reports.table import Column, Table
from run_folders import everything, line, scored, timed, write, write_many

RECORDS = Path(reports.__file__).parent / "records"
LATEX = pytest.mark.debian(packages=["texlive-latex-recommended"], programs=["pdflatex"])
ODD = "a_b^c~d\\e|f<g>h`i\"j''k--l %$#&{}[x]*−×±·†‡§²éñçÅßøμΩ→…中文💥 ½ﬁ"


def test_every_letter_is_ascii_and_means_itself() -> None:
    assert escaped("µ ± 2σ, é, Ångström, ½, 中") == r"$\mu$ $\pm$ 2$\sigma$, \'{e}, \r{A}ngstr\"{o}m, ?, ?"
    assert escaped("−1 × 2² · x†") == r"$-$1 $\times$ 2$^2$ $\cdot$ x$\dagger$"
    assert escaped("[a] * 1--2 ''") == r"{[}a] {*} 1-{}-2 '{}'"  # \\ would take [ and *; -- would be a dash
    assert escaped("-1.5 ± 2, 1e-05, a-1, ---3") == r"$-$1.5 $\pm$ 2, 1e-05, a-1, -{}-{}-3"
    assert escaped("selective_scan=cuda", letters=10) == (
        r"selective\_\penalty100{}scan=\penalty100{}cuda"
    )  # fmt: skip
    assert escaped("x" * 7, letters=3) == r"xxx\penalty500{}xxx\penalty500{}x"
    assert escaped(ODD + "\x00\x1b", letters=9).isascii()


def test_a_table_in_latex() -> None:
    columns = [
        Column("label", "Model"), Column("macs", "MACs (G)", 1e9, 4), Column("state", "State", tex=False),
        Column("speed", "Images/s", digits=4, mark="mark", bold="best"),
    ]  # fmt: skip
    rows = [
        {"label": "one_a", "macs": 1.5e9, "speed": 1234.0, "mark": " ‡", "best": True, "state": "done"},
        {"label": "two", "macs": None, "speed": None, "mark": "oom", "state": "oom", "status": "oom (50% more)"},
    ]
    assert Table("small", "A table.", columns, rows, ["‡: a note."]).latex() == (
        r"""% Needs \usepackage{array,booktabs}. At most 345 pt wide.
\begin{table}[htbp]
\centering\setlength{\belowcaptionskip}{4pt}
\caption{A table.}\label{tab:small}
\footnotesize\setlength{\tabcolsep}{3pt}
\begin{tabular}{@{}lrr@{}}
\toprule
Model & MACs (G) & Images/s \\
\midrule
one\_a & 1.500 & \textbf{1,234 $\ddagger$} \\
two $\mathsection$ & - & oom \\
\bottomrule
\end{tabular}
\par\smallskip
{\raggedright\noindent $\mathsection$ two: oom (50\% more).\par}
{\raggedright\noindent $\ddagger$: a note.\par}
\end{table}
"""
    )


def column(title: str, cell: str, rank: int = 0, text: bool = False, rows: int = 3) -> TexColumn:
    return TexColumn(title, [cell] * rows, [False] * rows, text, rank)


def test_text_is_wrapped_and_then_columns_are_left_out_by_rank() -> None:
    label = column("Model", "LaMamba-Diff-S (mixers: window and conv, scan: cross)", text=True)
    narrow = latex("t", "T.", [label, *(column(f"N{k}", "1,234.5", rank=k) for k in range(6))], [])
    assert r"\raggedright" in narrow and "left out" not in narrow
    wide = latex("t", "T.", [label, *(column(f"N{k}", "1,234.5", rank=k) for k in range(20))], [])
    (left,) = re.findall(r"% Columns left out to fit: (.*)\.", wide)
    titles = left.split(", ")
    assert titles == [f"N{k}" for k in range(19, 19 - len(titles), -1)] and 5 < len(titles) < 15
    assert r"\begin{longtable}" in latex("t", "T.", [column("N", "1", rows=60)], [])
    assert r"\resizebox" not in wide and "N0 & N1" in wide


def test_widths_are_those_of_the_font() -> None:
    """Of cmr8 (the letters of \\footnotesize), from its metrics file: digits 0.5313 em, m 0.8854 em, i 0.2951 em and a
    hyphen 0.3542 em. A minus is of cmsy8, 0.8264 em."""
    texts = ("0123456789", 5.313), ("mmmm", 4 * 0.8854), ("iiii", 4 * 0.2951)
    for text, em in (*texts, ("-0.0", 0.8264 + 2 * 0.5313 + 0.2951), ("i-0-0", 2 * (0.3542 + 0.5313) + 0.2951)):
        assert width_of(text) == pytest.approx(8 * em, rel=0.01)


def compile_all(folders: list[Path], work: Path) -> str:
    """The log of pdflatex, three times over one article with every table; longtable needs these to settle."""
    inputs = [path for folder in folders for path in sorted(folder.glob("*.tex"))]
    assert inputs
    packages = sorted(
        {name for path in inputs for name in re.findall(r"\\usepackage{(.*?)}", path.read_text())[0].split(",")}
    )
    body = "\n".join(f"\\input{{{path}}}\\clearpage" for path in inputs)
    head = f"\\documentclass{{article}}\n\\usepackage{{{','.join(packages)}}}"
    document = f"{head}\n\\begin{{document}}\n{body}\n\\end{{document}}\n"
    (work / "all.tex").write_text(document)
    for _ in range(3):
        done = subprocess.run(
            ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"], cwd=work, capture_output=True
        )
        assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    return (work / "all.log").read_text(errors="replace")


def overfull(log: str) -> list[float]:
    """By how many points boxes are too wide."""
    return [float(size) for size in re.findall(r"Overfull \\hbox \((\S+)pt too wide\)", log)]


@LATEX
def test_a_report_compiles_and_no_table_is_wider_than_the_text(tmp_path: Path) -> None:
    folders = []
    many = write_many(tmp_path / "scaling", families=2, sizes=3, seeds=2)
    sources = {"committed": sorted(RECORDS.iterdir()), "odd": [odd_runs(tmp_path / "runs")], "many": [many]}
    for name, paths in sources.items():
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        evidence = Evidence(read(paths))
        for item in TABLES.values():
            tables = item.make(evidence)
            for table in tables if isinstance(tables, list) else [tables]:
                if table.rows:
                    (folders[-1] / f"{table.name}.tex").write_text(table.latex())
    log = compile_all(folders, tmp_path)
    assert max(overfull(log), default=0) <= 1, overfull(log)
    assert "Float too large" not in log


@LATEX
def test_a_table_that_is_too_wide_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / "wide.tex").write_text(
        "% \\usepackage{array}\n\\noindent\\begin{tabular}{l}" + "wide " * 90 + "\\end{tabular}"
    )
    assert max(overfull(compile_all([tmp_path], tmp_path))) > 100


def odd_runs(root: Path) -> Path:
    """Runs of many metrics and settings, with labels of all kinds of letters, over several seeds."""
    for place in range(12):
        metrics = [scored(50.0 + place, metric=f"{name}-EffNetLite0-512") for name in ("FD", "KID", "IS", "Precision")]
        lines = [*everything(60.0 + place, 600.0 + place), *metrics, timed("forward", 90.0 + place, batch=32)]
        title = ("[1]", "*2", ODD, "x" * 150, "LaMamba-Diff-XL")[place % 5]
        variant = {"model": "dit_demo", "model.mixers": ["conv", "window"] * (place // 2 + 1)}
        write(root, f"run-{place // 2}-s{place % 2}", lines, title=title, variant=variant, seed=place % 2)
    write(root, "bad", [line("train", "oom", error="tried 50% of {0} & a_b | #1 $x\n ~^\\ <y>" + "z" * 200)], title=ODD)
    return root
