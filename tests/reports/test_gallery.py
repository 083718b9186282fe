"""The gallery shows what the committed records give today."""

import json
from pathlib import Path

import lamabench.reports as reports
import pytest
from lamabench.reports.gallery import FOLDERS, MARK, fill
from lamabench.reports.report import build

HERE = Path(reports.__file__).parent


def test_a_page_is_filled(tmp_path: Path) -> None:
    """The first report that has a table or figure shows it; of one that none has, it is said why."""
    folders = [tmp_path / name for name in ("first", "second")]
    for number, folder in enumerate(folders):
        folder.mkdir()
        absent = {"cost": "no costs", "loss": "no losses"} | ({"speed": "no speeds"} if number == 0 else {})
        (folder / "index.json").write_text(json.dumps({"absent": absent}))
        (folder / "runs.md").write_text(f"| Run {number} |\n|--|\n" + "| row |\n" * 18 + "\n- a note\n")
        (folder / "axis_mine.png").write_bytes(bytes([number]))
    (folders[1] / "speed.md").write_text("| Speed |\n|--|\n| 1 |\n")
    marks = ["table runs", "table cost", "table speed", "picture axis"]
    page = fill("# Page\n\n" + "\n".join(f"<!-- {mark} -->\nText.\n" for mark in marks), folders, tmp_path / "pictures")
    assert "| Run 0 |\n|--|\n" + "| row |\n" * 16 + "\n… and 2 more rows." in page and "Run 1" not in page
    assert "*No committed record shows it: no costs.*" in page and "| Speed |\n|--|\n| 1 |" in page
    assert "![axis](pictures/axis.png)" in page and (tmp_path / "pictures/axis.png").read_bytes() == b"\0"
    assert page.count("Text.") == 4 and "a note" not in page
    assert fill(page, folders, tmp_path / "pictures") == page
    added = page.replace("<!-- table runs", "<!-- table cost -->\nMine.\n<!-- table runs")
    assert "Mine.\n<!-- table runs -->" in fill(added, folders, tmp_path / "pictures")
    with pytest.raises(ValueError, match="no table is called nothing"):
        fill("<!-- table nothing -->\n", folders, tmp_path)


def test_the_committed_page_is_that_of_the_records(tmp_path: Path) -> None:
    """Its tables to the letter, and a picture for each figure."""
    folders = [tmp_path / name for name in FOLDERS]
    for folder in folders:
        build([HERE / "records" / folder.name], folder, pdf=False)
    page = (HERE / "README.md").read_text()
    assert fill(page, folders, tmp_path / "gallery") == page, "python -m lamabench.reports.gallery makes it again"
    drawn = {path.name for path in (tmp_path / "gallery").iterdir()}
    assert drawn == {path.name for path in (HERE / "gallery").iterdir()} - {"page.png"}
    assert len(MARK.findall(page)) > 20
