"""The gallery, README.md of this folder: the tables and figures of the committed records. `python -m
lamabench.reports.gallery` makes it again in a checkout.

A line `<!-- table NAME -->` or `<!-- picture NAME -->`, by a name of contents.py or, where studies have files of their
own, that of one, is followed by that table or figure, or by why the committed records have none, up to a line
`<!-- end -->`.
"""

import json
import re
import tempfile
from pathlib import Path

from .report import build

HERE = Path(__file__).parent
FOLDERS = (
    "demo",
    "cifar10",
    "bench",
    "bench-kernels",
    "costs",
)  # of records; the first one that has a table or figure shows it
MARK = re.compile(  # what it fills reaches up to an end, and over no other mark
    r"(<!-- (table|picture) ([\w*]+) -->\n)(?:(?:(?!<!-- (?:table|picture) ).)*?<!-- end -->\n)?", re.DOTALL
)
MOST_ROWS = 16  # of a table


def fill(text: str, reports: list[Path], pictures: Path) -> str:
    """A page with what its marks name, from the folders of several reports. Pictures are copied into `pictures`."""
    absent: dict[str, str] = {}
    for report in reversed(reports):
        absent |= json.loads((report / "index.json").read_text(encoding="utf-8"))["absent"]

    def filling(match: re.Match[str]) -> str:
        mark, kind, name = match.groups()
        ending = "md" if kind == "table" else "png"
        files = [file for report in reports for file in sorted(report.glob(f"{name}.{ending}"))]
        files += [file for report in reports for file in sorted(report.glob(f"{name}_*.{ending}"))]
        if name not in absent and not files:
            raise ValueError(f"no {kind} is called {name}")
        if not files:
            content = f"*No committed record shows it: {absent[name]}.*"
        elif kind == "table":
            content = _shortened(files[0].read_text(encoding="utf-8").split("\n\n")[0])
        else:
            pictures.mkdir(exist_ok=True)
            file = name.replace("*", "run") + ".png"
            (pictures / file).write_bytes(files[0].read_bytes())
            content = f"![{name}]({pictures.name}/{file})"
        return f"{mark}\n{content}\n\n<!-- end -->\n"

    return MARK.sub(filling, text)


def _shortened(table: str) -> str:
    lines = table.rstrip().split("\n")
    left = len(lines) - 2 - MOST_ROWS
    return "\n".join(lines[: 2 + MOST_ROWS]) + (f"\n\n… and {left} more rows." if left > 0 else "")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder, name) for name in FOLDERS]
        for report in reports:
            build([HERE / "records" / report.name], report, pdf=False)
        page = HERE / "README.md"
        page.write_text(fill(page.read_text(encoding="utf-8"), reports, HERE / "gallery"), encoding="utf-8")


if __name__ == "__main__":
    main()
