"""Studies: what a YAML file expands into, and what it must say."""

import pytest
import yaml
from lamabench.ablations import study as studies
from lamabench.ablations.study import Study, StudyError, load
from lamabench.harness.run import STAGES
from lamabench.launch.sweep import plan


def write(tmp_path, **data):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(data))
    return str(path)


def test_axes_multiply_in_order():
    study = Study(
        "s", "?", base={"data": "digits"}, axes={"model": ["a", "b"], "model.shift": [True, False]}, seeds=[0, 7]
    )
    variants = study.expand()
    assert [v.name for v in variants] == [
        f"{model}-{shift}-s{seed}" for model in "ab" for shift in (True, False) for seed in (0, 7)
    ]
    assert variants[1].overrides == ("data=digits", "model=a", "model.shift=true", "seed=7")
    assert variants[1].values == {"model": "a", "model.shift": True}


def test_named_variants_and_literals():
    variants = {
        "x": {"model.mixers": ["ssm", "window"], "data.path": None, "train.lr": 1e-4},
        "y": {"model.mixers": []},
    }
    x, y = Study("s", "?", variants=variants).expand()
    assert x.overrides == ("model.mixers=[ssm,window]", "data.path=null", "train.lr=0.0001", "seed=0")
    assert y.overrides == ("model.mixers=[]", "seed=0") and y.values == {"variant": "y"}


@pytest.mark.parametrize("name", studies.names())
def test_committed_studies_plan(name):
    study = load(name)
    runs = plan(study)
    assert study.question.endswith("?")
    assert len({run.info["id"] for run in runs}) == len(runs) == len(study.expand())


def test_stages_are_those_of_a_run():
    assert studies.STAGES == STAGES


def test_unknown_study_lists_the_choices():
    with pytest.raises(StudyError, match=r"unknown study 'dmeo' \(did you mean 'demo'\?\); choices: .*demo"):
        load("dmeo")


AXES = {"model": ["dit_nano"]}
BAD = [
    ({"axes": AXES}, "states its question"),
    ({"question": "?", "axes": AXES, "variants": {"a": {}}}, "axes or variants, one of the two"),
    ({"question": "?"}, "axes or variants, one of the two"),
    ({"question": "?", "axes": {"model": "dit_nano"}}, "axis model must list its values"),
    ({"question": "?", "axes": AXES, "seed": [0]}, "unknown key 'seed'; choices: question, claim, base"),
    ({"question": "?", "axes": AXES, "seeds": ["a"]}, "seeds are whole numbers, not 'a'"),
    ({"question": "?", "axes": AXES, "seeds": []}, "seeds must list at least one"),
    ({"question": "?", "axes": AXES, "stages": ["fly"]}, "unknown stage 'fly'; choices: cost, train"),
    ({"question": "?", "axes": [1]}, "axes must be a dict"),
]


@pytest.mark.parametrize(("data", "message"), BAD)
def test_bad_studies_are_one_line(tmp_path, data, message):
    with pytest.raises(StudyError, match=message) as caught:
        load(write(tmp_path, **data))
    assert "\n" not in str(caught.value)


def test_broken_yaml_is_one_line(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("question: [\n")
    with pytest.raises(StudyError, match="is not YAML") as caught:
        load(str(path))
    assert "\n" not in str(caught.value)


def test_two_variants_of_one_run_are_refused(tmp_path):
    same = {"a": {"model": "dit_nano"}, "b": {"model": "dit_nano", "train.batch_size": 256}}
    with pytest.raises(StudyError, match="b and a are the same run"):
        plan(load(write(tmp_path, question="?", variants=same)))
