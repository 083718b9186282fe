"""The page of a report in a browser: on a desktop and a phone, light and dark."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import PROGRAM, Tab, chromium
from lamabench.reports.report import build
from run_folders import everything, write

pytestmark = pytest.mark.debian(packages=[PROGRAM], programs=[PROGRAM])
# As texts, 10.2 comes before 9.5; rounded to four digits, three of them are equal.
VALUES = [10.2, 9.5, 10.2004, 101.0, 10.2001, 63.25]
SUMMARY = "document.querySelector('[id=table-summary]').closest('table')"
ROWS = f"[...{SUMMARY}.tBodies[0].rows].filter(row => row.checkVisibility())"
NO_SCROLLING = "[document.documentElement.scrollWidth <= innerWidth, document.body.scrollWidth <= innerWidth]"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a report on six models, of which one has a long name and one ran out of memory."""
    folder = tmp_path_factory.mktemp("browser")
    for place, value in enumerate(VALUES):
        family = ("dit", "lamamba")[place % 2]
        title = f"Model-{place}" + "-with-a-name-that-is-longer-than-a-phone-is-wide" * (place == 3)
        lines = everything(value, 600.0)
        about = {"variant": {"model": f"{family}_{place}"}, "labels": [0, 1], "curve": [1.0, 0.5]}
        write(folder / "runs", f"{family}-{place}", lines, family, title, **about)
    build([folder / "runs"], folder / "out")
    return folder / "out" / "index.html"


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    with chromium() as tab:
        yield tab


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_fits_the_screen_without_errors_or_network(tab: Tab, index: Path, width: int, dark: bool) -> None:
    tab.open(index, width, dark=dark)
    tab.run("document.querySelectorAll('details').forEach(details => { details.open = true })")
    assert tab.run(NO_SCROLLING) == [True, True]
    assert tab.run("innerWidth") == width
    assert tab.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    dark_paper = "getComputedStyle(document.body).backgroundColor"
    assert (max(map(int, tab.run(dark_paper)[4:-1].split(", "))) < 64) == dark
    assert tab.problems == []
    assert {url for url in tab.requests if not url.startswith("data:")} == {index.resolve().as_uri()}


def test_a_click_sorts_by_the_exact_value(tab: Tab, index: Path) -> None:
    tab.open(index)
    heading = f"[...{SUMMARY}.tHead.rows[0].cells].find(cell => cell.textContent.includes('FD'))"
    order = f"{ROWS}.map(row => Number(row.cells[{heading}.cellIndex].dataset.sort))"
    tab.click(f"{heading}.querySelector('button')")
    assert tab.run(order) == sorted(VALUES) and tab.run(f"{heading}.ariaSort") == "ascending"
    tab.click(f"{heading}.querySelector('button')")
    assert tab.run(order) == sorted(VALUES, reverse=True)
    assert tab.problems == []


def test_the_filter_keeps_rows_with_all_words(tab: Tab, index: Path) -> None:
    tab.open(index)
    tab.click(f"{SUMMARY}.closest('.box').querySelector('input')")
    tab.type("LAMAMBA")
    families = f"{ROWS}.map(row => row.dataset.words)"
    assert tab.run(families) == ["lamamba demo"] * 3
    assert tab.run(f"{SUMMARY}.closest('.box').querySelector('output').value") == "3 of 6 rows"
    tab.type(" model-5")
    assert len(tab.run(families)) == 1 and tab.problems == []


def test_the_switch_changes_the_theme_and_is_remembered(tab: Tab, index: Path) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    tab.open(index)
    light = tab.run(paper)
    tab.click("document.querySelector('#theme')")
    dark = tab.run(paper)
    assert light == "rgb(255, 255, 255)" and dark != light
    assert tab.run("getComputedStyle(document.querySelector('.frame')).backgroundColor") == light  # behind figures
    tab.open(index)
    assert tab.run(paper) == dark
    tab.click("document.querySelector('#theme')")
    assert tab.run(paper) == light and tab.problems == []


def test_on_paper_nothing_is_cut_off_or_dark(tab: Tab, index: Path) -> None:
    tab.open(index, dark=True)
    tab.ask("Emulation.setEmulatedMedia", media="print")
    assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.run("[...document.querySelectorAll('.scroll')].map(e => getComputedStyle(e).overflow)[0]") == "visible"
    assert not tab.run("document.querySelector('#theme').checkVisibility()")
