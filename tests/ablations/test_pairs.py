"""Verdicts in study files: the pairs of variants that a claim says, and the errors of a bad one."""

import pytest
import yaml
from lamabench.ablations.study import load
from lamabench.ablations.words import literal
from lamabench.kernels.errors import InputError


def write(tmp_path, **data):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


CLAIM = "A is better than B"
PAIRS = [
    ({"variants": {"a": {}, "b": {}}}, ["a", "b"], {"variant": "a"}, {"variant": "b"}),
    ({"axes": {"model": ["a", "b"]}}, ["a", {"model": "b"}], {"model": "a"}, {"model": "b"}),
    ({"axes": {"x": [1, 1.0, True, "1"]}}, [True, "1"], {"x": True}, {"x": "1"}),
    ({"axes": {"x": [[{"kind": "a"}], []]}}, [[], [{"kind": "a"}]], {"x": []}, {"x": [{"kind": "a"}]}),
    ({"axes": {"x": [{"kind": "a"}, None]}}, [{"kind": "a"}, None], {"x": {"kind": "a"}}, {"x": None}),
    (
        {"axes": {"model": ["a", "b"], "x": [1, 2]}},
        [{"x": 2, "model": "a"}, {"model": "b", "x": 1}],
        {"model": "a", "x": 2},
        {"model": "b", "x": 1},
    ),
    ({"axes": {"model": ["a", "b"], "sample.seed": [0, 1]}}, ["a", "b"], {"model": "a"}, {"model": "b"}),
]


@pytest.mark.parametrize(("varies", "pair", "better", "worse"), PAIRS, ids=range(len(PAIRS)))
def test_pairs_of_a_verdict_name_variants(tmp_path, varies, pair, better, worse):
    study = load(write(tmp_path, question="?", verdicts={CLAIM: [pair]}, **varies))
    (found,) = study.about()["verdicts"][CLAIM]
    assert literal(found) == literal({"better": better, "worse": worse})


TWO = {"question": "?", "axes": {"model": ["dit_s_2", "lamamba_s"]}}
BAD_VERDICTS = [
    (TWO, [CLAIM], "verdicts must be a dict, not"),
    (TWO, {CLAIM: "dit_s_2"}, r"'A is better than B' must be a list of pairs \[better, worse\], not 'dit_s_2'"),
    (TWO, {CLAIM: []}, r"must be a list of pairs \[better, worse\], not \[\]"),
    (TWO, {CLAIM: ["dit_s_2", "lamamba_s"]}, r"must be a list of pairs \[better, worse\]"),
    (TWO, {CLAIM: [["dit_s_2", "lamamba_s", "dit_s_2"]]}, r"must be a list of pairs \[better, worse\]"),
    (TWO, {" ": [["dit_s_2", "lamamba_s"]]}, "a key of verdicts must be a claim in a line, not ' '"),
    (TWO, {"a\nb": [["dit_s_2", "lamamba_s"]]}, "must be a claim in a line"),
    (
        TWO,
        {CLAIM: [["dit_s2", "lamamba_s"]]},
        r"unknown model in verdicts of .*mine\.yaml 'dit_s2' \(did you mean 'dit_s_2'\?\); choices: dit_s_2, lamamba_s",
    ),
    (TWO, {CLAIM: [["dit_s_2", "dit_s_2"]]}, "'dit_s_2' is beside itself in 'A is better than B'"),
    (
        {"question": "?", "variants": {"a": {}, "b": {}}},
        {CLAIM: [["a", "c"]]},
        r"unknown variant in verdicts of .* 'c'.*; choices: a, b",
    ),
    (
        {"question": "?", "axes": {"model": ["dit_s_2"], "train.lr": [1, 2]}},
        {CLAIM: [["dit_s_2", "dit_s_2"]]},
        r"'dit_s_2' is no variant; give a value of each axis, such as \{model: dit_s_2, train.lr: 1\}",
    ),
]


@pytest.mark.parametrize(("varies", "verdicts", "message"), BAD_VERDICTS, ids=range(len(BAD_VERDICTS)))
def test_bad_verdicts_are_one_line(tmp_path, varies, verdicts, message):
    with pytest.raises(InputError, match=message) as caught:
        load(write(tmp_path, **varies, verdicts=verdicts))
    assert "\n" not in str(caught.value)


def test_verdicts_stay_with_their_variants(tmp_path):
    """A debug study and one that extends another have the verdicts on variants that they have."""
    small, other = {"4 is better": [[4, 1]]}, {"16 is better": [[4, 1], [16, 4]]}
    whole = {"question": "?", "axes": {"model.d_state": [1, 4, 16]}, "verdicts": small | other}
    study = load(write(tmp_path, **whole, debug={"model.d_state": [1, 4]}))
    assert study.debug_size().verdicts == small and [*study.debug_size().pairs()] == ["4 is better"]
    (tmp_path / "mine.yaml").rename(tmp_path / "first.yaml")
    assert load(write(tmp_path, extends="first", seeds=[0, 1])).verdicts == whole["verdicts"]
    assert load(write(tmp_path, extends="first", verdicts=small)).verdicts == small
    assert load(write(tmp_path, extends="first", axes={"model.d_state": [1, 2]}, debug={})).verdicts == {}
    named = {"question": "?", "variants": {"a": {"model.dim": 64}, "b": {}}, "verdicts": {CLAIM: [["a", "b"]]}}
    assert load(write(tmp_path, **named, debug={"model.dim": 8})).debug_size().verdicts == named["verdicts"]
