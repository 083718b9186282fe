"""The page of a report: what it holds, in which order, what it escapes, and how large it becomes."""

import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from lamabench.reports.evidence import Evidence
from lamabench.reports.page import FILES, LIMIT, page
from lamabench.reports.report import build
from lamabench.reports.runs import read
from lamabench.reports.table import Column, Table
from run_folders import everything, parsed, write, write_many

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


class Parsed(HTMLParser):
    """Elements of a page as (tag, attributes, text up to the next tag)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.elements:
            tag, attributes, text = self.elements[-1]
            self.elements[-1] = (tag, attributes, text + data)

    def all(self, tag: str) -> list[tuple[dict[str, str], str]]:
        return [(attributes, text.strip()) for name, attributes, text in self.elements if name == tag]


@pytest.fixture(scope="session")
def html(report: Path) -> Parsed:
    return Parsed((report / "index.html").read_text())


def contrast(one: str, other: str) -> float:
    """The contrast of two colours #RRGGBB (WCAG 2.2, "contrast ratio")."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_nothing_is_fetched_and_every_link_leads_to_a_file(report: Path, html: Parsed) -> None:
    for _, attributes, _ in html.elements:
        assert not {name for name in attributes if name.startswith("on")} and "style" not in attributes
        assert attributes.get("src", "data:").startswith("data:image/") or "src" not in attributes
        href = attributes.get("href", "#content")
        if href != "data:,":
            assert not re.match(r"[a-z]+:|//", href)
            assert href.startswith("#") or (report / unquote(href)).exists(), href
    ids = [attributes["id"] for _, attributes, _ in html.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = {attributes["href"][1:] for attributes, _ in html.all("a") if attributes["href"].startswith("#")}
    assert anchors <= set(ids)
    (style,) = (text for _, text in html.all("style"))
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in html.all("meta")[2][0]["content"]
    places = [attributes["href"] for attributes, text in html.all("a") if text in ("dit", "DiT-demo")]
    assert len(places) == 2 and all((report / place / "metrics.jsonl").is_file() for place in places)


def test_headings_captions_and_alternatives(report: Path, html: Parsed) -> None:
    levels = [int(tag[1]) for tag, _, _ in html.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    titles = [text for _, text in html.all("h2")]
    order = ["What was read", "Study: demo", "Scale and quality", "Training", "Speed", "Cost", "Runs", "Not included"]
    assert titles == order
    assert len(html.all("caption")) == len(html.all("table")) >= 4
    pictures = html.all("img")
    assert len(pictures) == len(list(report.glob("*.png"))) >= 7
    assert all(attributes["alt"].endswith(".") for attributes, _ in pictures)
    assert html.elements[[tag for tag, _, _ in html.elements].index("body") + 1][1]["href"] == "#content"


def test_the_axes_of_a_study_are_in_words(tmp_path: Path) -> None:
    axes = {"model.mixers": [["ssm", "window"], ["conv"]], "train.lr": [5e-5, 1e-4]}
    facts = {"question": "Which?", "claim": "", "answer": "", "budget": "", "axes": axes}
    facts |= {"per": "train.lr 0.0001: train.clip=1"}
    write(tmp_path, "dit", everything(75.5, 1200.0), study="mine", facts=facts)
    html = Parsed(page(Evidence(read([tmp_path])), [], {}, {}))
    terms = [text.strip() for tag, _, text in html.elements if tag in ("dt", "dd")]
    words = dict(zip(terms[::2], terms[1::2], strict=True))
    assert words["Axis model.mixers"] == "ssm + window, conv" and words["Axis train.lr"] == "5e-5, 1e-4"
    assert words["Settings of single values"] == "train.lr 0.0001: train.clip=1"


def test_a_section_for_each_study_says_what_it_is_about(tmp_path: Path) -> None:
    write_many(tmp_path, 2, 1, 1, snapshots=1)
    write(tmp_path, "dit", everything(75.5, 1200.0), study="old & <plain>")
    html = Parsed(page(Evidence(read([tmp_path])), [], {}, {}))
    studies = [attributes for attributes, _ in html.all("section") if attributes.get("class") == "study"]
    assert len(studies) == 2
    terms = [text.strip() for tag, _, text in html.elements if tag in ("dt", "dd")]
    facts = dict(zip(terms[::2], terms[1::2], strict=True))
    assert facts["Claim"] == "LaMamba-Diff surpasses DiT at every scale."
    assert facts["What would count as an answer"] == "It does if its FD is lower at each size."
    assert facts["Axis model"] == "lamamba_s, dit_s_2"
    assert terms.count("not on record") == 1  # the other study has no question
    assert "Study: old & <plain>" in [text for _, text in html.all("h2")]


def test_tables_and_figures_stand_where_they_belong(tmp_path: Path) -> None:
    write_many(tmp_path, 2, 1, 1, snapshots=1)
    write(tmp_path, "dit", everything(75.5, 1200.0), study="scale big")
    names = ["runs", "seeds", "other", "scale", "ablation_scale_FD", "ablation_scale", "ablation_scale_big", "bench"]
    tables = [
        Table(name, f"Table {name}.", [Column("n", "N", digits=0)], [{"n": 1, "source": "here"}]) for name in names
    ]
    figures = dict.fromkeys(("loss", "axis_scale_big", "samples_dit", "samples"), b"<svg/>")
    html = Parsed(page(Evidence(read([tmp_path])), tables, figures, {}))
    shown = [(tag, attributes, text.strip()) for tag, attributes, text in html.elements]
    order = [text for tag, _, text in shown if (tag == "h2" or tag == "span") and text != "What was read"]
    expected = ["Study: scale", "Table ablation_scale_FD.", "Table ablation_scale.", "Study: scale big"]
    expected += ["Table ablation_scale_big.", "Scale and quality", "Table scale.", "Table seeds.", "Table other."]
    assert order == [*expected, "Training", "Speed", "Table bench.", "Runs", "Table runs."]
    after: dict[str, list[str]] = {}
    for tag, attributes, text in shown:
        if tag == "h2":
            after[text] = []
        elif tag == "a" and attributes["href"].endswith(".pdf"):
            after[list(after)[-1]].append(attributes["href"])
    assert after["Study: scale big"] == ["axis_scale_big.pdf", "samples_dit.pdf"]
    assert (after["Training"], after["Runs"]) == (["loss.pdf"], ["samples.pdf"])
    assert {attributes["title"] for tag, attributes, text in shown if tag == "th" and text == "1"} == {"here"}


def test_texts_of_records_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    write(tmp_path, "evil", everything(75.5, 1200.0), title=EVIL, family="dit", variant={"model": EVIL})
    (run,) = read([tmp_path])
    info = {**run.info, "about": {"question": EVIL, "claim": EVIL, "axes": {EVIL: [EVIL]}}, "study": EVIL, "name": EVIL}
    evidence = Evidence([replace(run, info=info)])
    table = Table(EVIL, EVIL, [Column("label", EVIL)], [{"label": EVIL}], [EVIL])
    text = page(evidence, [evidence.overview, table], {EVIL: b"<svg/>"}, {EVIL: EVIL}, tmp_path)
    html = Parsed(text)
    assert len(html.all("script")) == 2 and len(html.all("img")) == 1
    assert EVIL in [text for _, text in html.all("dd")] and EVIL in [text for _, text in html.all("span")]
    assert EVIL in [text for _, text in html.all("li")] and text.count("alert(1)") > 8


def test_cells_carry_full_precision_and_their_origin(report: Path, html: Parsed) -> None:
    exact = {row["label"]: row for row in parsed((report / "summary.csv").read_text())}
    cells = [attributes for attributes, text in html.all("td") if text == "75.50"]
    assert cells and all(float(cell["data-sort"]) == float(exact["DiT-demo"]["FD-EffNetLite0-512"]) for cell in cells)
    origin = "commit aaaaaaaaaaaa · A CPU · 2025-06-01"
    assert {cell["title"] for cell in cells} == {f"{origin} · protocol p1"}
    (params, *_) = (attributes for attributes, text in html.all("td") if text == "1.000" and "title" in attributes)
    assert params["title"] == origin
    assert all(attributes["data-sort"] == "" for attributes, text in html.all("td") if text == "-")
    words = [attributes["data-words"] for attributes, _ in html.all("tr") if "data-words" in attributes]
    assert {"dit demo", "lamamba demo", "adm demo"} <= set(words)


def test_the_page_stays_below_its_limit(three: Path, tmp_path: Path) -> None:
    evidence = Evidence(read([three]))
    large = b"\x89PNG\r\n\x1a\n" + bytes(8) + (300).to_bytes(4, "big") + (200).to_bytes(4, "big") + bytes(2_000_000)
    text = page(evidence, [], {"samples_dit": large, "loss": large}, {"crossover": "no sizes"})
    html = Parsed(text)
    (picture,) = (attributes for attributes, _ in html.all("img"))
    assert picture["alt"].startswith("Training loss") and (picture["width"], picture["height"]) == ("240", "160")
    assert len(text) <= LIMIT and any("samples_dit: left out of this page" in text for _, text in html.all("li"))
    wide = [Column(f"c{k}", f"Column {k}", digits=4) for k in range(30)]
    long = Table("long", "Many rows.", wide, [{f"c{k}": row + k / 7 for k in range(30)} for row in range(4000)])
    text = page(evidence, [long, replace(long, name="longer")], {}, {})
    assert len(text) <= LIMIT / 2 and text.count("<tr") < 1100
    assert re.search(r"3[59]00 more rows are in long.csv", text)


def test_the_same_records_give_the_same_page(three: Path) -> None:
    one, two = (Evidence(read([three])) for _ in range(2))
    assert page(one, [one.overview], {}, {}, three) == page(two, [two.overview], {}, {}, three)


def test_colours_can_be_told_apart() -> None:
    style = (FILES / "page.css").read_text()
    pairs = dict(re.findall(r"--(\w+): light-dark\((#\w{6}, #\w{6})\)", style))
    for text, ground in itertools.product(("ink", "faint", "link", "bad"), ("paper", "shade", "mark")):
        for one, other in zip(pairs[text].split(", "), pairs[ground].split(", "), strict=True):
            assert contrast(one, other) >= 4.5, (text, ground, one, other)
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_a_report_of_one_bare_run_has_a_page(tmp_path: Path) -> None:
    write(tmp_path / "runs", "bare", [])
    build([tmp_path / "runs"], tmp_path / "out")
    html = Parsed((tmp_path / "out/index.html").read_text())
    assert html.all("title")[0][1] == "Report: demo" and not html.all("img")
    assert "1: 1 not started" in [text for _, text in html.all("dd")]
