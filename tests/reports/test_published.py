"""Published numbers: what the suite has, a user's file, and what is refused."""

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from lamabench.kernels.errors import InputError
from lamabench.reports import published
from lamabench.reports.evidence import Evidence
from lamabench.reports.published import FILE, PublishedRow, PublishedVariant


def test_every_entry_of_the_file_is_a_typed_row() -> None:
    content, rows = yaml.safe_load(FILE.read_text()), published.read()
    for name, entries in content.items():
        for entry, row in zip(entries, getattr(rows, name), strict=True):
            values = {key.removesuffix("_"): value for key, value in vars(row).items()}
            assert {key: values[key] for key in entry} == entry
            assert all(values[key] in (None, "none", "printed", True) for key in values.keys() - entry.keys())


def test_rows_of_400k_steps() -> None:
    rows = {row.model: row for row in published.read().steps_400k}
    assert Counter(model.partition("-")[0] for model in rows) == {"DiT": 12, "DiCo": 4, "DiG": 4, "DiC": 3}
    assert rows["DiCo-XL"] == PublishedRow(
        model="DiCo-XL", params_m=701.2, macs_g=87.3, fid=11.67, source="arXiv 2505.11196", checked=False
    )
    assert {row.checked for model, row in rows.items() if model.startswith("DiT")} == {True}
    assert all(row.guidance == "none" and row.conditional for row in rows.values())
    # Within a family and patch, more multiply-adds give a lower FID; a typo in a digit would mostly break that.
    for family, patch in (("DiT", "/2"), ("DiT", "/4"), ("DiT", "/8"), ("DiCo", ""), ("DiG", "/2"), ("DiC", "")):
        sizes = [row for model, row in rows.items() if re.fullmatch(rf"{family}-[A-Z]+{patch}", model)]
        ordered = sorted(sizes, key=lambda row: row.macs_g)
        assert len(ordered) >= 3 and [row.fid for row in ordered] == sorted((row.fid for row in sizes), reverse=True)
    twin = published.read().ablations
    assert [(row.variant, row.fid, row.study) for row in twin] == [
        ("causal", 175.84, "scan"), ("bidirectional", 69.28, "scan"), ("four directions", 62.06, "scan"),
    ]  # fmt: skip
    assert isinstance(twin[0], PublishedVariant) and twin[2].fid == rows["DiG-S/2"].fid


def test_the_rows_of_a_user_follow(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("imagenet_256: [{model: A-XL, source: draft, fid: 3, is: 250.5, conditional: false}]")
    both, own = published.read(mine), published.read()
    assert both.imagenet_256[:-1] == own.imagenet_256 and both.steps_400k == own.steps_400k
    row = both.imagenet_256[-1]
    assert (row.model, row.fid, row.is_, row.conditional, row.convention) == ("A-XL", 3.0, 250.5, False, "printed")
    assert Evidence([]).published == own and Evidence([], published=both).published is both


ROW = {"model": "A", "source": "S", "fid": 2.5}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: [", "is not YAML: "),
        ("", "has no lists of published rows; choices: steps_400k, imagenet_256, imagenet_512, ablations, counted_"),
        ({"imagenet256": []}, r"unknown list 'imagenet256' \(did you mean 'imagenet_256'\?\); choices: steps_400k, "),
        ({"imagenet_256": {"model": "A"}}, "imagenet_256 must be a list of rows"),
        ({"imagenet_256": ["A"]}, "imagenet_256 row 1 must be a mapping such as {model: NAME"),
        ({"imagenet_256": [ROW, {"model": "B"}]}, r"imagenet_256 row 2 \(B\) lacks source, fid"),
        ({"ablations": [ROW]}, r"ablations row 1 \(A\) lacks study, variant"),
        ({"counted_from_released_code": [ROW]}, r"row 1 \(A\): unknown field 'source'.*; choices: model, size, params"),
        ({"imagenet_256": [ROW | {"fdi": 1}]}, r"\(A\): unknown field 'fdi' \(did you mean 'fid'\?\); choices: model,"),
        ({"imagenet_256": [ROW | {"fid": "low"}]}, "fid must be a number, not 'low'"),
        ({"imagenet_256": [ROW | {"fid": float("nan")}]}, "fid must be a number, not nan"),
        ({"imagenet_256": [ROW | {"fid": True}]}, "fid must be a number, not True"),
        ({"imagenet_256": [ROW | {"fid": None}]}, "fid must be a number, not None"),
        ({"imagenet_256": [ROW | {"model": 3}]}, "row 1: model must be a text, not 3"),
        ({"imagenet_256": [ROW | {"conditional": "yes"}]}, "conditional must be true or false, not 'yes'"),
        ({"imagenet_256": [ROW | {"guidance": "cfg"}]}, "unknown guidance 'cfg'; choices: none, classifier, "),
        ({"imagenet_256": [ROW | {"convention": "flops"}]}, "unknown convention 'flops'.*; choices: macs, "),
        ({"imagenet_256": [ROW, ROW]}, "imagenet_256 has A twice with the same numbers"),
    ],
)
def test_what_is_refused(content: object, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(InputError, match=words) as caught:
        published.read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
